"""Flow runs are forked on a real worker host, and whatever is killed or broken ends in the truth.

The runs are those of a pool that one host's worker serves, warm as the inventory says.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

import pytest
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId
from prefect.client.schemas.objects import State
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings
from prefect.states import Cancelling

from tests.fleet.conftest import PROJECT, Laptop, Site, connect, members
from tests.operations.conftest import Playbook
from tests.operations.test_deploy import change_count

HOST = members("prefect_worker")[0]
POOL = "default"
UNIT = f"prefect-worker@{POOL}.service"
STATE = "/var/lib/prefect/warm"
FOLDER = "/srv/warm-tests"
TOLD = "/var/lib/prefect/warm-tests"
FLOWS = Path(__file__).with_name("warm_flows.py")
KINDS = {
    "talkative": "Completed",
    "threads": "Completed",
    "processes": "Completed",
    "asynchronous": "Completed",
    "generator": "Completed",
    "async_generator": "Completed",
    "failing": "Failed",
    "slow": "TimedOut",
    "retried": "Completed",
}
NAMES = (*KINDS, "suspended", "waiting")
_STEPS = "prefect.deployments.steps"
_WAIT_SECONDS = 240
# To be shown by a run that no zygote was asked for, or that one has refused.
STOCK = "the stock command runs this flow run"
T = TypeVar("T")


class Runs:
    """Runs of the flows of warm_flows.py on the host."""

    def __init__(self) -> None:
        self.deployments: dict[str, UUID] = {}

    def ask(self, question: Callable[[PrefectClient], Awaitable[T]]) -> T:
        """Ask the API."""

        async def talk() -> T:
            async with get_client() as client:
                return await question(client)

        return asyncio.run(talk())

    def start(self, flow: str, command: str | None = None, **parameters: object) -> UUID:
        """Start a run, by another command than its pool's if need be, and return its id."""
        deployment = self.deployments[flow]
        return self.ask(
            lambda client: client.create_flow_run_from_deployment(
                deployment,
                parameters=parameters,
                job_variables={"command": command} if command else {},
            )
        ).id

    def state(self, run: UUID) -> State[Any]:
        """Return its state."""
        state = self.ask(lambda client: client.read_flow_run(run)).state
        assert state is not None
        return state

    def end(self, run: UUID) -> State[Any]:
        """Wait for its end, and return its state."""
        wait_until(lambda: self.state(run).is_final(), f"the end of {run}")
        return self.state(run)

    def told(self, run: UUID) -> dict[str, Any]:
        """Return what a run has told of itself, which it does first of all."""
        path = f"{TOLD}/{run}.json"
        wait_until(lambda: host_file(path), f"the beginning of {run}, {self.state(run)}")
        return json.loads(connect(HOST).check_output("cat %s", path))

    def begin(self, command: str | None = None) -> tuple[UUID, dict[str, Any]]:
        """Start one that waits for `finish`; return its id, and what it tells."""
        run = self.start("waiting", command, until=f"{TOLD}/finish")
        return run, self.told(run)

    def finish(self) -> None:
        """Let those that wait go on."""
        connect(HOST).check_output(f"touch {TOLD}/finish")

    def forked(self) -> dict[str, Any]:
        """Start runs until one is forked, which may take a new zygote; return what it tells."""
        deadline = time.monotonic() + _WAIT_SECONDS
        while True:
            run = self.start("talkative")
            assert self.end(run).is_completed()
            if is_forked(run):
                return self.told(run)
            assert time.monotonic() < deadline, journal()


def wait_until(true: Callable[[], object], what: str) -> None:
    """Wait until something is true."""
    deadline = time.monotonic() + _WAIT_SECONDS
    while not true():
        assert time.monotonic() < deadline, f"{what}: not in {_WAIT_SECONDS} s\n{journal()}"
        time.sleep(0.5)


def host_file(path: str) -> bool:
    """Return whether the host has a file."""
    return connect(HOST).run("test -e %s", path).rc == 0


def journal() -> str:
    """Return the last that the worker, its runs and their zygotes have said."""
    return connect(HOST).check_output(f"journalctl -u {UNIT} -n 1500 -o cat")


def is_forked(run: UUID) -> bool:
    """Return whether a zygote has said how a run, which is over, has ended."""
    said = rf"flow run {run}: ended"
    # It says so after the run has told the server.
    for _ in range(20):
        if re.search(said, journal()):
            return True
        if not clients():
            break
        time.sleep(0.5)
    return re.search(said, journal()) is not None


def processes(what: str) -> list[int]:
    """Return the ids of the unit's processes whose command line matches."""
    found = connect(HOST).run("pgrep --uid prefect --full %s", what).stdout
    group = connect(HOST).check_output(f"systemctl show -P ControlGroup {UNIT}")
    ours = [
        pid for pid in found.split() if group in connect(HOST).run(f"cat /proc/{pid}/cgroup").stdout
    ]
    return sorted(map(int, ours))


