"""Credentials blocks from a list of DHIS2 servers: a YAML or JSON list, or variables.

An entry is `{name, base_url, username, password}` or `{name, base_url, token}`, each with
`timeout_seconds`, `retries`, `verify_tls` and `ca_file` where their defaults don't fit. As
variables the server `play-dev` is `DHIS2_SERVERS__PLAY_DEV__BASE_URL=…`,
`DHIS2_SERVERS__PLAY_DEV__TOKEN=…` and so on.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import httpx
import yaml
from prefect.client.orchestration import get_client
from pydantic import ValidationError

from prefect_dhis2.credentials import Dhis2Credentials
from prefect_fleet.inputs import InputError, require_mapping

BLOCKS_PER_REQUEST = 200
VARIABLE_PREFIX = "DHIS2_SERVERS__"
REQUIRED = {"name": str, "base_url": str}
OPTIONAL: dict[str, type | tuple[type, ...]] = {
    "username": str,
    "password": str,
    "token": str,
    "timeout_seconds": (int, float),
    "retries": int,
    "verify_tls": bool,
    "ca_file": str,
}


@dataclass(frozen=True)
class Server:
    """One entry of a list: what to call it in messages, and its block or what is wrong with it."""

    label: str
    block: Dhis2Credentials | None = None
    fault: str | None = None


def build_blocks(entries: list[Any]) -> tuple[dict[str, Dhis2Credentials], list[str]]:
    """Return the blocks by name, and a sentence for each entry that makes none.

    A sentence names the entry (`server play: …`, or `server number 3: …` where it has no name) and
    never quotes another value of it.
    """
    servers = read_servers(entries)
    blocks = {server.label: server.block for server in servers if server.block}
    return blocks, [f"server {server.label}: {server.fault}" for server in servers if server.fault]


def read_servers(entries: list[Any]) -> list[Server]:
    """Return what each entry says, in their order."""
    servers: list[Server] = []
    names: set[str] = set()
    for number, entry in enumerate(entries, start=1):
        name = entry.get("name") if isinstance(entry, dict) else None
        label = str(name or f"number {number}")
        try:
            block = _build_block(entry)
            if label in names:
                raise InputError("is listed twice; only the first one counts")
        except InputError as error:
            servers.append(Server(label, fault=str(error)))
        else:
            names.add(label)
            servers.append(Server(label, block))
    return servers


def _build_block(entry: Any) -> Dhis2Credentials:
    require_mapping(entry, required=REQUIRED, optional=OPTIONAL)
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", entry["name"]):
        raise InputError("name may have lower-case letters, digits and dashes only")
    fields = {
        key: value for key, value in entry.items() if key != "name" and value not in (None, "")
    }
    try:
        return Dhis2Credentials(**fields)
    except ValidationError as error:
        raise InputError("; ".join(_describe(fault) for fault in error.errors())) from None


def _describe(fault: Any) -> str:
    place = ".".join(map(str, fault["loc"]))
    message = fault["msg"].removeprefix("Value error, ")
    return f"{place}: {message}" if place else message


def read_variables(variables: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return the entries that `DHIS2_SERVERS__<NAME>__<KEY>` variables describe, by name.

    Upper case and underscores of a variable become lower case and, in names, dashes. A variable
    without a second double underscore becomes a key that `read_servers` does not know.
    """
    entries: dict[str, dict[str, Any]] = {}
    for variable in sorted(variables):
        if not variable.startswith(VARIABLE_PREFIX):
            continue
        name, _, key = variable.removeprefix(VARIABLE_PREFIX).lower().partition("__")
        name = name.replace("_", "-")
        entries.setdefault(name, {"name": name})[key or variable] = _parse(key, variables[variable])
    return list(entries.values())


def _parse(key: str, text: str) -> Any:
    """Return `text` as the type of its key; one that doesn't fit is left for the check to find."""
    if OPTIONAL.get(key, str) is str:
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


async def read_stored_names() -> list[str]:
    """Return the names of all stored `Dhis2Credentials` blocks, sorted.

    Raises:
        httpx.HTTPError: the Prefect API does not answer or refuses.
    """
    names: list[str] = []
    slug = Dhis2Credentials.get_block_type_slug()
    async with get_client() as client:
        while True:
            try:
                documents = await client.read_block_documents_by_type(
                    slug, offset=len(names), limit=BLOCKS_PER_REQUEST, include_secrets=False
                )
            except httpx.HTTPStatusError as error:
                if error.response.status_code == HTTPStatus.NOT_FOUND:
                    # Neither a block of this type was ever stored nor the type itself.
                    return []
                raise
            names += [document.name for document in documents if document.name]
            if len(documents) < BLOCKS_PER_REQUEST:
                return sorted(names)
