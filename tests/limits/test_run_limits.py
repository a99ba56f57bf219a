"""A flow run takes what it may, and no more: on a worker host with all control groups.

The runs are those of a pool that one host's worker serves, warm, and of the same pool by the stock
command.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId
from prefect.states import Cancelling

from tests.fleet.conftest import Laptop, Site, connect
from tests.fleet.host_runs import (
    HOST,
    STOCK_COMMAND,
    UNIT,
    HostRuns,
    host_file,
    is_alive,
    kill_worker,
    said_as_forked,
    unit_group,
    wait_until,
)

FLOWS = Path(__file__).with_name("limits_flows.py")
NAMES = ("waits", "eats", "eats_in_a_child", "forks", "spins", "leaves")
# How a run is started.
WARM: dict[str, Any] = {}
STOCK: dict[str, Any] = {"command": STOCK_COMMAND}
BOTH = pytest.mark.parametrize("how", [WARM, STOCK], ids=["warm", "stock"])
_MEBIBYTE = 1 << 20


def artifacts(runs: HostRuns, run: UUID) -> list[Any]:
    """Return the tables that show what a run has taken."""
    ours = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run]))
    found = runs.ask(lambda client: client.read_artifacts(artifact_filter=ours))
    return [json.loads(str(one.data)) for one in found if one.key == "fleet-run-usage"]


def members_of(group: str) -> set[int]:
    """Return the processes of a control group."""
    return set(map(int, connect(HOST).check_output("cat %s/cgroup.procs", group).split()))


def manifest(run: UUID) -> dict[str, Any]:
    """Return a run's manifest when it says what the run has taken."""
    found: list[dict[str, Any]] = []

    def is_there() -> bool:
        shown = connect(HOST).run("prefect-manifests show %s", str(run))
        if shown.rc == 0 and json.loads(shown.stdout)["usage"]:
            found.append(json.loads(shown.stdout))
        return bool(found)

    wait_until(is_there, f"the usage of {run} in its manifest")
    return found[0]


@pytest.fixture(scope="module")
def runs(laptop: Laptop, site: Site) -> Iterator[HostRuns]:
    """The deployments; removed afterwards."""
    made = HostRuns(FLOWS, NAMES)
    with made.deployed(laptop, site):
        # Until there is a zygote, which takes more than one run where the processor is slow.
        wait_until(lambda: is_forked(made), "a run that is forked")
        yield made


def is_forked(runs: HostRuns) -> bool:
    """Return whether a run is forked now."""
    run = runs.start("leaves", WARM)
    assert runs.end(run).is_completed()
    return said_as_forked(run)


@pytest.fixture(autouse=True)
def nothing_waits(runs: HostRuns) -> Iterator[None]:
    """Each test has runs of its own that wait for it, and leaves no control group behind."""
    runs.let_wait()
    yield
    runs.finish()
    find = "find %s -mindepth 1 -maxdepth 1 -name 'run-*'"
    group = f"/sys/fs/cgroup{unit_group()}"
    wait_until(lambda: not connect(HOST).check_output(find, group), "the groups' end")


def test_the_unit_has_what_limits_need() -> None:
    host = connect(HOST)
    folder = f"/sys/fs/cgroup{unit_group()}"
    given = host.check_output("cat %s", f"{folder}/cgroup.subtree_control").split()
    assert set(given) >= {"memory", "pids", "cpu"}
    main = int(host.check_output(f"systemctl show -P MainPID {UNIT}"))
    assert main in members_of(f"{folder}/worker")
    # The pool's own limit is root's.
    for name in ("memory.max", "pids.max"):
        assert host.check_output("stat -c %%U %s", f"{folder}/{name}") == "root"


@BOTH
@pytest.mark.parametrize("flow", ["eats", "eats_in_a_child"])
def test_a_run_out_of_memory_is_reported_as_that_and_its_neighbours_live(
    runs: HostRuns, how: dict[str, Any], flow: str
) -> None:
    worker = connect(HOST).check_output(f"systemctl show -P MainPID {UNIT}")
    neighbour = runs.start("waits", how, until=runs.until)
    beside = runs.told(neighbour)
    run = runs.start(flow, how | {"memory_max": "192M"}, mebibytes=600)
    state = runs.end(run)
    assert state.is_crashed()
    assert str(state.message).startswith(
        "Out of memory: the run wanted more than its memory_max of 192M, and the kernel ended it. "
        "Give its deployment a larger memory_max"
    )
    told = runs.told(run)
    wait_until(lambda: not is_alive(told["pid"]), "its end")
    assert not host_file(told["group"])
    assert is_alive(beside["pid"])
    assert runs.state(neighbour).is_running()
    runs.finish()
    assert runs.end(neighbour).is_completed()
    assert connect(HOST).check_output(f"systemctl show -P MainPID {UNIT}") == worker
    said = manifest(run)
    assert said["usage"]["out_of_memory"]
    assert 180 * _MEBIBYTE < said["usage"]["memory_peak"] <= 192 * _MEBIBYTE
    # The message stays when the worker has said its last word, too.
    assert str(runs.state(run).message).startswith("Out of memory")


