"""Read from a DHIS2 server through its Web API.

Every function takes the client of a `Dhis2Credentials` block, whose base address ends in `/api/`.
"""

from collections import Counter
from collections.abc import AsyncIterator, Iterable
from typing import Any

import httpx

from prefect_dhis2 import Dhis2Error

UNIT_FIELDS = "id,name,level,path,parent[id]"


async def get_json(
    client: httpx.AsyncClient, path: str, params: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Return the JSON object that the server answers for `path`.

    Raises:
        Dhis2Error: no answer, a status other than 200, or a body that is no JSON object.
            The message names the address and never holds the credentials.
    """
    try:
        response = await client.get(path, params=params)
    except httpx.HTTPError as error:
        address = client.base_url.join(path)
        raise Dhis2Error(
            f"{address} did not answer: {error or type(error).__name__} ({type(error).__name__})"
        ) from error
    if response.status_code != httpx.codes.OK:
        raise Dhis2Error(f"{response.url} answered {_describe_failure(response)}")
    try:
        body = response.json()
    except ValueError as error:
        kind = response.headers.get("content-type", "no content type")
        raise Dhis2Error(f"{response.url} answered {kind} where JSON was expected") from error
    if not isinstance(body, dict):
        raise Dhis2Error(f"{response.url} answered a {type(body).__name__}, not an object")
    return body


def _describe_failure(response: httpx.Response) -> str:
    """Return status and reason; DHIS2 puts its own reason in the `message` of a JSON body."""
    status = f"{response.status_code} {response.reason_phrase}"
    if response.is_redirect:
        # Older servers send a client with wrong credentials to the login page.
        return f"{status}, a redirect to {response.headers.get('location', 'nowhere')}"
    try:
        message = response.json().get("message")
    except (ValueError, AttributeError):
        message = None
    return f"{status}: {message}" if message else status


async def get_system_info(client: httpx.AsyncClient) -> dict[str, Any]:
    """Return `GET /api/system/info`: version, server date and so on.

    Raises:
        Dhis2Error: no usable answer, or one without the `version` that every DHIS2 states.
    """
    info = await get_json(client, "system/info")
    if not info.get("version"):
        raise Dhis2Error(f"{client.base_url}system/info states no version: is this a DHIS2 server?")
    return info


async def iter_organisation_units(
    client: httpx.AsyncClient, page_size: int = 200, fields: str = UNIT_FIELDS
) -> AsyncIterator[dict[str, Any]]:
    """Yield every organisation unit, reading `page_size` of them per request.

    Raises:
        Dhis2Error: no usable answer, or fewer distinct units than the server says it has.
    """
    seen: set[str] = set()
    page, page_count, total = 1, 1, 0
    # Page numbers are followed instead of `pager.nextPage`: behind a proxy that address can be
    # one that only the server itself can reach. The end is `pageCount`, never an empty page:
    # DHIS2 answers a page behind the last one with the last one again.
    while page <= page_count:
        params = {"paging": "true", "page": page, "pageSize": page_size, "fields": fields}
        body = await get_json(client, "organisationUnits", params)
        try:
            page_count, total = int(body["pager"]["pageCount"]), int(body["pager"]["total"])
            units = [unit for unit in body["organisationUnits"] if unit["id"] not in seen]
        except (KeyError, TypeError, ValueError) as error:
            raise Dhis2Error(
                f"{client.base_url}organisationUnits, page {page}: not the shape of a DHIS2 page"
            ) from error
        for unit in units:
            seen.add(unit["id"])
            yield unit
        page += 1
    if len(seen) < total:
        raise Dhis2Error(
            f"{client.base_url}organisationUnits: read {len(seen)} distinct units of {total}; "
            "they changed while they were read, so run it again"
        )


def count_by_level(units: Iterable[dict[str, Any]]) -> dict[str, int]:
    """Return how many units each level has, as JSON-friendly `{"1": 1, "2": 4}`, top level first.

    Units whose level is missing are counted as `"unknown"`.
    """
    counts = Counter(unit.get("level") for unit in units)
    unknown = counts.pop(None, 0)
    by_level = {str(level): counts[level] for level in sorted(counts)}
    return by_level | ({"unknown": unknown} if unknown else {})
