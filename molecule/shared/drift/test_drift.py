"""Somebody changes a host by hand; a converge puts that right, and touches nothing else."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import SCENARIO

from lab.scenario import Scenario


@pytest.mark.parametrize("drift", [pytest.param(d, id=d["title"]) for d in SCENARIO.steps.drift])
def test_drift_is_put_right(scenario: Scenario, drift: dict[str, Any]) -> None:
    for host in scenario.fleet.hosts:
        if script := drift.get(host.name):
            scenario.fleet.run(host.name, f"set -e\n{script}", check=True)
    outcome = scenario.converge()
    assert outcome.status == 0, outcome.explain()
    assert outcome.changed == drift["changed"]


def test_there_is_drift_or_a_reason_for_none(scenario: Scenario) -> None:
    assert scenario.steps.drift or scenario.steps.none["drift"]
