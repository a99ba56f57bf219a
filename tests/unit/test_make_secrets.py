"""Generating the secrets that an inventory lacks."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from ansible import constants
from ansible.parsing.dataloader import DataLoader
from ansible.parsing.vault import VaultLib, VaultSecret, VaultSecretsContext

from tests.unit.shared import REPOSITORY, load_by_path

make_secrets = load_by_path("scripts/make_secrets.py")
mistakes = load_by_path("roles/fleet/filter_plugins/mistakes.py")

VaultPassword = Callable[[str], VaultLib]
Run = Callable[..., int]


@pytest.fixture(autouse=True)
def no_vault(monkeypatch: pytest.MonkeyPatch) -> None:
    """No password file of whoever runs the tests counts."""
    monkeypatch.setattr(constants, "DEFAULT_VAULT_PASSWORD_FILE", None)
    monkeypatch.setattr(constants, "DEFAULT_VAULT_IDENTITY_LIST", [])


@pytest.fixture
def vault_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> VaultPassword:
    """Return a function that configures a password, as ANSIBLE_VAULT_PASSWORD_FILE would."""

    def configure(password: str) -> VaultLib:
        path = tmp_path / "password"
        path.write_text(password)
        # Ansible reads the variable when it is imported.
        monkeypatch.setattr(constants, "DEFAULT_VAULT_PASSWORD_FILE", str(path))
        return VaultLib([("default", VaultSecret(password.encode()))])

    return configure


@pytest.fixture
def inventory(tmp_path: Path) -> Path:
    folder = tmp_path / "inventory"
    folder.mkdir()
    (folder / "hosts.yml").write_text("all: {}\n")
    return folder


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that runs the program in this process, which is much faster."""

    def run(*arguments: object) -> int:
        # Ansible keeps the passwords of a process for ever, and takes them once.
        monkeypatch.setattr(VaultSecretsContext, "_current", None)
        return make_secrets.main([str(argument) for argument in arguments])

    return run


def secrets_of(inventory: Path) -> Path:
    return inventory / "group_vars/all/secrets.yml"


def write(inventory: Path, text: str) -> Path:
    path = secrets_of(inventory)
    path.parent.mkdir(parents=True)
    path.write_text(text)
    return path


def read(inventory: Path) -> dict[str, object]:
    return yaml.safe_load(secrets_of(inventory).read_text())


def test_all_that_are_missing_are_generated_and_no_more_the_second_time(
    run: Run, inventory: Path, capsys
):
    random = make_secrets.secret_names()
    assert len(random) > 5
    names = [*random, *make_secrets.AUTHORITY]
    assert run(inventory) == 0
    path = secrets_of(inventory)
    content = path.read_bytes()
    values = yaml.safe_load(content)
    assert list(values) == names
    assert len(set(values.values())) == len(names)
    assert mistakes.secret_mistakes({name: values[name] for name in random}) == []
    authority = [values[name] for name in mistakes.AUTHORITY]
    assert mistakes.authority_mistakes(*authority) == []
    assert path.stat().st_mode & 0o777 == 0o600
    assert [path] == list(path.parent.iterdir()), "or something half done is left behind"
    content += b"# a comment, which writing would lose\n"
    path.write_bytes(content)
    assert run(inventory) == 0
    assert path.read_bytes() == content
    printed = capsys.readouterr()
    first, second = printed.out.splitlines()
    assert first == f"{path}: generated {', '.join(names)}"
    assert second == f"{path}: nothing is missing"
    assert not any(value in printed.out + printed.err for value in values.values())


def test_a_file_of_an_inventory_stands_for_its_folder(run: Run, inventory: Path):
    assert run(inventory / "hosts.yml") == 0
    assert secrets_of(inventory).exists()


def test_what_is_there_stays(run: Run, inventory: Path):
    before = {
        "fleet_auth_password": "mine-ø",
        "fleet_database_password": "",  # as good as missing
        "some_number": 7,
        "some_servers": [{"name": "play", "password": "p", "verify_tls": True}],
        "nothing": None,
    }
    path = write(inventory, yaml.safe_dump(before))
    path.chmod(0o644)
    assert run(inventory) == 0
    after = yaml.safe_load(path.read_text())
    assert len(after.pop("fleet_database_password")) >= 16
    del before["fleet_database_password"]
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {*make_secrets.secret_names(), *make_secrets.AUTHORITY} - {
        "fleet_auth_password",
        "fleet_database_password",
    }
    assert path.stat().st_mode & 0o777 == 0o600


def test_with_a_vault_password_the_file_is_encrypted(
    run: Run, inventory: Path, vault_password: VaultPassword
):
    vault = vault_password("first")
    assert run(inventory) == 0
    path = secrets_of(inventory)
    content = path.read_bytes()
    assert content.startswith(b"$ANSIBLE_VAULT;")
    assert path.stat().st_mode & 0o777 == 0o600
    values = yaml.safe_load(vault.decrypt(content))
    assert list(values) == [*make_secrets.secret_names(), *make_secrets.AUTHORITY]
    # What is missing from an encrypted file is added to it.
    del values["fleet_auth_password"]
    path.write_bytes(vault.encrypt(yaml.safe_dump(values)))
    environment = {**os.environ, "ANSIBLE_VAULT_PASSWORD_FILE": str(inventory.parent / "password")}
    program = REPOSITORY / "scripts/make_secrets.py"
    subprocess.run([sys.executable, program, inventory], env=environment, check=True)
    after = yaml.safe_load(vault.decrypt(path.read_bytes()))
    assert len(after.pop("fleet_auth_password")) >= 16
    assert after == values


