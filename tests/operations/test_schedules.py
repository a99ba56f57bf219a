"""Each kind of schedule, set by hand on a deployment, makes runs that end Completed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterStartTime,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import StateType

from tests.fleet.conftest import Laptop
from tests.operations.conftest import Playbook

KINDS = {
    "dhis2_connection/dhis2-connection": ["--cron", "* * * * *", "--timezone", "Europe/Oslo"],
    "dhis2_ou/dhis2-ou": ["--interval", "45"],
    "live_score/live-score": ["--rrule", "FREQ=MINUTELY"],
}
_WAIT_SECONDS = 240


@pytest.fixture
def scheduled(laptop: Laptop, playbook: Playbook) -> Iterator[None]:
    """Give each deployment its kind of schedule, every minute; then put the files' ones back."""
    for name, options in KINDS.items():
        command = ["deployment", "schedule", "create", name, *options, "--replace", "--accept-yes"]
        done = laptop.prefect(*command)
        assert done.returncode == 0, done.stdout + done.stderr
    yield
    done = playbook("deploy")
    assert done.returncode == 0, done.stdout
    # At least a line for each: live-score's file has several schedules.
    assert done.stdout.count("by hand") >= len(KINDS)


def completed(laptop: Laptop, flow: str, since: datetime) -> bool:
    """Whether a run of the flow that a schedule made since then has ended Completed."""
    runs = laptop.ask(
        lambda client: client.read_flow_runs(
            flow_filter=FlowFilter(name=FlowFilterName(any_=[flow])),
            flow_run_filter=FlowRunFilter(
                state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.COMPLETED])),
                start_time=FlowRunFilterStartTime(after_=since),
            ),
        )
    )
    return any(run.auto_scheduled for run in runs)


@pytest.mark.usefixtures("scheduled")
def test_every_kind_of_schedule_makes_runs(laptop: Laptop) -> None:
    since = datetime.now(UTC)
    waiting = {name.split("/")[0] for name in KINDS}
    deadline = time.monotonic() + _WAIT_SECONDS
    while waiting and time.monotonic() < deadline:
        waiting = {flow for flow in waiting if not completed(laptop, flow, since)}
        time.sleep(1)
    assert not waiting, f"no scheduled run Completed within {_WAIT_SECONDS} s"
