"""Limits of flow runs, and the control groups that hold them."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import jsonschema
import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State

from prefect_fleet.pools import LIMITS
from prefect_fleet.pools import main as make_pools
from prefect_operations import run_groups
from prefect_operations.draining import DrainingWorker
from prefect_operations.limits import Limits, RunJobConfiguration, WrongLimit, size
from prefect_operations.run_groups import RunGroup, RunGroups
from tests.unit.cgroups import inside, members, needs_groups, unit
from tests.unit.warm import CLIENT, STOCK, Warm, alive, children, wait_until, warm_folder

M = 1 << 20


@pytest.mark.parametrize(
    ("given", "limits"),
    [
        ({}, Limits()),
        ({"memory_max": "512M"}, Limits(memory_max=512 * M)),
        ({"memory_max": "2G"}, Limits(memory_max=2048 * M)),
        ({"memory_max": 128 * M}, Limits(memory_max=128 * M)),
        ({"memory_max": str(128 * M)}, Limits(memory_max=128 * M)),
        ({"memory_max": "65536K"}, Limits(memory_max=64 * M)),
        ({"cpu_quota": "150%"}, Limits(cpu_quota=150)),
        ({"cpu_quota": "12.5%"}, Limits(cpu_quota=12.5)),
        ({"tasks_max": 100}, Limits(tasks_max=100)),
        ({"tasks_max": "100"}, Limits(tasks_max=100)),
    ],
)
def test_limits_are_read_as_systemd_writes_them(given: dict[str, Any], limits: Limits) -> None:
    assert Limits.parse(**{"memory_max": None, "cpu_quota": None, "tasks_max": None} | given) == (
        limits
    )
    # What a run takes, a deploy does not refuse.
    jsonschema.validate(given, {"properties": LIMITS})


@pytest.mark.parametrize(
    ("name", "value", "is_refused_by_deploy"),
    [
        ("memory_max", "512m", True),
        ("memory_max", "lots", True),
        ("memory_max", "-1G", True),
        ("memory_max", "", True),
        ("memory_max", True, True),
        ("memory_max", 512, True),
        ("memory_max", "512", False),
        ("cpu_quota", "150", True),
        ("cpu_quota", 150, True),
        ("cpu_quota", "0%", False),
        ("tasks_max", 0, True),
        ("tasks_max", -3, True),
        ("tasks_max", "many", True),
        ("tasks_max", 1.5, True),
    ],
)
def test_what_is_no_limit_is_refused_with_what_to_write(
    name: str, value: object, is_refused_by_deploy: bool
) -> None:
    given = {"memory_max": None, "cpu_quota": None, "tasks_max": None} | {name: value}
    with pytest.raises(WrongLimit, match=f"^{name} is .*: write .* such as ") as refused:
        Limits.parse(**given)
    assert repr(value) in str(refused.value)
    checker = jsonschema.Draft202012Validator({"properties": LIMITS})
    assert checker.is_valid({name: value}) != is_refused_by_deploy


def test_all_faults_are_told_at_once() -> None:
    with pytest.raises(WrongLimit, match=r"memory_max is .*; cpu_quota is .*; tasks_max is "):
        Limits.parse("much", "much", "much")


def test_a_run_with_a_wrong_limit_ends_with_the_sentence() -> None:
    wrong = RunJobConfiguration(memory_max="much", command=None)
    run: Any = SimpleNamespace(id=uuid4(), name="a", deployment_id=None)
    with pytest.raises(WrongLimit, match=r"^memory_max is 'much': write a size"):
        wrong.prepare_for_flow_run(run)


@pytest.mark.parametrize(("number", "text"), [(512 * M, "512M"), (2048 * M, "2G"), (1001, "1001")])
def test_sizes_are_shown_as_they_are_written(number: int, text: str) -> None:
    assert size(number) == text


FILES = ("memory.max", "memory.swap.max", "memory.oom.group", "cpu.max", "pids.max")


def group_of_files(folder: Path, limits: Limits) -> RunGroup:
    """Return a group whose files are plain ones."""
    for name in FILES:
        (folder / name).write_text("")
    return RunGroup(folder, limits, None, lambda folder: None)


def test_limits_are_written_as_the_kernel_reads_them(tmp_path: Path) -> None:
    group = group_of_files(tmp_path, Limits(64 * M, 150, 20))
    group.limit({"memory", "cpu", "pids"})
    assert group.refused == []
    said = [str(64 * M), "0", "1", "150000 100000", "20"]
    assert [(tmp_path / name).read_text() for name in FILES] == said


def test_a_run_without_limits_has_none_but_ends_as_a_whole(tmp_path: Path) -> None:
    group = group_of_files(tmp_path, Limits())
    group.limit({"memory", "cpu", "pids"})
    assert [(tmp_path / name).read_text() for name in FILES] == ["", "", "1", "", ""]


def test_what_this_host_cannot_limit_is_told(tmp_path: Path) -> None:
    group = group_of_files(tmp_path, Limits(64 * M, 150, 20))
    group.limit({"pids"})
    assert group.refused == [
        "memory_max: this host's control groups have no memory",
        "cpu_quota: this host's control groups have no cpu",
    ]
    nowhere = RunGroups(None, "there are none")
    run: Any = SimpleNamespace(id=uuid4())
    assert nowhere.make(run, Limits(tasks_max=3)).refused == ["tasks_max: there are none"]
    assert nowhere.make(run, Limits()).refused == []
    assert nowhere.make(run, Limits()).command(["a"]) == ["a"]


@pytest.mark.parametrize(
    ("oom", "oom_kill", "limit", "says"),
    [
        (1, 1, 64 * M, "Out of memory: the run wanted more than its memory_max of 64M"),
        (0, 1, 64 * M, "Out of memory: this pool's runs together"),
        (0, 1, None, "Out of memory: this pool's runs together"),
        (1, 0, 64 * M, "as Prefect says"),
        (0, 0, None, "as Prefect says"),
    ],
)
def test_a_crash_for_want_of_memory_says_so(
    tmp_path: Path, oom: int, oom_kill: int, limit: int | None, says: str
) -> None:
    group = group_of_files(tmp_path, Limits(memory_max=limit))
    (tmp_path / "cgroup.events").write_text("populated 0\nfrozen 0\n")
    (tmp_path / "memory.events").write_text(f"low 0\nmax 9\noom {oom}\noom_kill {oom_kill}\n")
    (tmp_path / "memory.peak").write_text("65011712\n")
    (tmp_path / "cpu.stat").write_text("usage_usec 1500000\nuser_usec 1\n")
    group.note = tmp_path / "usage" / "run.json"
    group.note.parent.mkdir()
    asyncio.run(group.end())
    said = group.explain("as Prefect says")
    assert said.startswith(says)
    assert json.loads(group.note.read_text()) == {
        "memory_peak": 65011712,
        "processor_seconds": 1.5,
        "out_of_memory": bool(oom_kill),
    }


@pytest.fixture
def made() -> Iterator[Path]:
    with unit() as folder:
        yield folder


class Run:
    """What a worker does with the group of a run."""

    def __init__(self, folder: Path, usage: Path | None = None) -> None:
        self.id = uuid4()
        self.groups = RunGroups(folder, usage=usage)
        flow_run: Any = SimpleNamespace(id=self.id)
        self.group = self.groups.make(flow_run, Limits())
        assert self.group.folder is not None
        self.folder = self.group.folder

    def start(self, code: str) -> "subprocess.Popen[bytes]":
        command = self.group.command([sys.executable, "-c", code])
        return subprocess.Popen(command)


LEAVES = """
import subprocess, sys, time
for i in range(2):
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"],
                     start_new_session=True, stdout=subprocess.DEVNULL)
