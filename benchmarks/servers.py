"""A Prefect server for a benchmark, and what processes take."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import yaml

PROJECT = Path(__file__).resolve().parent.parent
# What answers, and what it asks, by the group of the host that has it.
_UNITS = {"prefect_server": "prefect-server.service", "postgres": "postgresql@17-main.service"}


@dataclass(frozen=True)
class Server:
    """A server, its database included.

    Attributes:
        pids: gives its processes.
        spent: gives the processor seconds that they have taken so far.
    """

    pids: Callable[[], list[int]]
    spent: Callable[[], float]


@contextlib.contextmanager
def prefect_server(fleet: str | None = None) -> Iterator[Server | None]:
    """The server that PREFECT_API_URL names from here on.

    That of a local fleet, which has to be converged; or the one of the environment, of which
    nothing is known; or one that is there as long as this, with SQLite.
    """
    sys.path[:0] = [str(PROJECT), str(PROJECT / "src")]
    os.environ["PYTHONPATH"] = str(PROJECT / "src")
    if fleet is not None:
        with _fleets_server(fleet) as server:
            yield server
        return
    if "PREFECT_API_URL" in os.environ:
        yield None
        return
    from tests.unit.conftest import PrefectServer

    # The database that the tests keep, if they have run: migrating an empty one takes a while.
    version = importlib.metadata.version("prefect")
    cached = PROJECT / ".pytest_cache" / "d" / f"prefect-{version}"
    own = PrefectServer(cached if cached.is_dir() else None)
    pid = own._process.pid
    try:
        os.environ["PREFECT_API_URL"] = own.url()
        yield Server(lambda: [pid, *below(pid)], lambda: processor_seconds(pid))
    finally:
        own.stop()


@contextlib.contextmanager
def _fleets_server(name: str) -> Iterator[Server]:
    """The server of a local fleet, through an ssh forward."""
    from lab.fleet import Fleet

    fleet = Fleet.load(name)
    hosts = {
        group: next(host.name for host in fleet.hosts if group in host.groups) for group in _UNITS
    }

    def spent() -> float:
        asked = ((host, f"systemctl show -P CPUUsageNSec {_UNITS[g]}") for g, host in hosts.items())
        return sum(int(fleet.run(host, script, check=True).stdout) for host, script in asked) / 1e9

    secrets = yaml.safe_load((fleet.inventory / "group_vars/all/secrets.yml").read_text())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    host = hosts["prefect_server"]
    to = f"127.0.0.1:{port}:{fleet.tailnet_address(host)}:4200"
    argv = ["ssh", "-F", str(fleet.ssh_config), "-S", "none", "-N", "-L", to, host]
    forward = subprocess.Popen(argv)
    try:
        url = f"http://127.0.0.1:{port}/api"
        end = time.monotonic() + 30
        while True:
            try:
                httpx.get(f"{url}/ready").raise_for_status()
                break
            except httpx.HTTPError:
                if time.monotonic() > end:
                    raise SystemExit(f"the server of {name} is not ready: converge it") from None
                time.sleep(0.2)
        os.environ["PREFECT_API_URL"] = url
        os.environ["PREFECT_API_AUTH_STRING"] = f"admin:{secrets['fleet_auth_password']}"
        yield Server(lambda: [pid for unit in _UNITS.values() for pid in _of_unit(unit)], spent)
    finally:
        forward.terminate()
        forward.wait()


def _of_unit(unit: str) -> list[int]:
    """Return the processes of all units of that name, on this machine and in its containers."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cgroup"):
        with contextlib.suppress(OSError):
            if f"/{unit}" in file.read_text():
                found.append(int(file.parent.name))
    return found


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
