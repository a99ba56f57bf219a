"""Certificates are renewed while the fleet is in use."""

from __future__ import annotations

import re
import subprocess
import time

from tests.fleet.conftest import Laptop, Site
from tests.fleet.test_tls import certificate
from tests.operations.conftest import Playbook

SERVICES = {"postgres": "postgresql@17-main.service", "rustfs": "rustfs.service"}
_TAKEN_UP_SECONDS = 60
_DAYS = 365


def shown(site: Site, group: str) -> tuple[str, int]:
    """Serial number and days left of the certificate that a service shows to a client's host."""
    said = certificate(site, group, "-serial", "-enddate", "-dateopt", "iso_8601")
    serial, end = (line.partition("=")[2] for line in said.splitlines())
    seconds = site.first("prefect_server").check_output("date --date=%s +%%s", end)
    return serial, round((int(seconds) - time.time()) / 86400)


def wait_for_another(site: Site, group: str, before: str) -> int:
    """Days left of the certificate that a service shows once it is another one than before."""
    deadline = time.monotonic() + _TAKEN_UP_SECONDS
    while (now := shown(site, group))[0] == before:
        assert time.monotonic() < deadline, f"{group} goes on showing the certificate {before}"
        time.sleep(1)
    return now[1]


def started(site: Site) -> dict[str, str]:
    """When each service was started."""
    return {
        group: site.first(group).check_output("systemctl show -P InactiveExitTimestamp %s", unit)
        for group, unit in SERVICES.items()
    }


def changed(done: subprocess.CompletedProcess[str]) -> bool:
    """Whether a playbook changed anything; it must have succeeded."""
    assert done.returncode == 0, done.stdout + done.stderr
    return re.search(r"changed=[1-9]", done.stdout) is not None


def test_certificates_about_to_end_are_renewed_and_services_go_on(
    site: Site, laptop: Laptop, playbook: Playbook
) -> None:
    before = started(site)
    serials = {group: shown(site, group)[0] for group in SERVICES}
    # Nobody waits for the day: these are issued for 100 days, which the fleet finds too few.
    short = {"certificates_days": 100, "certificates_renew_days": 99}
    assert changed(playbook("certificates", **short, certificates_renew_now=True))
    for group, serial in serials.items():
        assert wait_for_another(site, group, serial) <= 100
        serials[group] = shown(site, group)[0]
    assert changed(playbook("certificates"))
    for group, serial in serials.items():
        assert wait_for_another(site, group, serial) >= _DAYS - 1
    assert not changed(playbook("certificates"))
    assert started(site) == before, "a service was restarted"
    # The server reaches its database and a flow the object storage, as before.
    done = laptop.prefect(
        "deployment", "run", "live_score/live-score", "--watch", "--watch-timeout", "240"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Completed" in done.stdout
