"""What the tests of warm starts share: a zygote without Prefect, and clients.

An engine of a few lines takes the place of Prefect's, so that a zygote is there in a tenth of a
second, and so that each test says what its run does: it runs the code in the variable DO.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from prefect_fleet.warm import client
from prefect_fleet.warm.settings import Settings
from tests.unit.shared import REPOSITORY

CLIENT = [sys.executable, "-I", "-S", client.__file__]
STOCK = [sys.executable, "-m", "stand_in_engine"]
ENGINE = "import os\nexec(os.environ['DO'])\n"
# A zygote, or the parent of zygotes, of an engine that needs nothing.
DRIVER = """\
import sys
from prefect_fleet.warm import internals, {module}
internals.ENGINE = "stand_in_engine"
internals.CORE = {core!r}
internals.unfit = lambda: None
internals.renew = lambda made_with, said=None: None
internals.decorating = tuple
internals.setting_files = list
internals.complete_models = lambda: None
{module}.main(sys.argv[1:])
"""


class Warm:
    """A zygote and its clients.

    Args:
        folder: its own.
        environment: of the zygote and, but for what a test changes, of the runs.
    """

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        self.environment = environment
        self.socket = folder / "socket"
        self.settings = Settings(folder / "list", folder / "state", folder / "learned")
        self.work = folder / "work"
        self.log = folder / "log"
        self.zygote: subprocess.Popen[bytes]
        self.line: socket.socket

    def start(
        self,
        core: tuple[str, ...] = (),
        unfit: dict[str, str] | None = None,
        soon: bool = False,
    ) -> None:
        """Start the zygote."""
        driver = self.folder / "driver.py"
        driver.write_text(DRIVER.format(module="zygote", core=core))
        self.socket.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(self.socket))
            listening.listen(16)
            self.line, far_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with far_end, self.log.open("ab") as log:
                numbers = (listening.fileno(), far_end.fileno())
                options = [self.settings.to_json(), *map(str, numbers), json.dumps(unfit or {})]
                options.append(json.dumps(soon))
                self.zygote = subprocess.Popen(
                    [sys.executable, str(driver), *options],
                    pass_fds=numbers,
                    env=self.environment | {"OF_THE_ZYGOTE": "1"},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )

    def hear(self, word: str) -> dict[str, str]:
        """Wait until the zygote says this to its parent; return its message."""
        self.line.settimeout(30)
        while data := self.line.recv(1 << 16):
            message: dict[str, str] = json.loads(data)
            if word in message:
                return message
        raise AssertionError(f"it ended and did not say {word}:\n{self.log.read_text()}")

    def begin(
        self, do: str, *arguments: str, stock: bool = False, **environment: str
    ) -> "subprocess.Popen[str]":
        """Start a run that does this."""
        command = STOCK if stock else [*CLIENT, str(self.socket), *STOCK]
        return subprocess.Popen(
            [*command, *arguments],
            cwd=self.work,
            env=self.environment | {"DO": do} | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            umask=0o027,
        )

    def run(
        self,
        do: str,
        *arguments: str,
        stock: bool = False,
        refused: str | None = None,
        given: str = "",
        **environment: str,
    ) -> "subprocess.CompletedProcess[str]":
        """Run this to its end, forked unless it is to be refused for a reason with this text."""
        process = self.begin(do, *arguments, stock=stock, **environment)
        out, err = process.communicate(given, timeout=60)
        told = [line for line in err.splitlines() if line.startswith("prefect-warm: the stock")]
        assert len(told) == (refused is not None), err
        assert refused is None or refused in told[0]
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def stop(self) -> None:
        """End the zygote."""
        self.zygote.kill()
        self.zygote.wait()
        self.line.close()


@contextlib.contextmanager
def warm_folder(folder: Path) -> Iterator[Warm]:
    """A zygote that is yet to be started."""
    code = folder / "code"
    code.mkdir()
    (code / "stand_in_engine.py").write_text(ENGINE)
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "LANG": "C.UTF-8"}
    environment["PYTHONPATH"] = os.pathsep.join([str(code), str(REPOSITORY / "src")])
    made = Warm(folder, environment)
    made.work.mkdir()
    yield made


def wake(path: Path) -> None:
    """Have a parent's first zygote made, as its first client does; this one asks for nothing."""
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))


def wait_until(true: Callable[[], bool], what: str, seconds: float = 30) -> None:
    """Wait until something is true."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"{what}: not in {seconds} seconds"
        time.sleep(0.02)


def children(pid: int) -> list[int]:
    """Return the processes that a process has started and not yet waited for."""
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    """Return whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
