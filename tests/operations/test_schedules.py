"""Each kind of schedule, set by hand on a deployment, makes runs that end Completed."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import pytest

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


def completed(laptop: Laptop, flow: str, since: str) -> bool:
    """Whether a run of the flow that a schedule made since then has ended Completed."""
    listed = laptop.prefect(
        "flow-run", "ls", "--flow-name", flow, "--state-type", "COMPLETED", "--output", "json"
    )
    assert listed.returncode == 0, listed.stdout + listed.stderr
    return any(
        run["auto_scheduled"] and run["start_time"] > since for run in json.loads(listed.stdout)
    )


@pytest.mark.usefixtures("scheduled")
def test_every_kind_of_schedule_makes_runs(laptop: Laptop) -> None:
    since = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime())
    waiting = {name.split("/")[0] for name in KINDS}
    deadline = time.monotonic() + _WAIT_SECONDS
    while waiting and time.monotonic() < deadline:
        waiting = {flow for flow in waiting if not completed(laptop, flow, since)}
        time.sleep(3)
    assert not waiting, f"no scheduled run Completed within {_WAIT_SECONDS} s"
