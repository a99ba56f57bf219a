"""The manifests of flow runs: list, show and verify them; settle them, which a timer does.

`ls`, `show` and `verify` read this host's folder, $PREFECT_FLEET_DATA/manifests, or with
--from-store the bucket that has the copies of all hosts. They need no Prefect API; where one
answers, `verify` also compares stored results and artifacts.
Exit status: 0 done; 1 faults or nothing found (on stderr what, and what to do); 2 wrong usage.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from prefect_fleet.manifests.errors import AnotherPass, StoreError
from prefect_fleet.manifests.files import Manifests

if TYPE_CHECKING:
    from prefect_fleet.manifests.reading import Found, Source
    from prefect_fleet.manifests.record import Manifest
    from prefect_fleet.manifests.store import Store

PROGRAM = "python -m prefect_fleet.manifests"
# From one pass to the next of a process that stays: it reads a few small files.
LOOK_SECONDS = 5.0


class UsageError(RuntimeError):
    """The command can't be done as given; the message says what to write."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; see the module's text."""
    options = _parser().parse_args(arguments)
    # Only now, and only where it is needed: a pass with nothing to do must cost next to nothing.
    try:
        command = {"settle": settle, "ls": ls, "show": show, "verify": verify}[options.command]
        return command(options)
    except BrokenPipeError:  # `… | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (UsageError, StoreError, AnotherPass, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    except ValueError as error:
        from prefect_fleet.inputs import InputError

        if not isinstance(error, InputError):
            raise
        print(error, file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    store = argparse.ArgumentParser(add_help=False)
    store.add_argument(
        "--store",
        type=Path,
        metavar="FILE",
        help="YAML or JSON with endpoint_url, region, bucket, access_key, secret_key and perhaps "
        "ca_file; mode 0600 (default: $PREFECT_FLEET_STORE, or systemd's credential `store`)",
    )
    reading = argparse.ArgumentParser(add_help=False, parents=[store])
    reading.add_argument(
        "--from-store", action="store_true", help="read the bucket, not this host's folder"
    )
    filters = argparse.ArgumentParser(add_help=False)
    filters.add_argument("--flow", help="name of the flow")
    filters.add_argument("--deployment", help="name of the deployment, or flow/deployment")
    filters.add_argument("--state", help="type or name of the state, such as FAILED")
    filters.add_argument("--host", help="host of the latest attempt")
    filters.add_argument("--since", help="30m, 24h, 7d, 2w, or an ISO date or time in UTC")

    one = commands.add_parser("ls", parents=[reading, filters], help="list manifests, latest last")
    one.add_argument("--json", action="store_true", help="one JSON object a line, complete")
    one = commands.add_parser("show", parents=[reading], help="print one manifest")
    one.add_argument("run", help="beginning of the flow run's id, or a path")
    one = commands.add_parser(
        "verify", parents=[reading, filters], help="check manifests, their copies and references"
    )
    one.add_argument(
        "--longest", type=float, default=24, metavar="HOURS", help="that a run may take (24)"
    )
    one = commands.add_parser(
        "settle", parents=[store], help="close, complete and copy what this host's runs have left"
    )
    one.add_argument(
        "--keep-days",
        type=int,
        metavar="N",
        help="remove manifests that are older and whose copy is in the bucket",
    )
    one.add_argument(
        "--rescan", action="store_true", help="look at every manifest again, settled ones too"
    )
    one.add_argument(
        "--stay",
        type=float,
        default=0,
        metavar="SECONDS",
        help="where there is something to do, go on looking for so long (0)",
    )
    return parser


def settle(options: argparse.Namespace) -> int:
    """One pass over this host's manifests, and more where there is something to do."""
    from prefect_fleet.manifests import settle as passes

    manifests = Manifests()
    if not manifests.root.is_dir():
        return 0  # nothing has run yet
    owner = manifests.root.stat().st_uid
    if os.geteuid() != owner:
        # Its files would be another user's, and the runs' next writes would fail.
        raise UsageError(f"{manifests.root} belongs to user {owner}; run settle as that user")
    settings = _settings(options)

    def one_pass() -> passes.Report:
        report = passes.Settle(manifests, settings, keep_days=options.keep_days).run()
        for problem in report.problems:
            print(problem, file=sys.stderr)
        if report.has_news:
            print(report, flush=True)
        return report

    # Another release's passes are another process's.
    release, end = Path(__file__).resolve(), time.monotonic() + options.stay
    with passes.only_pass(manifests):
        if options.rescan:
            passes.rescan(manifests)
        report = one_pass()
        # What it imports once somebody is to be asked costs more than all that it does, so it stays
        # for what comes next. Where it could not do it, settings may have changed: it reads them
        # when it starts.
        stays = report.has_asked or report.soon is not None
        while stays and not report.problems and time.monotonic() < end:
            time.sleep(min(LOOK_SECONDS, report.soon or LOOK_SECONDS))
            if Path(__file__).resolve() != release:
                return 0
            report = one_pass()
        if report.soon is not None:
            time.sleep(report.soon)
            one_pass()
    return 0


