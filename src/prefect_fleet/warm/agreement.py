"""What a run and the zygote must have in common, so that the forked child is as if started anew.

What was imported beforehand may have looked at the environment. Every variable that it asked for
is recorded; a run in which one of them has another value is not for this zygote.
"""

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from types import FrameType

from prefect_fleet.warm import client, internals
from prefect_fleet.warm.request import Request

# Read by the interpreter, the C library and the dynamic loader, which nobody sees.
BENEATH = (
    b"PYTHON",
    b"LD_",
    b"LC_",
    b"LANG",
    b"TZ",
    b"MALLOC_",
    b"GLIBC_",
    b"OPENSSL_",
    b"SSL_CERT_",
    b"TMPDIR",
    b"HOSTALIASES",
    b"RES_OPTIONS",
    b"LOCALDOMAIN",
    # By numerical libraries, when they are loaded.
    b"OMP_",
    b"KMP_",
    b"MKL_",
    b"OPENBLAS_",
    b"GOTO_",
    b"NUMEXPR_",
    b"VECLIB_",
    b"BLIS_",
)
# Of /proc/PID/status: identity and privileges, which a child can't change; and what it can.
COMPARED = ("Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
COMPARED += ("NoNewPrivs", "Seccomp", "Cpus_allowed", "Mems_allowed", "limits")
TAKEN = ("Umask", "SigIgn")


class RecordingEnvironment(os._Environ):
    """`os.environ` or `os.environb`, which notes who asks for what.

    Made from it by changing its class, for other modules hold the object itself.
    """

    # Names to the modules that asked; "*" for all of them at once.
    asked: dict[str, set[str]]

    def __getitem__(self, key: str) -> str:
        self._note(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self._note(key)
        return super().__contains__(key)

    def __iter__(self) -> Iterator[str]:
        self._note("*")
        return super().__iter__()

    def __len__(self) -> int:
        self._note("*")
        return super().__len__()

    def copy(self) -> dict[str, str]:
        """As `os.environ` does it."""
        return dict(self)

    def _note(self, key: object) -> None:
        name = os.fsdecode(key) if isinstance(key, bytes) else str(key)
        asked: dict[str, set[str]] = type(self).asked
        asked.setdefault(name, set()).add(_module(sys._getframe(2)))


def _module(frame: FrameType | None) -> str:
    """Return the module that a call comes from, past those that only pass it on."""
    while frame is not None:
        name = str(frame.f_globals.get("__name__", ""))
        if name not in ("os", "_collections_abc", "collections.abc", __name__):
            return name
        frame = frame.f_back
    return ""


def record_environment() -> tuple[dict[str, set[str]], Callable[[], None]]:
    """Begin to record; return the record, and what ends it."""
    plain = type(os.environ)
    RecordingEnvironment.asked = {}
    os.environ.__class__ = os.environb.__class__ = RecordingEnvironment

    def end() -> None:
        os.environ.__class__ = os.environb.__class__ = plain

    return RecordingEnvironment.asked, end


def environment_difference(
    run: Mapping[bytes, bytes],
    here: Mapping[bytes, bytes],
    asked: set[bytes],
    prefixes: tuple[bytes, ...] = (),
) -> str | None:
    """Return what of a run's environment the imported modules would have seen otherwise.

    Args:
        run: the run's environment.
        here: the one that the modules were imported in.
        asked: names that they asked for.
        prefixes: beginnings of names of which they asked for all.
    """
    for name in run.keys() | here.keys():
        matters = name in asked or name.startswith(BENEATH + prefixes)
        if matters and run.get(name) != here.get(name):
            return f"{os.fsdecode(name)} is another than the zygote was started with"
    return None


def process_facts(pid: int | str) -> dict[str, str]:
    """Return identity, privileges and limits of a process.

    Raises:
        OSError: it has gone.
    """
    # pathlib interns the parts of a path, and for a new name each time the interpreter's table of
    # such strings takes more memory now and then.
    with open(f"/proc/{pid}/status") as status, open(f"/proc/{pid}/limits") as limits:  # noqa: PTH123
        lines = (line.rstrip("\n").partition(":\t") for line in status)
        facts = {key: value for key, _, value in lines if key in COMPARED + TAKEN}
        facts["limits"] = limits.read()
    return facts


def peer_difference(request: Request, there: dict[str, str], here: dict[str, str]) -> str | None:
    """Return in what the client's process differs, or None.

    Args:
        request: the run's.
        there: `process_facts` of the client.
        here: those of this process.
    """
    if (request.uid, request.gid) != (os.geteuid(), os.getegid()):
        return f"the client is of user {request.uid} and group {request.gid}"
    if list(request.places[:3]) != client.places()[:3]:
        return "the client has other folders for /, /tmp or /var/tmp"
    for name in COMPARED:
        if there.get(name) != here.get(name):
            return f"the client has other {name}"
    return None


def run_group(request: Request) -> tuple[bytes | None, str | None]:
    """Return the folder of the run's control group, if it has one; or why no child may enter it.

    It has to be the client's, as the kernel says, and beside the one of this process, which is in
    the worker's unit: then child and client are limited, measured and ended together.
    """
    folder = request.environment.get(client.GROUP)
    if folder is None:
        return None, None
    try:
        if request.pid not in _members(os.fsdecode(folder)):
            return None, "the client is not in its control group"
        unit = os.path.dirname(os.fsdecode(folder).rstrip("/"))  # noqa: PTH120 see process_facts
        if os.getpid() not in _members(f"{unit}/{client.WORKERS_GROUP}"):
            return None, "the client's control group is of another unit"
    except OSError as error:
        return None, f"the client's control group can't be seen: {error.strerror}"
    return folder, None


def _members(folder: str) -> set[int]:
    with open(f"{folder}/cgroup.procs") as members:  # noqa: PTH123 see process_facts
        return set(map(int, members))


def command_difference(arguments: tuple[bytes, ...]) -> str | None:
    """Return why a command is not what a zygote can become, or None."""
    if arguments[1:3] != (b"-m", internals.ENGINE.encode()):
        return f"the stock command is not PYTHON -m {internals.ENGINE}"
    python = os.fsdecode(arguments[0])
    if os.path.realpath(os.path.dirname(python)) != os.path.realpath(  # noqa: PTH120
        os.path.dirname(sys.executable)  # noqa: PTH120
    ):
        return f"{python} is of another environment than the zygote"
    return None
