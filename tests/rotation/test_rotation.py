"""All secrets are replaced while runs go on; afterwards the old ones open nothing.

Meanwhile the inventory keeps them as it would in git: encrypted by ansible-vault.
"""

from __future__ import annotations

import secrets
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.fleet.conftest import FLEET, Laptop, Site
from tests.fleet.programs import CONNECT, S3
from tests.fleet.test_secrets import shapes
from tests.operations.conftest import Playbook
from tests.outages.test_runs_survive import Runs

SECRETS = FLEET.inventory / "group_vars/all/secrets.yml"
AUTHORITY = "fleet_ca_certificate"
RUN_SECONDS = 90  # longer than the server, the database and the workers have other secrets


@dataclass(frozen=True)
class Vault:
    """The inventory's secrets, encrypted with the password in a file."""

    password: Path

    @property
    def environment(self) -> dict[str, str]:
        return {"ANSIBLE_VAULT_PASSWORD_FILE": str(self.password)}

    def do(self, action: str) -> str:
        """Run one of ansible-vault's actions on them."""
        argv = ["ansible-vault", action, f"--vault-password-file={self.password}", str(SECRETS)]
        return subprocess.run(argv, capture_output=True, text=True, check=True).stdout

    def read(self) -> dict[str, Any]:
        return yaml.safe_load(self.do("view"))


@pytest.fixture(scope="module")
def vault(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vault]:
    """The vault; the secrets are in the clear again afterwards."""
    password = tmp_path_factory.mktemp("vault") / "password"
    password.write_text(secrets.token_hex())
    vault = Vault(password)
    vault.do("encrypt")
    yield vault
    vault.do("decrypt")


class Rotated:
    """A fleet that was rotated while runs went on: what was before, and how it went."""

    def __init__(self, site: Site, runs: Runs, playbook: Playbook, vault: Vault) -> None:
        self.old = vault.read()
        self.runs = runs
        self.before = runs.start(2, RUN_SECONDS)
        runs.wait(self.before, "Running")
        self.done = playbook("rotate", "--diff", "-v", timeout=1800, environment=vault.environment)
        self.new = vault.read()
        self.site = replace(site, secrets=self.new)
        runs.log_in(self.site)


@pytest.fixture(scope="module")
def rotated(site: Site, runs: Runs, playbook: Playbook, vault: Vault) -> Rotated:
    """The fleet after `playbooks/rotate.yml`."""
    rotated = Rotated(site, runs, playbook, vault)
    assert rotated.done.returncode == 0, rotated.done.stdout[-6000:] + rotated.done.stderr
    return rotated


def test_every_secret_is_another_one(rotated: Rotated) -> None:
    assert rotated.new.keys() == rotated.old.keys()
    assert [name for name, value in rotated.new.items() if value == rotated.old[name]] == []


def test_the_secrets_are_encrypted_as_before(rotated: Rotated) -> None:
    assert SECRETS.read_text().startswith("$ANSIBLE_VAULT;")


def test_runs_that_went_on_meanwhile_completed(rotated: Rotated) -> None:
    for run in rotated.runs.wait(rotated.before, "Completed", "Failed", "Crashed", "Cancelled"):
        assert run["state_name"] == "Completed", run["state"]
        assert run["run_count"] == 1


def test_runs_complete_afterwards(rotated: Rotated) -> None:
    (run,) = rotated.runs.wait(rotated.runs.start(1, 0), "Completed", "Failed", "Crashed")
    assert run["state_name"] == "Completed", run["state"]


def test_what_was_printed_has_no_secret(rotated: Rotated) -> None:
    printed = rotated.done.stdout + rotated.done.stderr
    shown = [
        name
        for kept in (rotated.old, rotated.new)
        for name, value in kept.items()
        if name != AUTHORITY and any(shape in printed for shape in shapes(name, value))
    ]
    assert shown == []


def test_the_old_password_is_refused(rotated: Rotated, laptop: Laptop) -> None:
    url = f"{laptop.url}/version"
    old = httpx.get(url, auth=("admin", rotated.old["fleet_auth_password"]))
    assert old.status_code == 401
    assert httpx.get(url, auth=("admin", rotated.new["fleet_auth_password"])).status_code == 200


def test_the_database_refuses_the_old_password(rotated: Rotated) -> None:
    site = rotated.site
    server, user = site.first("prefect_server"), "prefect"
    there = {"host": site.address("postgres"), "user": user}
    name = "fleet_database_password"
    answer = site.python(server, CONNECT, **there, password=rotated.new[name])
    assert answer == "prefect"
    answer = site.python(server, CONNECT, **there, password=rotated.old[name])
    assert "InvalidPassword" in answer


@pytest.mark.parametrize("user", ["results", "manifests", "root"])
def test_the_object_storage_refuses_the_old_keys(rotated: Rotated, user: str) -> None:
    bucket = "results" if user == "root" else user
    script = f'{S3}\nprint(attempt(client.list_objects_v2, Bucket="{bucket}", MaxKeys=1))'
    answers = [
        rotated.site.python(
            rotated.site.first("prefect_worker"),
            script,
            url=rotated.site.storage,
            access=kept[f"fleet_rustfs_{user}_access_key"],
            secret=kept[f"fleet_rustfs_{user}_secret_key"],
        )
        for kept in (rotated.new, rotated.old)
    ]
    assert answers[0] == "done"
    assert answers[1] in ("InvalidAccessKeyId", "SignatureDoesNotMatch", "AccessDenied")


def test_hosts_trust_the_new_authority_alone(rotated: Rotated) -> None:
    for host in FLEET.hosts:
        found = FLEET.run(host.name, "cat /etc/prefect/ca.pem").stdout
        assert found.strip() == rotated.new[AUTHORITY].strip()
