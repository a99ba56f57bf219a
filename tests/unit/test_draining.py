"""Real workers with real runs, stopped in each way there is."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.unit.warm import children

FLOW = """
import os
import threading
import time

from prefect import flow


def note(flow, flow_run, state):
    with open(os.environ["DRAIN_NOTES"] + f"/{flow_run.id}.{state.name}", "w"):
        pass


@flow
def child(begun: str, until: str):
    with open(begun, "w"):
        pass
    while not os.path.exists(until):
        time.sleep(0.05)


@flow(name="waiter", on_crashed=[note], on_cancellation=[note])
def waiter(begun: str, until: str):
    if "lingering" in begun:
        # Python waits for it at its end.
        threading.Thread(target=threading.Event().wait).start()
        return
    child(begun, until)
"""
# Each has a worker in one test alone.
LINGERING = "lingering"
SILENT = "silent"
# Pool by pool: what its worker is told, and whether it is asked twice to stop.
POOLS: dict[str, tuple[list[str], int]] = {
    "patient": (["--drain-seconds", "120", "--limit", "1"], 1),
    "crash": (["--drain-seconds", "600", "--drain-then", "crash"], 2),
    "cancel": (["--drain-seconds", "0.5", "--drain-then", "cancel"], 1),
    "reschedule": (["--drain-seconds", "0.5", "--drain-then", "reschedule"], 1),
}


def wait_for(what: Callable[[], Any], why: Callable[[], str], seconds: float = 300) -> Any:
    """Return the first true answer; `why` says more when there is none."""
    until = time.monotonic() + seconds
    while not (answer := what()):
        if time.monotonic() > until:
            pytest.fail(f"{seconds} s passed without it\n{why()}", pytrace=False)
        time.sleep(0.1)
    return answer


class Fleet:
    """Pools, a deployment for each, and their workers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.workers: dict[str, subprocess.Popen[bytes]] = {}
        (folder / "flow.py").write_text(FLOW)
        (folder / "notes").mkdir()
        asyncio.run(self._deploy())

    async def _deploy(self) -> None:
        from prefect.client.orchestration import get_client
        from prefect.client.schemas.actions import WorkPoolCreate
        from prefect.workers.process import ProcessWorker

        template = ProcessWorker.get_default_base_job_template()
        async with get_client() as client:
            flow = await client.create_flow_from_name("waiter")
            for pool in (*POOLS, LINGERING, SILENT):
                await client.create_work_pool(
                    WorkPoolCreate(name=pool, type="process", base_job_template=template)
                )
                # One of them as a pool with a command of its own would run it.
                command = {"command": f"{sys.executable} -m prefect.engine"}
                await client.create_deployment(
                    flow_id=flow,
                    name=pool,
                    work_pool_name=pool,
                    entrypoint="flow.py:waiter",
                    path=str(self.folder),
                    pull_steps=[
                        {
                            "prefect.deployments.steps.set_working_directory": {
                                "directory": str(self.folder)
                            }
                        }
                    ],
                    job_variables={} if pool == "crash" else command,
                )

    def start_run(self, pool: str, name: str) -> str:
        async def create() -> str:
            from prefect.client.orchestration import get_client

            async with get_client() as client:
                found = await client.read_deployment_by_name(f"waiter/{pool}")
                parameters = {name: str(self.folder / f"{pool}.{name}") for name in BEGUN_UNTIL}
                run = await client.create_flow_run_from_deployment(
                    found.id, parameters=parameters, name=name
                )
                return str(run.id)

        return asyncio.run(create())

    def start_worker(self, pool: str, *options: str, polls: int = 1) -> None:
        with (self.folder / f"{pool}.log").open("ab") as log:
            self.workers[pool] = subprocess.Popen(
                [
                    *(sys.executable, "-m", "prefect_operations.worker"),
                    *("--pool", pool, "--name", f"worker-{pool}", *options),
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                start_new_session=True,
                env=os.environ
                | {
                    "PREFECT_WORKER_QUERY_SECONDS": str(polls),
                    "DRAIN_NOTES": str(self.folder / "notes"),
                },
            )

    def log(self, pool: str) -> str:
        return (self.folder / f"{pool}.log").read_text()

    def wait_until_begun(self, pool: str) -> None:
        wait_for((self.folder / f"{pool}.begun").exists, lambda: self.log(pool))

    def wait_until_draining(self, pool: str) -> None:
        wait_for(lambda: "Draining" in self.log(pool), lambda: self.log(pool))

    def end(self) -> None:
        for worker in self.workers.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(worker.pid, signal.SIGKILL)
            worker.wait()


BEGUN_UNTIL = ("begun", "until")


def read_run(run: str) -> Any:
    async def read() -> Any:
        from prefect.client.orchestration import get_client

        async with get_client() as client:
            return await client.read_flow_run(run)

    return asyncio.run(read())


def read_children(run: str) -> list[dict[str, Any]]:
    async def read() -> list[dict[str, Any]]:
        from prefect.client.orchestration import get_client

        filters = {"flow_runs": {"parent_flow_run_id": {"any_": [run]}}}
        async with get_client() as client:
            response = await client.request("POST", "/flow_runs/filter", json=filters)
            return response.json()

    return asyncio.run(read())


@pytest.fixture(scope="module")
def stopped(prefect_api: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Runs of all pools, after their workers were stopped at the same moment."""
    fleet = Fleet(tmp_path_factory.mktemp("drain"))
    try:
        runs = {pool: fleet.start_run(pool, "held") for pool in POOLS}
        for pool, (options, _) in POOLS.items():
            fleet.start_worker(pool, *options)
        for pool in POOLS:
            fleet.wait_until_begun(pool)
        queued = fleet.start_run("patient", "queued")
        for pool, (_, times) in POOLS.items():
            fleet.workers[pool].send_signal(signal.SIGTERM)
            if times > 1:
                wait_for(
                    lambda pool=pool: "Draining" in fleet.log(pool), lambda: fleet.log("crash")
                )
                fleet.workers[pool].send_signal(signal.SIGTERM)
        fleet.wait_until_draining("patient")
        late = fleet.start_run("patient", "late")
        assert fleet.workers["patient"].poll() is None, fleet.log("patient")
        (fleet.folder / "patient.until").touch()
        codes = {pool: worker.wait(300) for pool, worker in fleet.workers.items()}
        yield SimpleNamespace(
            fleet=fleet, runs=runs, codes=codes, unbegun={"queued": queued, "late": late}
        )
    finally:
        fleet.end()


def test_a_run_that_ends_within_the_limit_is_completed(stopped):
    assert stopped.codes["patient"] == 0, stopped.fleet.log("patient")
    run = read_run(stopped.runs["patient"])
    assert (run.state.name, run.run_count) == ("Completed", 1), stopped.fleet.log("patient")


@pytest.mark.parametrize("name", ["queued", "late"])
def test_a_draining_worker_takes_nothing_more(stopped, name):
    run = read_run(stopped.unbegun[name])
    assert run.state.is_scheduled(), stopped.fleet.log("patient")
    assert run.run_count == 0


@pytest.mark.parametrize(
    ("pool", "state", "note", "said"),
    [
        ("crash", "Crashed", "Crashed", "was told to end at once"),
        ("cancel", "Cancelled", "Cancelling", "was stopped, and the run was not done 0.5 s later"),
        ("reschedule", "AwaitingRetry", None, "was not done 0.5 s later"),
    ],
)
def test_what_is_left_is_ended_as_its_pool_says(stopped, pool, state, note, said):
    assert stopped.codes[pool] == 0, stopped.fleet.log(pool)
    run = read_run(stopped.runs[pool])
    log = stopped.fleet.log(pool)
    assert run.state.name == state, log
    assert said in run.state.message
    assert f"worker-{pool}" in run.state.message
    notes = {path.suffix[1:] for path in (stopped.fleet.folder / "notes").glob(f"{run.id}.*")}
    assert notes == ({note} if note else set()), log
    (child,) = read_children(str(run.id))
    # A run that begins anew finds its subflow again; one that is cancelled, cancels it.
    expected = {"crash": "CRASHED", "cancel": "CANCELLED", "reschedule": "RUNNING"}[pool]
    assert child["state_type"] == expected, child["state"]


def test_a_killed_worker_makes_up_for_its_runs_when_it_is_back(stopped):
    fleet, pool = stopped.fleet, "reschedule"
    run = stopped.runs[pool]
    begun = fleet.folder / f"{pool}.begun"
    begun.unlink()
    fleet.start_worker(pool)
    fleet.wait_until_begun(pool)
    assert read_run(run).run_count == 2  # it was given back, and has been taken again
    fleet.end()  # the worker and its processes, as systemd does it
    assert read_run(run).state.is_running()
    begun.unlink()
    pending = fleet.start_run(pool, "pending")
    (fleet.folder / f"{pool}.until").touch()
    asyncio.run(take(pending, f"worker-{pool}"))
    fleet.start_worker(pool)
    wait_for(lambda: read_run(pending).state.is_completed(), lambda: fleet.log(pool))
    state = read_run(run).state
    assert state.name == "Crashed"
    assert "had ended without a word" in state.message
    assert [child["state_type"] for child in read_children(run)][:1] == ["CRASHED"]


def test_a_worker_takes_runs_that_come_between_its_polls(stopped):
    fleet, pool = stopped.fleet, "cancel"
    (fleet.folder / f"{pool}.until").touch()

    def complete(*names: str) -> None:
        for run in [fleet.start_run(pool, name) for name in names]:
            wait_for(lambda run=run: read_run(run).state.is_completed(), lambda: fleet.log(pool))

    fleet.start_worker(pool, "--limit", "1", polls=3600)
    # The only poll may find this one, and its end may find one that comes soon after it.
    complete("first")
    wait_for(lambda: not children(fleet.workers[pool].pid), lambda: fleet.log(pool))
    time.sleep(3)
    # The worker is told of one, and has no place for the other until that one has ended.
    complete("second", "third")


def test_a_process_that_outlasts_its_run_is_ended(stopped):
    fleet, pool = stopped.fleet, LINGERING
    options = ("--limit", "1", "--linger-seconds", "5")
    fleet.start_worker(pool, *options)
    runs = [fleet.start_run(pool, name) for name in ("first", "second")]
    for run in runs:
        # The second has no place while the first one's process is there.
        wait_for(lambda run=run: read_run(run).state.is_completed(), lambda: fleet.log(pool))
    wait_for(lambda: not children(fleet.workers[pool].pid), lambda: fleet.log(pool))
    log = fleet.log(pool)
    for run in runs:
        assert f"Flow run {run} has been Completed for more than 5 s" in log
        assert read_run(run).state.is_completed(), log
        assert list((fleet.folder / "notes").glob(f"{run}.*")) == []


def test_a_worker_does_not_wait_for_a_server_that_is_silent(stopped, silent_server):
    fleet, pool = stopped.fleet, SILENT
    fleet.start_worker(pool)
    wait_for(lambda: "started!" in fleet.log(pool), lambda: fleet.log(pool))
    with silent_server():
        fleet.workers[pool].terminate()
        assert fleet.workers[pool].wait(120) == 0, fleet.log(pool)
    assert "Stopped, without a word to the server" in fleet.log(pool)


async def take(run: str, worker: str) -> None:
    """Leave a run as a worker does that is killed before it has started a process."""
    from prefect.client.orchestration import get_client
    from prefect.states import Pending

    async with get_client() as client:
        await client.set_flow_run_state(run, Pending())
        await client.update_flow_run_labels(run, {"prefect.worker.name": worker})


def test_what_is_used_of_prefects_internals_is_there():
    from prefect.runner._flow_run_executor import FlowRunExecutor, FlowRunExecutorContext
    from prefect.workers import process

    from prefect_operations import draining

    gone = [
        f"{getattr(owner, '__name__', owner)}.{name}"
        for owner, names in draining.INTERNALS.items()
        for name in names
        if not hasattr(owner, name)
    ]
    assert gone == []
    taken: Any = dict.fromkeys(
        ("flow_run", "starter", "process_manager", "state_proposer", "hook_runner")
    )
    executor = FlowRunExecutor(**taken, get_attempt_conclusion=lambda run: None)
    assert set(draining.EXECUTOR_INTERNALS) <= vars(executor).keys()
    assert issubclass(process.FlowRunExecutorContext, FlowRunExecutorContext)
    assert process.FlowRunExecutorContext is not FlowRunExecutorContext
    # Prefect's own worker stays the one that its command line finds.
    from prefect.workers.base import BaseWorker

    assert BaseWorker.get_worker_class_from_type("process") is process.ProcessWorker
