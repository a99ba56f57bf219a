"""Become a flow run: what a new process of `python -m prefect.engine` would be."""

import atexit
import contextlib
import fcntl
import gc
import importlib
import io
import os
import random
import select
import signal
import socket
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

from prefect_fleet.warm import client, internals
from prefect_fleet.warm.request import Request

F_SETSIG = 10  # <fcntl.h>; Python names it from 3.13 on
PYTHON_IGNORES = {signal.SIGPIPE, signal.SIGXFSZ}


def become(
    request: Request,
    facts: dict[str, str],
    group: bytes | None,
    seeded: Iterable[random.Random],
    keep: int,
    refusal: Callable[[], str | None],
    report: Callable[[], None],
) -> None:
    """Run the engine in this process, which was just forked, and end. It never returns.

    Args:
        request: the run's.
        facts: the client's `agreement.process_facts`.
        group: folder of the run's control group.
        seeded: `generators` of the zygote.
        keep: a file that stays open besides the run's.
        refusal: called when all is set but nothing has run; tells why the run can't be here.
        report: called when the run has ended.
    """
    status = 1
    line = None
    try:
        if group:
            _enter(group)
        line = _take_files(request, keep)
        _take_process(request, facts, seeded)
        if reason := _check_folder(request) or refusal():
            line.send(client.REFUSED + reason.encode())
            os._exit(0)
        line.send(client.READY + os.getpid().to_bytes(4, "big"))
        if line.recv(1) != client.GO:
            os._exit(0)
        _die_with(line)
    except BaseException:
        # Nothing has run: the client sees the line close and starts the stock command.
        traceback.print_exc()
        os._exit(1)
    try:
        status = _run(report)
        line.send(client.ENDING + status.to_bytes(4, "big"))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _enter(group: bytes) -> None:
    number = os.open(group + b"/cgroup.procs", os.O_WRONLY)
    os.write(number, b"0")
    os.close(number)


def _take_files(request: Request, keep: int) -> socket.socket:
    """Make the request's files this process's only ones; return the line to the client."""
    for number in range(3):
        os.dup2(request.files[number], number, inheritable=True)
    os.fchdir(request.files[3])
    line = request.files[4]
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208
        if (number := int(name)) > 2 and number not in (line, keep):
            # One of them was the listing's own.
            with contextlib.suppress(OSError):
                os.close(number)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=stream is sys.stderr or stream.isatty())
    return socket.socket(fileno=line)


def _take_process(request: Request, facts: dict[str, str], seeded: Iterable[random.Random]) -> None:
    # Its own session: a flow that signals its process group must not reach other runs.
    os.setsid()
    signal.set_wakeup_fd(-1)
    ignored = int(facts["SigIgn"], 16)
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        if number in PYTHON_IGNORES or ignored >> (number - 1) & 1:
            signal.signal(number, signal.SIG_IGN)
        elif number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)
        elif signal.getsignal(number) not in (signal.SIG_DFL, None):
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    os.umask(int(facts["Umask"], 8))
    os.environ.clear()
    os.environb.update(request.environment)
    rest = [os.fsdecode(item) for item in request.arguments[3:]]
    sys.argv = [internals.ENGINE, *rest]
    sys.orig_argv = [os.fsdecode(item) for item in request.arguments]
    # python -m puts the working directory first, where it was at the start.
    sys.path.insert(0, os.getcwd())  # noqa: PTH109
    importlib.invalidate_caches()
    tempfile.tempdir = None
    for generator in seeded:
        generator.seed()
    _seed_numpy()
    gc.enable()


def generators() -> list[random.Random]:
    """Return the random generators that Python code has made; the one of `random` too."""
    made = (one for one in gc.get_objects() if issubclass(type(one), random.Random))
    return [one for one in made if not isinstance(one, random.SystemRandom)]


def _seed_numpy() -> None:
    # Its generator is written in C, and seeded when it is imported.
    module = sys.modules.get("numpy.random")
    if module is not None:
        module.seed()


def _check_folder(request: Request) -> str | None:
    status = Path().stat()
    if request.places[3] != b"%d:%d" % (status.st_dev, status.st_ino):
        return "its working directory is another here"
    here = {name.partition(".")[0] for name in os.listdir()}  # noqa: PTH208
    taken = here & {name.partition(".")[0] for name in sys.modules}
    if taken:
        return f"{taken.pop()} in its working directory would be imported instead of another"
    return None


def _die_with(line: socket.socket) -> None:
    """Let the kernel kill this process when the client ends, whatever else has ended by then."""
    fcntl.fcntl(line, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(line, F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(line, fcntl.F_SETFL, fcntl.fcntl(line, fcntl.F_GETFL) | os.O_ASYNC)
    # It may have ended before.
    poll = select.poll()
    poll.register(line, select.POLLIN)
    if poll.poll(0):
        os.kill(os.getpid(), signal.SIGKILL)


def _run(report: Callable[[], None]) -> int:
    """Run the engine and what ends a Python process; return the exit status."""
    status = 0
    try:
        internals.run_engine()
    except SystemExit as end:
        status = _exit_status(end.code)
    except KeyboardInterrupt:
        traceback.print_exc()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        _end_python()
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
        status = 1
    try:
        report()
        _end_python()
    except BaseException:
        # As in a Python that ends: it is shown, and the status stays.
        traceback.print_exc()
    return status


def _exit_status(code: object) -> int:
    if code is None:
        return 0
    if isinstance(code, int):
        return code & 0xFF
    print(code, file=sys.stderr)
    return 1


def _end_python() -> None:
    """Do what the interpreter does at its end, but for freeing memory object by object."""
    threading._shutdown()
    atexit._run_exitfuncs()
    # Files that the flow left open. Those of the zygote are frozen, and not among these.
    for one in gc.get_objects():
        # By its type, for a proxy answers with the class of another object, or not at all.
        if issubclass(type(one), io.TextIOWrapper | io.BufferedWriter):
            with contextlib.suppress(OSError, ValueError):
                one.flush()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
