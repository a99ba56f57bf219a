"""One bad flow on a worker host, and what becomes of the other runs there.

Workers of pools made for this run on one host with smaller limits than usual, so that it takes
little to reach them: those of the unit's control group where that has any, else, as in containers
on some machines, those of setrlimit(2). Scenario `limits` has a host with the former.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import shlex
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings
from prefect.workers.process import ProcessWorker

from tests.fleet.conftest import Laptop, Site, connect, members

HOST = members("prefect_worker")[0]
POOLS = ("unruly", "orderly")
FOLDER = "/srv/unruly"
DROPINS = "/run/systemd/system"
LIMITS = """[Service]
{bite}
LimitFSIZE=64M
# Of two for one path, the first would count.
TemporaryFileSystem=
TemporaryFileSystem=/dev/shm:size=256M,mode=1777,nodev,nosuid
TemporaryFileSystem=/tmp:size=256M,mode=1777,nodev,nosuid
TemporaryFileSystem=/var/tmp:size=256M,mode=1777,nodev,nosuid
"""
# What bites, by whether the host's cgroups have controllers.
BITE = {
    True: "TasksMax=100\nLimitNPROC=infinity\nMemoryMax=600M\nMemorySwapMax=0\nLimitDATA=infinity",
    False: "LimitNPROC=300\nLimitDATA=1G",
}
TOLD = "/var/lib/prefect/unruly"
WARM = "/var/lib/prefect/warm"
NAMES = ("steady", "fork_bomb", "memory_hog", "disk_filler", "many_kinds_of_work", "look_around")
FLOWS = Path(__file__).with_name("unruly_flows.py")
_STEPS = "prefect.deployments.steps"
_WAIT_SECONDS = 300
# How long a bad flow keeps what it has taken.
_HOLD_SECONDS = 8


@dataclass(frozen=True)
class Runs:
    """Runs on the one host.

    Attributes:
        deployments: their ids, by pool and flow.
    """

    deployments: dict[tuple[str, str], Any]

    def start(self, flow: str, pool: str = POOLS[0], **parameters: object) -> Any:
        """Start a run, and return its id."""

        async def create() -> Any:
            async with get_client() as client:
                run = await client.create_flow_run_from_deployment(
                    self.deployments[pool, flow],
                    parameters=parameters,
                    work_queue_name=f"host-{HOST}",
                )
                return run.id

        return asyncio.run(create())

    def wait(self, run: Any, until: Callable[[FlowRun], bool]) -> FlowRun:
        """Return the run once it is as `until` says."""

        async def read() -> FlowRun:
            async with get_client() as client:
                return await client.read_flow_run(run)

        deadline = time.monotonic() + _WAIT_SECONDS
        while time.monotonic() < deadline:
            found = asyncio.run(read())
            if found.state is not None and until(found):
                return found
            time.sleep(1)
        pytest.fail(f"after {_WAIT_SECONDS} s: {found.state!r}", pytrace=False)

    def end(self, run: Any) -> FlowRun:
        """Return the run once it has ended."""
        return self.wait(run, lambda found: found.state is not None and found.state.is_final())

    def is_forked(self, run: Any) -> bool:
        """Return whether a run was forked, as the fleet's own are, once its process has ended."""
        return comes_true(f"journalctl --boot --quiet --grep='flow run {run}: ended'")

    def said(self, run: Any) -> Any:
        """Wait for a run, which has to end Completed, and return what it has told."""
        found = self.end(run)
        assert found.state is not None
        assert found.state.is_completed(), found.state
        return json.loads(connect(HOST).check_output(f"cat {TOLD}/{run}.json"))


def unit(pool: str) -> str:
    """The worker of a pool."""
    return f"prefect-worker@{pool}.service"


def has_controllers() -> bool:
    """Return whether the host's control groups can limit anything."""
    return "memory" in connect(HOST).check_output("cat /sys/fs/cgroup/cgroup.controllers").split()


def comes_true(command: str) -> bool:
    """Return whether a command succeeds on the host before long."""
    loop = shlex.quote(f"until {command}; do sleep 1; done")
    return connect(HOST).run(f"timeout {_WAIT_SECONDS} sh -c {loop}").rc == 0


async def create() -> dict[tuple[str, str], Any]:
    """Make pools and deployments on the server."""
    template = ProcessWorker.get_default_base_job_template()
    deployments = {}
    async with get_client() as client:
        for pool in POOLS:
            await client.create_work_pool(
                WorkPoolCreate(name=pool, type="process", base_job_template=template)
            )
            await client.create_work_queue(f"host-{HOST}", work_pool_name=pool)
        for flow, pool in itertools.product(NAMES, POOLS):
            deployments[pool, flow] = await client.create_deployment(
                flow_id=await client.create_flow_from_name(flow.replace("_", "-")),
                name=pool,
                work_pool_name=pool,
                entrypoint=f"unruly_flows.py:{flow}",
                pull_steps=[{f"{_STEPS}.set_working_directory": {"directory": FOLDER}}],
            )
    return deployments


