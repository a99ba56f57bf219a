"""The DHIS2 credentials block."""

import ast
import asyncio
import ssl
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from pydantic import ValidationError

from lab.dhis2_standin import StandinServer, Units
from prefect_dhis2 import Dhis2Credentials, Dhis2Error
from tests.unit.shared import DHIS2_PASSWORD, DHIS2_TOKEN, DHIS2_USERNAME

SECRET = "s3cret-word"


@pytest.fixture(scope="module")
def tls_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """Address of a stand-in for DHIS2 behind TLS, and the file of its own authority."""
    folder = tmp_path_factory.mktemp("tls")
    key_file, ca_file = folder / "key.pem", folder / "ca.pem"
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "tests")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    key_file.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    ca_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(ca_file, key_file)
    with StandinServer(("127.0.0.1", 0), Units(1), DHIS2_USERNAME, DHIS2_PASSWORD) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        # A client that turns away is what these tests are about.
        server.handle_error = lambda *_: None
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield f"https://127.0.0.1:{server.server_port}", str(ca_file)
        server.shutdown()
        thread.join()


def build(base_url: str, **fields) -> Dhis2Credentials:
    return Dhis2Credentials(
        base_url=base_url, username=DHIS2_USERNAME, password=DHIS2_PASSWORD, **fields
    )


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("https://play.example.org", "https://play.example.org"),
        (" https://play.example.org/ ", "https://play.example.org"),
        ("https://example.org:8443/dhis/api/", "https://example.org:8443/dhis"),
        ("http://10.0.0.1:8080/api", "http://10.0.0.1:8080"),
        ("https://example.org/myapi", "https://example.org/myapi"),
    ],
)
def test_base_url_is_kept_without_api(given: str, kept: str):
    block = build(given)
    assert block.base_url == kept
    assert block.api_url == f"{kept}/api/"


@pytest.mark.parametrize(
    "given",
    ["play.example.org", "ftp://x.org", "https://", "https://u:p@x.org", "https://x.org/?a=b"],
)
def test_an_address_of_no_use_is_refused(given: str):
    with pytest.raises(ValidationError, match="write the"):
        build(given)


@pytest.mark.parametrize("timeout", [0, -1])
def test_the_timeout_is_above_zero(timeout: float):
    with pytest.raises(ValidationError):
        build("https://x.org", timeout_seconds=timeout)


def test_both_clients_are_authenticated(dhis2: str):
    block = build(dhis2)
    with block.get_sync_client() as client:
        assert client.get("system/info").json()["version"]

    async def ask() -> int:
        async with block.get_client() as client:
            return (await client.get("system/info")).status_code

    assert asyncio.run(ask()) == 200


def test_the_timeout_reaches_the_client():
    with build("https://x.org", timeout_seconds=1.5).get_sync_client() as client:
        assert client.timeout.read == client.timeout.connect == 1.5


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "write a username with its password, or a token"),
        ({"username": "u"}, "password is missing; write both, or a token"),
        ({"password": SECRET}, "username is missing; write both, or a token"),
        ({"username": "", "password": SECRET, "token": ""}, "username is missing"),
        ({"username": "u", "password": SECRET, "token": SECRET}, "not both"),
        ({"username": "u", "token": SECRET}, "not both"),
        ({"username": "u:v", "password": SECRET}, "no user names with a colon"),
        ({"token": f"{SECRET}\n"}, "write the token alone"),
        ({"token": f"{SECRET}ä"}, "write the token alone"),
        ({"token": SECRET, "ca_file": "/x.pem", "verify_tls": False}, "write one of them"),
        ({"token": SECRET, "retries": 11}, "retries"),
        ({"token": SECRET, "timeout_seconds": SECRET}, "timeout_seconds"),
    ],
)
def test_there_is_one_way_to_sign_in_and_faults_show_no_secret(fields: dict, said: str):
    with pytest.raises(ValidationError, match=said) as raised:
        Dhis2Credentials(base_url="https://x.org", **fields)
    assert SECRET not in f"{raised.value} {raised.value!r}"


def test_a_token_is_sent_in_its_own_scheme(dhis2: str):
    block = Dhis2Credentials(base_url=dhis2, token=DHIS2_TOKEN, password="")
    with block.get_sync_client() as client:
        response = client.get("system/info")
    assert response.request.headers["authorization"] == f"ApiToken {DHIS2_TOKEN}"
    assert response.json()["version"]


@pytest.mark.parametrize("fields", [{"username": "u", "password": SECRET}, {"token": SECRET}])
def test_secrets_are_not_shown(fields: dict, caplog: pytest.LogCaptureFixture):
    block = Dhis2Credentials(base_url="https://x.org", **fields)
    client = block.get_sync_client()
    caplog.set_level("DEBUG")
    client._transport._sync_transport = httpx.MockTransport(lambda _: httpx.Response(401))
    with client, pytest.raises(Dhis2Error) as raised:
        client.get_json("me")
    shown = f"{block!r} {block} {block.model_dump_json()} {client!r} {vars(client)}"
    logged = " ".join(record.getMessage() for record in caplog.records)
    assert "https://x.org/api/me" in logged
    assert SECRET not in f"{shown} {logged} {raised.value!r}"


def test_a_server_with_a_certificate_of_its_own_authority(tls_server: tuple[str, str]):
    address, ca_file = tls_server
    with (
        build(address, retries=0).get_sync_client() as client,
        pytest.raises(Dhis2Error, match="CERTIFICATE_VERIFY_FAILED"),
    ):
        client.get_json("system/info")
    for fields in ({"ca_file": ca_file}, {"verify_tls": False}):
        with build(address, **fields).get_sync_client() as client:
            assert client.get_json("system/info")["version"]


@pytest.mark.parametrize("content", [None, "no certificate"])
def test_a_ca_file_of_no_use_is_named(tmp_path: Path, content: str | None):
    path = tmp_path / "ca.pem"
    if content:
        path.write_text(content)
    with pytest.raises(Dhis2Error, match=f"ca_file {path} can't be used on this host"):
        build("https://x.org", ca_file=str(path)).get_client()


def test_a_proxy_of_the_environment_is_used(dhis2: str, monkeypatch: pytest.MonkeyPatch):
    """The stand-in plays the proxy: it is asked for a host that is not there."""
    for name in ("http_proxy", "HTTP_PROXY", "no_proxy", "NO_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", dhis2)
    with build("http://far.invalid").get_sync_client() as client:
        assert client.get_json("system/info")["contextPath"] == "http://far.invalid"
    monkeypatch.setenv("no_proxy", "far.invalid")
    with (
        build("http://far.invalid", retries=0).get_sync_client() as client,
        pytest.raises(Dhis2Error, match="did not answer"),
    ):
        client.get_json("system/info")


def test_the_block_says_what_it_is_for():
    block_type = Dhis2Credentials._to_block_type()
    assert block_type.name == "DHIS2 Credentials"
    assert "a personal access token: one of the two" in block_type.description
    ast.parse(block_type.code_example.removeprefix("```python").removesuffix("```"))
    fields = Dhis2Credentials.model_json_schema()["properties"]
    assert all(field.get("description") for field in fields.values())


def test_prefect_registers_the_block(prefect_command):
    command = [sys.executable, "-P", "-m", "prefect", "block", "register", "-m", "prefect_dhis2"]
    done = prefect_command(command)
    assert done.returncode == 0, done.stdout
    assert "Successfully registered 1 block" in done.stdout
