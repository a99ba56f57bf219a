"""One bad flow on a worker host, and what becomes of the other runs there: of its own work pool.

A worker of a pool made for this runs on one host with smaller limits than usual, so that it takes
little to reach them. What a control group limits, its drop-in can't show on hosts whose cgroups
have no controllers: there it is the limits of setrlimit(2) that bite.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
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
POOL = "unruly"
UNIT = f"prefect-worker@{POOL}.service"
FOLDER = "/srv/unruly"
DROPIN = f"/run/systemd/system/{UNIT}.d/limits.conf"
LIMITS = "[Service]\nLimitNPROC=300\nLimitDATA=1G\nLimitFSIZE=64M\n" + "".join(
    f"TemporaryFileSystem={folder}:size=256M,mode=1777,nodev,nosuid\n"
    for folder in ("/dev/shm", "/tmp", "/var/tmp")
)
TOLD = "/var/lib/prefect/unruly"
NAMES = ("steady", "fork_bomb", "memory_hog", "disk_filler", "many_kinds_of_work", "look_around")
FLOWS = Path(__file__).with_name("unruly_flows.py")
_STEPS = "prefect.deployments.steps"
_WAIT_SECONDS = 180
# How long a bad flow keeps what it has taken.
_HOLD_SECONDS = 8


@dataclass(frozen=True)
class Pool:
    """The pool on its one host."""

    deployments: dict[str, Any]

    def start(self, flow: str, **parameters: object) -> Any:
        """Start a run, and return its id."""

        async def create() -> Any:
            async with get_client() as client:
                run = await client.create_flow_run_from_deployment(
                    self.deployments[flow], parameters=parameters, work_queue_name=f"host-{HOST}"
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

    def said(self, run: Any) -> Any:
        """Wait for a run, which has to end Completed, and return what it has told."""
        found = self.end(run)
        assert found.state is not None
        assert found.state.is_completed(), found.state
        return json.loads(connect(HOST).check_output(f"cat {TOLD}/{run}.json"))


@pytest.fixture(scope="module")
def pool(laptop: Laptop, site: Site) -> Iterator[Pool]:
    """The pool, its worker and its deployments; removed afterwards."""
    host = connect(HOST)

    async def create() -> dict[str, Any]:
        await remove()
        async with get_client() as client:
            template = ProcessWorker.get_default_base_job_template()
            await client.create_work_pool(
                WorkPoolCreate(name=POOL, type="process", base_job_template=template)
            )
            await client.create_work_queue(f"host-{HOST}", work_pool_name=POOL)
            return {name: await deploy(client, name) for name in NAMES}

    async def deploy(client: Any, name: str) -> Any:
        flow = await client.create_flow_from_name(f"unruly-{name}")
        return await client.create_deployment(
            flow_id=flow,
            name=POOL,
            work_pool_name=POOL,
            entrypoint=f"unruly_flows.py:{name}",
            pull_steps=[{f"{_STEPS}.set_working_directory": {"directory": FOLDER}}],
        )

    async def remove() -> None:
        async with get_client() as client:
            with contextlib.suppress(ObjectNotFound):
                await client.delete_work_pool(POOL)

    directory = DROPIN.rpartition("/")[0]
    host.check_output(f"install -d {FOLDER} {directory}")
    for path, text in ((f"{FOLDER}/unruly_flows.py", FLOWS.read_text()), (DROPIN, LIMITS)):
        host.check_output("printf %%s %s > %s", text, path)
    env = "/etc/prefect/workers"
    host.check_output(f"sed s/canary/{POOL}/g {env}/canary.env > {env}/{POOL}.env")
    with temporary_settings({PREFECT_API_URL: laptop.url, PREFECT_API_AUTH_STRING: site.auth}):
        try:
            deployments = asyncio.run(create())
            host.check_output(f"systemctl daemon-reload && systemctl start {UNIT}")
            yield Pool(deployments)
        finally:
            host.run(f"systemctl stop {UNIT}")
            host.run(f"rm -r {FOLDER} {TOLD} {directory} {env}/{POOL}.env; systemctl daemon-reload")
            asyncio.run(remove())


@pytest.fixture
def steady(pool: Pool) -> Any:
    """A run that is in the middle of its work."""
    run = pool.start("steady", seconds=60)
    pool.wait(run, lambda found: found.state is not None and found.state.is_running())
    return run


BAD = {
    "fork_bomb": ({"seconds": _HOLD_SECONDS}, "Resource temporarily unavailable"),
    "memory_hog": ({"seconds": _HOLD_SECONDS}, "MemoryError"),
    "one large file": ({"folder": "/tmp", "files": 1, "seconds": _HOLD_SECONDS}, "File too large"),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_flow_takes_nothing_from_other_runs(pool: Pool, steady: Any, bad: str) -> None:
    parameters, refusal = BAD[bad]
    ended = pool.end(pool.start(bad if bad in NAMES else "disk_filler", **parameters)).state
    assert ended is not None
    assert ended.is_failed(), ended
    assert refusal in str(ended.message)
    # The run beside it has not ended with it, and ends well; so does one that begins only now.
    after = pool.start("steady", seconds=1)
    assert pool.said(steady) > 10
    assert pool.said(after) > 0


def test_flows_can_do_what_data_flows_do(pool: Pool) -> None:
    assert pool.said(pool.start("many_kinds_of_work")) == {
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


def test_flows_can_do_nothing_to_the_host(pool: Pool) -> None:
    refused = "Operation not permitted"
    assert pool.said(pool.start("look_around")) == {
        "writable": [],
        "processes of others": [],
        "devices": [],
        "a network of its own": refused,
        "mounts of its own": refused,
        "host name": refused,
        "packets of all": "Address family not supported by protocol",
        "kernel's log": "No such file or directory",
        "server's settings": "Permission denied",
        "object storage's keys": "Permission denied",
    }
