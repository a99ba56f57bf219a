"""Store DHIS2 servers as blocks: `python scripts/create_blocks.py FILE`.

FILE is YAML or JSON, mode 0600, a list of
`{name, base_url, username, password, verify_tls?, timeout_seconds?}`. Every server becomes a
`Dhis2Credentials` block of that name; blocks of other names stay as they are. A bad entry is
named on stderr, and the others are stored all the same.
The last line of stdout is
`{"blocks": [{"name": "play", "status": "new|changed|unchanged|failed"}]}`.
Exit status: 0 all stored, 1 not all (reasons on stderr), 2 wrong usage.
"""

import asyncio
import json
import re
import sys
from typing import Any

from dotenv import load_dotenv
from pydantic import ValidationError

from prefect_dhis2 import Dhis2Credentials
from prefect_fleet.api import ApiError, api_errors, ensure_block
from prefect_fleet.inputs import InputError, file_argument, read_file, require_mapping

REQUIRED = {"name": str, "base_url": str, "username": str, "password": str}
OPTIONAL: dict[str, type | tuple[type, ...]] = {
    "verify_tls": bool,
    "timeout_seconds": (int, float),
}


def build_block(entry: Any) -> tuple[str, Dhis2Credentials]:
    """Return the block's name and the block that `entry` describes.

    Raises:
        InputError: what is wrong with the entry; never quotes a value.
    """
    require_mapping(entry, required=REQUIRED, optional=OPTIONAL)
    fields = {key: value for key, value in entry.items() if key != "name" and value is not None}
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", entry["name"]):
        raise InputError("name may have lower-case letters, digits and dashes only")
    try:
        return entry["name"], Dhis2Credentials(**fields)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()]
        raise InputError("; ".join(faults)) from error


async def store(entries: list[Any]) -> list[dict[str, str]]:
    """Store each entry and return its name and status; reasons of failures go to stderr."""
    statuses: list[dict[str, str]] = []
    done: set[str] = set()
    for number, entry in enumerate(entries, start=1):
        given = entry.get("name") if isinstance(entry, dict) else None
        label = str(given or f"number {number}")
        try:
            name, block = build_block(entry)
            if name in done:
                raise InputError("is listed twice; only the first one counts")
            done.add(name)
            with api_errors():
                status: str = await ensure_block(block, name)
        except (InputError, ApiError) as error:
            print(f"server {label}: {error}", file=sys.stderr)
            status = "failed"
        statuses.append({"name": label, "status": status})
    return statuses


def main(arguments: list[str] | None = None) -> int:
    """Run the program; see the module's text."""
    path = file_argument(
        "create_blocks.py", __doc__, "YAML or JSON list of DHIS2 servers, mode 0600", arguments
    )
    try:
        entries = read_file(path, secret=True)
        if not isinstance(entries, list):
            raise InputError(f"{path}: is no list; write - name: … for each server")
    except InputError as error:
        print(error, file=sys.stderr)
        return 1
    statuses = asyncio.run(store(entries))
    print(json.dumps({"blocks": statuses}))
    return int(any(entry["status"] == "failed" for entry in statuses))


if __name__ == "__main__":
    load_dotenv()
    sys.exit(main())
