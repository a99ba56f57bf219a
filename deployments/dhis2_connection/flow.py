"""Check that every stored DHIS2 server answers with its stored credentials."""

import asyncio
import time
from typing import Any

from dotenv import load_dotenv
from prefect import flow, get_run_logger, task
from prefect.artifacts import acreate_table_artifact
from prefect.client.orchestration import get_client
from prefect.exceptions import ObjectNotFound

from prefect_dhis2 import Dhis2Credentials
from prefect_examples.dhis2 import get_system_info

BLOCKS_PER_REQUEST = 200


class ServersFailedError(RuntimeError):
    """At least one DHIS2 server did not pass its check."""


async def stored_server_names() -> list[str]:
    """Return the names of all stored `Dhis2Credentials` blocks, sorted."""
    names: list[str] = []
    async with get_client() as client:
        while True:
            try:
                documents = await client.read_block_documents_by_type(
                    Dhis2Credentials.get_block_type_slug(),
                    offset=len(names),
                    limit=BLOCKS_PER_REQUEST,
                    include_secrets=False,
                )
            except ObjectNotFound:
                return []
            names += [document.name for document in documents if document.name]
            if len(documents) < BLOCKS_PER_REQUEST:
                return sorted(names)


@task(task_run_name="check-{server}")
async def check_server(server: str) -> dict[str, Any]:
    """Ask one server for its version.

    Args:
        server: name of its `Dhis2Credentials` block.

    Returns:
        server, url, ok, version, seconds (how long the answer took) and error.
    """
    outcome: dict[str, Any] = {"server": server, "url": None, "ok": False, "version": None}
    started = time.monotonic()
    error: str | None = None
    try:
        credentials = await Dhis2Credentials.aload(server)
        outcome["url"] = credentials.base_url
        async with credentials.get_client() as client:
            outcome["version"] = (await get_system_info(client))["version"]
        outcome["ok"] = True
    except Exception as failure:
        # One server's failure, of whatever kind, must not hide what the others answer.
        error = str(failure) or type(failure).__name__
    return outcome | {"seconds": round(time.monotonic() - started, 3), "error": error}


@flow(name="dhis2_connection")
async def dhis2_connection_flow() -> list[dict[str, Any]]:
    """Check every stored DHIS2 server side by side.

    Returns:
        One outcome per server, as `check_server` describes it.

    Raises:
        ServersFailedError: some servers failed; the message names each with its reason, and the
            table artifact `dhis2-connection` shows all outcomes.
    """
    logger = get_run_logger()
    servers = await stored_server_names()
    if not servers:
        logger.warning("No DHIS2 server is stored; scripts/create_blocks.py stores them.")
        return []
    outcomes = list(await asyncio.gather(*(check_server(server) for server in servers)))
    await acreate_table_artifact(
        table=outcomes, key="dhis2-connection", description="DHIS2 servers and their answers"
    )
    failed = [outcome for outcome in outcomes if not outcome["ok"]]
    if failed:
        reasons = "; ".join(f"{outcome['server']}: {outcome['error']}" for outcome in failed)
        raise ServersFailedError(f"{len(failed)} of {len(outcomes)} servers failed. {reasons}")
    logger.info("All %d DHIS2 servers answered.", len(outcomes))
    return outcomes


if __name__ == "__main__":
    load_dotenv()
    asyncio.run(dhis2_connection_flow())