until = time.process_time() + 0.2
while time.process_time() < until:
    pass
"""


@needs_groups
def test_what_a_run_leaves_behind_is_ended_and_its_group_removed(
    made: Path, tmp_path: Path
) -> None:
    run = Run(made, tmp_path)
    process = run.start(LEAVES)
    assert process.wait(60) == 0
    left = members(run.folder)
    assert len(left) == 2
    asyncio.run(run.group.end())
    assert not any(map(alive, left))
    assert not run.folder.exists()
    usage = json.loads((tmp_path / f"{run.id}.json").read_text())
    assert usage["processor_seconds"] >= 0.2
    assert not usage["out_of_memory"]
    assert [file.name for file in tmp_path.iterdir()] == [f"{run.id}.json"]


@needs_groups
def test_groups_that_a_killed_worker_has_left_are_removed(made: Path) -> None:
    run = Run(made)
    process = run.start("import time; time.sleep(600)")
    (run.folder / "own").mkdir()
    wait_until(lambda: process.pid in members(made), "the process in its group")
    other = made / "not-a-run"
    other.mkdir()
    RunGroups(made)
    assert process.wait(60) == -9
    RunGroups(made)
    assert not run.folder.exists()
    assert other.exists()


@needs_groups
def test_a_worker_finds_its_unit(made: Path) -> None:
    code = "from prefect_operations.run_groups import RunGroups as R; r = R.find()"
    code += "; print(r._unit, r.why, sep='|')"
    for group, said in ((made / "worker", f"{made}|\n"), (made, "None|the worker's unit has no D")):
        done = subprocess.run(
            inside(group, [sys.executable, "-c", code]),
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        assert done.stdout.startswith(said)


@pytest.fixture
def warm(made: Path, tmp_path: Path) -> Iterator[Warm]:
    """A zygote in the group `worker` of a unit."""
    with warm_folder(tmp_path) as started:
        started.start()
        started.hear("ready")
        (made / "worker" / "cgroup.procs").write_text(str(started.zygote.pid))
        yield started
        started.stop()


def begin(
    warm: Warm, run: Run, do: str, errors: int | None = None, **environment: str
) -> "subprocess.Popen[bytes]":
    """Start a forked run in the group of a run."""
    return subprocess.Popen(
        run.group.command([*CLIENT, str(warm.socket), *STOCK]),
        cwd=warm.work,
        env=warm.environment | {"DO": do} | run.group.environment() | environment,
        stdin=subprocess.DEVNULL,
        stderr=errors,
        umask=0o027,
    )


WAITS = "import os, time; open(f'told-{os.getpid()}', 'w').close(); time.sleep(600)"


def told(warm: Warm) -> list[int]:
    return [int(file.name.partition("-")[2]) for file in warm.work.glob("told-*")]


@needs_groups
def test_a_forked_run_is_in_the_group_of_its_client(made: Path, warm: Warm) -> None:
    run = Run(made)
    process = begin(warm, run, WAITS)
    wait_until(lambda: bool(told(warm)), "its beginning")
    (child,) = told(warm)
    assert children(warm.zygote.pid) == [child]
    assert members(run.folder) == {process.pid, child}
    assert warm.zygote.pid in members(made / "worker")
    asyncio.run(run.group.end())
    assert process.wait(30) == -9
    wait_until(lambda: not alive(child), "the end of the child")
    assert not run.folder.exists()
    assert alive(warm.zygote.pid)


@needs_groups
@pytest.mark.parametrize("who", ["client", "zygote"])
def test_nothing_of_a_run_outlives_its_end_whoever_is_killed(
    made: Path, warm: Warm, who: str
) -> None:
    run = Run(made)
    process = begin(warm, run, "import subprocess; subprocess.Popen(['sleep', '600']);" + WAITS)
    wait_until(lambda: bool(told(warm)), "its beginning")
    inside_it = members(run.folder)
    assert len(inside_it) == 3
    if who == "client":
        process.kill()
    else:
        warm.zygote.kill()
        warm.zygote.wait()
        assert members(run.folder) == inside_it
    if who == "client":
        process.wait(30)
    asyncio.run(run.group.end())
    assert process.wait(30) == -9
    wait_until(lambda: not any(map(alive, inside_it)), "the end of all")
    assert not run.folder.exists()


@needs_groups
@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("outside", "the client is not in its control group"),
        ("elsewhere", "the client's control group is of another unit"),
        ("gone", "the client's control group can't be seen: No such file"),
    ],
)
def test_a_run_with_another_group_than_its_own_is_refused(
    made: Path, warm: Warm, where: str, said: str
) -> None:
    with unit() as other:
        run = Run(other if where == "elsewhere" else made)
        group = str(run.folder)
        if where != "elsewhere":
            run.group.folder = None
        if where == "gone":
            group += "-gone"
        process = begin(warm, run, "pass", subprocess.PIPE, PREFECT_FLEET_GROUP=group)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0
        assert f"the stock command runs this flow run: {said}" in err.decode()


@needs_groups
def test_where_the_kernel_does_not_say_the_zygote_notes_the_memory(
    made: Path, warm: Warm, tmp_path: Path
) -> None:
    run = Run(made, tmp_path / "usage")
    assert run.group.folder is not None
    if (run.group.folder / "memory.peak").exists():
        pytest.skip("the kernel says it here")
    process = begin(warm, run, "bytearray(64 << 20)")
    assert process.wait(30) == 0
    asyncio.run(run.group.end())
    assert run.group.usage is not None
    assert run.group.usage.memory_peak is not None
    assert run.group.usage.memory_peak > 64 * M
    (only,) = (tmp_path / "usage").iterdir()
    assert json.loads(only.read_text())["memory_peak"] == run.group.usage.memory_peak


def test_what_is_used_of_prefects_internals_is_there() -> None:
    from prefect.runner import _starter_engine
    from prefect.utilities.processutils import run_process

    assert set(run_groups.INTERNALS) <= vars(_starter_engine).keys()
    assert _starter_engine.run_process is run_groups._run_process
    assert _starter_engine.run_process is not run_process
    assert "run_process" in _starter_engine.EngineCommandStarter.start.__code__.co_names


GROUPED = """
import os, subprocess
from pathlib import Path
from prefect import flow