def ls(options: argparse.Namespace) -> int:
    """List manifests."""
    import json

    rows = []
    for found in _select(options, _source(options)):
        if found.manifest is None:
            print(f"{found.path}: {found.fault}", file=sys.stderr)
        elif options.json:
            print(json.dumps({"path": found.path, **json.loads(found.content)}))
        else:
            manifest = found.manifest
            rows.append(
                (
                    f"{datetime.fromisoformat(manifest.start).astimezone(UTC):%Y-%m-%d %H:%M:%S}",
                    manifest.run.id[:8],
                    manifest.state.name,
                    "" if manifest.duration is None else f"{manifest.duration:.1f}",
                    *_usage(manifest),
                    str(manifest.run.attempts),
                    manifest.worker.host,
                    manifest.flow.name
                    + (f"/{manifest.deployment.name or '?'}" if manifest.deployment else ""),
                    manifest.run.name,
                )
            )
    if not options.json:
        head = ("START (UTC)", "RUN", "STATE", "S", "CPU S", "MIB", "TRY", "HOST", "FLOW", "NAME")
        _print_table(head, rows)
    return 0


def _usage(manifest: "Manifest") -> tuple[str, str]:
    """Processor time and peak memory of a run, as far as they are known."""
    usage = manifest.usage
    seconds = usage.processor_seconds if usage else None
    peak = usage.memory_peak if usage else None
    return (
        "" if seconds is None else f"{seconds:.1f}",
        "" if peak is None else f"{peak / (1 << 20):.0f}",
    )


def _print_table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, *rows):
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())


def show(options: argparse.Namespace) -> int:
    """Print one manifest."""
    source = _source(options)
    if Path(options.run).is_file() and not options.from_store:
        sys.stdout.write(Path(options.run).read_text(encoding="utf-8"))
        return 0
    wanted = options.run.lower()
    paths = [
        path
        for path in source.paths(None)
        if path == options.run or path.rpartition("_")[2].startswith(wanted)
    ]
    if len(paths) != 1:
        what = "no manifest" if not paths else f"{len(paths)} manifests"
        advice = "" if paths or options.from_store else "; --from-store reads those of all hosts"
        raise UsageError(f"{what} of a run {options.run!r} in {source.where}{advice}")
    (found,) = source.read_all(paths)
    if found.fault and not found.content:
        raise UsageError(f"{found.path}: {found.fault}")
    sys.stdout.write(found.content.decode(errors="replace"))
    return 0


def verify(options: argparse.Namespace) -> int:
    """Check manifests."""
    from prefect_fleet.manifests import verify as checks

    manifests = None if options.from_store else Manifests()
    source = _source(options)
    store = _store(options) if manifests and _settings(options) else None
    faults: list[checks.Fault] = []
    number = 0
    with checks.References() as references:
        for found in _select(options, source):
            number += 1
            if found.fault and not found.content:
                faults.append(checks.Fault(found.path, found.fault))
                continue
            faults += checks.check_form(found)
            faults += checks.check_end(found, manifests, options.longest)
            if store is not None and manifests is not None:
                faults += checks.check_copy(found, manifests, store)
            faults += references.check(found)
    for fault in faults:
        print(fault, file=sys.stderr)
    notes = [f"{number} manifests in {source.where}", f"{len(faults)} faults"]
    if manifests:
        notes.append(f"copies compared with {store.where}" if store else "copies not compared")
    notes.append(f"{references.checked} results and artifacts compared")
    if references.unreadable:
        notes.append(f"{references.unreadable} could not be read")
    if references.away:
        notes.append(references.away)
    print("; ".join(notes))
    return 1 if faults else 0


def _select(options: argparse.Namespace, source: "Source") -> "list[Found]":
    """The manifests that the options ask for, and those that can't be read."""
    from prefect_fleet.manifests.reading import parse_since

    try:
        since = parse_since(options.since) if options.since else None
    except ValueError as error:
        raise UsageError(f"--since: {error}") from error
    return [
        found
        for found in source.read_all(source.paths(since))
        if (found.content or found.fault) and _is_wanted(options, found, since)
    ]


def _is_wanted(options: argparse.Namespace, found: "Found", since: datetime | None) -> bool:
    manifest = found.manifest
    if manifest is None:
        return True
    deployment = manifest.deployment.name if manifest.deployment else None
    names = {deployment, f"{manifest.flow.name}/{deployment}"}
    return (
        (options.flow is None or options.flow == manifest.flow.name)
        and (options.deployment is None or options.deployment in names)
        and (
            options.state is None
            or options.state.lower() in {manifest.state.type.lower(), manifest.state.name.lower()}
        )
        and (options.host is None or options.host == manifest.worker.host)
        and (since is None or datetime.fromisoformat(manifest.start) >= since)
    )


def _source(options: argparse.Namespace) -> "Source":
    from prefect_fleet.manifests.reading import Bucket, Folder

    if options.from_store:
        return Bucket(_store(options))
    manifests = Manifests()
    if not manifests.root.is_dir():
        raise UsageError(
            f"{manifests.root} is not there; set PREFECT_FLEET_DATA, or read the bucket with "
            "--from-store"
        )
    return Folder(manifests)


def _settings(options: argparse.Namespace) -> Path | None:
    given: Path | None = options.store
    if given is not None:
        return given
    if named := os.environ.get("PREFECT_FLEET_STORE"):
        return Path(named)
    if folder := os.environ.get("CREDENTIALS_DIRECTORY"):
        credential = Path(folder, "store")
        return credential if credential.exists() else None
    return None


def _store(options: argparse.Namespace) -> "Store":
    from prefect_fleet.manifests.store import Store

    settings = _settings(options)
    if settings is None:
        raise UsageError("no bucket is known; write --store FILE, or set PREFECT_FLEET_STORE")
    return Store(settings)


if __name__ == "__main__":
    sys.exit(main())
