"""Check mode on a host that the role has not seen yet."""

from __future__ import annotations

from lab.scenario import Scenario


def test_check_mode_passes_on_a_clean_host_and_changes_nothing(scenario: Scenario) -> None:
    before = scenario.fingerprint()
    outcome = scenario.converge("--check", "--diff")
    assert outcome.status == 0, outcome.explain()
    # Else the hosts were not clean, and this shows nothing.
    assert outcome.changed
    after = scenario.fingerprint()
    differences = {host: sorted(before[host] ^ after[host]) for host in before}
    assert not any(differences.values()), differences
    shown = [name for name, value in scenario.secrets().items() if value in outcome.text]
    assert shown == [], "--diff shows these secrets"
