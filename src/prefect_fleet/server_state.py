"""What the server has, read in pages: a few requests for any number of deployments."""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import WorkPool

from prefect_fleet.bare_api import PAGE


@dataclass
class ServerState:
    """What deploying compares with, as the API shows it.

    Attributes:
        flows: id of each flow, by name; those alone that were asked for.
        deployments: each deployment, by `<flow>/<name>`.
        automations: each automation, by the id of a deployment that it runs.
        pools: each work pool, by name.
        queues: names of the work queues of each pool.
        default_queues: name of the queue of each pool that takes what names none.
    """

    flows: dict[str, str]
    deployments: dict[str, dict[str, Any]]
    automations: dict[str, list[dict[str, Any]]]
    pools: dict[str, WorkPool]
    queues: dict[str, set[str]]
    default_queues: dict[str, str]


async def read_pages(client: PrefectClient, path: str, **body: Any) -> list[dict[str, Any]]:
    """Return all that a `…/filter` route of the API shows."""
    found: list[dict[str, Any]] = []
    while True:
        page = body | {"limit": PAGE, "offset": len(found)}
        response = await client.request("POST", path, json=page)  # type: ignore[arg-type]
        shown = response.json()
        found += shown
        if len(shown) < PAGE:
            return found


async def read_state(client: PrefectClient) -> ServerState:
    """Read it all, side by side."""
    # By itself, as the first request finds out whether the server wants CSRF tokens.
    pools = await read_pages(client, "/work_pools/filter")
    flows, deployments, automations, queues = await asyncio.gather(
        read_pages(client, "/flows/filter"),
        read_pages(client, "/deployments/filter"),
        read_pages(client, "/automations/filter"),
        read_pages(client, "/work_queues/filter"),
    )
    names = {flow["id"]: flow["name"] for flow in flows}
    by_deployment: dict[str, list[dict[str, Any]]] = {}
    for automation in automations:
        for deployment_id in run_by(automation):
            by_deployment.setdefault(deployment_id, []).append(automation)
    by_pool: dict[str, set[str]] = {pool["name"]: set() for pool in pools}
    for queue in queues:
        by_pool.setdefault(queue.get("work_pool_name") or "", set()).add(queue["name"])
    return ServerState(
        flows={name: flow_id for flow_id, name in names.items()},
        # A deployment whose flow was made between two of the requests is left for the next time.
        deployments={
            f"{names[one['flow_id']]}/{one['name']}": one
            for one in deployments
            if one["flow_id"] in names
        },
        automations=by_deployment,
        pools={pool["name"]: WorkPool.model_validate(pool) for pool in pools},
        queues=by_pool,
        default_queues={
            pool["name"]: queue["name"]
            for pool in pools
            for queue in queues
            if queue["id"] == pool.get("default_queue_id")
        },
    )


def run_by(automation: dict[str, Any]) -> Iterable[str]:
    """Return the ids of the deployments that an automation runs."""
    return {
        action["deployment_id"]
        for action in automation["actions"]
        if action.get("type") == "run-deployment" and action.get("deployment_id")
    }


async def read_automations(client: PrefectClient, deployment_id: UUID) -> list[dict[str, Any]]:
    """Return the automations that have to do with a deployment now."""
    response = await client.request(
        "GET",
        "/automations/related-to/{resource_id}",
        path_params={"resource_id": f"prefect.deployment.{deployment_id}"},
    )
    shown: list[dict[str, Any]] = response.json()
    return shown
