"""Warm starts of Prefect's own engine, on a real server: what holds internals.py to its version."""

import asyncio
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect import __version__
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId
from prefect.client.schemas.objects import FlowRun, State
from prefect.states import Cancelling, Pending

from tests.unit.warm import CLIENT, alive, children, wait_until, wake

STOCK = [sys.executable, "-m", "prefect.engine"]
FLOWS = """
import json, logging, os, sys, time
from pathlib import Path
from prefect import flow, get_run_logger, task
from prefect.futures import wait
from prefect.settings import get_current_settings
from prefect.task_runners import ProcessPoolTaskRunner, ThreadPoolTaskRunner


@task(retries=1)
def double(number):
    if number == 3 and not Path("tried").exists():
        Path("tried").touch()
        raise ValueError("the first time")
    return 2 * number


@task
async def triple(number):
    return 3 * number


@flow(log_prints=True)
def facts(where: str):
    loggers = logging.Logger.manager.loggerDict
    Path(where).write_text(json.dumps({
        "settings": get_current_settings().to_environment_variables(exclude_unset=True),
        "loggers": {name: [logger.level, logger.propagate, [repr(h) for h in logger.handlers]]
                    for name, logger in [("root", logging.getLogger()), *sorted(loggers.items())]
                    if isinstance(logger, logging.Logger)
                    and (name == "root" or logger.handlers or logger.level)},
        "environment": {k: v for k, v in os.environ.items() if "FLOW_RUN_ID" not in k},
        "path": sys.path,
        "argv": sys.argv,
    }))
    print("printed")


@flow
def inner(number):
    return double(number)


@flow(task_runner=ThreadPoolTaskRunner(max_workers=2))
def threads():
    assert [f.result() for f in double.map([1, 2, 3])] == [2, 4, 6]
    assert inner(4) == 8


@flow(task_runner=ProcessPoolTaskRunner(max_workers=2))
def processes():
    assert [f.result() for f in double.map([1, 2])] == [2, 4]


@flow
async def asynchronous():
    assert await triple(2) == 6
    assert inner(5) == 10


@flow
def generator():
    yield 1
    yield 2


@flow
async def async_generator():
    yield 1


@flow
def failing():
    raise ValueError("on purpose")


@flow(timeout_seconds=0.5)
def slow():
    time.sleep(30)


@flow(retries=1)
def twice():
    if not Path("once").exists():
        Path("once").touch()
        raise ValueError("the first time")


@flow
def waiting():
    Path("began").touch()
    time.sleep(60)


def say_cancelled(flow, flow_run, state):
    Path(flow_run.parameters["folder"], "cancelled").touch()


def say_crashed(flow, flow_run, state):
    path = Path(flow_run.parameters["folder"], "crashed")
    path.with_suffix(".part").write_text(str(os.getpid()))
    path.with_suffix(".part").rename(path)


@flow(on_cancellation=[say_cancelled], on_crashed=[say_crashed])
def served(folder: str):
    Path(folder, "pid").write_text(str(os.getpid()))
    time.sleep(60)
"""