async def remove() -> None:
    """Remove all that is left of this and of an earlier test."""
    async with get_client() as client:
        for pool in POOLS:
            for flow in NAMES:
                with contextlib.suppress(ObjectNotFound):
                    found = await client.read_deployment_by_name(f"{flow.replace('_', '-')}/{pool}")
                    await client.delete_deployment(found.id)
            with contextlib.suppress(ObjectNotFound):
                await client.delete_work_pool(pool)


@pytest.fixture(scope="module")
def runs(laptop: Laptop, site: Site) -> Iterator[Runs]:
    """The pools, their workers and deployments; removed afterwards."""
    host = connect(HOST)
    env = "/etc/prefect/workers"
    units = " ".join(unit(pool) for pool in POOLS)
    files_made = " ".join(f"{DROPINS}/{unit(pool)}.d {env}/{pool}.env" for pool in POOLS)
    forks = " ".join(f"{WARM}/{pool}.*" for pool in POOLS)
    with temporary_settings({PREFECT_API_URL: laptop.url, PREFECT_API_AUTH_STRING: site.auth}):
        try:
            asyncio.run(remove())
            deployments = asyncio.run(create())
            host.check_output(f"install -d {FOLDER} && install -d -o prefect {TOLD}")
            files = {f"{FOLDER}/unruly_flows.py": FLOWS.read_text()}
            for pool in POOLS:
                host.check_output(f"install -d {DROPINS}/{unit(pool)}.d")
                own = f"s/canary/{pool}/g; s#^WORKER_ARGUMENTS=.*#& --warm-start {WARM}#"
                host.check_output(f"sed '{own}' {env}/canary.env > {env}/{pool}.env")
                limits = LIMITS.format(bite=BITE[has_controllers()])
                files[f"{DROPINS}/{unit(pool)}.d/limits.conf"] = limits
            for path, text in files.items():
                host.check_output("printf %%s %s > %s", text, path)
            host.check_output(f"systemctl daemon-reload && systemctl start {units}")
            made = Runs(deployments)
            # The first run has a zygote made; until that is there, they may be left to the stock
            # command.
            for run in [made.start("steady", pool, until="/") for pool in POOLS]:
                assert made.said(run)
            for pool in POOLS:
                assert comes_true(f"test -e {WARM}/{pool}.json")
            yield made
        finally:
            host.run(f"systemctl stop {units}; rm -r {FOLDER} {TOLD} {files_made} {forks}")
            host.run("systemctl daemon-reload")
            asyncio.run(remove())


# What it does, with what it is refused, and whether the runs of its own pool are safe from it as
# well as those of others.
HELD = {"seconds": _HOLD_SECONDS}
BAD: dict[str, tuple[str, dict[str, object], str, bool]] = {
    "fork bomb": ("fork_bomb", HELD, "Resource temporarily unavailable", False),
    "memory hog": ("memory_hog", HELD, "MemoryError", True),
    "one large file": (
        "disk_filler",
        {"folder": "/var/lib/prefect", "file_mib": 128, **HELD},
        "File too large",
        True,
    ),
    "many files": (
        "disk_filler",
        {"folder": "/tmp", "file_mib": 32, **HELD},
        "No space left on device",
        False,
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_flow_takes_nothing_from_other_runs(runs: Runs, bad: str) -> None:
    flow, parameters, refusal, own_pool_too = BAD[bad]
    end = f"{TOLD}/end of {bad}"
    pools = POOLS if own_pool_too else POOLS[1:]
    others = [runs.start("steady", pool, until=end) for pool in pools]
    for run in others:
        runs.wait(run, lambda found: found.state is not None and found.state.is_running())
    run = runs.start(flow, **parameters)
    ended = runs.end(run).state
    connect(HOST).check_output("touch %s", end)
    assert ended is not None
    if bad == "memory hog" and has_controllers():
        # The kernel ends it, for a control group refuses no memory.
        assert ended.is_crashed(), ended
        assert connect(HOST).check_output("journalctl --boot --dmesg --grep='Memory cgroup out of'")
    else:
        assert ended.is_failed(), ended
        assert refusal in str(ended.message)
    # A host with a kernel of its own may be too slow for that, and the stock command takes over.
    assert runs.is_forked(run) or has_controllers()
    # Those beside it went on all the time, and its own pool's worker takes the next run.
    for run in [*others, runs.start("steady", until="/")]:
        assert runs.said(run)["finished"]


def test_flows_can_do_what_data_flows_do(runs: Runs) -> None:
    assert runs.said(runs.start("many_kinds_of_work")) == {
        "task processes": [2, 4],
        "processes": 3,
        "subprocess": "42",
        "callback": 2,
        "memory": True,
        "rows": 100_000,
        "mail": 220,
        "interfaces": True,
        "stored": "a result",
    }


def test_flows_can_do_nothing_to_the_host(runs: Runs) -> None:
    refused = "Operation not permitted"
    said = runs.said(runs.start("look_around"))
    # Hosts of their own do not have these files at all.
    for name in ("server's settings", "object storage's keys"):
        assert said.pop(name) in ("Permission denied", "No such file or directory")
    assert said == {
        "writable": [],
        "processes of others": [],
        "devices": [],
        "a network of its own": refused,
        "mounts of its own": refused,
        "host name": refused,
        "packets of all": "Address family not supported by protocol",
        "kernel's log": "No such file or directory",
    }
