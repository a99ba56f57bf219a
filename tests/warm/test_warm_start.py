"""Flow runs are forked on a real worker host, and whatever is killed or broken ends in the truth.

The runs are those of a pool that one host's worker serves, warm as the inventory says.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect.states import Cancelling

from tests.fleet.conftest import PROJECT, Laptop, Site, connect
from tests.fleet.host_runs import (
    HOST,
    POOL,
    STOCK_COMMAND,
    UNIT,
    HostRuns,
    host_file,
    is_alive,
    journal,
    kill_worker,
    said_as_forked,
    unit_group,
    wait_until,
)
from tests.operations.conftest import Playbook
from tests.operations.test_deploy import change_count

STATE = "/var/lib/prefect/warm"
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
_FORKED_SECONDS = 240
# To be shown by a run that no zygote was asked for, or that one has refused.
STOCK = "the stock command runs this flow run"


class WarmRuns(HostRuns):
    """Runs of the flows of warm_flows.py on the host."""

    def begin(self, variables: dict[str, Any] | None = None) -> tuple[UUID, dict[str, Any]]:
        """Start one that waits for `finish`; return its id, and what it tells."""
        run = self.start("waiting", variables, until=self.until)
        return run, self.told(run)

    def forked(self) -> dict[str, Any]:
        """Start runs until one is forked, which may take a new zygote; return what it tells."""
        deadline = time.monotonic() + _FORKED_SECONDS
        while True:
            run = self.start("talkative")
            assert self.end(run).is_completed()
            if is_forked(run):
                return self.told(run)
            assert time.monotonic() < deadline, journal()


def is_forked(run: UUID) -> bool:
    """Return whether a zygote has said how a run, which is over, has ended."""
    # It says so after the run has told the server.
    for _ in range(20):
        if said_as_forked(run):
            return True
        if not clients():
            break
        time.sleep(0.5)
    return said_as_forked(run)


def processes(what: str) -> list[int]:
    """Return the ids of the unit's processes whose command line matches."""
    found = connect(HOST).run("pgrep --uid prefect --full %s", what).stdout
    group = unit_group()
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
    (found,) = parents()
    return found


def parents() -> list[int]:
    """Return all such processes: there is none between one and the next."""
    return processes("prefect_fleet[.]warm[.]parent")


def kill(pid: int) -> None:
    """Kill a process of the host."""
    connect(HOST).check_output(f"kill -9 {pid}")


def own_memory(pid: int) -> int:
    """Return how many KiB a process has for itself alone."""
    rows = connect(HOST).check_output(f"cat /proc/{pid}/smaps_rollup")
    return sum(map(int, re.findall(r"Private_\w+: +(\d+)", rows)))


@pytest.fixture(scope="module")
def runs(laptop: Laptop, site: Site) -> Iterator[WarmRuns]:
    """The deployments; removed afterwards."""
    host = connect(HOST)
    assert "--warm-start" in host.check_output(f"cat /etc/prefect/workers/{POOL}.env"), (
        "this fleet's inventory has no prefect_worker_warm_start: true"
    )
    made = WarmRuns(FLOWS, NAMES)
    with made.deployed(laptop, site):
        made.forked()
        yield made


@pytest.fixture(autouse=True)
def nothing_waits(runs: WarmRuns) -> Iterator[None]:
    """Each test has runs of its own that wait for it."""
    runs.let_wait()
    yield
    runs.finish()
    wait_until(lambda: not clients(), "the end of all runs")


