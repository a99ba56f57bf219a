"""A Prefect server for a benchmark, and what processes take."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import sys
from collections.abc import Iterator
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent


@contextlib.contextmanager
def prefect_server() -> Iterator[int | None]:
    """The server of the environment, or one that is there as long as this: its process."""
    if "PREFECT_API_URL" in os.environ:
        yield None
        return
    sys.path.insert(0, str(PROJECT / "src"))
    os.environ["PYTHONPATH"] = str(PROJECT / "src")
    from tests.unit.conftest import PrefectServer

    # The database that the tests keep, if they have run: migrating an empty one takes a while.
    version = importlib.metadata.version("prefect")
    cached = PROJECT / ".pytest_cache" / "d" / f"prefect-{version}"
    own = PrefectServer(cached if cached.is_dir() else None)
    try:
        os.environ["PREFECT_API_URL"] = own.url()
        yield own._process.pid
    finally:
        own.stop()


def below(pid: int) -> list[int]:
    """Return all processes that a process has started."""
    found = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for task in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in task.read_text().split():
                found += [int(child), *below(int(child))]
    return found


def processor_seconds(pid: int) -> float:
    """Return those of a process and of all that it has waited for."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