@flow
def grouped(where: str):
    left = subprocess.Popen(["sleep", "600"], start_new_session=True,
                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    group = os.environ["PREFECT_FLEET_GROUP"]
    inside = Path(group, "cgroup.procs").read_text().split()
    assert str(os.getpid()) in inside and str(left.pid) in inside
    Path(where).write_text(f"{group} {left.pid}")
"""


async def create(folder: Path, command: str | None, **variables: str) -> UUID:
    """Create a run of GROUPED in the pool `grouped`."""
    async with get_client() as client:
        deployment = await client.create_deployment(
            await client.create_flow_from_name("grouped"),
            "grouped",
            work_pool_name="grouped",
            entrypoint=f"{folder}/flow.py:grouped",
            enforce_parameter_schema=False,
        )
        given = variables | ({"command": command} if command else {})
        run = await client.create_flow_run_from_deployment(
            deployment, parameters={"where": str(folder / "told")}, job_variables=given
        )
        return run.id


@pytest.fixture
def worker(made: Path, tmp_path: Path, prefect_api: str) -> Iterator[Path]:
    """A worker in the group `worker` of a unit, and its log."""
    (tmp_path / "flow.py").write_text(GROUPED)
    pools = tmp_path / "pools.json"
    pools.write_text(json.dumps([{"name": "grouped", "type": "process"}]))
    assert make_pools([str(pools)]) == 0
    start = [sys.executable, "-m", "prefect_operations.worker", "--pool", "grouped"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            inside(made / "worker", [*start, "--name", "grouped", "--drain-seconds", "0"]),
            env=os.environ
            | {"PREFECT_WORKER_QUERY_SECONDS": "1", "PREFECT_FLEET_DATA": str(tmp_path)},
            stdout=log,
            stderr=log,
        )
    yield tmp_path / "log"
    process.terminate()
    assert process.wait(120) == 0


def end(run: UUID, log: Path) -> State[Any]:
    """Wait for the end of a run, and return its state."""
    ended: list[State[Any]] = []

    def has_ended() -> bool:
        with get_client(sync_client=True) as client:
            state = client.read_flow_run(run).state
        if state is not None and state.is_final():
            ended.append(state)
        return bool(ended)

    wait_until(has_ended, f"the end of {run}\n{log.read_text()}", 300)
    return ended[0]


@needs_groups
def test_a_worker_runs_each_run_in_a_group(made: Path, worker: Path) -> None:
    """Without a command of the pool's, and with one; what is no limit is told."""
    folder = worker.parent
    for command in (None, f"{sys.executable} -m prefect.engine"):
        run = asyncio.run(create(folder, command, memory_max="512M"))
        assert end(run, worker).is_completed(), worker.read_text()
        group, left = (folder / "told").read_text().split()
        assert group == str(made / f"run-{run}")
        note = folder / "manifests" / ".usage" / f"{run}.json"
        wait_until(note.exists, "its usage", 60)
        assert json.loads(note.read_text())["processor_seconds"] > 0
        wait_until(lambda one=group: not Path(one).exists(), "the end of its group", 60)
        assert not alive(int(left))
        asked = "The run goes on without memory_max: this host's control groups have no memory"
        has_memory = "memory" in (made / "cgroup.subtree_control").read_text().split()
        assert (asked in worker.read_text()) != has_memory
    state = end(asyncio.run(create(folder, None, memory_max="100")), worker)
    assert state.is_crashed()
    assert "memory_max is '100': write a size from 16M on" in str(state.message)


def test_a_worker_fills_in_a_template_that_the_server_takes() -> None:
    """It refuses one whose configuration has a variable that is not described."""
    template = DrainingWorker.get_default_base_job_template()
    variables = {f"{{{{ {name} }}}}" for name in template["variables"]["properties"]}
    assert set(map(str, template["job_configuration"].values())) <= variables