def clients() -> list[int]:
    """Return the processes that the worker sees as its runs."""
    return processes("warm/client[.]py")


def client_of(run: UUID) -> int:
    """Return the process that the worker sees as this run; scheduled ones may be there as well."""
    (found,) = [
        pid
        for pid in clients()
        if connect(HOST).run(f"grep -qz FLOW_RUN_ID={run} /proc/{pid}/environ").rc == 0
    ]
    return found


def parent() -> int:
    """Return the process that keeps zygotes."""
    (found,) = processes("prefect_fleet[.]warm[.]parent")
    return found


def kill(pid: int) -> None:
    """Kill a process of the host."""
    connect(HOST).check_output(f"kill -9 {pid}")


def is_alive(pid: int) -> bool:
    """Return whether the host has a process, other than one that is only to be waited for."""
    return connect(HOST).run(f"grep -q '^State:[[:space:]]*[^Z]' /proc/{pid}/status").rc == 0


def own_memory(pid: int) -> int:
    """Return how many KiB a process has for itself alone."""
    rows = connect(HOST).check_output(f"cat /proc/{pid}/smaps_rollup")
    return sum(map(int, re.findall(r"Private_\w+: +(\d+)", rows)))


async def create() -> dict[str, UUID]:
    """Make the deployments."""
    async with get_client() as client:
        return {
            flow: await client.create_deployment(
                flow_id=await client.create_flow_from_name(flow.replace("_", "-")),
                name="warm-tests",
                work_pool_name=POOL,
                entrypoint=f"warm_flows.py:{flow}",
                pull_steps=[{f"{_STEPS}.set_working_directory": {"directory": FOLDER}}],
                enforce_parameter_schema=False,
            )
            for flow in NAMES
        }


async def remove() -> None:
    """Remove the deployments."""
    async with get_client() as client:
        for flow in NAMES:
            with contextlib.suppress(ObjectNotFound):
                name = f"{flow.replace('_', '-')}/warm-tests"
                found = await client.read_deployment_by_name(name)
                await client.delete_deployment(found.id)


@pytest.fixture(scope="module")
def runs(laptop: Laptop, site: Site) -> Iterator[Runs]:
    """The deployments; removed afterwards."""
    host = connect(HOST)
    assert "--warm-start" in host.check_output(f"cat /etc/prefect/workers/{POOL}.env"), (
        "this fleet's inventory has no prefect_worker_warm_start: true"
    )
    made = Runs()
    with temporary_settings({PREFECT_API_URL: laptop.url, PREFECT_API_AUTH_STRING: site.auth}):
        try:
            asyncio.run(remove())
            host.check_output(f"install -d {FOLDER} && install -d -o prefect {TOLD}")
            host.check_output("printf %%s %s > %s", FLOWS.read_text(), f"{FOLDER}/warm_flows.py")
            made.deployments = asyncio.run(create())
            made.forked()
            yield made
        finally:
            made.finish()
            host.run(f"rm -r {FOLDER} {TOLD}")
            asyncio.run(remove())


@pytest.fixture(autouse=True)
def nothing_waits(runs: Runs) -> Iterator[None]:
    """Each test has runs of its own that wait for it."""
    connect(HOST).check_output(f"rm -f {TOLD}/finish")
    yield
    runs.finish()
    wait_until(lambda: not clients(), "the end of all runs")


@pytest.fixture(scope="module")
def of_all_kinds(runs: Runs) -> dict[str, UUID]:
    """A run of each kind; they run beside one another."""
    return {kind: runs.start(kind) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_a_flow_of_each_kind_is_forked_and_ends_as_it_should(
    runs: Runs, of_all_kinds: dict[str, UUID], kind: str
) -> None:
    run = of_all_kinds[kind]
    state = runs.end(run)
    assert state.name == KINDS[kind], state
    assert is_forked(run)
    assert runs.told(run)["folder"] == FOLDER


def test_what_a_run_prints_and_logs_reaches_the_server_and_the_journal(runs: Runs) -> None:
    run = runs.start("talkative")
    assert runs.end(run).is_completed()
    ours = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run]))

    def messages() -> set[str]:
        return {log.message for log in runs.ask(lambda client: client.read_logs(ours))}

    wait_until(lambda: {"printed", "logged"} <= messages(), "the run's logs")
    assert "| logged" in journal() or "- logged" in journal()


def test_a_run_shares_what_its_zygote_has_imported(runs: Runs) -> None:
    runs.forked()
    state = json.loads(connect(HOST).check_output(f"cat {STATE}/{POOL}.json"))
    assert state["copied_for"] is None
    (run, warm), (_, stock) = (
        runs.begin(),
        runs.begin("/opt/prefect/venv/bin/python -m prefect.engine"),
    )
    ours, theirs = own_memory(warm["pid"]), own_memory(stock["pid"])
    # Half, if the child copies each object whose references it counts.
    assert ours < 0.4 * theirs, f"{ours} KiB, and {theirs} by the stock command"
    runs.finish()
    assert runs.end(run).is_completed()


