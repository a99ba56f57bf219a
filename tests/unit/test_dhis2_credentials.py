"""The DHIS2 credentials block."""

import asyncio
import sys

import pytest
from pydantic import ValidationError

from prefect_dhis2 import Dhis2Credentials
from tests.unit.shared import DHIS2_PASSWORD, DHIS2_USERNAME


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


@pytest.mark.parametrize("verify", [True, False])
def test_verify_tls_reaches_the_client(verify: bool):
    block = build("https://x.org", verify_tls=verify)
    assert block._client_settings()["verify"] is verify


def test_the_password_is_not_shown():
    block = build("https://x.org")
    assert DHIS2_PASSWORD not in f"{block!r} {block} {block.model_dump_json()}"


def test_prefect_registers_the_block(prefect_command):
    command = [sys.executable, "-P", "-m", "prefect", "block", "register", "-m", "prefect_dhis2"]
    done = prefect_command(command)
    assert done.returncode == 0, done.stdout
    assert "Successfully registered 1 block" in done.stdout
