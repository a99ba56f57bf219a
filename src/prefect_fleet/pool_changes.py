"""What work pools become, and the writing of it; `prefect_fleet.pools` has what they should be."""

import contextlib
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any

from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.client.schemas.objects import WorkPool
from prefect.exceptions import ObjectNotFound

from prefect_fleet.inputs import InputError
from prefect_fleet.journal import Journal
from prefect_fleet.plan import Item
from prefect_fleet.pools import Pool, differences, missing_queues, with_limits, worker_class
from prefect_fleet.server_state import read_pages


@dataclass(frozen=True)
class PoolChange:
    """A work pool of the list, and what it becomes.

    Attributes:
        item: for the plan.
        pool: the pool as it should be.
        stored: the pool as the server has it; None for a new one.
        queues: its work queues that are not there yet.
        template: its base job template, where that changes.
    """

    item: Item
    pool: Pool
    stored: WorkPool | None
    queues: tuple[str, ...]
    template: dict[str, Any] | None = None

    def result(self) -> WorkPool:
        """Return the pool as it will be on the server."""
        if self.stored is not None:
            changes = {"base_job_template": self.template} if self.template else {}
            return self.stored.model_copy(update=changes)
        return WorkPool.model_construct(
            name=self.pool.name, type=self.pool.type, base_job_template=_template(self.pool)
        )


def plan_pools(
    pools: list[Pool], stored: Mapping[str, WorkPool], queues: Mapping[str, Set[str]]
) -> list[PoolChange]:
    """Return what each pool becomes.

    Args:
        pools: the pools as they should be.
        stored: those of the server, by name.
        queues: names of the work queues of these.

    Raises:
        InputError: a pool exists with another type.
    """
    faults = [
        f"work pool {pool.name}: has type {found.type}, which can't become {pool.type}; write "
        f"type {found.type}, or delete it first (prefect work-pool delete {pool.name})"
        for pool in pools
        if (found := stored.get(pool.name)) and found.type != pool.type
    ]
    if faults:
        raise InputError("\n".join(faults))
    return [_plan(pool, stored.get(pool.name), queues.get(pool.name, set())) for pool in pools]


def _plan(pool: Pool, stored: WorkPool | None, queues: Set[str]) -> PoolChange:
    if stored is None:
        # Every pool is made with a queue of this name.
        missing = missing_queues(pool, {"default"})
        details = [f"work queue {name} is new" for name in missing]
        item = Item("work pool", pool.name, "new", details)
        return PoolChange(item, pool, None, tuple(missing))
    before = stored.base_job_template or _default_template(pool)
    details = differences(pool, stored.concurrency_limit, queues, before)
    item = Item("work pool", pool.name, "changed" if details else "unchanged", details)
    template = None
    if pool.type == "process":
        made, added = with_limits(before)
        template = made if added else None
    return PoolChange(item, pool, stored, tuple(missing_queues(pool, queues)), template)


def _template(pool: Pool) -> dict[str, Any]:
    template = _default_template(pool)
    return with_limits(template)[0] if pool.type == "process" else template


def _default_template(pool: Pool) -> dict[str, Any]:
    found = worker_class(pool.type)
    assert found is not None, "parse_pools refuses types without a worker"
    return found.get_default_base_job_template()


async def write_pool(client: PrefectClient, journal: Journal, change: PoolChange) -> None:
    """Create or update one pool and its queues."""
    pool, stored = change.pool, change.stored

    async def create() -> None:
        await client.create_work_pool(
            WorkPoolCreate(
                name=pool.name,
                type=pool.type,
                # Without a template the pool can't run anything before a worker has filled it in.
                base_job_template=_template(pool),
                concurrency_limit=pool.concurrency_limit,
            )
        )

    async def delete() -> None:
        with contextlib.suppress(ObjectNotFound):
            await client.delete_work_pool(pool.name)

    async def set_limit(limit: int | None) -> None:
        await client.update_work_pool(pool.name, WorkPoolUpdate(concurrency_limit=limit))

    async def set_template(template: dict[str, Any]) -> None:
        await client.update_work_pool(pool.name, WorkPoolUpdate(base_job_template=template))

    what = f"work pool {pool.name}"
    if stored is None:
        await journal.write(what, create, delete)
    elif stored.concurrency_limit != pool.concurrency_limit:
        await journal.write(
            what,
            lambda: set_limit(pool.concurrency_limit),
            lambda: set_limit(stored.concurrency_limit),
        )
    if stored is not None and (template := change.template):
        await journal.write(
            f"job variables of {what}",
            lambda: set_template(template),
            lambda: set_template(stored.base_job_template),
        )
    for queue in change.queues:
        await create_queue(client, journal, pool.name, queue)


async def create_queue(client: PrefectClient, journal: Journal, pool: str, queue: str) -> None:
    """Create a work queue that is not there."""

    async def create() -> None:
        await client.create_work_queue(queue, work_pool_name=pool)

    async def delete() -> None:
        try:
            found = await client.read_work_queue_by_name(queue, work_pool_name=pool)
        except ObjectNotFound:
            return
        await client.delete_work_queue_by_id(found.id)

    await journal.write(f"work queue {queue} of {pool}", create, delete)


async def ensure_pools(pools: list[Pool]) -> list[Item]:
    """Create and update; nothing is changed when one of them would need another type.

    Raises:
        InputError: a pool exists with another type.
    """
    async with get_client() as client:
        shown = await read_pages(client, "/work_pools/filter")
        queues: dict[str, set[str]] = {}
        for queue in await read_pages(client, "/work_queues/filter"):
            queues.setdefault(queue.get("work_pool_name") or "", set()).add(queue["name"])
        stored = {pool["name"]: WorkPool.model_validate(pool) for pool in shown}
        changes = plan_pools(pools, stored, queues)
        journal = Journal()
        for change in changes:
            await write_pool(client, journal, change)
    return [change.item for change in changes]
