"""Hosts boot while the tailnet is late or its control server is away: services start, and heal."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lab.podman import LabError
from tests.fleet.conftest import FLEET, Site, connect, members, neighbour, wait_until

# What needs neither another host nor the tailnet.
ALONE = {
    "postgres": ["postgresql@17-main"],
    "prefect_server": ["haproxy"],
    "prefect_worker": ["tailscaled"],
}
# These ask again and again, RustFS for an address of its own, the others for what they need.
WAITING = {
    "rustfs": ["rustfs"],
    "prefect_server": ["prefect-server"],
    "prefect_worker": ["prefect-worker@default", "prefect-worker@projections-local"],
}
# At every address of its own the neighbour answers here.
_NEIGHBOUR_PORT = 3142
_LATE_SECONDS = 30
_LATE = "/etc/systemd/system/tailscaled.service.d/late.conf"


def states(units: dict[str, list[str]]) -> dict[str, str]:
    """State of each unit on each host of its group."""
    return {
        f"{unit} on {host}": state(host, unit)
        for group, names in units.items()
        for host in members(group)
        for unit in names
    }


def state(host: str, unit: str) -> str:
    return connect(host).check_output("systemctl show --value --property=ActiveState %s", unit)


def in_tailnet(host: str) -> bool:
    try:
        return bool(FLEET.tailnet_address(host))
    except LabError:
        return False


def neighbour_receives(host: str, address: str) -> bool:
    """Whether a host's request for an address reaches a neighbour that passes for its router.

    The neighbour has that address too, and would get the password with the request.
    """
    family = "-6" if ":" in address else "-4"
    of_router = ["ip", family, "-oneline", "address", "show", "dev", "eth0"]
    router = neighbour(*of_router).split()[3].split("/")[0]
    route = f"{address} via {router} dev eth0"
    url = f"http://[{address}]" if ":" in address else f"http://{address}"
    neighbour("ip", "address", "add", address, "dev", "lo")
    connect(host).check_output(f"ip {family} route add {route}")
    try:
        ask = f"curl --silent --max-time 5 --output /dev/null {url}:{_NEIGHBOUR_PORT}/"
        return connect(host).run(ask).rc == 0
    finally:
        connect(host).check_output(f"ip {family} route del {route}")
        neighbour("ip", "address", "del", address, "dev", "lo")


def expect_healed(site: Site) -> None:
    """Wait for what people see of a fleet that is whole: it answers, and a run ends well."""
    worker = site.first("prefect_worker")
    url = f"{site.api}/ready"
    ask = "curl --silent --fail --max-time 5 --output /dev/null %s"
    wait_until(lambda: worker.run(ask, url).rc == 0, "the API is not ready")
    wait_until(lambda: set(states(WAITING).values()) == {"active"}, "not all services run")
    run = "prefect-cli deployment run live_score/live-score --watch --watch-timeout 240"
    done = worker.run(run)
    assert done.rc == 0, done.stdout + done.stderr
    for host in FLEET.hosts:
        failed = "systemctl list-units --failed --plain --no-legend"
        assert connect(host.name).check_output(failed) == ""


def test_without_the_control_server_services_start_nothing_leaks_and_all_heals(site: Site) -> None:
    control = site.first("headscale")
    others = [host.name for host in FLEET.hosts if host.name not in members("headscale")]
    control.check_output("systemctl stop headscale")
    try:
        FLEET.reboot(others)
        # Else nothing would have to heal.
        assert not any(in_tailnet(name) for name in others)
        assert set(states(ALONE).values()) == {"active"}
        assert set(states(WAITING).values()) <= {"active", "activating"}
        worker = members("prefect_worker")[0]
        for elsewhere in ("192.0.2.1", "2001:db8::1"):
            assert neighbour_receives(worker, elsewhere)
        for in_the_tailnet in (site.address("prefect_server"), "fd7a:115c:a1e0::1"):
            assert not neighbour_receives(worker, in_the_tailnet)
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
    begun = "systemctl show --value --property=ActiveEnterTimestampMonotonic %s"
    for host in members("postgres"):
        database, tailnet = (
            int(connect(host).check_output(begun, unit))
            for unit in ("postgresql@17-main", "tailscaled")
        )
        assert 0 < database < tailnet
    expect_healed(site)
