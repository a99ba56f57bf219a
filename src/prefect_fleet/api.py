"""What the programs of this package share when they talk to the Prefect API."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import httpx
from prefect.blocks.core import Block
from prefect.client.orchestration import get_client
from prefect.exceptions import ObjectNotFound
from prefect.settings import get_current_settings

Status = Literal["new", "changed", "unchanged"]


class ApiError(RuntimeError):
    """The Prefect API is not configured, does not answer or refuses the request."""


@contextmanager
def api_errors() -> Iterator[None]:
    """Turn the client's errors into one sentence with the way out.

    Raises:
        ApiError: instead of any HTTP error in the body, and when no API is configured: Prefect
            would otherwise start a temporary server of its own and change that one.
    """
    url = get_current_settings().api.url
    if not url:
        raise ApiError("no Prefect API is configured; set PREFECT_API_URL")
    try:
        yield
    except httpx.HTTPStatusError as error:
        status = error.response.status_code
        way_out = "; check PREFECT_API_AUTH_STRING" if status == httpx.codes.UNAUTHORIZED else ""
        raise ApiError(f"the Prefect API at {url} answered {status}{way_out}") from error
    except httpx.HTTPError as error:
        raise ApiError(
            f"the Prefect API at {url} does not answer ({error or type(error).__name__}); "
            "check PREFECT_API_URL"
        ) from error


async def ensure_block(block: Block, name: str) -> Status:
    """Store `block` under `name` unless exactly this is stored already."""
    wanted = block.model_dump(mode="json", by_alias=True, context={"include_secrets": True})
    slug = block.get_block_type_slug()
    async with get_client() as client:
        try:
            stored = await client.read_block_document_by_name(name, slug)
        except ObjectNotFound:
            stored = None
    if stored is not None and _without_type(stored.data) == _without_type(wanted):
        return "unchanged"
    await block.asave(name, overwrite=True)
    return "new" if stored is None else "changed"


def _without_type(data: dict[str, object]) -> dict[str, object]:
    """Drop the type's slug, which Prefect adds when it dumps a block but does not store."""
    return {key: value for key, value in data.items() if key != "block_type_slug"}
