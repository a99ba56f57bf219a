"""Deploy every prefect.yaml below a folder: `python -m prefect_fleet.deploy --root DIR`.

Everything is read and checked first. All faults are reported together on stderr, those of files as
`path/prefect.yaml:LINE: deployment 'x': what is wrong; what to write`, and nothing is changed.
Then the plan is printed: what is new, what changes and how, and what is on the server but in no
file any more. With `--plan` that is all. Otherwise it is written, all or nothing: if a write
fails, what was written before it is put back.

Stored is what `prefect deploy --all` would store, but that pauses made by hand stay. Deployments
that are gone from the files are removed only with `--prune`, and only if this project made them;
its name is the `name` in the folder's own prefect.yaml, or `--project`.

`--settings` names a YAML or JSON file with mode 0600, or `-` for standard input. Its keys, all of
them optional: work_pools (as for prefect_fleet.pools), block_modules (modules whose block types
are registered), result_storage (as for prefect_fleet.results), dhis2_servers (as for
prefect_dhis2.servers) and environment (a mapping of variables for `{{ $NAME }}` in the files, on
top of this process's own).

Where $CACHE_DIRECTORY is set, as systemd's CacheDirectory= does it, a plan that has nothing to do
is kept there, and said again without Prefect while all that it depends on stays the same.

The last line of stdout is `{"changes": 2, "plan": [{"kind": …, "name": "…", "status": …,
"details": ["…"]}]}`; kind is one of work pool, block type, block and deployment, status one of new,
changed, unchanged, gone and removed.
Exit status: 0 done, 1 faults, or nothing or not everything was done, 2 wrong usage.
"""

import argparse
import asyncio
import os
import sys
from pathlib import Path

from prefect_fleet.inputs import InputError, read_file
from prefect_fleet.last_plan import LastPlan

HOME = Path("/opt/prefect")
AS_BEFORE = "as the last plan, for nothing that it depends on has changed:"


def main(arguments: list[str] | None = None) -> int:
    """Run the program; see the module's text."""
    parser = argparse.ArgumentParser(prog="python -m prefect_fleet.deploy", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--root", type=Path, required=True, help="folder with the files below it")
    parser.add_argument(
        "--home", type=Path, default=HOME, help="where workers have the current release"
    )
    parser.add_argument(
        "--settings", type=Path, help="YAML or JSON, mode 0600; - is standard input"
    )
    parser.add_argument("--project", help="whose deployments these are, instead of the root's name")
    parser.add_argument("--plan", action="store_true", help="show the plan, change nothing")
    parser.add_argument(
        "--prune", action="store_true", help="remove what this project made and no file has"
    )
    options = parser.parse_args(arguments)
    root: Path = options.root.resolve()
    if not root.is_dir():
        parser.error(f"--root {options.root}: there is no such folder")
    try:
        given = read_file(options.settings, secret=True) if options.settings else {}
        folder = os.environ.get("CACHE_DIRECTORY")
        last = None
        if folder:
            choices = [str(options.home), options.project, options.prune]
            last = LastPlan(Path(folder), root, [given, choices])
            if said := last.recall():
                print(AS_BEFORE)
                print(said, end="")
                return 0
        from prefect_fleet import deploying

        try:
            status, said = deploying.carry_out(root, given, options)
        except deploying.UsageError as error:
            parser.error(str(error))
        if last and said:
            last.keep(said)
        return status
    except InputError as error:
        print(error, file=sys.stderr)
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("stopped; nothing was changed", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
