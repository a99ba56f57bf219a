"""Whether a host's certificates are as they should be, against files that are."""

import getpass
import grp
import json
import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from ansible.module_utils.testing import patch_module_args
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from tests.unit.certificates import Authority
from tests.unit.shared import load_by_path

look = load_by_path("roles/certificates/library/certificates_look.py")

pytestmark = pytest.mark.skipif(getpass.getuser() != "root", reason="keys belong to root")
GROUP = grp.getgrgid(os.getgid()).gr_name


class Certified:
    """A certificate with its key, as the role makes them, and the question about them."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        self.authority = Authority(folder)
        self.certificate = folder / "certificate.pem"
        self.key = folder / "key.pem"
        self.issue()

    def issue(
        self, days: int = 300, name: str = "db1", subject: str = "db1", server: bool = True
    ) -> None:
        """Write both files."""
        secrets = self.authority.secrets
        issuer = x509.load_pem_x509_certificate(secrets["fleet_ca_certificate"].encode())
        signer = load_pem_private_key(secrets["fleet_ca_key"].encode(), None)
        assert isinstance(signer, ec.EllipticCurvePrivateKey)
        key = ec.generate_private_key(ec.SECP256R1())
        end = datetime.now(UTC) + timedelta(days=days, hours=1)
        who = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, subject)])
        names = [x509.IPAddress(ip_address("10.0.0.11")), x509.DNSName(name)]
        usages = x509.ExtendedKeyUsageOID
        usage = [usages.SERVER_AUTH if server else usages.CLIENT_AUTH]
        others = (False,) * 8
        certificate = (
            x509.CertificateBuilder(issuer.subject, who, key.public_key(), 1)
            .not_valid_before(datetime.now(UTC) - timedelta(days=400))
            .not_valid_after(end)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.KeyUsage(True, *others), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usage), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .sign(signer, hashes.SHA256())
        )
        self.certificate.write_bytes(certificate.public_bytes(Encoding.PEM))
        self.certificate.chmod(0o644)
        plain = (Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        self.key.write_bytes(key.private_bytes(*plain))
        self.key.chmod(0o640)

    def ask(self, authority: Authority | None = None) -> list[str]:
        """What the module finds wrong."""
        entry = {
            "certificate_file": str(self.certificate),
            "key_file": str(self.key),
            "group": GROUP,
        }
        given: dict[str, Any] = {
            "certificates": [entry],
            "names": ["IP:10.0.0.11", "DNS:db1"],
            "common_name": "db1",
            "authority": (authority or self.authority).secrets["fleet_ca_certificate"],
            "renew_days": 120,
        }
        with patch_module_args(given), pytest.raises(SystemExit):
            look.main()
        said = json.loads(self._capsys.readouterr().out)
        assert not said["changed"]
        return said["why"]


@pytest.fixture
def certified(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Certified:
    return Certified(tmp_path, capsys)


def test_nothing_is_found_where_all_is_well(certified: Certified):
    assert certified.ask() == []


WRONG: dict[str, tuple[Callable[[Certified], object], str]] = {
    "ends soon": (lambda one: one.issue(days=119), "ends in less than 120 days"),
    "another name": (lambda one: one.issue(name="db2"), "has another SubjectAlternativeName"),
    "another subject": (lambda one: one.issue(subject="db2"), "has another subject"),
    "not for servers": (lambda one: one.issue(server=False), "has another ExtendedKeyUsage"),
    "cut short": (lambda one: os.truncate(one.certificate, 100), "cannot be read"),
    "no key": (lambda one: one.key.unlink(), "cannot be read"),
    "an open key": (lambda one: one.key.chmod(0o644), "key.pem has other rights"),
    "a closed certificate": (
        lambda one: one.certificate.chmod(0o600),
        "certificate.pem has other rights",
    ),
}


@pytest.mark.parametrize("title", WRONG)
def test_what_is_wrong_is_found(certified: Certified, title: str):
    change, said = WRONG[title]
    change(certified)
    (found,) = certified.ask()
    assert said in found


def test_another_key_is_found(certified: Certified):
    key = certified.key.read_bytes()
    certified.issue()
    certified.key.write_bytes(key)
    (found,) = certified.ask()
    assert found.endswith("is for another key")


def test_another_authority_is_found(certified: Certified, tmp_path: Path):
    folder = tmp_path / "other"
    folder.mkdir()
    (found,) = certified.ask(Authority(folder))
    assert found.endswith("is signed by another authority")
