"""Import once, then fork one child a run: `python -m prefect_fleet.warm.zygote OPTIONS`.

Started by the parent, with the listening socket and a line to the parent as open files. On that
line it says what it is about to import, that it accepts runs, and that it will take no more: then
the parent starts another, and this one stays until its children have ended. It does the same when
the parent has gone.
"""

import contextlib
import functools
import gc
import json
import operator
import os
import random
import selectors
import signal
import socket
import stat
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefect_fleet.warm import agreement, child, client, imports, internals, request, sharing
from prefect_fleet.warm.settings import Settings
from prefect_fleet.warm.usual import Usual, has_only_environment

# A request is written in one go; who needs longer is no client of ours.
SECONDS_TO_ASK = 2.0
# Between two looks at whether the code has changed, when nothing happens.
SECONDS_TO_LOOK = 5.0
# For runs that begin and end together, that one successor is made for all of them.
SECONDS_TO_LEARN = 30.0
# Ways to end, for the parent.
AGAIN = 75  # <sysexits.h> EX_TEMPFAIL: start another one


@dataclass
class Run:
    """A child that runs."""

    connection: socket.socket
    flow_run: str
    peak_file: bytes | None
    started: float = field(default_factory=time.monotonic)


class Zygote:
    """A process that is ready to fork.

    Args:
        settings: what to import, and where to note it.
        listening: where clients come.
        parent: line to the parent.
        unfit: modules to leave out, and why.
        soon: import no more than the release lists.
    """

    def __init__(
        self,
        settings: Settings,
        listening: socket.socket,
        parent: socket.socket,
        unfit: dict[str, str],
        soon: bool,
    ) -> None:
        self._settings = settings
        self._listening = listening
        self._parent = parent
        self._unfit = unfit
        self._soon = soon
        self._runs: dict[int, Run] = {}
        self._asking: set[Any] = set()
        self._selector = selectors.DefaultSelector()
        self._draining: str | None = None
        self._shelf = imports.Shelf()
        self._reports, self._reporting = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._learned: dict[str, None] = {}
        self._learning = 0.0
        self._watched: dict[str, tuple[int, ...] | None] = {}
        self._seen: set[str] = set()
        self._usual = Usual(lambda said: internals.renew(self._made_with, said), identity, say)

    def tell(self, **what: object) -> None:
        """Tell the parent; it may have gone."""
        with contextlib.suppress(OSError):
            self._parent.send(json.dumps(what).encode())

    def load(self) -> None:
        """Import everything, and set aside what the engine does not import itself."""
        gc.disable()
        environment = dict(os.environb)
        settings = self._settings
        self._watch([*imports.own_paths(), str(settings.list), *settings.watch])
        self._watch_modules()
        preloader = imports.Preloader()
        self.tell(importing="")
        preloader.core()
        if reason := internals.unfit():
            raise imports.Unfit(reason)
        core = list(sys.modules)
        self._core = set(map(imports.package, core))
        self._watch_modules()
        learned = read_learned(settings.learned)
        listed = imports.read_list(settings.list)
        for name in dict.fromkeys(listed if self._soon else [*listed, *learned]):
            if imports.is_left_out(name, self._unfit, self._core):
                continue
            self.tell(importing=name)
            try:
                preloader.load(name)
            except imports.Unfit as error:
                # It can't be undone here.
                self.tell(unfit=name, reason=str(error))
                sys.exit(AGAIN)
            self._watch_modules()
        internals.complete_models()
        self._asked = preloader.finish()
        internals.prepare_tls()
        self._environment = environment
        self._failed = preloader.failed
        own_code = any(map(self._is_own, set(sys.modules) - set(core)))
        self._made_with = internals.decorating() if own_code else None
        self._later = [name for name in learned if self._is_new(name)]
        # What is noted and yet not there can't be imported by this name.
        self._known = {*sys.modules, *learned}
        self._shelf.take(core)
        self._seeded: list[random.Random] = child.generators()
        self._facts = agreement.process_facts("self")
        self._writes_counts = sharing.share()
        gc.freeze()
        # What is made from now on is little, and may not pile up over thousands of runs.
        gc.enable()
        self._write_state(preloader.loaded)

    def _is_new(self, name: str) -> bool:
        """Return whether a module might be imported beforehand, and has not been."""
        if name in sys.modules or name in self._failed:
            return False
        return not imports.is_left_out(name, self._unfit, self._core)

    def _is_own(self, name: str) -> bool:
        """Return whether a module is neither Python's nor an installed package's."""
        file = imports.origin(sys.modules[name])
        return file is not None and not file.startswith(imports.own_paths())

    def _watch(self, paths: Iterable[str]) -> None:
        """Note the state of files that another release or an installation would change.

        Of a module that is its own, as soon as it is imported: a release may come meanwhile.
        """
        for path in paths:
            self._watched.setdefault(path, identity(path))

    def _watch_modules(self) -> None:
        new = sys.modules.keys() - self._seen
        self._seen |= new
        files = (imports.origin(sys.modules[name]) for name in new if self._is_own(name))
        self._watch(file for file in files if file is not None)

    def _write_state(self, loaded: list[str]) -> None:
        size = Path("/proc/self/statm").read_text().split()[1]
        state = {
            "pid": os.getpid(),
            "loaded": loaded,
            "left_out": {**self._unfit, **self._failed},
            "copied_for": self._writes_counts,
            "resident_bytes": int(size) * os.sysconf("SC_PAGESIZE"),
        }
        write_json(self._settings.state, state)

    def serve(self) -> None:
        """Fork a child for each request, until another zygote has to take over."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._drain_on_signal)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        wakeup, waking = socket.socketpair()
        for one in (wakeup, waking, self._listening):
            one.setblocking(False)
        signal.set_wakeup_fd(waking.fileno(), warn_on_full_buffer=False)
        for one in (wakeup, self._listening, self._parent, self._reports):
            self._selector.register(one, selectors.EVENT_READ)
        self.tell(ready=True)
        if self._soon and self._later:
            self.tell(more=len(self._later))
        if reason := self._changed():
            self._drain(reason)
        while self._draining is None or self._runs or self._asking:
            for key, _ in self._selector.select(SECONDS_TO_LOOK):
                source = key.fileobj
                if source is self._listening:
                    self._accept()
                elif source is wakeup:
                    with contextlib.suppress(BlockingIOError):
                        wakeup.recv(1 << 12)
                elif source is self._parent:
                    # It has gone, or has another one.
                    self._selector.unregister(self._parent)
                    self._drain("the parent wants no more of it")
                elif source is self._reports:
                    self._learn(self._reports.recv(1 << 20))
                elif source in self._asking:
                    self._serve(source)
                elif isinstance(source, socket.socket):
                    self._lose(source)
            self._reap()
            if self._draining is None and (reason := self._changed()):
                self._drain(reason)
            if self._draining is None and self._learned and self._has_learned():
                self._ask_for_successor()

    def _drain_on_signal(self, number: int, _: object) -> None:
        self._drain(f"it got {signal.Signals(number).name}")

    def _drain(self, reason: str) -> None:
        """Take no more runs; serve() returns when the last has ended."""
        if self._draining is not None:
            return
        self._draining = reason
        self._selector.unregister(self._listening)
        self._listening.close()
        self.tell(draining=reason)

    def _has_learned(self) -> bool:
        """Return whether no other run is about to add to what was learned, or that took long."""
        return not self._runs or time.monotonic() >= self._learning + SECONDS_TO_LEARN

    def _ask_for_successor(self) -> None:
        """Note what runs have imported; a zygote with all of that takes over when it is ready."""
        noted = read_learned(self._settings.learned)
        # In the order of their imports: one may need what another has set up.
        write_json(self._settings.learned, list(dict.fromkeys([*noted, *self._learned])))
        self._known.update(self._learned)
        self.tell(more=len(self._learned))
        self._learned.clear()
        self._learning = 0.0

    def _changed(self) -> str | None:
        for path, before in self._watched.items():
            if identity(path) != before:
                return f"{path} has changed"
        return None

    def _accept(self) -> None:
        try:
            connection, _ = self._listening.accept()
        except OSError:
            return  # another zygote was quicker, or the client has gone
        try:
            connection.settimeout(SECONDS_TO_ASK)
            connection.send(client.HELLO)
        except OSError:
            connection.close()
            return
        self._asking.add(connection)
        self._selector.register(connection, selectors.EVENT_READ)

    def _serve(self, connection: socket.socket) -> None:
        """Read a request and do what it asks for."""
        self._asking.remove(connection)
        self._selector.unregister(connection)
        try:
            asked = request.receive(connection)
        except (OSError, request.BadRequest) as error:
            _refuse(connection, str(error))
            return
        try:
            if reason := self._fork(connection, asked):
                _refuse(connection, reason)
        finally:
            # After the refusal, for it would seem to be a child that has died.
            asked.close()

    def _fork(self, connection: socket.socket, asked: request.Request) -> str | None:
        """Start a child; return why not."""
        try:
            there = agreement.process_facts(asked.pid)
        except OSError:
            return "the client has gone"
        if reason := self._changed():
            self._drain(reason)
            return reason
        reason = (
            agreement.peer_difference(asked, there, self._facts)
            or agreement.command_difference(asked.arguments)
            or agreement.environment_difference(
                asked.environment,
                self._environment,
                self._asked,
                tuple(map(os.fsencode, internals.PREFIXES.values())),
            )
        )
        if reason is not None:
            return reason
        group, reason = agreement.run_group(asked)
        if reason is not None:
            return reason
        if imports.threads() != 1:
            self._drain("a thread runs in it")
            return "a thread runs in the zygote"
        usual = self._usual.fits(asked.environment)
        try:
            pid = os.fork()
        except OSError as error:
            return f"can't fork: {error.strerror}"
        if pid == 0:
            # A copy of the zygote's stack must never return into its loop.
            try:
                child.become(
                    asked,
                    there,
                    group,
                    self._seeded,
                    self._reporting.fileno(),
                    lambda: self._renew(usual),
                    self._report,
                )
            finally:
                os._exit(1)
        flow_run = asked.environment.get(b"PREFECT__FLOW_RUN_ID", b"?").decode(errors="replace")
        self._runs[pid] = Run(connection, flow_run, asked.environment.get(client.PEAK_FILE))
        self._selector.register(connection, selectors.EVENT_READ, pid)
        return None

    def _renew(self, usual: bool) -> str | None:
        """Have, in a child, the settings and logging of its run; return why that can't be."""
        if usual and has_only_environment():
            return None
        return internals.renew(self._made_with)

    def _report(self) -> None:
        """Tell the zygote, from a child, what was imported there."""
        # A thread of the run may import something meanwhile.
        names = [name for name in list(sys.modules) if name not in self._known]
        new = [name for name in names if _can_learn(name)]
        if new:
            with contextlib.suppress(OSError):
                self._reporting.setblocking(False)
                self._reporting.send(json.dumps(new).encode())

    def _learn(self, message: bytes) -> None:
        with contextlib.suppress(ValueError):
            for name in json.loads(message):
                if name not in self._known and self._is_new(name):
                    self._learned.setdefault(name)
                    self._learning = self._learning or time.monotonic()

    def _lose(self, connection: socket.socket) -> None:
        """End the run of a client that has ended: for the worker, they are one process."""
        self._selector.unregister(connection)
        for pid, run in self._runs.items():
            if run.connection is connection:
                os.kill(pid, signal.SIGKILL)

    def _reap(self) -> None:
        while self._runs:
            pid, status, usage = os.wait4(-1, os.WNOHANG)
            if pid == 0:
                return
            run = self._runs.pop(pid, None)
            if run is None:
                continue  # what an imported module has started
            if run.peak_file:
                # Not by pathlib: see agreement.process_facts.
                with contextlib.suppress(OSError), open(run.peak_file, "wb") as file:  # noqa: PTH123
                    file.write(b"%d" % (usage.ru_maxrss << 10))
            with contextlib.suppress(OSError):
                run.connection.send(client.ENDED + status.to_bytes(4, "big"))
            with contextlib.suppress(KeyError):
                self._selector.unregister(run.connection)
            run.connection.close()
            say(
                f"flow run {run.flow_run}: {ending(status)}, "
                f"{time.monotonic() - run.started:.2f} s, "
                f"{usage.ru_utime + usage.ru_stime:.2f} s of processor time, "
                f"{usage.ru_maxrss >> 10} MiB at most"
            )
            # All else is frozen, so it takes no time. Left to Python, cycles would pile up first,
            # and take new pages between two collections, a few more each time.
            gc.collect()