class Runs:
    """Flow runs by hand: what a process worker does around them is left out."""

    def __init__(self, folder: Path, socket: Path) -> None:
        self.folder = folder
        self.socket = socket
        # pytest sets COLUMNS and LINES later, which rich asks for.
        self.environment = dict(os.environ)
        (folder / "flows.py").write_text(FLOWS)

    def create(
        self,
        name: str,
        parameters: dict[str, Any] | None = None,
        work_pool_name: str | None = None,
        job_variables: dict[str, Any] | None = None,
    ) -> FlowRun:
        """Create a run of a deployment of this flow, which is scheduled if it has a work pool."""
        return asyncio.run(self._create(name, parameters or {}, work_pool_name, job_variables))

    async def _create(
        self,
        name: str,
        parameters: dict[str, Any],
        work_pool_name: str | None,
        job_variables: dict[str, Any] | None,
    ) -> FlowRun:
        async with get_client() as client:
            flow_id = await client.create_flow_from_name(name)
            deployment = await client.create_deployment(
                flow_id,
                "warm",
                entrypoint=f"{self.folder}/flows.py:{name}",
                work_pool_name=work_pool_name,
                enforce_parameter_schema=False,
            )
            return await client.create_flow_run_from_deployment(
                deployment,
                parameters=parameters,
                state=None if work_pool_name else Pending(),
                job_variables=job_variables,
            )

    def begin(
        self, run: FlowRun, stock: bool, dotenv: str = "", **environment: str
    ) -> "subprocess.Popen[str]":
        """Start its process, in a folder that has a file .env if anything is to be in it."""
        work = self.folder / str(run.id)
        work.mkdir()
        if dotenv:
            (work / ".env").write_text(dotenv)
        return subprocess.Popen(
            STOCK if stock else [*CLIENT, str(self.socket), *STOCK],
            cwd=work,
            env={**self.environment, "PREFECT__FLOW_RUN_ID": str(run.id)} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def end(self, run: FlowRun, process: "subprocess.Popen[str]") -> tuple[State[Any], str]:
        """Wait for its end; return its state, and what it wrote."""
        out, _ = process.communicate(timeout=120)
        assert "prefect-warm:" not in out, out
        with get_client(sync_client=True) as client:
            state = client.read_flow_run(run.id).state
        assert state is not None
        return state, out


@pytest.fixture(scope="module")
def runs(prefect_api: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    folder = tmp_path_factory.mktemp("warm")
    # The first cannot be imported, the second ends every process that imports it.
    (folder / "breaks.py").write_text("raise ValueError('broken')")
    (folder / "ends.py").write_text("import os; os._exit(3)")
    (folder / "list").write_text("breaks\nends\nprefect.deployments.steps\n")
    path = os.pathsep.join([os.environ["PYTHONPATH"], str(folder)])
    with pytest.MonkeyPatch.context() as patch, (folder / "log").open("w") as log:
        patch.setenv("PYTHONPATH", path)
        made = Runs(folder, folder / "socket")
        command = [sys.executable, "-m", "prefect_fleet.warm.parent", "--pool", "default"]
        command += ["--state", str(folder), "--list", str(folder / "list")]
        command += ["--socket", str(folder / "socket")]
        parent = subprocess.Popen(command, env=made.environment, stdout=log, stderr=log)
        wait_until(made.socket.exists, (folder / "log").read_text())
        time.sleep(0.5)
        assert not children(parent.pid), "a pool without runs has a zygote"
        wake(made.socket)
        wait_until((folder / "default.json").exists, (folder / "log").read_text(), 120)
        yield made
        parent.terminate()
        assert parent.wait(30) == 0


SETTINGS = {
    "PREFECT_LOGGING_LEVEL": "DEBUG",
    "PREFECT_LOGGING_EXTRA_LOGGERS": "mine",
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "WARNING",
    "PREFECT_RESULTS_PERSIST_BY_DEFAULT": "true",
    "PREFECT_CLIENT_MAX_RETRIES": "3",
}


@pytest.mark.parametrize(
    ("given", "retries"),
    [
        # The zygote reads these for its first run, and they stay its own.
        (SETTINGS, "3"),
        ({"PREFECT_CLIENT_MAX_RETRIES": "4", "MINE": "1"}, "4"),
        (SETTINGS | {"MINE": "2"}, "3"),
        (SETTINGS | {"dotenv": 'PREFECT_CLIENT_CUSTOM_HEADERS={"x-mine":"3"}'}, "3"),
        ({"prefect_client_max_retries": "5"}, "5"),
    ],
    ids=["first", "others", "those of the first", "from a file", "in small letters"],
)
def test_settings_and_logging_are_those_of_a_new_process(
    runs: Runs, given: dict[str, str], retries: str
) -> None:
    """For each supported version of Prefect: it reads both when it is imported."""
    assert __version__.startswith("3.9.")
    found = []
    for stock in (False, True):
        where = runs.folder / "facts"
        run = runs.create("facts", {"where": str(where)})
        state, out = runs.end(run, runs.begin(run, stock, **given))
        assert state.is_completed(), out
        text = where.read_text().replace(str(run.id), "RUN")
        found.append(json.loads(text))
    assert found[0] == found[1]
    assert found[0]["settings"]["PREFECT_CLIENT_MAX_RETRIES"] == retries
    assert ("dotenv" in given) == ("PREFECT_CLIENT_CUSTOM_HEADERS" in found[0]["settings"])


@pytest.mark.parametrize(
    ("name", "ends"),
    [
        ("threads", "Completed"),
        ("processes", "Completed"),
        ("asynchronous", "Completed"),
        ("generator", "Completed"),
        ("async_generator", "Completed"),
        ("failing", "Failed"),
        ("slow", "TimedOut"),
        ("twice", "Completed"),
    ],
)
def test_flow_ends_as_it_should(runs: Runs, name: str, ends: str) -> None:
    run = runs.create(name)
    state, out = runs.end(run, runs.begin(run, False))
    assert state.name == ends, out


def test_logs_reach_the_server_and_the_caller(runs: Runs) -> None:
    run = runs.create("facts", {"where": str(runs.folder / "logged")})
    _, out = runs.end(run, runs.begin(run, False))
    assert "printed" in out
    ours = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[UUID(str(run.id))]))

    def arrived() -> bool:
        with get_client(sync_client=True) as client:
            return "printed" in [log.message for log in client.read_logs(ours)]

    wait_until(arrived, "its log on the server", 60)


