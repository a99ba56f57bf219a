"""Certificates of the fleet's authority, for tests, and a server that shows one."""

import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from ipaddress import ip_address
from pathlib import Path
from threading import Thread

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from tests.unit.shared import load_by_path

make_secrets = load_by_path("scripts/make_secrets.py")


@dataclass
class Authority:
    """What make_secrets.py makes, with files of it below a folder."""

    folder: Path
    secrets: dict[str, str] = field(default_factory=make_secrets.make_authority)

    @property
    def file(self) -> str:
        """The file that clients get."""
        path = self.folder / "ca.pem"
        path.write_text(self.secrets["fleet_ca_certificate"])
        return str(path)

    def issue(self, address: str = "127.0.0.1", days: float = 1) -> Path:
        """Certificate and key of a service in one file; negative `days`: it has ended."""
        issuer = x509.load_pem_x509_certificate(self.secrets["fleet_ca_certificate"].encode())
        signer = load_pem_private_key(self.secrets["fleet_ca_key"].encode(), None)
        assert isinstance(signer, ec.EllipticCurvePrivateKey)
        key = ec.generate_private_key(ec.SECP256R1())
        end = datetime.now(UTC) + timedelta(days=days)
        names = x509.SubjectAlternativeName([x509.IPAddress(ip_address(address))])
        identifier = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        by = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier)
        certificate = (
            x509.CertificateBuilder(issuer.subject, x509.Name([]), key.public_key(), 1)
            .not_valid_before(end - timedelta(days=2))
            .not_valid_after(end)
            .add_extension(names, critical=True)
            .add_extension(by, critical=False)
            .sign(signer, hashes.SHA256())
        )
        path = self.folder / "service.pem"
        path.write_bytes(
            key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
            + certificate.public_bytes(Encoding.PEM)
        )
        return path


@contextmanager
def serving(certificate: Path) -> Iterator[str]:
    """Yield the address of a server with this certificate, which answers everything with 200."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        # A client that turns away is what the tests are about.
        server.handle_error = lambda *_: None
        thread = Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield f"https://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()
