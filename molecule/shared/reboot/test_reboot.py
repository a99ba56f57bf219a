"""All hosts off and on again; the role's own tests after this find out what came back."""

from __future__ import annotations

from lab.scenario import Scenario


def test_hosts_come_back_with_no_failed_unit(scenario: Scenario) -> None:
    scenario.fleet.reboot([])
    failed = {
        host.name: scenario.fleet.run(
            host.name, "systemctl list-units --failed --plain --no-legend", check=True
        ).stdout
        for host in scenario.fleet.hosts
    }
    assert not any(failed.values()), failed
