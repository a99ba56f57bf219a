"""Manifests of runs that a real worker runs, and that end in every way there is."""

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

from prefect_fleet.manifests.files import Manifests
from prefect_fleet.manifests.host import hostname
from prefect_fleet.manifests.record import Manifest, Worker, load
from prefect_fleet.manifests.redact import REDACTED
from prefect_fleet.manifests.settle import WITHOUT_A_WORD, Pace, Settle
from tests.unit.shared import REPOSITORY

POOL = "manifests"
SECONDS = {"done": 0, "killed": 120, "cancelled": 120, "lost": 120}
FLOW = '''
import os
import time

from prefect import flow, task

from prefect_fleet.manifests import with_manifest


@with_manifest
@flow
def child():
    return "of the parent"


@with_manifest
@flow(name="sleeper", persist_result=True)
def sleeper(marker: str, seconds: float = 120, password: str = ""):
    """Say that it runs, and sleep."""
    with open(marker, "w") as file:
        file.write(str(os.getpid()))
    child()
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        time.sleep(0.05)
    return {"slept": seconds}
'''


def wait_for(what: Callable[[], Any], seconds: float = 90) -> Any:
    """Return the first true answer."""
    until = time.monotonic() + seconds
    while not (answer := what()):
        assert time.monotonic() < until, f"{seconds} s passed without it"
        time.sleep(0.1)
    return answer


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder that stands for /var/lib/prefect."""
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_FLEET_DATA", str(folder))
        yield folder


@pytest.fixture(scope="module")
def runs(prefect_api: str, data: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Ids of runs by how they ended; their worker is gone."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.flows import Flow
    from prefect.states import Cancelling

    folder = tmp_path_factory.mktemp("code")
    (folder / "flow.py").write_text(FLOW)
    flow = Flow.from_source(str(folder), "flow.py:sleeper")
    log = folder / "worker.log"

    async def start() -> dict[str, str]:
        async with get_client() as client:
            await client.create_work_pool(WorkPoolCreate(name=POOL, type="process"))
            deployment = await flow.deploy(
                "manifests",
                work_pool_name=POOL,
                # Skips a second interpreter that looks for the flow's workspace.
                job_variables={"command": f"{sys.executable} -m prefect.engine"},
                print_next_steps=False,
                ignore_warnings=True,
            )
            ids = {}
            for name, seconds in SECONDS.items():
                run = await client.create_flow_run_from_deployment(
                    deployment,
                    parameters={
                        "marker": str(folder / name),
                        "seconds": seconds,
                        "password": "correct horse",
                    },
                    tags=["test", name],
                )
                ids[name] = str(run.id)
            return ids

    async def cancel(key: str) -> None:
        async with get_client() as client:
            await client.set_flow_run_state(key, Cancelling(), force=True)

    async def state_of(key: str) -> str:
        async with get_client() as client:
            return (await client.read_flow_run(key)).state_type.value

    ids = asyncio.run(start())
    pids: dict[str, int] = {}
    with log.open("wb") as output:
        worker = subprocess.Popen(
            [
                *(sys.executable, "-m", "prefect", "worker", "start"),
                *("--pool", POOL, "--type", "process", "--name", "tested"),
            ],
            env={
                **os.environ,
                "PREFECT_WORKER_QUERY_SECONDS": "1",
                "PYTHONPATH": str(REPOSITORY / "src"),
            },
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        for name in ids:
            wait_for(lambda name=name: (folder / name).exists() and (folder / name).read_text())
            pids[name] = int((folder / name).read_text())
        os.kill(pids["killed"], signal.SIGKILL)
        asyncio.run(cancel(ids["cancelled"]))
        for name in ("done", "killed", "cancelled"):
            wait_for(
                lambda name=name: (
                    asyncio.run(state_of(ids[name])) in {"COMPLETED", "CRASHED", "CANCELLED"}
                )
            )
        # The hook that writes the manifest comes after the state.
        wait_for(lambda: "write_manifest' finished" in log.read_text().split("'Crashed'")[-1])
    except BaseException:
        print(log.read_text())
        raise
    finally:
        # The worker's host loses power.
        worker.kill()
        worker.wait()
        for pid in pids.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    return SimpleNamespace(ids=ids, pids=pids, log=log.read_text())


@pytest.fixture
def manifest_of(runs: SimpleNamespace, data: Path) -> Callable[[str], Manifest]:
    def read(name: str) -> Manifest:
        (file,) = (data / "manifests").glob(f"*/sleeper/*_{runs.ids[name]}.json")
        return load(file.read_bytes())

    return read


def test_completed(
    runs: SimpleNamespace, data: Path, manifest_of: Callable[[str], Manifest]
) -> None:
    manifest = manifest_of("done")
    assert (manifest.state.type, manifest.state.source) == ("COMPLETED", "run")
    assert manifest.deployment
    assert manifest.deployment.name == "manifests"
    assert manifest.worker == Worker(host=hostname(), pool=POOL, queue="default", name="tested")
    assert manifest.process
    assert manifest.process.pid == runs.pids["done"]
    assert manifest.run.tags == ["done", "test"]
    assert manifest.run.parameters["password"] == REDACTED
    assert manifest.run.parameters["seconds"] == 0
    assert manifest.result
    children = [load(file.read_bytes()) for file in (data / "manifests").glob("*/child/*.json")]
    assert manifest.run.id in {child.run.parent_id for child in children}


def test_killed(runs: SimpleNamespace, manifest_of: Callable[[str], Manifest]) -> None:
    """The worker reports it, and loads the flow for its hooks."""
    manifest = manifest_of("killed")
    assert (manifest.state.type, manifest.state.source) == ("CRASHED", "worker")
    assert manifest.error
    assert "-9" in (manifest.error.message or "")
    assert manifest.process
    assert manifest.process.pid == runs.pids["killed"]
    assert manifest.end


def test_cancelled(manifest_of: Callable[[str], Manifest]) -> None:
    """Its hook comes before its last state."""
    before = manifest_of("cancelled")
    assert (before.state.type, before.state.source, before.end) == ("CANCELLING", "worker", None)
    settle()
    manifest = manifest_of("cancelled")
    assert (manifest.state.type, manifest.state.source) == ("CANCELLED", "api")
    assert manifest.end


def test_lost(runs: SimpleNamespace, manifest_of: Callable[[str], Manifest]) -> None:
    """Nobody reports it: neither the run nor its worker is there any more."""
    assert manifest_of("lost").state.type == "RUNNING"
    settle()
    assert manifest_of("lost").state.type == "RUNNING"
    settle(later=1_000)
    manifest = manifest_of("lost")
    assert (manifest.state.type, manifest.state.source) == ("CRASHED", "sweep")
    assert manifest.state.message == WITHOUT_A_WORD


def settle(later: float = 0) -> None:
    report = Settle(Manifests(), None, pace=Pace(facts=0), now=time.time() + later).run()
    assert report.problems == []
