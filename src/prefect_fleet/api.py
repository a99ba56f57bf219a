"""What the programs of this package share when they talk to the Prefect API."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import httpx
from prefect.blocks.core import Block
from prefect.client.orchestration import PrefectClient, get_client
from prefect.exceptions import ObjectNotFound
from prefect.settings import get_current_settings

Status = Literal["new", "changed", "unchanged"]
Client = TypeVar("Client", bound=PrefectClient)


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


def new_client(kind: type[Client]) -> Client:
    """Return a client of another class than Prefect's own for the API of the settings."""
    settings = get_current_settings()
    secret = settings.api.auth_string
    auth_string = secret.get_secret_value() if secret else None
    return kind(str(settings.api.url), auth_string=auth_string)


async def ensure_block(block: Block, name: str) -> Status:
    """Store `block` under `name` unless exactly this is stored already."""
    slug = block.get_block_type_slug()
    async with get_client() as client:
        try:
            stored = await client.read_block_document_by_name(name, slug)
        except ObjectNotFound:
            stored = None
    if stored is not None and not block_differences(block, stored.data):
        return "unchanged"
    await block.asave(name, overwrite=True)
    return "new" if stored is None else "changed"


def block_data(block: Block) -> dict[str, Any]:
    """Return what the API stores of a block, secrets included."""
    data = block.model_dump(mode="json", by_alias=True, context={"include_secrets": True})
    # Prefect adds the type's slug when it dumps a block, but does not store it.
    data.pop("block_type_slug", None)
    return data


def block_differences(block: Block, stored: dict[str, Any]) -> list[str]:
    """Return the dotted keys in which a block differs from what is stored; never a value."""
    return list(_differing(stored, block_data(block), ""))


def _differing(old: Any, new: Any, where: str) -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted((old.keys() | new.keys()) - {"block_type_slug"}):
            yield from _differing(old.get(key), new.get(key), f"{where}.{key}".lstrip("."))
    elif old != new:
        yield where