def test_a_suspended_run_is_resumed_in_a_process_of_its_own(runs: Runs) -> None:
    run = runs.start("suspended")
    first = runs.told(run)
    wait_until(lambda: runs.state(run).is_paused(), "its suspension")
    wait_until(lambda: not is_alive(first["pid"]), "the end of its first process")
    assert runs.ask(lambda client: client.resume_flow_run(run)) is not None
    assert runs.end(run).is_completed()
    assert runs.told(run)["pid"] != first["pid"]


def test_a_cancelled_run_is_cancelled_and_its_hook_runs(runs: Runs) -> None:
    run, told = runs.begin()
    runs.ask(lambda client: client.set_flow_run_state(run, Cancelling()))
    assert runs.end(run).is_cancelled()
    wait_until(lambda: host_file(f"{TOLD}/{run}.cancelled"), "its hook")
    assert not is_alive(told["pid"])


@pytest.mark.parametrize("who", ["child", "client"])
def test_a_killed_run_is_crashed_and_its_hook_runs(runs: Runs, who: str) -> None:
    run, told = runs.begin()
    client = client_of(run)
    kill(told["pid"] if who == "child" else client)
    assert runs.end(run).is_crashed()
    wait_until(lambda: host_file(f"{TOLD}/{run}.crashed"), "its hook")
    wait_until(lambda: not is_alive(told["pid"]) and not is_alive(client), "its processes' end")


@pytest.mark.parametrize("who", ["zygote", "parent"])
def test_a_run_outlives_what_has_forked_it_and_the_next_is_forked(runs: Runs, who: str) -> None:
    run, told = runs.begin()
    before = parent()
    kill(told["parent"] if who == "zygote" else before)
    assert runs.forked()["parent"] != told["parent"]
    assert (parent() != before) == (who == "parent")
    assert is_alive(told["pid"])
    runs.finish()
    assert runs.end(run).is_completed()


def test_a_killed_worker_takes_its_runs_along_and_the_next_is_forked(runs: Runs) -> None:
    run, told = runs.begin()
    zygote = told["parent"]
    connect(HOST).check_output(f"systemctl kill --kill-whom=main -s KILL {UNIT}")
    state = runs.end(run)
    assert state.is_crashed()
    assert "had ended without a word" in str(state.message)
    assert not is_alive(told["pid"])
    assert not is_alive(zygote)
    assert runs.forked()["parent"] != zygote


def test_a_stopped_worker_lets_its_runs_finish(runs: Runs) -> None:
    run, _ = runs.begin()
    connect(HOST).check_output(f"systemctl stop --no-block {UNIT}")
    try:
        wait_until(lambda: "Draining: waiting" in journal(), "the drain")
        runs.finish()
        assert runs.end(run).is_completed()
        state = f"systemctl show -P ActiveState {UNIT}"
        wait_until(lambda: connect(HOST).check_output(state) == "inactive", "its end")
        assert connect(HOST).run("pgrep --full warm[.]parent.*--pool.%s", POOL).rc == 1
    finally:
        connect(HOST).check_output(f"systemctl start {UNIT}")
    runs.forked()


BREAKS = "import os\nos._exit(3)\n"


def test_another_release_has_another_zygote_and_runs_in_flight_keep_theirs(
    runs: Runs, code: Path, playbook: Playbook
) -> None:
    run, told = runs.begin()
    # Its list has a module that ends whoever imports it.
    (code / "src" / "prefect_examples" / "ends.py").write_text(BREAKS)
    with (code / "warm-imports.txt").open("a") as listed:
        listed.write("prefect_examples.ends\n")
    try:
        assert change_count(playbook("deploy", fleet_code=code)) > 0
        assert runs.forked()["parent"] != told["parent"]
        assert is_alive(told["parent"])
        runs.finish()
        assert runs.end(run).is_completed()
        wait_until(lambda: not is_alive(told["parent"]), "the end of the zygote before")
        state = json.loads(connect(HOST).check_output(f"cat {STATE}/{POOL}.json"))
        assert "ended the zygote" in state["left_out"]["prefect_examples.ends"]
        assert "prefect_aws.s3" in state["loaded"]
    finally:
        assert change_count(playbook("deploy", fleet_code=PROJECT)) > 0


def test_where_nothing_can_be_forked_the_stock_command_runs(
    runs: Runs, code: Path, playbook: Playbook
) -> None:
    zygote = code / "src" / "prefect_fleet" / "warm" / "zygote.py"
    sound = zygote.read_text()
    zygote.write_text("raise RuntimeError('broken on purpose')\n")
    try:
        assert change_count(playbook("deploy", fleet_code=code)) > 0
        for _ in range(2):
            run = runs.start("talkative")
            assert runs.end(run).is_completed()
            assert not is_forked(run)
        said = journal()
        assert STOCK in said
        assert "no zygote can be made" in said
    finally:
        zygote.write_text(sound)
        assert change_count(playbook("deploy", fleet_code=PROJECT)) > 0
    runs.forked()
