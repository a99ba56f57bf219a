"""Every role has a Molecule scenario, and every scenario has all of its parts."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
import yaml

from lab.fleet import Fleet
from lab.scenario import Scenario, ScenarioError, Steps
from tests.unit.shared import REPOSITORY

# Defaults, a module and a filter: unit tests and every scenario exercise it.
WITHOUT = {"fleet"}
ROLES = sorted(path.name for path in (REPOSITORY / "roles").iterdir() if path.name not in WITHOUT)
SITES = {"default", "lan", "limits", "single"}
SCENARIOS = sorted(path.parent.name for path in (REPOSITORY / "molecule").glob("*/molecule.yml"))


def test_every_role_has_a_scenario():
    assert sorted({*ROLES, *SITES}) == SCENARIOS


@pytest.mark.parametrize("role", ROLES)
def test_a_scenario_is_whole(role: str):
    """Molecule passes over a step for which it finds no file, and says so in one line of many."""
    scenario = Scenario.load(role)
    assert (scenario.folder / "converge.yml").is_file()
    assert [*(scenario.folder / "tests").glob("test_*.py")]
    hosts = {host.name for host in scenario.fleet.hosts}
    for drift in scenario.steps.drift:
        assert drift.keys() - hosts <= {"title", "changed"}
        assert drift.keys() & hosts
        assert drift["changed"].keys() <= hosts
    for wrong in scenario.steps.wrong:
        assert wrong.keys() >= {"host", "variables", "message"}
        assert wrong["host"] in hosts
    # Its own settings are those of the base configuration: all steps, in their order.
    assert not yaml.safe_load((scenario.folder / "molecule.yml").read_text())


def test_the_steps_of_the_base_configuration_are_there():
    config = yaml.safe_load((REPOSITORY / ".config/molecule/config.yml").read_text())
    steps = [step.split() for step in config["scenario"]["test_sequence"]]
    for step, *folders in steps:
        for folder in folders:
            assert step == "verify"
            assert [*(REPOSITORY / "molecule/any" / folder).resolve().glob("test_*.py")]
    assert [step for step, *_ in steps].count("converge") == 1


def test_tasks_that_drift_names_are_those_of_roles():
    named = {
        name
        for role in ROLES
        for drift in Scenario.load(role).steps.drift
        for names in drift["changed"].values()
        for name in names
    }
    files = [*REPOSITORY.glob("roles/*/tasks/*.yml"), *REPOSITORY.glob("playbooks/*.yml")]
    text = "".join(path.read_text() for path in files)
    assert [name for name in sorted(named) if f"- name: {name}\n" not in text] == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("drifts = 1", "unknown keys: drifts"),
        ('none.wrong = "a"', "[[drift]] entries or none.drift"),
        ('none.drift = "a"', "[[wrong]] entries or none.wrong"),
        ('[[drift]]\n[none]\ndrift = "a"\nwrong = "a"', "[[drift]] entries or none.drift"),
    ],
)
def test_wrong_steps_are_refused(tmp_path: Path, text: str, message: str):
    path = tmp_path / "steps.toml"
    path.write_text(text)
    with pytest.raises(ScenarioError) as caught:
        Steps.read(path)
    assert message in str(caught.value)


@pytest.mark.parametrize("fleet", tomllib.loads((REPOSITORY / "lab/fleets.toml").read_text()))
def test_only_fleets_about_installing_boot_bare(fleet: str):
    assert Fleet.load(fleet).prepared == (
        fleet not in {"lab", "five", "molecule", "prepared", "base", "prefect"}
    )
