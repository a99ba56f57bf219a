"""Hosts boot while the tailnet is late or its control server is away: services start, and heal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from lab.podman import LabError
from tests.fleet.conftest import FLEET, Site, connect, members

# What needs no other host. Prefect's server and workers ask again and again for theirs.
ALONE = {
    "postgres": "postgresql@17-main",
    "prefect_server": "haproxy",
    "rustfs": "rustfs",
    "prefect_worker": "tailscaled",
}
UNITS = [(host, unit) for group, unit in ALONE.items() for host in members(group)]
_HEAL_SECONDS = 240
_LATE_SECONDS = 30
_LATE = "/etc/systemd/system/tailscaled.service.d/late.conf"


def wait_until(what: Callable[[], bool], problem: str) -> None:
    deadline = time.monotonic() + _HEAL_SECONDS
    while not what():
        assert time.monotonic() < deadline, f"{problem} after {_HEAL_SECONDS} s"
        time.sleep(1)


def state(host: str, unit: str) -> str:
    return connect(host).check_output("systemctl show --value --property=ActiveState %s", unit)


def in_tailnet(host: str) -> bool:
    try:
        return bool(FLEET.tailnet_address(host))
    except LabError:
        return False


def expect_healed(site: Site) -> None:
    """Wait for what people see of a fleet that is whole: it answers, and a run ends well."""
    worker = site.first("prefect_worker")
    url = f"{site.api}/ready"
    ask = "curl --silent --fail --max-time 5 --output /dev/null %s"
    wait_until(lambda: worker.run(ask, url).rc == 0, "the API is not ready")
    wait_until(lambda: all(map(workers_run, members("prefect_worker"))), "not all workers run")
    run = "prefect-cli deployment run live_score/live-score --watch --watch-timeout 240"
    done = worker.run(run)
    assert done.rc == 0, done.stdout + done.stderr
    for host in FLEET.hosts:
        failed = "systemctl list-units --failed --plain --no-legend"
        assert connect(host.name).check_output(failed) == ""


def workers_run(host: str) -> bool:
    pools = ("default", "projections-local")
    return all(state(host, f"prefect-worker@{pool}") == "active" for pool in pools)


def test_services_start_without_the_control_server_and_heal(site: Site) -> None:
    control = site.first("headscale")
    others = [host.name for host in FLEET.hosts if host.name not in members("headscale")]
    control.check_output("systemctl stop headscale")
    try:
        FLEET.reboot(others)
        # Else nothing would have to heal.
        assert not any(in_tailnet(name) for name in others)
        for host, unit in UNITS:
            assert state(host, unit) == "active"
        for host in members("prefect_server"):
            assert state(host, "prefect-server") in {"active", "activating"}
    finally:
        control.check_output("systemctl start headscale")
    expect_healed(site)


@pytest.fixture
def late_tailnet() -> Iterator[None]:
    """On every host tailscaled starts late at the next boot."""
    for host in FLEET.hosts:
        write = f"printf '[Service]\\nExecStartPre=sleep {_LATE_SECONDS}\\n' > {_LATE}"
        connect(host.name).check_output(f"mkdir -p $(dirname {_LATE}) && {write}")
    yield
    for host in FLEET.hosts:
        connect(host.name).check_output(f"rm -r $(dirname {_LATE}) && systemctl daemon-reload")


def test_services_start_before_a_late_tailnet(site: Site, late_tailnet: None) -> None:
    FLEET.reboot([])
    for host, unit in UNITS:
        if unit in {"tailscaled", "haproxy"}:  # which is ordered after it
            continue
        begun = "systemctl show --value --property=ActiveEnterTimestampMonotonic %s"
        times = [int(connect(host).check_output(begun, one)) for one in (unit, "tailscaled")]
        assert 0 < times[0] < times[1]
    expect_healed(site)
