"""Run the fleet's own object storage, RustFS, for a test: the real program on a free port."""

import os
import platform
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lab import artifacts
from lab.podman import LABEL
from tests.unit.shared import ObjectStore

START_SECONDS = 60
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


class CannotRun(Exception):
    """RustFS can't be had or started on this machine; the text says why."""


def get_program() -> Path:
    """Return where the program is: in the artifact cache, fetched into it when it is not there.

    Raises:
        CannotRun: no source has it. It is not built: that takes too long for a test.
    """
    try:
        arch = ARCHITECTURES[platform.machine()]
        artifact = artifacts.select(artifacts.load_list(), "rustfs", arch)
        mirror = os.environ.get(artifacts.MIRROR_VARIABLE)
        options = artifacts.Options(
            cache=artifacts.default_cache(os.environ),
            sources=("mirror", "upstream"),
            mirror=Path(mirror).absolute() if mirror else None,
            image=None,
        )
        return Path(artifacts.get(artifact, options)["binaries"]["rustfs"])
    except (artifacts.ArtifactError, KeyError, OSError) as error:
        raise CannotRun(f"RustFS is not to be had: {error}") from error


def starts(command: list[str]) -> bool:
    """Tell whether the program runs at all: it may want a newer C library than this machine's."""
    return subprocess.run([*command, "--version"], capture_output=True, check=False).returncode == 0


def podman(*arguments: str) -> str:
    """Run podman as the user that there is, and return what it printed.

    Raises:
        CannotRun: there is none, or it failed.
    """
    try:
        done = subprocess.run(["podman", *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise CannotRun("this machine's C library is too old for RustFS; no podman") from error
    return done.stdout


@contextmanager
def runnable(program: Path) -> Iterator[list[str]]:
    """Yield a command that runs the program, with the C library of the lab's hosts if need be.

    Raises:
        CannotRun: neither this machine nor the lab's image has a C library for it.
    """
    if starts([str(program)]):
        yield [str(program)]
        return
    if os.geteuid() != 0:
        raise CannotRun("this machine's C library is too old for RustFS")
    images = podman("images", "--quiet", f"localhost/{LABEL}-host").split()
    if not images:
        raise CannotRun("this machine's C library is too old for RustFS; the lab has no image yet")
    root = podman("image", "mount", images[0]).strip()
    try:
        (loader,) = Path(root).glob("usr/lib/*-linux-gnu/ld-linux-*.so.*")
        command = [str(loader), "--library-path", str(loader.parent), str(program)]
        if not starts(command):
            raise CannotRun("RustFS starts neither with this machine's C library nor the lab's")
        yield command
    finally:
        podman("image", "unmount", images[0])


@contextmanager
def running_rustfs(folder: Path) -> Iterator[ObjectStore]:
    """Run it with its data and its log below `folder`.

    Raises:
        CannotRun: see `get_program` and `runnable`; or it did not start.
    """
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    store = ObjectStore(f"http://{address}", "fleet-tests", "fleet-tests-secret")
    data, log = folder / "data", folder / "log"
    data.mkdir()
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "RUSTFS_ADDRESS": address,
        "RUSTFS_CONSOLE_ENABLE": "false",
        "RUSTFS_ACCESS_KEY": store.access_key,
        "RUSTFS_SECRET_KEY": store.secret_key,
        "RUSTFS_OBS_LOG_DIRECTORY": "",
        "RUST_LOG": "warn",
    }
    with runnable(get_program()) as command, log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "server", str(data)],
            env=environment,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            if not _becomes_ready(process, f"http://{address}/health/ready"):
                raise CannotRun(f"RustFS did not start: {log.read_text(errors='replace')[-2000:]}")
            yield store
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
            process.wait()


def _becomes_ready(process: subprocess.Popen[bytes], url: str) -> bool:
    end = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < end:
        with suppress(OSError), urllib.request.urlopen(url, timeout=5) as response:
            if response.status == 200:
                return True
        time.sleep(0.1)
    return False
