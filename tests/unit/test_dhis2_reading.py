"""Clients of DHIS2: what they read, when they try again, and what they say when they can't."""

import asyncio
import socket
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import httpx
import httpx_retries.retry
import pytest

from lab.dhis2_standin import Fault, StandinServer
from prefect_dhis2 import AsyncDhis2Client, Dhis2Client, Dhis2Credentials, Dhis2Error, Page
from prefect_examples.dhis2 import get_system_info
from tests.unit.shared import DHIS2_PASSWORD, DHIS2_UNITS, DHIS2_USERNAME

INFO = "/api/system/info"


def credentials(base_url: str, **fields: Any) -> Dhis2Credentials:
    login = {"username": DHIS2_USERNAME, "password": DHIS2_PASSWORD}
    return Dhis2Credentials(base_url=base_url, **login | fields)


def read_info(client: AsyncDhis2Client) -> dict[str, Any]:
    async def read() -> dict[str, Any]:
        async with client:
            return await get_system_info(client)

    return asyncio.run(read())


def read_info_in_sync(block: Dhis2Credentials) -> dict[str, Any]:
    with block.get_sync_client() as client:
        return client.get_json("system/info")


def answering(handler: Callable[[httpx.Request], httpx.Response]) -> AsyncDhis2Client:
    """A client whose server is `handler`, for answers that the stand-in never gives."""
    transport = httpx.MockTransport(handler)
    return AsyncDhis2Client(transport=transport, base_url="https://x.org/api/")


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Let no client really wait; the list is how long each would have waited, in seconds."""
    waited: list[float] = []

    async def sleep(seconds: float) -> None:
        waited.append(seconds)

    monkeypatch.setattr(httpx_retries.retry, "asyncio", SimpleNamespace(sleep=sleep))
    monkeypatch.setattr(httpx_retries.retry, "time", SimpleNamespace(sleep=waited.append))
    return waited


@pytest.fixture(params=["async", "sync"])
def ask(request: pytest.FixtureRequest) -> Callable[[Dhis2Credentials], dict[str, Any]]:
    """Ask a server for its version, with either client."""
    if request.param == "sync":
        return read_info_in_sync
    return lambda block: read_info(block.get_client())


def test_system_info(dhis2: str, ask):
    assert ask(credentials(dhis2))["version"]


@pytest.mark.parametrize("page_size", [1000, 50, 41, 7])
def test_every_item_is_read_once_whatever_the_page_size(dhis2: str, page_size: int):
    block = credentials(dhis2)
    fields = "id,parent[id]"
    with block.get_sync_client() as client:
        pages = list(client.get_pages("organisationUnits", fields=fields, page_size=page_size))

    async def read() -> list[Page]:
        async with block.get_client() as client:
            resource = client.get_pages("organisationUnits", fields=fields, page_size=page_size)
            return [page async for page in resource]

    assert asyncio.run(read()) == pages
    items = [item for page in pages for item in page.items]
    assert len({item["id"] for item in items}) == len(items) == DHIS2_UNITS
    assert items[1] == {"id": items[1]["id"], "parent": {"id": items[0]["id"]}}
    assert [page.number for page in pages] == list(range(1, pages[0].count + 1))
    assert {page.total for page in pages} == {DHIS2_UNITS}


def test_pages_have_an_order_that_lasts_unless_one_is_given():
    queries: list[httpx.QueryParams] = []

    def handler(request: httpx.Request) -> httpx.Response:
        queries.append(request.url.params)
        return httpx.Response(200, json={"pager": {"pageCount": 1, "total": 0}, "sets": []})

    client = Dhis2Client(transport=httpx.MockTransport(handler), base_url="https://x.org/api/")
    with client:
        list(client.get_pages("sets", fields="id"))
        list(
            client.get_pages("sets", fields="id", params={"order": "name:asc", "filter": "a:eq:b"})
        )
    assert [query["order"] for query in queries] == ["id:asc", "name:asc"]
    assert queries[1]["filter"] == "a:eq:b"


@pytest.mark.parametrize(
    "fault",
    [
        Fault("status", status=429),
        Fault("status", status=500),
        Fault("status", status=503),
        Fault("drop"),
        Fault("truncate"),
        Fault("delay", seconds=30),
    ],
    ids=lambda fault: f"{fault.kind}-{fault.status}",
)
def test_what_passes_is_tried_again(dhis2, dhis2_server: StandinServer, waits, ask, fault: Fault):
    dhis2_server.faults[:] = [Fault(**vars(fault) | {"times": 3})]
    assert ask(credentials(dhis2, retries=3, timeout_seconds=0.3))["version"]
    assert dhis2_server.faults == []
    assert len(waits) == 3
    for number, wait in enumerate(waits):
        assert 0 <= wait <= 2**number


@pytest.mark.parametrize("retries", [0, 2])
def test_there_is_an_end_to_it(dhis2, dhis2_server: StandinServer, waits, ask, retries: int):
    dhis2_server.faults[:] = [Fault("status", status=503, times=None)]
    with pytest.raises(Dhis2Error, match=rf"503 .*request sent {retries + 1} times"):
        ask(credentials(dhis2, retries=retries))
    assert len(waits) == retries


def test_a_server_that_says_when_to_come_back_is_heard(dhis2, dhis2_server, waits, ask):
    dhis2_server.faults[:] = [Fault("status", status=429, retry_after="7", times=2)]
    assert ask(credentials(dhis2))["version"]
    assert waits == [7, 7]


def test_a_server_that_wants_too_long_is_not_waited_for_for_ever(dhis2, dhis2_server, waits, ask):
    dhis2_server.faults[:] = [Fault("status", status=429, retry_after="7200", times=None)]
    with pytest.raises(Dhis2Error, match=r"429 .*it asks to wait \(Retry-After: 7200\)"):
        ask(credentials(dhis2))
    assert waits == [300]


@pytest.mark.parametrize("method", ["POST", "PATCH"])
def test_what_may_change_something_twice_is_sent_once(dhis2, dhis2_server, waits, method: str):
    def count_requests(request: httpx.Request) -> httpx.Response:
        requests.append(request)
        return httpx.Response(503)

    requests: list[httpx.Request] = []
    transport = httpx.MockTransport(count_requests)
    with Dhis2Client(transport=transport, retries=3, base_url="https://x.org/api/") as client:
        assert client.request(method, "metadata", json={}).status_code == 503
        assert len(requests) == 1
        client.put("metadata", json={})
        assert len(requests) == 5


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 501])
def test_what_does_not_pass_is_not_tried_again(dhis2, dhis2_server, waits, ask, status: int):
    dhis2_server.faults[:] = [Fault("status", status=status)]
    with pytest.raises(Dhis2Error, match=f"answered {status}"):
        ask(credentials(dhis2))
    assert waits == []


def test_wrong_credentials_are_said_without_showing_them(dhis2: str, ask):
    for wrong in (
        {"password": "s3cret-guess"},
        {"username": None, "password": None, "token": "s3cret-guess"},
    ):
        with pytest.raises(
            Dhis2Error, match=r"401 Unauthorized: Unauthorized; check the"
        ) as raised:
            ask(credentials(dhis2, **wrong))
        assert "s3cret-guess" not in f"{raised.value!r} {raised.value.__cause__!r}"


def test_a_server_that_is_not_there_is_named(ask):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        with pytest.raises(
            Dhis2Error, match=rf"127\.0\.0\.1:{port}/api/system/info did not answer: .*ConnectError"
        ):
            ask(credentials(f"http://127.0.0.1:{port}", retries=0))


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (Fault("delay", seconds=30), r"did not answer: .*ReadTimeout"),
        (Fault("drop"), r"did not answer: .*RemoteProtocolError"),
        (Fault("truncate"), r"did not answer: .*RemoteProtocolError"),
        (Fault("cut-json"), "application/json.* where JSON was expected: it is cut short"),
        (Fault("login-page"), "answered text/html where JSON was expected: a web page, such as a"),
        (Fault("redirect"), "302 Found, a redirect to /dhis-web-login/; check the base URL"),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
def test_a_fault_that_stays_is_described(dhis2, dhis2_server, ask, fault: Fault, said: str):
    dhis2_server.faults[:] = [Fault(**vars(fault) | {"times": None})]
    with pytest.raises(Dhis2Error, match=said):
        ask(credentials(dhis2, retries=0, timeout_seconds=0.3))


@pytest.mark.parametrize(
    ("base_path", "said"),
    [
        ("/dhis", r"404 Not Found, and not in DHIS2's words; check the base URL"),
        ("", r"404 Not Found: The resource /api/nothing was not found$"),
    ],
)
def test_a_wrong_base_path_is_told_from_an_unknown_resource(dhis2: str, base_path: str, said: str):
    with (
        credentials(f"{dhis2}{base_path}").get_sync_client() as client,
        pytest.raises(Dhis2Error, match=said),
    ):
        client.get_json("nothing")


@pytest.mark.parametrize(
    ("response", "said"),
    [
        (httpx.Response(502, text="<html>"), "502 Bad Gateway"),
        (httpx.Response(409, json={"message": "no"}), "409 Conflict: no"),
        (httpx.Response(409, json=["no"]), "409 Conflict"),
        (httpx.Response(200, text="yes"), "answered text/plain; charset=utf-8 where JSON was"),
        (httpx.Response(200, json=[1]), "answered a list"),
        (httpx.Response(200, json={"name": "other"}), "states no version"),
    ],
)
def test_an_answer_of_no_use_is_described(response: httpx.Response, said: str):
    with pytest.raises(Dhis2Error, match=said):
        read_info(answering(lambda request: response))


@pytest.mark.parametrize(
    "body",
    [
        {"units": []},
        {"pager": {"pageCount": 1, "total": 1}},
        {"pager": {"pageCount": "x", "total": 1}, "units": []},
        {"pager": {"pageCount": 1, "total": 1}, "units": ["x"]},
        {"pager": [], "units": []},
    ],
)
def test_a_page_of_another_shape_is_an_error(body: dict[str, Any]):
    transport = httpx.MockTransport(lambda _: httpx.Response(200, json=body))
    with (
        Dhis2Client(transport=transport, base_url="https://x.org/api/") as client,
        pytest.raises(Dhis2Error, match="units, page 1: not the shape of a DHIS2 page"),
    ):
        list(client.get_pages("units", fields="id"))
