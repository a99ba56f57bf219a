"""Store DHIS2 servers as blocks: `python scripts/create_blocks.py [FILE]`.

FILE is YAML or JSON, mode 0600 (`-` is standard input), a list of
`{name, base_url, username, password}` or `{name, base_url, token}`, each with `timeout_seconds`,
`retries`, `verify_tls` and `ca_file` if wished. Without FILE the servers are those of
`DHIS2_SERVERS__<NAME>__<KEY>` variables, in the environment or in `.env`:

    DHIS2_SERVERS__PLAY_DEV__BASE_URL=https://play.example.org/dev
    DHIS2_SERVERS__PLAY_DEV__TOKEN=d2pat_…

is the server `play-dev`. Every server becomes a `Dhis2Credentials` block of its name; what is the
same already is not written. A bad entry is named on stderr, and the others are stored all the same.

    --dry-run     say what would be done, and do nothing
    --only NAME   only this server; may be given several times
    --prune       delete every DHIS2 credentials block that is not in the list, also those that were
                  made by hand; their names are said first. Not done when any entry is bad.

The last line of stdout is
`{"blocks": [{"name": "play", "status": "new|changed|unchanged|deleted|failed"}]}`.
Exit status: 0 all done, 1 not all (reasons on stderr), 2 wrong usage.
"""

import argparse
import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

from dotenv import load_dotenv
from prefect.client.orchestration import get_client
from prefect.exceptions import ObjectNotFound

from prefect_dhis2 import Dhis2Credentials
from prefect_dhis2.servers import (
    VARIABLE_PREFIX,
    Server,
    read_servers,
    read_stored_names,
    read_variables,
)
from prefect_fleet.api import ApiError, api_errors, block_differences, ensure_block
from prefect_fleet.inputs import InputError, read_file


def say(text: str) -> None:
    """Tell the caller; stdout is for the result."""
    print(text, file=sys.stderr)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Return the command line; wrong usage ends the program with status 2."""
    parser = argparse.ArgumentParser(prog="create_blocks.py", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "file",
        type=Path,
        nargs="?",
        help="YAML or JSON list of DHIS2 servers, mode 0600; - is standard input; "
        f"without it the servers are those of {VARIABLE_PREFIX}… variables",
    )
    parser.add_argument("--dry-run", action="store_true", help="change nothing")
    parser.add_argument("--only", action="append", metavar="NAME", help="only this server")
    parser.add_argument("--prune", action="store_true", help="delete blocks that are not listed")
    options = parser.parse_args(arguments)
    if options.only and options.prune:
        parser.error("--prune needs the whole list; leave out --only")
    return options


def read_entries(path: Path | None) -> list[Any]:
    """Return the list of servers, unchecked.

    Raises:
        InputError: the file can't be used.
    """
    if path is None:
        return read_variables(os.environ)
    entries = read_file(path, secret=True)
    if not isinstance(entries, list):
        raise InputError(f"{path}: is no list; write - name: … for each server")
    return entries


def choose(servers: list[Server], only: list[str] | None) -> list[Server]:
    """Return the servers of these names, or all.

    Raises:
        InputError: a name that is not in the list.
    """
    if not only:
        return servers
    known = [server.label for server in servers]
    if unknown := [name for name in only if name not in known]:
        raise InputError(
            f"--only {', '.join(unknown)}: not in the list; it has {', '.join(known) or 'nothing'}"
        )
    return [server for server in servers if server.label in only]


async def store(server: Server, *, dry_run: bool) -> str:
    """Store one server's block, or find out what that would do, and return the status."""
    if server.block is None:
        say(f"server {server.label}: {server.fault}")
        return "failed"
    try:
        with api_errors():
            if dry_run:
                return await _foresee(server.block, server.label)
            return await ensure_block(server.block, server.label)
    except ApiError as error:
        say(f"server {server.label}: {error}")
        return "failed"


async def _foresee(block: Dhis2Credentials, name: str) -> str:
    async with get_client() as client:
        try:
            stored = await client.read_block_document_by_name(name, block.get_block_type_slug())
        except ObjectNotFound:
            return "new"
    return "changed" if block_differences(block, stored.data) else "unchanged"


async def prune(kept: set[str], *, dry_run: bool) -> list[dict[str, str]]:
    """Delete the blocks of other names, and return name and status of each.

    Raises:
        ApiError: the API does not answer or refuses.
    """
    with api_errors():
        names = [name for name in await read_stored_names() if name not in kept]
        if not names:
            return []
        say(f"{'would delete' if dry_run else 'deleting'}, as not in the list: {', '.join(names)}")
        if not dry_run:
            for name in names:
                await Dhis2Credentials.adelete(name)
    return [{"name": name, "status": "deleted"} for name in names]


async def run(servers: list[Server], options: argparse.Namespace) -> list[dict[str, str]]:
    """Do what the options say, and return name and status of each block."""
    statuses = [
        {"name": server.label, "status": await store(server, dry_run=options.dry_run)}
        for server in servers
    ]
    if options.prune and any(entry["status"] == "failed" for entry in statuses):
        say("nothing was deleted: mend what failed, then run it again")
    elif options.prune:
        statuses += await prune({server.label for server in servers}, dry_run=options.dry_run)
    return statuses


def main(arguments: list[str] | None = None) -> int:
    """Run the program; see the module's text."""
    options = parse_arguments(arguments)
    try:
        servers = choose(read_servers(read_entries(options.file)), options.only)
        if not servers:
            if options.prune:
                raise InputError("--prune with no server at all would delete every block")
            say(f"there is no server in {options.file or f'{VARIABLE_PREFIX}… variables'}")
        statuses = asyncio.run(run(servers, options))
    except (InputError, ApiError) as error:
        say(str(error))
        return 1
    print(json.dumps({"blocks": statuses}))
    return int(any(entry["status"] == "failed" for entry in statuses))


if __name__ == "__main__":
    load_dotenv()
    sys.exit(main())
