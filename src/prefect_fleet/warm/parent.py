"""Keep a zygote running: `python -m prefect_fleet.warm.parent --state FOLDER --pool NAME …`.

This process makes the socket, imports next to nothing, and lives as long as its worker; zygotes
come and go. The first is started when the first run comes, for a pool without runs shall cost
nothing. It is there soon, for it imports only what the engine and the release's list need; one that
imports what runs have been seen to import follows it. One that has become unfit for
new runs is followed by another and stays until its children have ended. One that breaks at an
import is followed by one without that import. Where there is none and can't be, clients are told
so at once, and the stock command runs. When this file itself is another, this process ends with
status 0, and whoever keeps it starts the new one.
"""

import argparse
import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from prefect_fleet.warm import client
from prefect_fleet.warm.settings import Settings

# An import that takes longer hangs.
SECONDS_TO_IMPORT = 60.0
# Between two attempts when a zygote can't even import Prefect.
SECONDS_TO_RETRY = 60.0


class Zygote:
    """One that takes runs, or will.

    Args:
        process: it.
        line: to it; it takes no more runs when this is closed.
        soon: it imports no more than it has to.
    """

    def __init__(self, process: "subprocess.Popen[bytes]", line: socket.socket, soon: bool) -> None:
        self.process = process
        self.line = line
        self.soon = soon
        self.importing = ""
        self.ready = False
        self.heard = time.monotonic()


class Parent:
    """Starts zygotes, one after another.

    Args:
        settings: for them.
        listening: where clients come.
    """

    def __init__(self, settings: Settings, listening: socket.socket) -> None:
        self._settings = settings
        self._listening = listening
        self._selector = selectors.DefaultSelector()
        self._zygotes: list[Zygote] = []
        self._old: list[subprocess.Popen[bytes]] = []
        self._unfit: dict[str, str] = {}
        # No run has come yet.
        self._asleep = True
        self._broken = ""
        self._retry = 0.0
        # One that imports what has been learned is to follow the one that is there.
        self._wanted = False
        self._own = identity()

    def run(self) -> None:
        """Serve until a signal ends this process."""
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        # Ends select() when a zygote ends.
        wakeup, waking = socket.socketpair()
        for one in (wakeup, waking, self._listening):
            one.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(waking.fileno(), warn_on_full_buffer=False)
        self._selector.register(wakeup, selectors.EVENT_READ)
        self._selector.register(self._listening, selectors.EVENT_READ)
        while True:
            if self._asleep:
                pass
            elif not self._zygotes and time.monotonic() >= self._retry:
                if identity() != self._own:
                    say("the parent ends, for its own code has changed")
                    return
                self._start(soon=True)
            elif self._wanted and all(one.ready for one in self._zygotes):
                self._start(soon=False)
            for key, _ in self._selector.select(self._patience()):
                if key.fileobj is wakeup:
                    wakeup.recv(1 << 12)
                elif key.fileobj is self._listening:
                    self._wake_or_refuse()
                else:
                    self._hear(key.data)
            self._old = [process for process in self._old if process.poll() is None]
            for zygote in self._zygotes:
                if not zygote.ready and time.monotonic() >= zygote.heard + SECONDS_TO_IMPORT:
                    # Its end is heard on the line.
                    zygote.process.kill()

    def _patience(self) -> float | None:
        """Return for how many seconds nothing has to be done if nothing happens."""
        moments = [one.heard + SECONDS_TO_IMPORT for one in self._zygotes if not one.ready]
        if not self._zygotes and not self._asleep:
            moments.append(self._retry)
        return max(0.0, min(moments) - time.monotonic()) if moments else None

    def _start(self, soon: bool) -> None:
        if self._broken:
            self._selector.unregister(self._listening)
            self._broken = ""
        line, far_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        numbers = (self._listening.fileno(), far_end.fileno())
        process = subprocess.Popen(
            [sys.executable, "-m", "prefect_fleet.warm.zygote", self._settings.to_json()]
            + [str(number) for number in numbers]
            + [json.dumps(self._unfit), json.dumps(soon)],
            stdin=subprocess.DEVNULL,
            pass_fds=numbers,
        )
        far_end.close()
        zygote = Zygote(process, line, soon)
        self._zygotes.append(zygote)
        self._selector.register(line, selectors.EVENT_READ, zygote)

    def _hear(self, zygote: Zygote) -> None:
        if zygote not in self._zygotes:
            return  # forgotten while its message was on the way
        data = zygote.line.recv(1 << 16)
        if not data:
            self._lose(zygote)
            return
        message = json.loads(data)
        zygote.heard = time.monotonic()
        zygote.importing = message.get("importing", zygote.importing)
        if message.get("ready"):
            self._take(zygote)
        if name := message.get("unfit"):
            self._leave_out(name, message["reason"])
        if failed := message.get("failed"):
            self._break(failed)
        if (count := message.get("more")) and not self._wanted:
            say(f"another zygote follows: runs import {count} modules more")
            self._wanted = True
        if reason := message.get("draining"):
            say(f"another zygote follows: {reason}")
            self._forget(zygote)

    def _take(self, zygote: Zygote) -> None:
        zygote.ready = True
        if not zygote.soon:
            self._wanted = False
        for other in [one for one in self._zygotes if one.ready and one is not zygote]:
            self._forget(other)

    def _lose(self, zygote: Zygote) -> None:
        """Find out how a zygote ended that had said nothing of it."""
        try:
            status = zygote.process.wait(5)
        except subprocess.TimeoutExpired:
            zygote.process.kill()
            status = zygote.process.wait()
        self._forget(zygote)
        if zygote.ready:
            say(f"a zygote ended with status {status}; another follows")
            self._retry = time.monotonic() + 1
        elif zygote.importing and zygote.importing not in self._unfit:
            self._leave_out(zygote.importing, f"its import ended the zygote with status {status}")
        elif not zygote.importing and not self._broken:
            self._break(f"a zygote ended with status {status} when it imported Prefect")

    def _forget(self, zygote: Zygote) -> None:
        """Let a zygote go on until its children have ended."""
        self._selector.unregister(zygote.line)
        zygote.line.close()
        self._zygotes.remove(zygote)
        self._old.append(zygote.process)

    def _leave_out(self, name: str, reason: str) -> None:
        self._unfit[name] = reason
        say(f"{name} is not imported beforehand: {reason}")

    def _break(self, reason: str) -> None:
        self._wanted = False
        if any(one.ready for one in self._zygotes):
            say(f"the zygote before goes on, for the next can't be made: {reason}")
            return
        self._broken = reason
        self._retry = time.monotonic() + SECONDS_TO_RETRY
        self._selector.register(self._listening, selectors.EVENT_READ)
        say(f"runs start by the stock command, for no zygote can be made: {reason}")

    def _wake_or_refuse(self) -> None:
        """Have a zygote made for the first client, which waits; without one, refuse them all."""
        if self._asleep:
            self._asleep = False
            self._selector.unregister(self._listening)
            return
        with contextlib.suppress(OSError):
            connection, _ = self._listening.accept()
            with connection:
                connection.send(client.REFUSED + self._broken.encode(errors="replace"))