@pytest.fixture(scope="module")
def of_all_kinds(runs: WarmRuns) -> dict[str, UUID]:
    """A run of each kind; they run beside one another."""
    return {kind: runs.start(kind) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_a_flow_of_each_kind_is_forked_and_ends_as_it_should(
    runs: WarmRuns, of_all_kinds: dict[str, UUID], kind: str
) -> None:
    run = of_all_kinds[kind]
    state = runs.end(run)
    assert state.name == KINDS[kind], state
    assert is_forked(run)
    assert runs.told(run)["folder"] == runs.folder


def test_what_a_run_prints_and_logs_reaches_the_server_and_the_journal(runs: WarmRuns) -> None:
    run = runs.start("talkative")
    assert runs.end(run).is_completed()
    wait_until(lambda: {"printed", "logged"} <= set(runs.messages(run)), "the run's logs")
    assert "| logged" in journal() or "- logged" in journal()


def test_a_run_shares_what_its_zygote_has_imported(runs: WarmRuns) -> None:
    runs.forked()
    state = json.loads(connect(HOST).check_output(f"cat {STATE}/{POOL}.json"))
    assert state["copied_for"] is None
    (run, warm), (_, stock) = (
        runs.begin(),
        runs.begin({"command": STOCK_COMMAND}),
    )
    ours, theirs = own_memory(warm["pid"]), own_memory(stock["pid"])
    # Half, if the child copies each object whose references it counts.
    assert ours < 0.4 * theirs, f"{ours} KiB, and {theirs} by the stock command"
    runs.finish()
    assert runs.end(run).is_completed()


def test_a_suspended_run_is_resumed_in_a_process_of_its_own(runs: WarmRuns) -> None:
    run = runs.start("suspended")
    first = runs.told(run)
    wait_until(lambda: runs.state(run).is_paused(), "its suspension")
    wait_until(lambda: not is_alive(first["pid"]), "the end of its first process")
    assert runs.ask(lambda client: client.resume_flow_run(run)) is not None
    assert runs.end(run).is_completed()
    assert runs.told(run)["pid"] != first["pid"]


def test_a_cancelled_run_is_cancelled_and_its_hook_runs(runs: WarmRuns) -> None:
    run, told = runs.begin()
    runs.ask(lambda client: client.set_flow_run_state(run, Cancelling()))
    assert runs.end(run).is_cancelled()
    wait_until(lambda: host_file(f"{runs.told_in}/{run}.cancelled"), "its hook")
    assert not is_alive(told["pid"])


@pytest.mark.parametrize("who", ["child", "client"])
def test_a_killed_run_is_crashed_and_its_hook_runs(runs: WarmRuns, who: str) -> None:
    run, told = runs.begin()
    client = client_of(run)
    kill(told["pid"] if who == "child" else client)
    assert runs.end(run).is_crashed()
    wait_until(lambda: host_file(f"{runs.told_in}/{run}.crashed"), "its hook")
    wait_until(lambda: not is_alive(told["pid"]) and not is_alive(client), "its processes' end")


@pytest.mark.parametrize("who", ["zygote", "parent"])
def test_a_run_outlives_what_has_forked_it_and_the_next_is_forked(runs: WarmRuns, who: str) -> None:
    run, told = runs.begin()
    before = parent()
    kill(told["parent"] if who == "zygote" else before)
    if who == "parent":
        # A zygote that was on its way may take runs until it sees that its parent has gone.
        wait_until(lambda: set(parents()) - {before}, "another parent")
    assert runs.forked()["parent"] != told["parent"]
    assert (parent() != before) == (who == "parent")
    assert is_alive(told["pid"])
    runs.finish()
    assert runs.end(run).is_completed()


def test_a_killed_worker_takes_its_runs_along_and_the_next_is_forked(runs: WarmRuns) -> None:
    run, told = runs.begin()
    zygote = told["parent"]
    kill_worker()
    state = runs.end(run)
    assert state.is_crashed()
    assert "had ended without a word" in str(state.message)
    assert not is_alive(told["pid"])
    assert not is_alive(zygote)
    assert runs.forked()["parent"] != zygote


def test_a_stopped_worker_lets_its_runs_finish(runs: WarmRuns) -> None:
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
    runs: WarmRuns, code: Path, playbook: Playbook
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
    runs: WarmRuns, code: Path, playbook: Playbook
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
