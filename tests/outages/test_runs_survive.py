"""Runs survive what is done to a fleet in use: stops, restarts, outages, and the loss of a host."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import httpx
import pytest
from prefect.client.orchestration import PrefectClient, get_client
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings
from prefect.states import Pending
from pydantic import TypeAdapter

from lab.podman import podman
from tests.fleet.conftest import FLEET, Laptop, Site, connect, members, wait_until
from tests.operations.test_manifests import ended, wait_for

WORKERS = members("prefect_worker")
T = TypeVar("T")
_WAIT_SECONDS = 240
_AT_A_TIME = 4
_RUN_SECONDS = 5


class Runs:
    """Canary runs, which take as many seconds as they are told, on the pool `default`."""

    def __init__(self, laptop: Laptop, site: Site) -> None:
        self._url = laptop.url
        self.log_in(site)

    def log_in(self, site: Site) -> None:
        """Go on with the fleet's password of that moment."""
        self._settings = {PREFECT_API_URL: self._url, PREFECT_API_AUTH_STRING: site.auth}

    def ask(self, question: Callable[[PrefectClient], Awaitable[T]]) -> T:
        """Ask the API."""

        async def talk() -> T:
            async with get_client() as client:
                return await question(client)

        with temporary_settings(self._settings):
            return asyncio.run(talk())

    def start(self, count: int, seconds: float) -> list[str]:
        """Start runs that take so long, and return their ids."""

        async def create(client: PrefectClient) -> list[str]:
            found = await client.read_deployment_by_name(DEPLOYMENT)
            runs = [
                await client.create_flow_run_from_deployment(
                    found.id, parameters={"seconds": seconds}
                )
                for _ in range(count)
            ]
            return [str(run.id) for run in runs]

        return self.ask(create)

    def read(self, runs: list[str]) -> list[dict[str, Any]]:
        """What the API says of runs."""

        async def look(client: PrefectClient) -> list[dict[str, Any]]:
            body: Any = {"flow_runs": {"id": {"any_": runs}}}
            return (await client.request("POST", "/flow_runs/filter", json=body)).json()

        return self.ask(look)

    def wait(self, runs: list[str], *states: str) -> list[dict[str, Any]]:
        """Wait until each of the runs is in one of the states."""
        deadline = time.monotonic() + _WAIT_SECONDS
        while True:
            found = self.read(runs)
            if all(run["state_name"] in states for run in found):
                return found
            if time.monotonic() > deadline:
                shown = [f"{run['name']}: {run['state_name']}: {run['state']}" for run in found]
                pytest.fail("\n".join(shown), pytrace=False)
            time.sleep(1)


DEPLOYMENT = "canary/operations"
SERVICES = {
    "rustfs": "rustfs",
    "postgres": "postgresql@17-main",
    "prefect_server": "prefect-server",
}


@pytest.fixture(scope="module")
def runs(laptop: Laptop, site: Site) -> Iterator[Runs]:
    """The canary flow, deployed for the pool `default` as well."""
    runs = Runs(laptop, site)

    async def deploy(client: PrefectClient) -> str:
        found = await client.read_deployment_by_name("canary/canary")
        made = await client.create_deployment(
            flow_id=found.flow_id,
            name="operations",
            work_pool_name="default",
            entrypoint=found.entrypoint,
            path=found.path,
            pull_steps=found.pull_steps,
            parameter_openapi_schema=found.parameter_openapi_schema,
        )
        return str(made)

    made = runs.ask(deploy)
    yield runs

    async def remove(client: PrefectClient) -> None:
        await client.delete_deployment(made)

    runs.ask(remove)


@contextlib.contextmanager
def alone(worker: str) -> Iterator[None]:
    """Leave the pool to one worker host."""
    others = [name for name in WORKERS if name != worker]
    for name in others:
        connect(name).check_output("systemctl stop prefect-worker@default")
    try:
        yield
    finally:
        for name in others:
            connect(name).check_output("systemctl start prefect-worker@default")