@BOTH
def test_a_run_that_stays_below_its_limit_is_completed(runs: HostRuns, how: dict[str, Any]) -> None:
    run = runs.start("eats", how | {"memory_max": "512M"}, mebibytes=200)
    assert runs.end(run).is_completed()
    said = manifest(run)["usage"]
    assert not said["out_of_memory"]
    assert 200 * _MEBIBYTE < said["memory_peak"] < 512 * _MEBIBYTE
    assert said["processor_seconds"] > 0
    wait_until(lambda: artifacts(runs, run), "the artifact")
    (table,) = artifacts(runs, run)
    assert [row["value"] for row in table] == [
        said["memory_peak"],
        said["processor_seconds"],
        "no",
    ]
    assert manifest(run)["artifacts"] in ([], None)


@BOTH
def test_a_run_gets_no_more_threads_than_it_may_have(runs: HostRuns, how: dict[str, Any]) -> None:
    run = runs.start("forks", how | {"tasks_max": 60}, threads=200)
    state = runs.end(run)
    assert state.is_failed()
    assert "can't start new thread" in str(state.message)
    assert 20 < runs.told(run)["begun"] < 60
    free = runs.start("forks", how, threads=200)
    assert runs.end(free).is_completed()
    assert runs.told(free)["begun"] == 200


@BOTH
def test_a_run_gets_no_more_processor_time_than_it_may_have(
    runs: HostRuns, how: dict[str, Any]
) -> None:
    run = runs.start("spins", how | {"cpu_quota": "20%"}, seconds=2)
    assert runs.end(run).is_completed()
    cpu = runs.told(run)["cpu"]
    # How often it had to wait for the next period of 0.1 s.
    assert cpu["nr_throttled"] > 5
    free = runs.start("spins", how, seconds=2)
    assert runs.end(free).is_completed()
    assert runs.told(free)["cpu"].get("nr_throttled", 0) == 0
    assert manifest(free)["usage"]["processor_seconds"] >= 2


@BOTH
def test_what_a_run_leaves_behind_is_ended(runs: HostRuns, how: dict[str, Any]) -> None:
    run = runs.start("leaves", how)
    assert runs.end(run).is_completed()
    left = runs.told(run)["left"]
    wait_until(lambda: not is_alive(left), "the end of what it left")


@BOTH
def test_all_of_a_run_is_in_its_group_and_ends_with_a_cancellation(
    runs: HostRuns, how: dict[str, Any]
) -> None:
    run = runs.start("waits", how, until=runs.until)
    told = runs.told(run)
    inside = members_of(told["group"])
    assert told["pid"] in inside
    runs.ask(lambda client: client.set_flow_run_state(run, Cancelling()))
    assert runs.end(run).is_cancelled()
    wait_until(lambda: not any(map(is_alive, inside)), "its processes' end")


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("memory_max", "100", "memory_max is '100': write a size from 16M on, such as 512M or 2G"),
        ("cpu_quota", "0%", "cpu_quota is '0%': write percent of one processor from 1% on"),
    ],
)
def test_a_wrong_limit_ends_the_run_with_what_to_write(
    runs: HostRuns, variable: str, value: str, says: str
) -> None:
    # What the pool's schema does not refuse before.
    state = runs.end(runs.start("leaves", {variable: value}))
    assert state.is_crashed()
    assert says in str(state.message)


def test_a_stopped_worker_ends_its_runs_as_ever(runs: HostRuns) -> None:
    run = runs.start("waits", {"memory_max": "512M"}, until=runs.until)
    told = runs.told(run)
    kill_worker()
    state = runs.end(run)
    assert state.is_crashed()
    assert "had ended without a word" in str(state.message)
    assert not is_alive(told["pid"])
    wait_until(lambda: not host_file(told["group"]), "its group's end")
    assert runs.end(runs.start("leaves", WARM)).is_completed()
