"""Flow runs whose process is gone for good: which they are, and what becomes of them.

Only runs that a worker started are looked at; a worker writes its name into their labels. Runs
that people start by hand have no such label and are left alone.
"""

from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import State
from prefect.client.schemas.responses import OrchestrationResult, SetStateStatus
from prefect.states import AwaitingRetry, Cancelled, Crashed

WORKER_LABEL = "prefect.worker.name"
_PAGE = 200
# A run in one of these has a process, or is about to.
_OPEN = ("PENDING", "RUNNING", "CANCELLING")


@dataclass(frozen=True)
class OpenRun:
    """A flow run that should have a process.

    Attributes:
        id: of the flow run.
        name: for people.
        state: its type, PENDING, RUNNING or CANCELLING.
        since: when it entered that.
        pool: name of its work pool; None for a run without one.
        worker: name of the worker that took it last; None if it has not said so yet.
    """

    id: UUID
    name: str
    state: str
    since: datetime
    pool: str | None
    worker: str | None


async def read_open_runs(client: PrefectClient, pool: str | None = None) -> list[OpenRun]:
    """Return the runs of one work pool, or of all, that should have a process."""
    filters: dict[str, Any] = {"flow_runs": {"state": {"type": {"any_": list(_OPEN)}}}}
    if pool is not None:
        filters["work_pools"] = {"name": {"any_": [pool]}}
    return [_open_run(run) async for run in _read(client, filters)]


async def _read(client: PrefectClient, filters: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    """All flow runs of a filter. The client's own method makes models of them, ten times slower."""
    offset = 0
    while True:
        page = filters | {"limit": _PAGE, "offset": offset, "sort": "ID_DESC"}
        response = await client.request("POST", "/flow_runs/filter", json=page)  # type: ignore[arg-type]
        shown = response.json()
        for run in shown:
            yield run
        if len(shown) < _PAGE:
            return
        offset += len(shown)


def _open_run(run: dict[str, Any]) -> OpenRun:
    return OpenRun(
        id=UUID(run["id"]),
        name=run["name"],
        state=run["state"]["type"],
        since=datetime.fromisoformat(run["state"]["timestamp"]),
        pool=run.get("work_pool_name"),
        worker=(run.get("labels") or {}).get(WORKER_LABEL),
    )


async def close_lost(client: PrefectClient, runs: Iterable[OpenRun], why: str) -> list[str]:
    """Mark runs whose process is gone, and return what was done, a sentence each.

    A run that had not begun goes back to the queue; one that was running is Crashed, since what
    it had done so far is not known; one that was being cancelled is Cancelled.

    Args:
        client: of the API.
        runs: the runs.
        why: what happened to their process, as a sentence.
    """
    done = []
    for run in runs:
        if run.state == "PENDING":
            state: State[Any] = AwaitingRetry(message=f"{why} The run had not begun.")
        elif run.state == "CANCELLING":
            state = Cancelled(message=f"{why} The run was being cancelled.")
        else:
            state = Crashed(message=f"{why} The run was running there.")
        if await propose(client, run.id, state):
            done.append(f"{run.name} ({run.id}): {run.state} -> {state.name}")
            if state.is_final():
                await close_children(client, run.id, why)
    return done


async def propose(client: PrefectClient, run: UUID, state: State[Any]) -> bool:
    """Propose a state; whether the server took it (it does not if the run has ended)."""
    result: OrchestrationResult[Any] = await client.set_flow_run_state(run, state)
    return result.status == SetStateStatus.ACCEPT


async def close_children(client: PrefectClient, parent: UUID, why: str) -> None:
    """Mark the open subflows that ran in the process of a run that has ended, at any depth.

    A subflow with a deployment has a process of its own and is left alone.
    """
    filters: dict[str, Any] = {
        "flow_runs": {
            "parent_flow_run_id": {"any_": [str(parent)]},
            "deployment_id": {"is_null_": True},
            "state": {"type": {"any_": list(_OPEN)}},
        }
    }
    for child in [run async for run in _read(client, filters)]:
        state = Crashed(message=f"{why} It ran in the process of flow run {parent}.")
        await propose(client, UUID(child["id"]), state)
        await close_children(client, UUID(child["id"]), why)
