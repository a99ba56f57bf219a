"""Check mode on the converged host."""

from __future__ import annotations

from lab.scenario import Scenario


def test_check_mode_finds_nothing_to_do(scenario: Scenario) -> None:
    outcome = scenario.converge("--check", "--diff")
    assert outcome.status == 0, outcome.explain()
    assert outcome.changed == {}
