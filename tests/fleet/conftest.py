"""A converged local fleet, seen as its users and its neighbours see it.

Which fleet is said by LAB_FLEET (default: lab). Molecule's verify step runs these tests; they run
alone as well:  LAB_FLEET=lab pytest tests/fleet
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import httpx
import pytest
import testinfra
import yaml
from prefect.client.orchestration import PrefectClient, get_client
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings
from testinfra.host import Host

from lab.fleet import PROJECT, Fleet
from lab.podman import podman
from tests.fleet.programs import S3

FLEET = Fleet.load(os.environ.get("LAB_FLEET", "lab"))
_READY_SECONDS = 180
_WAIT_SECONDS = 240
_connections: dict[str, Host] = {}
T = TypeVar("T")


def connect(name: str) -> Host:
    """A testinfra host, over ssh with one shared connection."""
    if name not in _connections:
        _connections[name] = testinfra.get_host(f"ssh://{name}", ssh_config=str(FLEET.ssh_config))
    return _connections[name]


def members(group: str) -> list[str]:
    """Names of the hosts of an inventory group."""
    return [host.name for host in FLEET.hosts if group in host.groups]


def neighbour(*argv: str, input: str = "") -> str:
    """Run a command on the fleet's apt cache: on the same network, and no host of the fleet."""
    return podman("exec", "-i", FLEET.container("apt-cache"), *argv, input=input).stdout


@dataclass
class Site:
    """What a test needs to know of the fleet."""

    # Not shown: pytest prints arguments when a test fails.
    secrets: dict[str, str] = field(repr=False)
    addresses: dict[str, str] = field(default_factory=dict)

    def first(self, group: str) -> Host:
        """The first host of a group."""
        return connect(members(group)[0])

    def address(self, group: str) -> str:
        """Fleet address of the first host of a group."""
        return self.addresses[members(group)[0]]

    @property
    def api(self) -> str:
        return f"http://{self.address('prefect_server')}:4200/api"

    @property
    def storage(self) -> str:
        return f"https://{self.address('rustfs')}:9000"

    @property
    def auth(self) -> str:
        return f"admin:{self.secrets['fleet_auth_password']}"

    def python(self, host: Host, script: str, /, **values: str) -> str:
        """Run Python in the host's Prefect environment; values arrive as `V`, over stdin.

        Gives back stdout and fails the test with stderr if the script does.
        """
        program = f"V = {values!r}\n{script}"
        done = subprocess.run(
            [
                "ssh",
                "-F",
                str(FLEET.ssh_config),
                host.backend.host.name,
                "/opt/prefect/venv/bin/python",
                "-",
            ],
            input=program,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def ask_results(self, script: str, /, **values: str) -> str:
        """Run Python on a worker host, with a `client` of S3 that may use the bucket `results`."""
        access = {
            "url": self.storage,
            "access": self.secrets["fleet_rustfs_results_access_key"],
            "secret": self.secrets["fleet_rustfs_results_secret_key"],
        }
        return self.python(self.first("prefect_worker"), S3 + script, **{**access, **values})


def wait_until(what: Callable[[], bool], problem: str) -> None:
    """Wait until something holds; the test fails with the problem if it goes on not to."""
    deadline = time.monotonic() + _WAIT_SECONDS
    while not what():
        assert time.monotonic() < deadline, f"{problem} after {_WAIT_SECONDS} s"
        time.sleep(0.5)


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="session")
def site() -> Site:
    """The fleet, once its API is ready: after a reboot that takes a while."""
    secrets = yaml.safe_load((FLEET.inventory / "group_vars/all/secrets.yml").read_text())
    site = Site(secrets)
    deadline = time.monotonic() + _READY_SECONDS
    ready, asking = "", "prefect_worker" if members("prefect_worker") else "prefect_server"
    while ready != "200" and time.monotonic() < deadline:
        site.addresses = {host.name: FLEET.tailnet_address(host.name) for host in FLEET.hosts}
        ready = site.first(asking).check_output(
            "curl --silent --max-time 5 --output /dev/null --write-out '%%{http_code}' %s || true",
            f"{site.api}/ready",
        )
        time.sleep(0.5)
    assert ready == "200", f"{site.api} was not ready after {_READY_SECONDS} s"
    return site


@pytest.fixture(scope="session")
def forward() -> Iterator[Callable[[list[str]], None]]:
    """Open ssh forwards through the first worker host, a member of the tailnet."""
    running = []

    def start(arguments: list[str]) -> None:
        gate = members("prefect_worker")[0]
        argv = ["ssh", "-F", str(FLEET.ssh_config), "-S", "none", "-N"]
        argv += ["-o", "ExitOnForwardFailure=yes", *arguments, gate]
        running.append(subprocess.Popen(argv, stderr=subprocess.DEVNULL))

    yield start
    for process in running:
        process.terminate()
        process.wait()


@dataclass
class Laptop:
    """A client that is no host of the fleet: the project's own environment and a `.env`."""

    folder: Path
    url: str
    # Not shown, as above.
    auth: str = field(repr=False)

    def ask(self, question: Callable[[PrefectClient], Awaitable[T]]) -> T:
        """Ask the API from this process: the command line takes seconds to start."""

        async def talk() -> T:
            async with get_client() as client:
                return await question(client)

        with temporary_settings({PREFECT_API_URL: self.url, PREFECT_API_AUTH_STRING: self.auth}):
            return asyncio.run(talk())

    def prefect(self, *args: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """Run Prefect's command line in the laptop's folder."""
        environment = {name: os.environ[name] for name in ("PATH", "HOME")}
        return subprocess.run(
            ["prefect", *args],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )


@pytest.fixture(scope="session")
def laptop(
    site: Site, forward: Callable[[list[str]], None], tmp_path_factory: pytest.TempPathFactory
) -> Laptop:
    """A folder with a `.env`; the API is reached through a forward into the tailnet."""
    port = free_port()
    forward(["-L", f"127.0.0.1:{port}:{site.address('prefect_server')}:4200"])
    url = f"http://127.0.0.1:{port}/api"
    for _ in range(100):
        try:
            httpx.get(f"{url}/health", timeout=5)
            break
        except httpx.TransportError:
            time.sleep(0.2)
    folder = tmp_path_factory.mktemp("laptop")
    env = folder / ".env"
    env.touch(mode=0o600)
    env.write_text(f"PREFECT_API_URL={url}\nPREFECT_API_AUTH_STRING={site.auth}\n")
    return Laptop(folder, url, site.auth)


__all__ = ["FLEET", "PROJECT", "Laptop", "Site", "connect", "free_port", "members", "wait_until"]
