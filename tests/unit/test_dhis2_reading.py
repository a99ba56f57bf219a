"""Reading a DHIS2 server: what is read, and what is said when it can't be."""

import asyncio
import socket
from collections.abc import Callable

import httpx
import pytest

from prefect_dhis2 import Dhis2Credentials
from prefect_examples.dhis2 import (
    Dhis2Error,
    count_by_level,
    get_system_info,
    iter_organisation_units,
)
from tests.unit.shared import DHIS2_PASSWORD, DHIS2_UNITS, DHIS2_USERNAME


def credentials(base_url: str, password: str = DHIS2_PASSWORD) -> Dhis2Credentials:
    return Dhis2Credentials(base_url=base_url, username=DHIS2_USERNAME, password=password)


def read_info(client: httpx.AsyncClient) -> dict:
    async def read() -> dict:
        async with client:
            return await get_system_info(client)

    return asyncio.run(read())


def read_units(client: httpx.AsyncClient, page_size: int = 50) -> list[dict]:
    async def read() -> list[dict]:
        async with client:
            return [unit async for unit in iter_organisation_units(client, page_size)]

    return asyncio.run(read())


def answering(handler: Callable[[httpx.Request], httpx.Response]) -> httpx.AsyncClient:
    """A client whose server is `handler`, for answers that the stand-in never gives."""
    return httpx.AsyncClient(base_url="https://x.org/api/", transport=httpx.MockTransport(handler))


def test_system_info(dhis2: str):
    assert read_info(credentials(dhis2).get_client())["version"]


@pytest.mark.parametrize("page_size", [1000, 50, 41, 7])
def test_every_unit_is_read_once_whatever_the_page_size(dhis2: str, page_size: int):
    units = read_units(credentials(dhis2).get_client(), page_size)
    assert len({unit["id"] for unit in units}) == len(units) == DHIS2_UNITS
    assert units[0].keys() == {"id", "name", "level", "path"}
    assert units[1]["parent"] == {"id": units[0]["id"]}


def test_wrong_password_is_said_without_showing_it(dhis2: str):
    with pytest.raises(Dhis2Error, match="401 Unauthorized: Unauthorized") as raised:
        read_info(credentials(dhis2, "s3cret-guess").get_client())
    assert "s3cret-guess" not in str(raised.value)


def test_a_server_that_is_not_there_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        with pytest.raises(
            Dhis2Error, match=rf"127\.0\.0\.1:{port}/api/system/info did not answer"
        ):
            read_info(credentials(f"http://127.0.0.1:{port}").get_client())


@pytest.mark.parametrize(
    ("response", "said"),
    [
        (httpx.Response(302, headers={"location": "/login"}), "302 Found, a redirect to /login"),
        (httpx.Response(502, text="<html>"), "502 Bad Gateway"),
        (httpx.Response(409, json={"message": "no"}), "409 Conflict: no"),
        (httpx.Response(409, json=["no"]), "409 Conflict"),
        (httpx.Response(200, html="<html>"), "answered text/html"),
        (httpx.Response(200, json=[1]), "answered a list"),
        (httpx.Response(200, json={"name": "other"}), "states no version"),
    ],
)
def test_an_answer_of_no_use_is_described(response: httpx.Response, said: str):
    with pytest.raises(Dhis2Error, match=said):
        read_info(answering(lambda request: response))


def test_a_page_of_another_shape_is_an_error():
    with pytest.raises(Dhis2Error, match="page 1: not the shape"):
        read_units(answering(lambda request: httpx.Response(200, json={"organisationUnits": []})))


def test_units_that_get_lost_between_pages_are_noticed():
    def same_page_twice(request: httpx.Request) -> httpx.Response:
        pager = {"page": request.url.params["page"], "pageCount": 2, "total": 4}
        units = [{"id": "a"}, {"id": "b"}]
        return httpx.Response(200, json={"pager": pager, "organisationUnits": units})

    with pytest.raises(Dhis2Error, match="read 2 distinct units of 4"):
        read_units(answering(same_page_twice))


def test_levels_are_counted_in_their_order():
    levels = [3, 1, 2, 3, None, 10, 2, 3]
    counted = count_by_level({"level": level} for level in levels)
    assert list(counted.items()) == [("1", 1), ("2", 2), ("3", 3), ("10", 1), ("unknown", 1)]
