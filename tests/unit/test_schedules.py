"""The schedules of the root prefect.yaml: what they say is when runs happen.

Expected times are written in UTC: Europe/Oslo is an hour ahead of it in winter and two in summer;
its clocks change on 2026-03-29 and 2026-10-25.
"""

import asyncio
import contextlib
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from subprocess import CompletedProcess
from typing import Any
from uuid import UUID

import pytest
import yaml
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule, RRuleSchedule
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import ObjectAlreadyExists
from prefect.server.schemas import schedules as server_schedules

from tests.unit.shared import REPOSITORY

SLUGS = ["workday-mornings", "twice-a-day", "last-friday-of-the-month"]


@pytest.fixture(scope="module")
def written() -> dict[str, dict[str, Any]]:
    """The schedules of the file, by slug."""
    content = yaml.safe_load((REPOSITORY / "prefect.yaml").read_text())
    (deployment,) = (one for one in content["deployments"] if one["name"] == "live-score")
    return {schedule["slug"]: schedule for schedule in deployment["schedules"]}


def next_runs(written: dict[str, Any], start: str, count: int) -> list[str]:
    """Return the first runs from `start` on, in UTC, as the server's own schedule has them."""
    if "cron" in written:
        schedule: Any = server_schedules.CronSchedule(
            cron=written["cron"], timezone=written["timezone"]
        )
    elif "interval" in written:
        schedule = server_schedules.IntervalSchedule(
            interval=timedelta(seconds=written["interval"]),
            anchor_date=datetime.fromisoformat(written["anchor_date"]),
            timezone=written["timezone"],
        )
    else:
        schedule = server_schedules.RRuleSchedule(
            rrule=written["rrule"], timezone=written["timezone"]
        )
    first = datetime.fromisoformat(start).replace(tzinfo=UTC)
    dates = asyncio.run(schedule.get_dates(n=count, start=first))
    return [show(one) for one in dates]


def show(time: datetime) -> str:
    return time.astimezone(UTC).strftime("%a %Y-%m-%d %H:%M")


def test_the_three_kinds_are_there(written):
    assert list(written) == SLUGS
    kinds = ["cron", "interval", "rrule"]
    assert [kind for slug in SLUGS for kind in kinds if kind in written[slug]] == kinds


@pytest.mark.parametrize(
    ("slug", "start", "expected"),
    [
        pytest.param(
            "workday-mornings",
            "2026-03-26T12:00",
            ["Fri 2026-03-27 06:30", "Mon 2026-03-30 05:30", "Tue 2026-03-31 05:30"],
            id="cron keeps to the clock when summer time begins",
        ),
        pytest.param(
            "workday-mornings",
            "2026-10-22T12:00",
            ["Fri 2026-10-23 05:30", "Mon 2026-10-26 06:30", "Tue 2026-10-27 06:30"],
            id="cron keeps to the clock when summer time ends",
        ),
        pytest.param(
            "twice-a-day",
            "2026-03-28T12:00",
            ["Sat 2026-03-28 15:00", "Sun 2026-03-29 03:00", "Sun 2026-03-29 15:00"],
            id="interval counts from its anchor",
        ),
        pytest.param(
            "last-friday-of-the-month",
            "2026-01-26T00:00",
            [
                "Fri 2026-01-30 17:00",
                "Fri 2026-02-27 17:00",
                "Fri 2026-03-27 17:00",
                "Fri 2026-04-24 16:00",
                "Fri 2026-05-29 16:00",
            ],
            id="rrule finds the last Friday, and keeps to the clock",
        ),
    ],
)
def test_runs_are_when_the_file_says(written, slug: str, start: str, expected: list[str]):
    assert next_runs(written[slug], start, len(expected)) == expected


def test_there_are_a_few_runs_a_day(written):
    days = [
        run[:14]
        for schedule in written.values()
        for run in next_runs(schedule, "2026-06-01T00:00", 100)
        if run[4:11] == "2026-06"
    ]
    assert len(days) == 22 + 60 + 1
    assert max(map(days.count, days)) == 4


@pytest.fixture
def deployed(
    prefect_command: Callable[..., CompletedProcess[str]],
) -> Iterator[DeploymentResponse]:
    """The file's entry on the server, put there by Prefect's own command."""

    async def make_work_pool() -> None:
        async with get_client() as client:
            with contextlib.suppress(ObjectAlreadyExists):
                await client.create_work_pool(
                    WorkPoolCreate(name="projections-local", type="process")
                )

    async def read() -> DeploymentResponse:
        async with get_client() as client:
            return await client.read_deployment_by_name("live_score/live-score")

    async def delete(deployment: UUID) -> None:
        async with get_client() as client:
            await client.delete_deployment(deployment)

    asyncio.run(make_work_pool())
    command = [sys.executable, "-P", "-m", "prefect", "--no-prompt", "deploy", "-n", "live-score"]
    done = prefect_command(command)
    assert done.returncode == 0, done.stdout
    deployment = asyncio.run(read())
    yield deployment
    asyncio.run(delete(deployment.id))


def test_each_kind_survives_its_deployment_and_makes_runs(deployed: DeploymentResponse):
    assert {one.slug: type(one.schedule) for one in deployed.schedules} == {
        "workday-mornings": CronSchedule,
        "twice-a-day": IntervalSchedule,
        "last-friday-of-the-month": RRuleSchedule,
    }
    assert all(one.active for one in deployed.schedules)
    start = datetime(2026, 3, 26, 12, tzinfo=UTC)
    assert asyncio.run(schedule_runs(deployed.id, start, start + timedelta(days=4.5))) == [
        "Thu 2026-03-26 15:00",
        "Fri 2026-03-27 03:00",
        "Fri 2026-03-27 06:30",
        "Fri 2026-03-27 15:00",
        "Fri 2026-03-27 17:00",
        "Sat 2026-03-28 03:00",
        "Sat 2026-03-28 15:00",
        "Sun 2026-03-29 03:00",
        "Sun 2026-03-29 15:00",
        "Mon 2026-03-30 03:00",
        "Mon 2026-03-30 05:30",
        "Mon 2026-03-30 15:00",
    ]


async def schedule_runs(deployment: UUID, start: datetime, end: datetime) -> list[str]:
    """Have the server's scheduler make the runs between two times; return when they are, in UTC."""
    # Without `min_runs`, a schedule stops at a few runs, however far away `end_time` is.
    times = {"start_time": start.isoformat(), "end_time": end.isoformat(), "min_runs": 50}
    async with get_client() as client:
        await client.request(
            "POST", "/deployments/{id}/schedule", path_params={"id": deployment}, json=times
        )
        runs = await client.read_flow_runs(
            deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[deployment])),
            sort=FlowRunSort.EXPECTED_START_TIME_ASC,
        )
    return [show(run.expected_start_time) for run in runs if run.expected_start_time]