def _refuse(connection: socket.socket, reason: str) -> None:
    with contextlib.suppress(OSError):
        connection.send(client.REFUSED + reason.encode(errors="replace"))
    connection.close()
    say(f"refused a run: {reason}")


def _can_learn(name: str) -> bool:
    """Return whether a module is Python's or of an installed package, and a file."""
    module = sys.modules.get(name)
    spec = getattr(module, "__spec__", None)
    if spec is None or spec.name != name or name in ("__main__", internals.ENGINE):
        return False
    return spec.origin is not None and spec.origin.startswith(imports.own_paths())


def ending(status: int) -> str:
    """Return how a process ended."""
    if os.WIFSIGNALED(status):
        return f"ended by {signal.Signals(os.WTERMSIG(status)).name}"
    return f"ended with status {os.WEXITSTATUS(status)}"


def identity(path: str) -> tuple[int, ...] | None:
    """Return what changes when another file takes a path, or None where there is none.

    A folder of packages changes by what is installed. Its own time would change as well when Python
    begins to keep compiled files in it.
    """
    try:
        status = os.stat(path)  # noqa: PTH116
        if stat.S_ISDIR(status.st_mode):
            # Whatever their order, and without a list of them for each run.
            content = functools.reduce(operator.xor, map(hash, _installed(path)), 0)
            return status.st_dev, status.st_ino, content
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size


