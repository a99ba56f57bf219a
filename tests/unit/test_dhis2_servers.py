"""Lists of DHIS2 servers, as other programs read them."""

import asyncio

import httpx
import pytest
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, temporary_settings

from prefect_dhis2 import Dhis2Credentials
from prefect_dhis2.servers import build_blocks, read_stored_names, read_variables

SECRET = "s3cret-word"
LOGIN = {"base_url": "https://x.org", "username": "u", "password": SECRET}


def test_blocks_by_name_and_faults_that_name_the_entry():
    blocks, faults = build_blocks(
        [
            {"name": "play", **LOGIN},
            {"name": "token", "base_url": "https://x.org/dhis/api", "token": SECRET, "retries": 0},
            {"name": "empty", **LOGIN, "token": "", "ca_file": None, "verify_tls": None},
            {"name": "both", **LOGIN, "token": SECRET},
            {"name": "neither", "base_url": "https://x.org"},
            {"name": "typo", **LOGIN, "pasword": SECRET},
            {"name": "play", **LOGIN},
            {"name": 5, **LOGIN},
            {"base_url": f"https://{SECRET}@x.org", "token": SECRET},
            [SECRET],
        ]
    )
    assert list(blocks) == ["play", "token", "empty"]
    assert blocks["token"].base_url == "https://x.org/dhis"
    assert blocks["token"].retries == 0
    assert blocks["empty"].verify_tls is True
    starts = [
        "server both: write a token, or a username with its password, not both",
        "server neither: write a username with its password, or a token",
        "server typo: pasword is not known",
        "server play: is listed twice",
        "server 5: name is a int, not a str",
        "server number 9: name is missing",
        "server number 10: is a list; write a mapping",
    ]
    assert [fault[: len(start)] for fault, start in zip(faults, starts, strict=True)] == starts
    assert SECRET not in " ".join(faults)


def test_no_servers_are_no_fault():
    assert build_blocks([]) == ({}, [])


def test_variables_of_one_server_make_one_entry():
    assert read_variables(
        {
            "DHIS2_SERVERS__A_B__BASE_URL": "https://x.org",
            "DHIS2_SERVERS__A_B__PASSWORD": "123",
            "DHIS2_SERVERS__A_B__RETRIES": "3",
            "DHIS2_SERVERS__C__VERIFY_TLS": "no",
            "DHIS2_SERVER__D__TOKEN": "other",
        }
    ) == [
        {"name": "a-b", "base_url": "https://x.org", "password": "123", "retries": 3},
        {"name": "c", "verify_tls": False},
    ]


def test_a_prefect_server_that_never_heard_of_the_block_has_none(prefect_api: str):
    async def forget() -> None:
        async with get_client() as client:
            block_type = await client.read_block_type_by_slug("dhis2-credentials")
            await client.delete_block_type(block_type.id)

    Dhis2Credentials(base_url="https://x.org", token=SECRET).save("known", overwrite=True)
    assert "known" in asyncio.run(read_stored_names())
    asyncio.run(forget())
    assert asyncio.run(read_stored_names()) == []


def test_another_failure_of_the_prefect_server_is_none_of_no_blocks(dhis2: str):
    """The stand-in answers Prefect's client as something that wants a login."""
    with (
        temporary_settings({PREFECT_API_URL: f"{dhis2}/api"}),
        pytest.raises(httpx.HTTPStatusError, match="401"),
    ):
        asyncio.run(read_stored_names())