@contextlib.contextmanager
def pool_settings(worker: str, **options: object) -> Iterator[None]:
    """Run a host's default worker with other drain options than the inventory's."""
    host = connect(worker)
    unit = "/run/systemd/system/prefect-worker@default.service.d"
    arguments = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in options.items())
    program = "/opt/prefect/venv/bin/python -m prefect_operations.worker --pool %i"
    lines = f"[Service]\\nExecStart=\\nExecStart={program} $WORKER_ARGUMENTS {arguments}\\n"
    host.check_output(f"mkdir -p {unit}")
    host.check_output(f"printf '{lines.replace('%', '%%')}' > {unit}/test.conf")
    host.check_output("systemctl daemon-reload && systemctl restart prefect-worker@default")
    try:
        yield
    finally:
        host.check_output(f"rm -r {unit} && systemctl daemon-reload")
        host.check_output("systemctl restart prefect-worker@default")


def test_a_stopped_worker_lets_its_runs_finish(runs: Runs) -> None:
    host = WORKERS[0]
    with alone(host):
        (run,) = runs.start(1, 25)
        runs.wait([run], "Running")
        connect(host).check_output("systemctl stop prefect-worker@default")
        try:
            (found,) = runs.read([run])
            # One that comes meanwhile waits for a worker.
            (late,) = runs.start(1, 0)
        finally:
            connect(host).check_output("systemctl start prefect-worker@default")
        assert (found["state_name"], found["run_count"]) == ("Completed", 1)
        runs.wait([late], "Completed")
    said = connect(host).check_output("journalctl -u prefect-worker@default -n 200 -o cat")
    assert "Draining: waiting up to 300 s for 1 run" in said


def test_what_outlasts_the_limit_is_ended_as_the_pool_says(runs: Runs) -> None:
    host = WORKERS[0]
    with alone(host), pool_settings(host, drain_seconds=1, drain_then="crash"):
        (run,) = runs.start(1, 600)
        runs.wait([run], "Running")
        connect(host).check_output("systemctl stop prefect-worker@default")
        (found,) = runs.read([run])
        assert found["state_name"] == "Crashed", found["state"]
        assert "was stopped, and the run was not done 1 s later" in found["state"]["message"]
        manifest = wait_for(host, run, until=ended)
        assert manifest["state"]["name"] == "Crashed"
        assert manifest["state"]["message"] == found["state"]["message"]


def test_a_killed_worker_takes_its_runs_along_and_says_so(runs: Runs) -> None:
    host = WORKERS[0]
    with alone(host):
        (run,) = runs.start(1, 600)
        runs.wait([run], "Running")
        pid = wait_for(host, run, until=lambda one: one["process"]["pid"] > 0)["process"]["pid"]
        connect(host).check_output("systemctl kill --kill-whom=main -s KILL prefect-worker@default")
        (found,) = runs.wait([run], "Crashed")
        assert not connect(host).file(f"/proc/{pid}").exists
    assert "had ended without a word" in found["state"]["message"]


class Load(threading.Thread):
    """Keeps a few runs open until it is stopped; how many a minute, the machine says."""

    def __init__(self, runs: Runs) -> None:
        super().__init__()
        self._runs = runs
        self._enough = threading.Event()
        self.started: list[str] = []

    def run(self) -> None:
        while not self._enough.is_set():
            # A request whose answer is lost may have made a run; nobody asks after that one.
            with contextlib.suppress(httpx.HTTPError):
                if self._open() < _AT_A_TIME:
                    self.started += self._runs.start(1, _RUN_SECONDS)
            self._enough.wait(1)

    def _open(self) -> int:
        return sum(run["end_time"] is None for run in self._runs.read(self.started))

    def wait_for_run_on(self, host: str) -> None:
        """Wait until one of the runs is running on that host."""

        def is_there(run: dict[str, Any]) -> bool:
            worker = run["labels"].get("prefect.worker.name")
            return run["state_name"] == "Running" and worker == f"{host}-default"

        wait_until(
            lambda: any(is_there(run) for run in self._runs.read(self.started)), f"no run on {host}"
        )

    def stop(self) -> None:
        self._enough.set()
        self.join()


def survive(runs: Runs, site: Site, disturb: Callable[[Load], None]) -> None:
    """Do something under a steady load of runs.

    Each of them must end Completed, in one attempt, and have kept its result.
    """
    load = Load(runs)
    load.start()
    try:
        disturb(load)
        enough = len(load.started) + 2
        wait_until(lambda: len(load.started) > enough, "no two more runs were made")
    finally:
        load.stop()
    found = runs.wait(load.started, "Completed", "Failed", "Crashed", "Cancelled")
    assert len(found) == len(load.started)
    bad = [
        run["state"] for run in found if (run["state_name"], run["run_count"]) != ("Completed", 1)
    ]
    assert bad == []
    assert without_result(found, site) == []