def test_terminated_run_is_crashed(runs: Runs) -> None:
    run = runs.create("waiting")
    process = runs.begin(run, False)
    wait_until((runs.folder / str(run.id) / "began").exists, "its beginning", 60)
    process.terminate()
    state, out = runs.end(run, process)
    assert state.is_crashed(), out
    assert process.returncode == -15


def test_imports_that_break_are_left_out_and_told(runs: Runs) -> None:
    state = json.loads((runs.folder / "default.json").read_text())
    assert state["left_out"].keys() == {"breaks", "ends"}
    assert "ValueError: broken" in state["left_out"]["breaks"]
    assert "ended the zygote with status 3" in state["left_out"]["ends"]
    assert "ends is not imported beforehand" in (runs.folder / "log").read_text()


@pytest.fixture(scope="module")
def worker(runs: Runs) -> Iterator[int]:
    """Process id of a stock worker whose work pool has the client as its command."""
    from prefect.workers.process import ProcessWorker

    template = ProcessWorker.get_default_base_job_template()
    command = shlex.join([*CLIENT, str(runs.socket), *STOCK])
    template["variables"]["properties"]["command"]["default"] = command
    with get_client(sync_client=True) as client:
        client.create_work_pool(
            WorkPoolCreate(name="warm", type="process", base_job_template=template)
        )
    start = [sys.executable, "-m", "prefect", "worker", "start", "--pool", "warm"]
    with (runs.folder / "worker").open("w") as log:
        process = subprocess.Popen(
            [*start, "--type", "process", "--install-policy", "never"],
            env=runs.environment | {"PREFECT_WORKER_QUERY_SECONDS": "1"},
            stdout=log,
            stderr=log,
        )
    yield process.pid
    process.terminate()
    process.wait(60)


class Served:
    """A run of `served` that a worker has started."""

    def __init__(self, runs: Runs, worker: int) -> None:
        self.folder = runs.folder / f"served-{len(list(runs.folder.glob('served-*')))}"
        self.folder.mkdir()
        parameters = {"folder": str(self.folder)}
        self.run = runs.create("served", parameters, work_pool_name="warm")
        wait_until(self._began, "its beginning", 120)
        self.child = int((self.folder / "pid").read_text())
        (self.client,) = children(worker)

    def _began(self) -> bool:
        path = self.folder / "pid"
        return path.exists() and bool(path.read_text())

    def state(self) -> State[Any]:
        """Return its state."""
        with get_client(sync_client=True) as client:
            state = client.read_flow_run(self.run.id).state
        assert state is not None
        return state

    def ends(self) -> State[Any]:
        """Wait until it has ended; return its state."""
        wait_until(lambda: self.state().is_final(), "its end", 120)
        assert not alive(self.child)
        wait_until(lambda: not alive(self.client), "the client's end")
        return self.state()