def identity() -> tuple[int, int, int] | None:
    """Return what is another when this program's file is, or None where there is none."""
    try:
        status = os.stat(__file__)  # noqa: PTH116
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size


def say(text: str) -> None:
    """Write a line for the journal."""
    print(text, file=sys.stderr, flush=True)


def listen(path: Path) -> socket.socket:
    """Return a socket at a path, for this user alone."""
    path.unlink(missing_ok=True)
    made = socket.socket(socket.AF_UNIX)
    before = os.umask(0o177)
    try:
        made.bind(str(path))
    finally:
        os.umask(before)
    made.listen(128)
    return made


def main(arguments: list[str] | None = None) -> None:
    """Run the program; see the module's text."""
    parser = argparse.ArgumentParser(prog="python -m prefect_fleet.warm.parent")
    parser.add_argument("--pool", required=True, help="name of the work pool")
    parser.add_argument("--state", required=True, type=Path, help="folder for what is learned")
    parser.add_argument("--list", type=Path, default=Path("/dev/null"), help="modules to import")
    parser.add_argument("--socket", required=True, type=Path, help="where to listen")
    parser.add_argument("--watch", action="append", default=[], help="changes with a release")
    options = parser.parse_args(arguments)
    listening = listen(options.socket)
    options.state.mkdir(parents=True, exist_ok=True)
    settings = Settings(
        options.list,
        options.state / f"{options.pool}.json",
        options.state / f"{options.pool}.learned.json",
        tuple(options.watch),
    )
    Parent(settings, listening).run()


if __name__ == "__main__":
    main()