def _installed(folder: str) -> Iterator[tuple[str, int]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name != "__pycache__":
                # Installing the same version again makes its metadata anew.
                is_metadata = entry.name.endswith(".dist-info")
                yield entry.name, entry.stat().st_mtime_ns if is_metadata else 0


def read_learned(path: Path) -> list[str]:
    """Return the modules that runs imported, as noted."""
    try:
        noted = json.loads(path.read_text())
    except (OSError, ValueError):
        return []
    return [name for name in noted if isinstance(name, str)] if isinstance(noted, list) else []


def write_json(path: Path, content: object) -> None:
    """Write a file whole or not at all; a note that can't be written is no reason to stop."""
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        draft.write_text(json.dumps(content, indent=1))
        draft.replace(path)
    except OSError as error:
        say(f"can't write {path}: {error.strerror}")


def say(text: str) -> None:
    """Write a line for the journal."""
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode(errors="replace"))


def main(arguments: list[str]) -> None:
    """Run the program; see the module's text."""
    # What Python puts first for -m: the working directory of this process is nobody's.
    del sys.path[0]
    settings = Settings.from_json(arguments[0])
    listening, parent = (socket.socket(fileno=int(number)) for number in arguments[1:3])
    for one in (listening, parent):
        one.set_inheritable(False)
    zygote = Zygote(settings, listening, parent, *map(json.loads, arguments[3:5]))
    try:
        zygote.load()
    except imports.Unfit as error:
        zygote.tell(failed=str(error))
        sys.exit(1)
    except Exception as error:
        zygote.tell(failed=f"{type(error).__name__}: {error}")
        raise
    zygote.serve()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
