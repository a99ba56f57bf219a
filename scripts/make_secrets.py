#!/usr/bin/env python3
"""Generate the secrets that an inventory lacks: `make_secrets.py [--rotate|--forget] INVENTORY`.

Among them is the fleet's own authority, a key and a certificate for 10 years, which signs the
certificates of the fleet's services. They go to group_vars/all/secrets.yml beside the inventory,
readable by its owner alone, and encrypted where ansible.cfg or ANSIBLE_VAULT_PASSWORD_FILE names a
vault password file. Secrets that are there already stay as they are.

playbooks/rotate.yml replaces them: with --rotate every secret is made anew, the old ones going into
fleet_previous_secrets; with --forget these are removed. Exit status: 0 done, 1 the file cannot be
read or written.
"""

from __future__ import annotations

import argparse
import os
import secrets
import string
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import yaml
from ansible import constants
from ansible.cli import CLI
from ansible.errors import AnsibleError
from ansible.parsing.dataloader import DataLoader
from ansible.parsing.vault import VaultLib
from ansible.parsing.yaml.dumper import AnsibleDumper
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

_LENGTH = 40  # characters of 62 kinds each: 238 bits
_ALPHABET = string.ascii_letters + string.digits
AUTHORITY = ("fleet_ca_key", "fleet_ca_certificate")
PREVIOUS = "fleet_previous_secrets"
_AUTHORITY_DAYS = 3653
_DEFAULTS = Path(__file__).resolve().parent.parent / "roles/fleet/defaults/main/main.yml"


def secret_names() -> list[str]:
    """The names of the secrets that the fleet needs, from its role's defaults."""
    return yaml.safe_load(_DEFAULTS.read_text())["fleet_secrets"]


def make_authority() -> dict[str, str]:
    """A new authority: the PEM texts of its key and of its certificate by their names."""
    key = ec.generate_private_key(ec.SECP256R1())
    # The number tells authorities of several fleets, or of one over the years, from one another.
    title = f"prefect-fleet authority {secrets.token_hex(4)}"
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, title)])
    # Hosts whose clocks are behind have to take it as well.
    begin = datetime.now(UTC) - timedelta(days=1)
    usage = dict.fromkeys(
        (
            "digital_signature",
            "content_commitment",
            "key_encipherment",
            "data_encipherment",
            "key_agreement",
            "encipher_only",
            "decipher_only",
        ),
        False,
    )
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(begin + timedelta(days=_AUTHORITY_DAYS))
        # It may sign certificates of services, but no further authorities.
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.KeyUsage(key_cert_sign=True, crl_sign=True, **usage), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    texts = (pem.decode(), certificate.public_bytes(Encoding.PEM).decode())
    return dict(zip(AUTHORITY, texts, strict=True))


def secrets_file(inventory: Path) -> Path:
    """Where the secrets of an inventory (a folder or a file in one) stand."""
    folder = inventory if inventory.is_dir() else inventory.parent
    return folder / "group_vars/all/secrets.yml"


def complete(present: dict[str, object], names: list[str]) -> dict[str, str]:
    """New secrets by name, for those of the names and of the authority that are missing.

    Raises:
        AnsibleError: there is one half of an authority.
    """
    made = {
        name: "".join(secrets.choice(_ALPHABET) for _ in range(_LENGTH))
        for name in names
        if not present.get(name)
    }
    halves = [name for name in AUTHORITY if present.get(name)]
    if not halves:
        made |= make_authority()
    elif len(halves) < len(AUTHORITY):
        raise AnsibleError(
            f"has {halves[0]} without the other one of {' and '.join(AUTHORITY)}; add that, or "
            "remove both for a new authority"
        )
    return made


def rotate(present: dict[str, object], names: list[str]) -> dict[str, object]:
    """New secrets by name, and the old ones; nothing while an earlier rotation has not ended."""
    if present.get(PREVIOUS):
        return {}
    replaced = {name: present[name] for name in (*names, *AUTHORITY) if present.get(name)}
    kept = {name: value for name, value in present.items() if name not in replaced}
    return {**complete(kept, names), PREVIOUS: replaced}


class SecretsFile:
    """The secrets of an inventory, in a file that its owner alone reads.

    Raises:
        AnsibleError: the file is no mapping, or it is encrypted and no password, or a wrong one,
            is configured.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        loader = DataLoader()
        self._keys = CLI.setup_vault_secrets(
            loader, constants.DEFAULT_VAULT_IDENTITY_LIST, auto_prompt=False
        )
        loader.set_vault_secrets(self._keys)
        self.present = (loader.load_from_file(str(path)) or {}) if path.exists() else {}
        if not isinstance(self.present, dict):
            raise AnsibleError("is no mapping of names to secrets; write them as `name: value`")

    def write(self, values: dict[str, object]) -> None:
        """Replace the file by one with these values.

        Raises:
            OSError: it cannot be written.
        """
        # Ansible's own dumper keeps what else stands there: lists, numbers, values with !vault.
        data = yaml.dump(values, Dumper=AnsibleDumper, sort_keys=False, allow_unicode=True).encode()
        if self._keys:
            data = VaultLib(self._keys).encrypt(data)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._path.with_suffix(".partial")
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(self._path)


def change(path: Path, action: str) -> str:
    """Do what the command line asks for, and say what was done.

    Raises:
        AnsibleError: see SecretsFile and complete.
        OSError: the file cannot be written.
    """
    file = SecretsFile(path)
    if action == "forget":
        left = {name: value for name, value in file.present.items() if name != PREVIOUS}
        if len(left) == len(file.present):
            return "there are no old secrets"
        file.write(left)
        return "forgot the old secrets"
    make = rotate if action == "rotate" else complete
    made = make(file.present, secret_names())
    if not made:
        return "a rotation goes on" if action == "rotate" else "nothing is missing"
    file.write(file.present | made)
    return f"generated {', '.join(name for name in made if name != PREVIOUS)}"


def main(argv: list[str]) -> int:
    """Generate, and say what was generated."""
    parser = argparse.ArgumentParser(prog="make_secrets.py")
    parser.add_argument("inventory", type=Path, help="a folder or file that exists")
    parser.add_argument("--rotate", dest="action", action="store_const", const="rotate")
    parser.add_argument("--forget", dest="action", action="store_const", const="forget")
    options = parser.parse_args(argv)
    if not options.inventory.exists():
        print(f"make_secrets.py: there is no inventory {options.inventory}", file=sys.stderr)
        return 1
    path = secrets_file(options.inventory)
    try:
        print(f"{path}: {change(path, options.action or 'complete')}")
    except (AnsibleError, OSError) as error:
        print(f"{path}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