def test_an_inventory_of_earlier_days_gets_an_authority(run: Run, inventory: Path):
    before = dict.fromkeys(make_secrets.secret_names(), "x" * 40)
    path = write(inventory, yaml.safe_dump(before))
    assert run(inventory) == 0
    after = yaml.safe_load(path.read_text())
    assert mistakes.authority_mistakes(*(after.pop(name) for name in mistakes.AUTHORITY)) == []
    assert after == before


@pytest.mark.parametrize("half", mistakes.AUTHORITY)
def test_half_an_authority_is_not_replaced(run: Run, inventory: Path, capsys, half: str):
    path = write(inventory, f"{half}: mine\n")
    assert run(inventory) == 1
    assert path.read_text() == f"{half}: mine\n"
    said = capsys.readouterr().err
    assert f"{path}: has {half} without the other one of" in said
    assert "add that, or remove both" in said


def test_a_value_that_is_encrypted_by_itself_stays_so(
    run: Run, inventory: Path, vault_password: VaultPassword
):
    vault = vault_password("first")
    lines = vault.encrypt("inner-secret").decode().splitlines()
    text = "fleet_auth_password: !vault |\n" + "".join(f"  {line}\n" for line in lines)
    path = write(inventory, text)
    assert run(inventory) == 0
    plain = vault.decrypt(path.read_bytes()).decode()
    assert "!vault" in plain
    assert "inner-secret" not in plain
    loader = DataLoader()
    loader.set_vault_secrets(vault.secrets)
    assert loader.load_from_file(str(path))["fleet_auth_password"] == "inner-secret"


@pytest.mark.parametrize("password", ["second", None])
def test_an_encrypted_file_without_its_password_is_left_alone(
    run: Run,
    inventory: Path,
    vault_password: VaultPassword,
    monkeypatch,
    capsys,
    password: str | None,
):
    vault = vault_password("first")
    path = write(inventory, "")
    path.write_bytes(vault.encrypt("fleet_auth_password: mine\n"))
    content = path.read_bytes()
    if password:
        vault_password(password)
    else:
        monkeypatch.setattr(constants, "DEFAULT_VAULT_PASSWORD_FILE", None)
    assert run(inventory) == 1
    assert path.read_bytes() == content
    printed = capsys.readouterr()
    assert f"{path}: " in printed.err
    assert "vault" in printed.err
    assert not printed.out


@pytest.mark.parametrize("text", ["just text\n", "- a\n- b\n", "a: [\n"])
def test_a_file_that_is_no_mapping_is_left_alone(run: Run, inventory: Path, capsys, text: str):
    path = write(inventory, text)
    assert run(inventory) == 1
    assert path.read_text() == text
    assert capsys.readouterr().err.startswith(f"{path}: ")


@pytest.mark.parametrize("arguments", [[], ["one", "two"], ["--unknown", "one"]])
def test_wrong_usage(run: Run, capsys, arguments: list[str]):
    with pytest.raises(SystemExit, match="2"):
        run(*arguments)
    assert capsys.readouterr().err.startswith("usage: ")


def test_an_inventory_that_is_not_there_is_named(run: Run, capsys):
    assert run("/nowhere/inventory") == 1
    assert "there is no inventory /nowhere/inventory" in capsys.readouterr().err


# --- Rotation -------------------------------------------------------------------------------------


def test_a_rotation_makes_every_secret_anew_and_keeps_the_old_ones(
    run: Run, inventory: Path, capsys
):
    write(inventory, "tailscale_auth_key: tskey\n")
    assert run(inventory) == 0
    before = read(inventory)
    capsys.readouterr()
    assert run("--rotate", inventory) == 0
    after = read(inventory)
    names = {*make_secrets.secret_names(), *make_secrets.AUTHORITY}
    assert after.pop("fleet_previous_secrets") == {name: before[name] for name in names}
    assert after.keys() == before.keys()
    assert {name for name in names if after[name] == before[name]} == set()
    assert after["tailscale_auth_key"] == "tskey"
    assert "fleet_previous_secrets" not in capsys.readouterr().out


def test_a_rotation_that_has_not_ended_goes_on_with_the_same_secrets(
    run: Run, inventory: Path, capsys
):
    run(inventory)
    run("--rotate", inventory)
    before = read(inventory)
    capsys.readouterr()
    assert run("--rotate", inventory) == 0
    assert read(inventory) == before
    assert "a rotation goes on" in capsys.readouterr().out


def test_the_old_secrets_are_forgotten_and_nothing_else(run: Run, inventory: Path):
    run(inventory)
    run("--rotate", inventory)
    rotated = read(inventory)
    assert run("--forget", inventory) == 0
    del rotated["fleet_previous_secrets"]
    assert read(inventory) == rotated
    assert run("--forget", inventory) == 0
    assert read(inventory) == rotated


def test_a_rotated_file_stays_encrypted(run: Run, inventory: Path, vault_password: VaultPassword):
    vault_password("correct horse")
    run(inventory)
    run("--rotate", inventory)
    path = secrets_of(inventory)
    assert path.read_text().startswith("$ANSIBLE_VAULT")
    assert path.stat().st_mode & 0o777 == 0o600
