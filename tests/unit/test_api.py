"""What the programs say when the Prefect API can't be used."""

import asyncio
import socket

import pytest
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, temporary_settings

from prefect_fleet.api import ApiError, api_errors


async def ask() -> None:
    async with get_client() as client:
        await client.read_work_pools()


def run_ask() -> None:

    with api_errors():
        asyncio.run(ask())


def test_without_an_api_no_temporary_server_is_started(monkeypatch):
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    with (
        temporary_settings(restore_defaults={PREFECT_API_URL}),
        pytest.raises(ApiError, match="no Prefect API is configured; set PREFECT_API_URL"),
    ):
        run_ask()


def test_an_api_that_is_away_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/api"
        with (
            temporary_settings({PREFECT_API_URL: url}),
            pytest.raises(ApiError, match=rf"{url} does not answer .*; check PREFECT_API_URL"),
        ):
            run_ask()


def test_a_refused_login_names_the_setting(dhis2: str):
    """Any server that answers 401 will do."""
    with (
        temporary_settings({PREFECT_API_URL: f"{dhis2}/api"}),
        pytest.raises(ApiError, match="answered 401; check PREFECT_API_AUTH_STRING"),
    ):
        run_ask()
