"""Whose runs are marked as lost, and whose are not."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest

from prefect_operations.lost_runs import OpenRun, read_open_runs
from prefect_operations.sweep import Watch, main, spoke_since, sweep

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
SILENT = timedelta(seconds=90)
EVERY = timedelta(seconds=15)


def run_of(worker: str | None = "w", state: str = "RUNNING", age: float = 3600) -> OpenRun:
    since = NOW - timedelta(seconds=age)
    return OpenRun(
        uuid4(), "a-run", state, since, "p" if worker or state == "PENDING" else None, worker
    )


def watch_since(seconds: float) -> Watch:
    """A watch that has been told of the server's answers for so long, the last time just now."""
    watch = Watch(SILENT, EVERY)
    at = NOW - timedelta(seconds=seconds)
    while at <= NOW:
        watch.begin_pass(at)
        watch.heard(at)
        at += EVERY
    return watch


@pytest.mark.parametrize(
    ("run", "beat", "listening", "is_lost"),
    [
        pytest.param(run_of(), 100, 600, True, id="dead host"),
        pytest.param(run_of(state="PENDING"), 100, 600, True, id="dead host, not begun"),
        pytest.param(run_of(state="CANCELLING"), 100, 600, True, id="dead host, cancelling"),
        pytest.param(run_of(), None, 600, True, id="worker that the server has forgotten"),
        pytest.param(run_of(), 40, 600, False, id="long run on a living host"),
        pytest.param(run_of(), 3000, 60, False, id="server back for a minute"),
        pytest.param(run_of(age=50), 3000, 600, False, id="taken just now"),
        pytest.param(run_of(None), None, 600, False, id="started by hand"),
        pytest.param(run_of(None, "PENDING"), None, 600, True, id="worker died while taking it"),
        pytest.param(run_of(None, "PENDING", 50), None, 600, False, id="is being taken"),
    ],
)
def test_silence_alone_makes_a_run_lost(run, beat, listening, is_lost):
    beats = {} if beat is None else {("p", "w"): NOW - timedelta(seconds=beat)}
    found = watch_since(listening).suspects([run], beats, NOW)
    assert found == ([run] if is_lost else [])


def test_nobody_is_suspected_by_a_watch_that_has_slept():
    watch = watch_since(600)
    later = NOW + timedelta(hours=1)
    watch.begin_pass(later)
    watch.heard(later)
    assert watch.suspects([run_of()], {}, later) == []


@pytest.mark.parametrize("seconds", ["0", "-1", "5"])
def test_periods_that_make_no_sense_are_refused(seconds, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--silent-seconds", seconds])
    assert ended.value.code == 2
    assert "no less than --every-seconds" in capsys.readouterr().err


async def make_run(client: Any, pool: str, worker: str, *states: Any) -> str:
    """A run that a worker has brought into the last of the states."""
    flow = await client.create_flow_from_name("lost")
    deployment = await client.create_deployment(flow_id=flow, name="lost", work_pool_name=pool)
    run = await client.create_flow_run_from_deployment(deployment)
    for state in states:
        await client.set_flow_run_state(run.id, state)
    await client.update_flow_run_labels(run.id, {"prefect.worker.name": worker})
    return str(run.id)


def test_the_runs_of_a_dead_host_are_marked_and_no_others(prefect_api):
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.events import emit_event
    from prefect.events.worker import EventsWorker
    from prefect.states import Cancelling, Pending, Running

    async def scenario() -> dict[str, Any]:
        async with get_client() as client:
            await client.create_work_pool(WorkPoolCreate(name="sweep", type="process"))
            for worker in ("dead", "alive"):
                await client.send_worker_heartbeat("sweep", worker)
            runs = {
                "begun": await make_run(client, "sweep", "dead", Pending(), Running()),
                "taken": await make_run(client, "sweep", "dead", Pending()),
                "leaving": await make_run(
                    client, "sweep", "dead", Pending(), Running(), Cancelling()
                ),
                "speaking": await make_run(client, "sweep", "dead", Pending(), Running()),
                "alive": await make_run(client, "sweep", "alive", Pending(), Running()),
            }
            ours = {str(run.id) for run in await read_open_runs(client, "sweep")}
            assert ours == set(runs.values())
            watch = Watch(timedelta(seconds=10), timedelta(seconds=30))
            assert await sweep(client, watch, lambda: datetime.now(UTC)) == []
            await asyncio.sleep(watch.silent.total_seconds())
            # The dead one has been silent for long enough; the other one and one of the runs speak,
            # and the server may be slow to show that.
            begun = datetime.now(UTC)
            (speaking,) = [
                run
                for run in await read_open_runs(client, "sweep")
                if str(run.id) == runs["speaking"]
            ]
            while not await spoke_since(client, speaking, begun):
                assert datetime.now(UTC) < begun + timedelta(minutes=2)
                emit_event(
                    "prefect.flow-run.heartbeat",
                    resource={"prefect.resource.id": f"prefect.flow-run.{runs['speaking']}"},
                )
                await asyncio.to_thread(EventsWorker.drain_all)
                # As the passes of that time would have.
                watch.begin_pass(datetime.now(UTC))
                watch.heard(datetime.now(UTC))
            await client.send_worker_heartbeat("sweep", "alive")
            await sweep(client, watch, lambda: datetime.now(UTC))
            return {name: (await client.read_flow_run(run)).state for name, run in runs.items()}

    states = asyncio.run(scenario())
    assert {name: state.name for name, state in states.items()} == {
        "begun": "Crashed",
        "taken": "AwaitingRetry",
        "leaving": "Cancelled",
        "speaking": "Running",
        "alive": "Running",
    }
    assert "Worker 'dead' has not been heard for 10 s" in states["begun"].message


def test_an_outage_of_the_server_marks_nobody(prefect_api):
    import httpx
    from prefect.client.orchestration import PrefectClient

    async def scenario() -> Watch:
        watch = watch_since(600)
        async with PrefectClient("http://127.0.0.1:9/api") as client:
            with pytest.raises(httpx.HTTPError):
                await sweep(client, watch, lambda: NOW)
        return watch

    watch = asyncio.run(scenario())
    assert watch.suspects([run_of()], {}, NOW) == []
