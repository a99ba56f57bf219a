"""What can be told about this host, this process and the code in it, without any request."""

import os
import platform
import re
import socket
import sys
from pathlib import Path

from prefect_fleet.manifests.record import Process

RELEASES = Path("/opt/prefect/releases")
ENVIRONMENTS = Path("/opt/prefect/venvs")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def hostname() -> str:
    """Name of this host, as the kernel has it."""
    return socket.gethostname()


def this_process(attempt: int) -> Process:
    """This process, which is that attempt of a run."""
    pid = os.getpid()
    stat = _stat(pid)
    return Process(
        pid=pid,
        start_ticks=stat[1] if stat else None,
        boot_id=_boot_id(),
        attempt=attempt,
    )


def is_alive(process: Process) -> bool:
    """Whether that very process still runs on this host; a zombie does not."""
    if process.start_ticks is None:
        try:
            os.kill(process.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
        return True
    stat = _stat(process.pid)
    return (
        process.boot_id == _boot_id()
        and stat is not None
        and stat[0] not in "ZX"
        and stat[1] == process.start_ticks
    )


def _stat(pid: int) -> tuple[str, int] | None:
    """State letter and start of a process, in clock ticks since boot."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    # The program's name stands in parentheses and may hold anything, parentheses included.
    fields = text.rpartition(")")[2].split()
    return fields[0], int(fields[19])


def _boot_id() -> str | None:
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return None


def release_id(*places: str | Path) -> str | None:
    """The release that one of the places really lies in: a link such as /opt/prefect/src counts.

    Args:
        places: folders or files, the most telling first.
    """
    for place in places:
        try:
            real = Path(place).resolve()
        except OSError:
            continue
        if real.is_relative_to(RELEASES) and real != RELEASES:
            return real.relative_to(RELEASES).parts[0]
    return None


def lock_hash() -> str | None:
    """Hash of the locked packages that this interpreter runs with: its environment's name."""
    real = Path(sys.prefix).resolve()
    if real.is_relative_to(ENVIRONMENTS) and real != ENVIRONMENTS:
        return real.relative_to(ENVIRONMENTS).parts[0]
    return None


def python_version() -> str:
    """Such as 3.13.5."""
    return platform.python_version()


def safe_name(name: str) -> str:
    """A flow's name as that of a folder and a part of an object's key: at most 100 bytes."""
    cleaned = re.sub(r"[^\w.-]+", "-", name).strip("-.")
    return cleaned.encode(errors="ignore")[:100].decode(errors="ignore") or "flow"
