"""An image of hosts on which the long part of an installation is done already.

Debian's packages of all groups and the Python environment of the lock: what takes minutes and is
the same for every host. Nothing is configured and nothing of the fleet runs. Fleets with
`image = "prepared"` boot from it; roles find their packages there, and do the rest themselves.

It is made by the project's own roles on a local host, once for each lock and list of packages.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import sys

import yaml

from lab.fleet import PROJECT, Fleet, cache_directory
from lab.podman import LABEL, LabError, podman

_FLEET = "prepared"
_KEPT = 3  # older ones are removed, a gigabyte each
_PLAYBOOK = PROJECT / "lab/prepared.yml"
_TIDY = """
set -e
rm -rf /etc/prefect /opt/prefect/venv /opt/prefect/releases /usr/local/bin/prefect-cli
rm -rf /root/.ansible
rm -f /etc/sysctl.d/60-prefect-fleet.conf
userdel prefect
rm -rf /var/lib/prefect
# Hosts that are to have them enable them again, see lab/fleet.py.
systemctl --quiet disable postgresql.service haproxy.service
apt-get clean
rm -rf /root/.ssh /etc/ssh/ssh_host_* /etc/uv /etc/apt/apt.conf.d/95lab-cache /var/log/journal/*
: > /etc/environment
: > /etc/machine-id
"""


def ensure_prepared_image(base: str) -> str:
    """The tag of the prepared image on top of `base`, which is made now if podman does not have it.

    Raises:
        LabError: podman refused, or a role failed.
    """
    defaults = yaml.safe_load((PROJECT / "roles/fleet/defaults/main/main.yml").read_text())
    locks = [(PROJECT / f"requirements/{name}.txt").read_text() for name in ("prefect", "uv")]
    recipe = [base, str(defaults["fleet_packages"]), *locks, _PLAYBOOK.read_text(), _TIDY]
    digest = hashlib.sha256("\0".join(recipe).encode()).hexdigest()[:12]
    tag = f"localhost/{LABEL}-prepared:{digest}"
    if podman("image", "exists", tag, check=False).returncode == 0:
        return tag
    cache_directory().mkdir(parents=True, exist_ok=True)
    with (cache_directory() / "prepared.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # scenarios run side by side
        if podman("image", "exists", tag, check=False).returncode != 0:
            print(f"lab: making the image of prepared hosts ({tag}), some minutes", flush=True)
            _make(tag)
            _remove_old()
    return tag


def _make(tag: str) -> None:
    fleet = Fleet.load(_FLEET)
    fleet.down()
    try:
        fleet.up()
        environment = {**os.environ, "ANSIBLE_CONFIG": str(PROJECT / "ansible.cfg")}
        for argv in (
            [sys.executable, "scripts/make_secrets.py", str(fleet.inventory)],
            ["ansible-playbook", f"--inventory={fleet.inventory}", str(_PLAYBOOK)],
        ):
            done = subprocess.run(
                argv, cwd=PROJECT, env=environment, capture_output=True, text=True, check=False
            )
            if done.returncode != 0:
                raise LabError(f"{argv[0]} failed:\n{done.stdout}{done.stderr}")
        host = fleet.hosts[0].name
        fleet.run(host, _TIDY, check=True)
        podman("stop", "--time", "10", fleet.container(host))
        podman("commit", "--quiet", "--change", "CMD=/sbin/init", fleet.container(host), tag)
    finally:
        fleet.down()


def _remove_old() -> None:
    """Keep the newest images; those that containers use stay as well."""
    found = podman(
        "images", "--sort", "created", "--format", "{{.Repository}}:{{.Tag}}",
        "--filter", f"reference=localhost/{LABEL}-prepared",
    ).stdout.split()  # fmt: skip
    for tag in found[_KEPT:]:
        podman("rmi", tag, check=False)
