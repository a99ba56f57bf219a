"""Every unit of ours is in its sandbox and has its limits, as loaded and as its process lives."""

from __future__ import annotations

import re

import pytest

from tests.fleet.conftest import FLEET, Site, connect, wait_until

# `systemd-analyze security` at most; docs/security.md tells what these may do beyond the others.
EXPOSURE = 2.0
EXPOSURES = {"prefect-worker@default.service": 2.5, "tailscaled.service": 2.5}
# Template units, by one of their instances.
INSTANCES = {
    "postgresql@.service": "postgresql@17-main.service",
    "prefect-worker@.service": "prefect-worker@default.service",
}
# What may be root, and which bits of capabilities(7) it can have: CAP_NET_ADMIN, CAP_NET_RAW.
ROOT = {"tailscaled.service": 1 << 12 | 1 << 13}
# Units of the roles, and Debian's with additions of ours; whoever adds a unit has it tested here.
LIST = """
cd /etc/systemd/system
find . -maxdepth 1 -type f -name '*.service' -printf '%f\n'
for dropin in *.service.d/fleet.conf; do test -f "$dropin" && echo "${dropin%.d/*}"; done
true
"""
# The far end is no part of the fleet; the firewall's unit leaves no process behind.
NOT_ASKED = {"dhis2-standin.service", "prefect-firewall.service"}
LIMITS = ("MemoryMax", "TasksMax", "LimitNPROC")


def units(host: str) -> list[str]:
    """Services of the fleet on a host."""
    listed = set(connect(host).check_output("sh -c %s", LIST).split())
    return sorted(INSTANCES.get(name, name) for name in listed - NOT_ASKED)


def show(host: str, unit: str, *names: str) -> dict[str, str]:
    """Properties of a unit."""
    shown = connect(host).check_output(f"systemctl show --property={','.join(names)} {unit}")
    return dict(line.partition("=")[::2] for line in shown.splitlines())


def main_process(host: str, unit: str) -> dict[str, str]:
    """What the kernel says of a unit's main process; empty where there is none."""
    status: dict[str, str] = {}

    def is_known() -> bool:
        status.clear()
        pid = show(host, unit, "MainPID")["MainPID"]
        if pid == "0":
            return True
        said = connect(host).run(f"cat /proc/{pid}/status && readlink /proc/{pid}/exe")
        *lines, program = said.stdout.splitlines() or [""]
        status.update(line.partition(":\t")[::2] for line in lines)
        # One that a timer starts may have ended meanwhile, or be systemd's own still, which puts
        # itself into the sandbox before it becomes the service.
        return said.rc == 0 and not program.startswith("/usr/lib/systemd/")

    wait_until(is_known, f"{unit} on {host} has not begun")
    return status


@pytest.mark.parametrize("host", [host.name for host in FLEET.hosts])
def test_exposure_is_small(site: Site, host: str) -> None:
    too_much = {}
    for unit in units(host):
        said = connect(host).check_output(f"systemd-analyze security --no-pager {unit}")
        found = re.search(rf"Overall exposure level for {re.escape(unit)}: (\d+\.\d+)", said)
        assert found, said
        if float(found.group(1)) > EXPOSURES.get(unit, EXPOSURE):
            # What it costs most, first.
            faults = [line for line in said.splitlines() if line.startswith("✗")]
            too_much[unit] = [found.group(1), *faults]
    assert not too_much


@pytest.mark.parametrize("host", [host.name for host in FLEET.hosts])
def test_memory_tasks_and_dumps_are_limited(site: Site, host: str) -> None:
    for unit in units(host):
        limits = show(host, unit, *LIMITS, "LimitCORE")
        assert not {limit: unit for limit in LIMITS if limits[limit] == "infinity"}
        # A dump holds every secret of its process.
        assert limits["LimitCORE"] == "0", unit


@pytest.mark.parametrize("host", [host.name for host in FLEET.hosts])
def test_processes_live_in_the_sandbox(site: Site, host: str) -> None:
    for unit in units(host):
        status = main_process(host, unit)
        if not status:
            continue  # started by a timer, or not at all
        assert status["NoNewPrivs"] == "1", unit
        assert status["Seccomp"] == "2", unit
        assert int(status["CapBnd"], 16) == ROOT.get(unit, 0), unit
        assert (status["Uid"].split()[0] == "0") == (unit in ROOT), unit


def test_each_component_has_a_user_of_its_own(site: Site) -> None:
    users: dict[str, set[str]] = {}
    for host in FLEET.hosts:
        for unit in units(host.name):
            user = show(host.name, unit, "User")["User"] or "root"
            users.setdefault(user, set()).add(unit.split("@")[0].removesuffix(".service"))
    # Manifests are written by flow runs and completed by their service.
    assert users.pop("prefect", set()) <= {"prefect-worker", "prefect-manifests"}
    assert not {user: names for user, names in users.items() if len(names) > 1}