@pytest.fixture(scope="module")
def fleets(runs: Runs) -> Iterator["subprocess.Popen[bytes]"]:
    """The fleet's own worker, which has a parent of its own."""
    folder = runs.folder / "fleet"
    with get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name="fleet", type="process"))
    command = [sys.executable, "-m", "prefect_operations.worker", "--pool", "fleet"]
    command += ["--name", "fleet", "--drain-seconds", "60", "--warm-start", str(folder)]
    settings = {"PREFECT_WORKER_QUERY_SECONDS": "1", "PREFECT_CLIENT_MAX_RETRIES": "2"}
    with (runs.folder / "fleet.log").open("w") as log:
        worker = subprocess.Popen(
            command, cwd=runs.folder, env=runs.environment | settings, stdout=log, stderr=log
        )
    wait_until((folder / "fleet.socket").exists, "a parent", 120)
    wake(folder / "fleet.socket")
    wait_until((folder / "fleet.json").exists, "a zygote", 120)
    yield worker
    worker.kill()
    worker.wait()


def said(runs: Runs) -> str:
    return (runs.folder / "fleet.log").read_text()


def test_a_killed_runs_hooks_are_not_in_the_fleets_worker(
    runs: Runs, fleets: "subprocess.Popen[bytes]"
) -> None:
    folder = runs.folder / "hooked"
    folder.mkdir()
    run = runs.create("served", {"folder": str(folder)}, work_pool_name="fleet")
    wait_until(lambda: (folder / "pid").exists() and (folder / "pid").read_text(), "it", 120)
    os.kill(int((folder / "pid").read_text()), signal.SIGKILL)
    wait_until((folder / "crashed").exists, said(runs), 120)
    assert int((folder / "crashed").read_text()) != fleets.pid
    with get_client(sync_client=True) as client:
        state = client.read_flow_run(run.id).state
    assert state is not None
    assert state.is_crashed()


def test_fleets_worker_gives_a_run_its_own_settings_and_takes_its_parent_along(
    runs: Runs, fleets: "subprocess.Popen[bytes]"
) -> None:
    where = runs.folder / "facts-of-the-fleet"
    # Of the worker it has 2.
    own = {"env": {"PREFECT_CLIENT_MAX_RETRIES": "3"}}
    run = runs.create("facts", {"where": str(where)}, "fleet", own)
    wait_until(where.exists, said(runs), 120)
    parents = children(fleets.pid)
    fleets.terminate()
    assert fleets.wait(120) == 0
    wait_until(lambda: not any(map(alive, parents)), "the parent's end")
    assert f"flow run {run.id}: ended with status 0" in said(runs)
    assert json.loads(where.read_text())["settings"]["PREFECT_CLIENT_MAX_RETRIES"] == "3"
    with get_client(sync_client=True) as client:
        state = client.read_flow_run(run.id).state
    assert state is not None
    assert state.is_completed()


def test_what_the_fleets_worker_uses_of_prefects_internals_is_there() -> None:
    from prefect.runner._starter_engine import EngineCommandStarter

    from prefect_operations.warm import INTERNALS

    assert set(INTERNALS) <= vars(EngineCommandStarter()).keys()


def test_cancelled_run_is_cancelled(runs: Runs, worker: int) -> None:
    served = Served(runs, worker)
    # The intent reaches the engine before the signal does, which runs the hook.
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(served.run.id, Cancelling())
    assert served.ends().is_cancelled(), (runs.folder / "worker").read_text()
    assert (served.folder / "cancelled").exists()


@pytest.mark.parametrize("who", ["child", "client"])
def test_killed_run_is_crashed(runs: Runs, worker: int, who: str) -> None:
    served = Served(runs, worker)
    os.kill(getattr(served, who), signal.SIGKILL)
    assert served.ends().is_crashed(), (runs.folder / "worker").read_text()
