"""Check that every stored DHIS2 server answers with its stored credentials."""

import asyncio
import time
from typing import Any, Literal

from dotenv import load_dotenv
from prefect import flow, get_run_logger, task
from prefect.artifacts import acreate_table_artifact

from prefect_dhis2 import Dhis2Credentials
from prefect_dhis2.servers import read_stored_names
from prefect_examples.dhis2 import get_system_info
from prefect_fleet.manifests import with_manifest


class ServersFailedError(RuntimeError):
    """DHIS2 servers that did not pass their check; the message names them."""


@task(task_run_name="check-{server}")
async def check_server(server: str) -> dict[str, Any]:
    """Ask one server for its version.

    Args:
        server: name of its `Dhis2Credentials` block.

    Returns:
        url, version, and latency_seconds from the question to the answer, further tries included.

    Raises:
        prefect_dhis2.Dhis2Error: the server did not give a usable answer.
        ValueError: the block can't be used.
    """
    credentials = await Dhis2Credentials.aload(server)
    async with credentials.get_client() as client:
        started = time.monotonic()
        version = (await get_system_info(client))["version"]
        seconds = round(time.monotonic() - started, 3)
    return {"url": credentials.base_url, "version": version, "latency_seconds": seconds}


async def outcome_of(server: str) -> dict[str, Any]:
    """Run the check of one server as a task, and return its row of the table."""
    row: dict[str, Any] = {"server": server, "status": "ok"}
    try:
        return row | await check_server(server) | {"error": None}
    except Exception as error:
        # One server's failure, of whatever kind, must not hide what the others answer. Its task
        # run has failed already, which shows in the UI.
        nothing = dict.fromkeys(("url", "version", "latency_seconds"))
        return row | nothing | {"status": "failed", "error": str(error) or type(error).__name__}


@with_manifest
@flow(name="dhis2_connection")
async def dhis2_connection_flow(
    fail_on: Literal["any", "all", "never"] = "any",
) -> list[dict[str, Any]]:
    """Check every stored DHIS2 server, all at the same time.

    Args:
        fail_on: When the run fails: if `any` server failed, only if `all` did, or `never`.

    Returns:
        One outcome per server: server, status (`ok` or `failed`), url, version, latency_seconds
        and error. The table artifact `dhis2-connection` shows the same.

    Raises:
        ServersFailedError: servers failed as `fail_on` says; the message names each with its
            reason.
    """
    logger = get_run_logger()
    servers = await read_stored_names()
    if not servers:
        logger.warning("No DHIS2 server is stored; scripts/create_blocks.py stores them.")
        return []
    outcomes = list(await asyncio.gather(*map(outcome_of, servers)))
    await acreate_table_artifact(
        table=outcomes, key="dhis2-connection", description="DHIS2 servers and their answers"
    )
    failed = [outcome for outcome in outcomes if outcome["status"] == "failed"]
    if not failed:
        logger.info("All %d DHIS2 servers answered.", len(outcomes))
        return outcomes
    reasons = "; ".join(f"{outcome['server']}: {outcome['error']}" for outcome in failed)
    message = f"{len(failed)} of {len(outcomes)} servers failed. {reasons}"
    if fail_on == "any" or (fail_on == "all" and len(failed) == len(outcomes)):
        raise ServersFailedError(message)
    logger.warning("%s", message)
    return outcomes


if __name__ == "__main__":
    load_dotenv()
    asyncio.run(dhis2_connection_flow())