def without_result(found: list[dict[str, Any]], site: Site) -> list[str]:
    """Those of completed runs whose result is not in the object storage.

    Prefect ends a run Completed, and names the object, where it could not write it as well.
    """
    keys = {run["state"]["data"]["storage_key"]: run["name"] for run in found}
    script = """
import json
calls = [dict(Bucket="results", Key=key) for key in json.loads(V["keys"])]
print(json.dumps([call["Key"] for call in calls if attempt(client.head_object, **call) != "done"]))
"""
    missing = site.ask_results(script, keys=json.dumps(list(keys)))
    return [keys[key] for key in json.loads(missing)]


def test_a_rolling_restart_of_all_workers_loses_no_run(runs: Runs, site: Site) -> None:
    def roll(load: Load) -> None:
        for name in WORKERS:
            load.wait_for_run_on(name)
            connect(name).check_output("systemctl restart prefect-worker@default")

    with contextlib.ExitStack() as stack:
        for name in WORKERS:
            # Else the one that happens to ask first takes them all, and others have none to lose.
            stack.enter_context(pool_settings(name, limit=_AT_A_TIME // len(WORKERS)))
        survive(runs, site, roll)


@pytest.mark.parametrize("group", SERVICES)
def test_restarts_of_what_runs_need_lose_no_run(runs: Runs, site: Site, group: str) -> None:
    host, unit = site.first(group), SERVICES[group]

    def restart(_: Load) -> None:
        wait_for_a_beginning()
        host.check_output("systemctl stop %s", unit)
        # The flow that has just begun ends meanwhile.
        time.sleep(_RUN_SECONDS)
        host.check_output("systemctl start %s", unit)
        wait_until(lambda: is_ready(site), "the API is not ready")

    survive(runs, site, restart)


def wait_for_a_beginning() -> None:
    """Wait until a flow begins; its run is Running for seconds by then."""
    begun = f"journalctl -u prefect-worker@default --since=@{time.time()} | grep 'Aimed at'"
    wait_until(
        lambda: any(connect(name).run(begun).rc == 0 for name in WORKERS), "no flow has begun"
    )


def is_ready(site: Site) -> bool:
    """Whether the API answers and has its database."""
    url = f"{site.api}/ready"
    return site.first("prefect_worker").run("curl -sf --max-time 5 -o /dev/null %s", url).rc == 0


def test_the_runs_of_a_dead_host_are_marked(runs: Runs) -> None:
    host = WORKERS[-1]
    with alone(host):
        (running,) = runs.start(1, 600)
        runs.wait([running], "Running")
        worker = f"{host}-default"
        podman("kill", FLEET.container(host))
        try:
            begun = time.monotonic()
            # As the host leaves it that dies between taking a run and starting its process.
            (pending,) = runs.start(1, 0)
            runs.ask(lambda client: leave_pending(client, pending, worker))
            (found,) = runs.wait([running], "Crashed")
            (given_back,) = runs.wait([pending], "AwaitingRetry", "Late")
            assert time.monotonic() - begun < 180
        finally:
            FLEET.up()
        assert "its host is taken for dead" in found["state"]["message"]
        assert given_back["run_count"] == 0
        manifest = wait_for(host, running, until=ended)
        assert manifest["state"]["name"] == "Crashed"
        assert "its host is taken for dead" in manifest["state"]["message"]
        runs.wait([pending], "Completed")


async def leave_pending(client: PrefectClient, run: str, worker: str) -> None:
    await client.set_flow_run_state(run, Pending())
    await client.update_flow_run_labels(run, {"prefect.worker.name": worker})


def test_what_is_old_is_removed_after_the_periods_of_the_inventory(runs: Runs) -> None:
    async def look(client: PrefectClient) -> dict[str, Any]:
        return (await client.request("GET", "/admin/settings")).json()["server"]

    server = runs.ask(look)
    vacuum = server["services"]["db_vacuum"]
    assert {"events", "flow_runs"} <= set(vacuum["enabled"])
    day = 24 * 3600
    assert seconds(vacuum["retention_period"]) == 90 * day
    assert seconds(server["events"]["retention_period"]) == 7 * day
    (heartbeats,) = vacuum["event_retention_overrides"].values()
    assert seconds(heartbeats) == day


def seconds(period: str | float) -> float:
    """Seconds of a period as the API shows it."""
    return TypeAdapter(timedelta).validate_python(period).total_seconds()
