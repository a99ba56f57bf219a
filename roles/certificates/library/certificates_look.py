#!/usr/bin/python
"""Whether the certificates of a host are as they should be, in one call that changes nothing.

The modules that make keys, requests and certificates compare as well, each in a call of its own and
for each certificate: they are asked only where this one finds something.
"""

from __future__ import annotations

import grp
import pwd
import stat
from datetime import UTC, datetime
from ipaddress import ip_address
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule

try:
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_pem_private_key
except ImportError:
    x509 = None

DOCUMENTATION = r"""
module: certificates_look
short_description: Find certificates that are missing, wrong or about to end
options:
  certificates:
    description: The certificates, each with C(certificate_file), C(key_file) and C(group).
    type: list
    elements: dict
    required: true
  names:
    description: What they have to be good for, as C(IP:10.0.0.1) or C(DNS:db1).
    type: list
    elements: str
    required: true
  common_name: {description: The name of their subject., type: str, required: true}
  authority:
    description: The certificate of whom they are signed by, in PEM.
    type: str
    required: true
  renew_days: {description: Days that they have to be good for., type: int, required: true}
author: [prefect-fleet]
"""

RETURN = r"""
why:
  description: What is not as it should be; empty when nothing is.
  returned: always
  type: list
  elements: str
"""

_KEY_MODE, _CERTIFICATE_MODE = 0o640, 0o644


def wanted_name(text: str) -> x509.GeneralName:
    """A name as certificates hold it.

    >>> wanted_name("DNS:db1")
    <DNSName(value='db1')>
    """
    kind, _, value = text.partition(":")
    return x509.IPAddress(ip_address(value)) if kind == "IP" else x509.DNSName(value)


def right_mistakes(path: str, group: str, mode: int) -> list[str]:
    """Who else may reach a file that is there."""
    found = Path(path).stat()
    try:
        owners = (pwd.getpwnam("root").pw_uid, grp.getgrnam(group).gr_gid)
    except KeyError:
        return [f"there is no group {group}"]
    if (found.st_uid, found.st_gid) == owners and stat.S_IMODE(found.st_mode) == mode:
        return []
    return [f"{path} has other rights"]


def certificate_mistakes(
    certificate: x509.Certificate, names: list[str], common_name: str, days: int
) -> list[str]:
    """What a certificate says that it should not."""
    mistakes = []
    if (certificate.not_valid_after_utc - datetime.now(UTC)).days < days:
        mistakes.append(f"ends in less than {days} days")
    wanted = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, common_name)])
    if certificate.subject != wanted:
        mistakes.append("has another subject")
    usage = dict.fromkeys(
        (
            "content_commitment",
            "key_encipherment",
            "data_encipherment",
            "key_agreement",
            "key_cert_sign",
            "crl_sign",
            "encipher_only",
            "decipher_only",
        ),
        False,
    )
    extensions = {
        x509.SubjectAlternativeName: set(map(wanted_name, names)),
        x509.ExtendedKeyUsage: {x509.ExtendedKeyUsageOID.SERVER_AUTH},
        x509.KeyUsage: x509.KeyUsage(digital_signature=True, **usage),
        x509.BasicConstraints: x509.BasicConstraints(ca=False, path_length=None),
    }
    for kind, value in extensions.items():
        try:
            found = certificate.extensions.get_extension_for_class(kind).value
        except x509.ExtensionNotFound:
            found = None
        if (set(found) if found and isinstance(value, set) else found) != value:
            mistakes.append(f"has another {kind.__name__}")
    return mistakes


def find_mistakes(
    entry: dict[str, str],
    names: list[str],
    common_name: str,
    authority: x509.Certificate,
    days: int,
) -> list[str]:
    """All that is wrong with one certificate and its key."""
    path, key_path = entry["certificate_file"], entry["key_file"]
    try:
        key = load_pem_private_key(Path(key_path).read_bytes(), password=None)
        certificate = x509.load_pem_x509_certificate(Path(path).read_bytes())
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        return [f"{path} or its key cannot be read: {error}"]
    mistakes = right_mistakes(key_path, entry["group"], _KEY_MODE)
    mistakes += right_mistakes(path, "root", _CERTIFICATE_MODE)
    if not isinstance(getattr(key, "curve", None), ec.SECP256R1):
        mistakes.append(f"{key_path} is of another kind")
    if certificate.public_key() != key.public_key():
        mistakes.append(f"{path} is for another key")
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        mistakes.append(f"{path} is signed by another authority")
    said = certificate_mistakes(certificate, names, common_name, days)
    return mistakes + [f"{path} {mistake}" for mistake in said]


def main() -> None:
    """Run as an Ansible module."""
    module = AnsibleModule(
        argument_spec={
            "certificates": {"type": "list", "elements": "dict", "required": True},
            "names": {"type": "list", "elements": "str", "required": True},
            "common_name": {"type": "str", "required": True},
            "authority": {"type": "str", "required": True},
            "renew_days": {"type": "int", "required": True},
        },
        supports_check_mode=True,
    )
    params = module.params
    if x509 is None:
        module.exit_json(why=["this host lacks python3-cryptography, which makes certificates"])
    authority = x509.load_pem_x509_certificate(params["authority"].encode())
    why = [
        mistake
        for entry in params["certificates"]
        for mistake in find_mistakes(
            entry, params["names"], params["common_name"], authority, params["renew_days"]
        )
    ]
    module.exit_json(changed=False, why=why)


if __name__ == "__main__":
    main()
