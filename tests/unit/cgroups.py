"""A control group for tests, as systemd gives a worker's unit one: for root, where version 2 is."""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest


def hierarchy() -> Path | None:
    """Return where control groups of version 2 are mounted and can be made."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        if after.startswith("cgroup2 ") and before.split()[3] == "/":
            point = Path(before.split()[4])
            with contextlib.suppress(OSError):
                # A folder of tmpfs in its place could be written, too.
                probe = point / f"probe-{os.getpid()}"
                probe.mkdir()
                found = (probe / "cgroup.procs").exists()
                probe.rmdir()
                if found:
                    return point
    return None


HERE = hierarchy()
needs_groups = pytest.mark.skipif(
    HERE is None, reason="control groups of version 2 can't be made here"
)


@contextlib.contextmanager
def unit() -> Iterator[Path]:
    """A unit with an empty group `worker`; whatever is in it at the end is killed."""
    assert HERE is not None
    made = HERE / f"prefect-fleet-test-{os.getpid()}-{time.monotonic_ns()}"
    made.mkdir()
    (made / "worker").mkdir()
    try:
        yield made
    finally:
        (made / "cgroup.kill").write_text("1")
        until = time.monotonic() + 30
        while "populated 1" in (made / "cgroup.events").read_text() and time.monotonic() < until:
            time.sleep(0.02)
        for folder in sorted(made.glob("**/"), reverse=True):
            folder.rmdir()


def inside(group: Path, command: list[str]) -> list[str]:
    """Return what enters a group and becomes a command."""
    return ["/bin/sh", "-c", 'echo 0 >"$0/cgroup.procs"; exec "$@"', str(group), *command]


def members(group: Path) -> set[int]:
    """Return the processes of a group and of those in it."""
    files = group.glob("**/cgroup.procs")
    return {int(pid) for file in files for pid in file.read_text().split()}
