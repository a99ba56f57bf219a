"""Where secrets can be read: nowhere by strangers, and on each host only those that it needs.

A probe looks for the values themselves, with the rights of one user, in every file that this user
can read, in the command lines of all processes, in what systemd says of its units and in the
journal. The values reach it over stdin.
"""

from __future__ import annotations

import base64
import json
import shlex
import subprocess
from functools import cache
from urllib.parse import quote

import pytest
import yaml

from tests.fleet.conftest import FLEET, Site, members

# Runs on the host with its own Python: prints the secrets that it found, by name, and where.
PROBE = r"""
import json, os, subprocess, sys

wanted = {name: [v.encode() for v in values] for name, values in json.load(sys.stdin).items()}
found = {}

def search(place, data):
    for name, values in wanted.items():
        if any(value in data for value in values):
            found.setdefault(name, []).append(place)

# Neither the kernel's own trees, nor programs, nor what the local hosts share as a cache.
skipped = {"/proc", "/sys", "/dev", "/usr", "/opt/prefect/venvs", "/opt/prefect/uv", "/var/cache"}
largest = 8 << 20 if os.getuid() == 0 else 1 << 40  # root reads the database's files as well
for folder, folders, files in os.walk("/"):
    folders[:] = [name for name in folders if os.path.join(folder, name) not in skipped]
    for name in files:
        path = os.path.join(folder, name)
        try:
            plain = os.path.isfile(path) and not os.path.islink(path)
            if plain and os.path.getsize(path) < largest:
                with open(path, "rb") as file:
                    search(path, file.read())
        except OSError:
            pass
for process in filter(str.isdigit, os.listdir("/proc")):
    try:
        with open(f"/proc/{process}/cmdline", "rb") as file:
            search("a command line", file.read())
    except OSError:
        pass
for argv in (["systemctl", "show", "*"], ["journalctl", "--no-pager", "--output=cat"]):
    search(" ".join(argv), subprocess.run(argv, capture_output=True).stdout)
print(json.dumps(found))
"""

# Who may read which secret on a host of these groups. What is not named, nobody may.
DATABASE = {"fleet_database_password"}
ROOT_KEYS = {
    "fleet_rustfs_root_access_key",
    "fleet_rustfs_root_secret_key",
    "fleet_rustfs_rpc_secret",
}
RESULTS = {"fleet_rustfs_results_access_key", "fleet_rustfs_results_secret_key"}
MANIFESTS = {"fleet_rustfs_manifests_access_key", "fleet_rustfs_manifests_secret_key"}
ROOT_MAY_READ = {
    "prefect_server": DATABASE,
    "rustfs": ROOT_KEYS | RESULTS | MANIFESTS,  # RustFS keeps its users' keys as they are
    "prefect_worker": MANIFESTS,
}
EVERY_HOST = {"fleet_auth_password"}  # root's and the flows' user's, for prefect-cli and flows


def shapes(name: str, value: str) -> list[str]:
    """The forms in which a secret may stand somewhere."""
    if "\n" in value.strip():
        # A key in PEM is known by each of its lines.
        return [line for line in value.splitlines() if line and not line.startswith("-----")]
    forms = [value, quote(value, safe="")]
    if name == "fleet_auth_password":
        forms.append(base64.b64encode(f"admin:{value}".encode()).decode())
    return forms


def wanted() -> str:
    """The secrets to look for, as the probe reads them."""
    secrets = yaml.safe_load((FLEET.inventory / "group_vars/all/secrets.yml").read_text())
    public = {name for name in secrets if name.endswith("_certificate")}
    return json.dumps(
        {name: shapes(name, value) for name, value in secrets.items() if name not in public}
    )


@cache
def probe(host: str, user: str) -> dict[str, list[str]]:
    """What the user can find on the host: names of secrets, and the places of each."""
    argv = ["ssh", "-F", str(FLEET.ssh_config), host]
    # The program is the argument; what it looks for is not.
    words = shlex.join(["runuser", "-u", user, "--", "python3", "-c", PROBE])
    if user == "prefect" and host in members("prefect_worker"):
        # Where flows are: their unit does not see what systemd hands to other units of their user.
        worker = "systemctl show --value --property=MainPID prefect-worker@default"
        words = f"nsenter --mount --target $({worker}) -- {words}"
    argv.append(words)
    done = subprocess.run(argv, input=wanted(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def public_places(found: dict[str, list[str]]) -> dict[str, list[str]]:
    """Those of the places that are no files: others read them, or they are copied on.

    Access keys are names, not secrets, to S3: RustFS writes into its journal whom it has made.
    """
    shown = {name: [p for p in places if not p.startswith("/")] for name, places in found.items()}
    return {name: p for name, p in shown.items() if p and not name.endswith("_access_key")}


HOSTS = [host.name for host in FLEET.hosts]


@pytest.mark.parametrize("host", HOSTS)
def test_a_stranger_on_the_host_finds_no_secret(site: Site, host: str) -> None:
    assert probe(host, "nobody") == {}


@pytest.mark.parametrize("host", HOSTS)
def test_no_secret_is_in_a_command_line_a_unit_or_the_journal(site: Site, host: str) -> None:
    assert public_places(probe(host, "root")) == {}


@pytest.mark.parametrize("host", HOSTS)
def test_root_finds_only_what_the_host_needs(site: Site, host: str) -> None:
    allowed = set(EVERY_HOST)
    for group, secrets in ROOT_MAY_READ.items():
        if host in members(group):
            allowed |= secrets
    found = probe(host, "root")
    assert {name: places for name, places in found.items() if name not in allowed} == {}


@pytest.mark.parametrize("host", HOSTS)
def test_flows_find_the_auth_string_and_nothing_else(site: Site, host: str) -> None:
    assert probe(host, "prefect").keys() == {"fleet_auth_password"}
