"""`make deploy`: what it says, what it refuses, what it writes and what it leaves alone."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fleet.conftest import PROJECT, Laptop, connect, members
from tests.operations.conftest import Playbook

FLOW = """
from prefect import flow

@flow(name="visitor")
def visitor(name: str = "world") -> str:
    return f"hello {name}"
"""
FILE = """
name: prefect-fleet
pull:
  - prefect.deployments.steps.set_working_directory:
      directory: /opt/prefect/deployments/visitor
deployments:
  - name: visitor
    entrypoint: flow.py:visitor
    schedules:
      - cron: "0 5 * * *"
        timezone: Europe/Oslo
    work_pool: {name: default}
"""
NAME = "visitor/visitor"
POLLED = ("last_polled", "status")


def releases_in_use() -> set[str]:
    """What `current` leads to on the worker hosts."""
    return {
        connect(name).check_output("readlink /opt/prefect/current")
        for name in members("prefect_worker")
    }


def change_count(done: subprocess.CompletedProcess[str]) -> int:
    """Changed tasks of all hosts, of a playbook that must have succeeded."""
    assert done.returncode == 0, done.stdout + done.stderr
    return sum(int(count) for count in re.findall(r"changed=(\d+)", done.stdout))


def inspect(laptop: Laptop, name: str = NAME) -> dict[str, object]:
    done = laptop.prefect("deployment", "inspect", name, "--output", "json")
    assert done.returncode == 0, done.stdout + done.stderr
    # When workers last asked for its runs changes all the time.
    return {name: value for name, value in json.loads(done.stdout).items() if name not in POLLED}


@pytest.fixture(scope="module")
def visitor(code: Path, playbook: Playbook, laptop: Laptop) -> Iterator[Path]:
    """The folder of a deployment that is deployed beside the project's own, and removed at last."""
    folder = code / "deployments" / "visitor"
    folder.mkdir()
    (folder / "flow.py").write_text(FLOW)
    (folder / "prefect.yaml").write_text(FILE)
    done = playbook("deploy", fleet_code=code)
    assert change_count(done) > 0
    assert NAME in done.stdout
    yield folder
    # The project's own files name it no more.
    done = playbook("deploy", fleet_code=PROJECT, prefect_deploy_prune="true")
    assert change_count(done) > 0
    assert laptop.prefect("deployment", "inspect", NAME).returncode != 0


def test_a_deploy_of_what_is_there_changes_nothing(playbook: Playbook, laptop: Laptop) -> None:
    before = inspect(laptop, "dhis2_ou/dhis2-ou"), releases_in_use()
    done = playbook("deploy")
    assert change_count(done) == 0
    assert "nothing to do" in done.stdout.lower()
    assert (inspect(laptop, "dhis2_ou/dhis2-ou"), releases_in_use()) == before
    # Known without a plan, the next time.
    done = playbook("deploy")
    assert change_count(done) == 0
    assert "as the last plan, for nothing" in done.stdout
    assert "nothing to do" in done.stdout.lower()


def test_a_new_flow_runs_on_the_workers(visitor: Path, laptop: Laptop) -> None:
    done = laptop.prefect("deployment", "run", NAME, "--watch", "--watch-timeout", "120")
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(releases_in_use()) == 1


def test_mistakes_are_told_together_and_nothing_changes(
    visitor: Path, code: Path, playbook: Playbook, laptop: Laptop
) -> None:
    before = inspect(laptop), releases_in_use()
    bad = code / "deployments" / "bad"
    shutil.copytree(visitor, bad)
    file = bad / "prefect.yaml"
    file.write_text(FILE.replace("default}", "nowhere}").replace("0 5 * * *", "0 25 * * *"))
    (visitor / "flow.py").write_text(FLOW + "\nimport a_module_that_is_not_there\n")
    try:
        done = playbook("deploy", fleet_code=code)
    finally:
        shutil.rmtree(bad)
        (visitor / "flow.py").write_text(FLOW)
    assert done.returncode != 0
    for said in ("nowhere", "0 25 * * *", "a_module_that_is_not_there", "bad/prefect.yaml:12"):
        assert said in done.stdout
    assert (inspect(laptop), releases_in_use()) == before


def test_a_schedule_changed_by_hand_is_told_of_before_it_is_overwritten(
    visitor: Path, code: Path, playbook: Playbook, laptop: Laptop
) -> None:
    arguments = ["--interval", "3600", "--replace", "--accept-yes"]
    assert laptop.prefect("deployment", "schedule", "create", NAME, *arguments).returncode == 0
    plan = playbook("deploy", fleet_code=code, deploy_only_plan="true")
    assert change_count(plan) == 0
    assert "by hand" in plan.stdout
    (schedule,) = inspect(laptop)["schedules"]
    assert schedule["schedule"]["interval"] == 3600
    assert change_count(playbook("deploy", fleet_code=code)) > 0
    (schedule,) = inspect(laptop)["schedules"]
    assert schedule["schedule"]["cron"] == "0 5 * * *"
    assert change_count(playbook("deploy", fleet_code=code)) == 0


def test_what_was_paused_by_hand_stays_paused(
    visitor: Path, code: Path, playbook: Playbook, laptop: Laptop
) -> None:
    (schedule,) = inspect(laptop)["schedules"]
    pause = ["deployment", "schedule", "pause", NAME, schedule["id"]]
    assert laptop.prefect(*pause).returncode == 0
    file = visitor / "prefect.yaml"
    file.write_text(FILE.replace("entrypoint:", "tags: [seen]\n    entrypoint:"))
    assert change_count(playbook("deploy", fleet_code=code)) > 0
    shown = inspect(laptop)
    assert shown["tags"] == ["seen"]
    assert [one["active"] for one in shown["schedules"]] == [False]


def test_what_is_gone_stays_until_it_is_to_be_removed(
    visitor: Path, playbook: Playbook, laptop: Laptop
) -> None:
    done = playbook("deploy", fleet_code=PROJECT, deploy_only_plan="true")
    assert done.returncode == 0, done.stdout
    assert re.search(rf"gone.*{NAME}|{NAME}.*gone", done.stdout)
    inspect(laptop)
