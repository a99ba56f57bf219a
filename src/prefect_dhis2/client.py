"""HTTP clients for DHIS2's Web API: they try again where that can help, and read page by page."""

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import httpx
from httpx_retries import Retry, RetryTransport

from prefect_dhis2.errors import (
    Dhis2Error,
    describe_failure,
    describe_no_json,
    describe_silence,
)

# Waits between tries, drawn at random up to 1, 2, 4, 8 s and so on, so that many clients of one
# server don't come back at once.
BACKOFF_FACTOR_SECONDS = 0.5
# All waits of one request together; a longer Retry-After is not waited for in full.
LONGEST_WAIT_SECONDS = 300
RETRIED_STATUSES = (
    HTTPStatus.TOO_MANY_REQUESTS,
    HTTPStatus.INTERNAL_SERVER_ERROR,
    HTTPStatus.BAD_GATEWAY,
    HTTPStatus.SERVICE_UNAVAILABLE,
    HTTPStatus.GATEWAY_TIMEOUT,
)
PAGE_SIZE = 1000
# DHIS2 before 2.29 answers XML unless it is asked for JSON.
HEADERS = {"Accept": "application/json"}


@dataclass(frozen=True)
class Page:
    """One page of a resource: which one of how many, how many items all have together, and its."""

    number: int
    count: int
    total: int
    items: list[dict[str, Any]]


class AsyncDhis2Client(httpx.AsyncClient):
    """An `httpx.AsyncClient` whose relative paths start at `/api/`.

    Args:
        transport: what carries the requests.
        retries: how often one is sent again.
        options: those of `httpx.AsyncClient`.
    """

    def __init__(
        self, *, transport: httpx.AsyncBaseTransport, retries: int = 0, **options: Any
    ) -> None:
        self._retry_whole = _build_retry(retries, validate_response=httpx.Response.aread)
        transport = RetryTransport(transport=transport, retry=_build_retry(retries))
        super().__init__(transport=transport, **{"headers": HEADERS} | options)

    async def get_json(self, path: str, params: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the JSON object that the server answers for `path`.

        Raises:
            Dhis2Error: no answer, a status other than 200, or a body that is no JSON object.
                The message names the address and never holds the credentials.
        """
        try:
            response = await self.get(path, params=params, extensions={"retry": self._retry_whole})
        except httpx.HTTPError as error:
            raise Dhis2Error(describe_silence(self.base_url.join(path), error)) from error
        return _read_object(response)

    async def get_pages(
        self,
        resource: str,
        *,
        fields: str,
        page_size: int = PAGE_SIZE,
        params: dict[str, Any] | None = None,
    ) -> AsyncIterator[Page]:
        """Yield a metadata resource, such as `organisationUnits`, page by page.

        Args:
            resource: its name, which is also the key of the list in the answer.
            fields: DHIS2's `fields`, for example `id,name,parent[id]`.
            page_size: items per request.
            params: further parameters, for example `{"filter": "level:eq:2"}`.

        Raises:
            Dhis2Error: as `get_json`; or a page that has not the shape of one.
        """
        number, count = 1, 1
        while number <= count:
            query = _page_query(number, page_size, fields, params)
            body = await self.get_json(resource, query)
            page = _read_page(body, resource, number, self.base_url.join(resource))
            yield page
            number, count = number + 1, page.count


class Dhis2Client(httpx.Client):
    """The same as `AsyncDhis2Client` for code that is not asynchronous."""

    def __init__(self, *, transport: httpx.BaseTransport, retries: int = 0, **options: Any) -> None:
        self._retry_whole = _build_retry(retries, validate_response=httpx.Response.read)
        transport = RetryTransport(transport=transport, retry=_build_retry(retries))
        super().__init__(transport=transport, **{"headers": HEADERS} | options)

    def get_json(self, path: str, params: dict[str, Any] | None = None) -> dict[str, Any]:
        """As `AsyncDhis2Client.get_json`."""
        try:
            response = self.get(path, params=params, extensions={"retry": self._retry_whole})
        except httpx.HTTPError as error:
            raise Dhis2Error(describe_silence(self.base_url.join(path), error)) from error
        return _read_object(response)

    def get_pages(
        self,
        resource: str,
        *,
        fields: str,
        page_size: int = PAGE_SIZE,
        params: dict[str, Any] | None = None,
    ) -> Iterator[Page]:
        """As `AsyncDhis2Client.get_pages`."""
        number, count = 1, 1
        while number <= count:
            query = _page_query(number, page_size, fields, params)
            body = self.get_json(resource, query)
            page = _read_page(body, resource, number, self.base_url.join(resource))
            yield page
            number, count = number + 1, page.count


def _build_retry(retries: int, validate_response: Any = None) -> Retry:
    """Return the policy; with `validate_response` a body that breaks off counts as a failure, too.

    Without it a body is read after the transport is done with the request, which is what streaming
    needs and what leaves nothing to try again.
    """
    return Retry(
        total=retries,
        status_forcelist=RETRIED_STATUSES,
        backoff_factor=BACKOFF_FACTOR_SECONDS,
        max_backoff_wait=LONGEST_WAIT_SECONDS,
        total_timeout=LONGEST_WAIT_SECONDS,
        validate_response=validate_response,
    )


def _read_object(response: httpx.Response) -> dict[str, Any]:
    if response.status_code != HTTPStatus.OK:
        raise Dhis2Error(describe_failure(response))
    try:
        body = response.json()
    except ValueError:
        # Without the cause: it holds the whole body.
        raise Dhis2Error(describe_no_json(response)) from None
    if not isinstance(body, dict):
        raise Dhis2Error(f"{response.url} answered a {type(body).__name__}, not an object")
    return body


def _page_query(
    number: int, page_size: int, fields: str, params: dict[str, Any] | None
) -> dict[str, Any]:
    # Without an order of its own a server may give an item on two pages, and another on none.
    query: dict[str, Any] = {"order": "id:asc"} | (params or {})
    return query | {"paging": "true", "page": number, "pageSize": page_size, "fields": fields}


def _read_page(body: dict[str, Any], resource: str, number: int, address: httpx.URL) -> Page:
    # Page numbers are followed instead of `pager.nextPage`: behind a proxy that address can be
    # one that only the server itself can reach. The end is `pageCount`, never an empty page:
    # DHIS2 answers a page behind the last one with the last one again.
    try:
        pager, items = body["pager"], body[resource]
        page = Page(number, int(pager["pageCount"]), int(pager["total"]), list(items))
        if not all(isinstance(item, dict) for item in page.items):
            raise TypeError
    except (KeyError, TypeError, ValueError):
        raise Dhis2Error(f"{address}, page {number}: not the shape of a DHIS2 page") from None
    return page
