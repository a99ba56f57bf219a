"""Create or update the work pools that a file lists: `python -m prefect_fleet.pools FILE`.

FILE is YAML or JSON: `[{"name": "default", "type": "process", "concurrency_limit": null,
"work_queues": ["host-a"]}, …]`; the last two keys may be left out. Pools and work queues that it
does not list, and everything else of the pools that it does (paused, base job template), stay as
they are; but the job variables of `LIMITS` are added to a template of a process pool without them.
The last line of stdout is
`{"work_pools": [{"name": "default", "status": "new|changed|unchanged"}]}`.
Exit status: 0 done, 1 nothing or not everything was done (reasons on stderr), 2 wrong usage.
"""

import asyncio
import contextlib
import copy
import json
import sys
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any

from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.client.schemas.objects import WorkPool
from prefect.exceptions import ObjectNotFound

from prefect_fleet.api import ApiError, api_errors
from prefect_fleet.inputs import InputError, file_argument, read_file, require_mapping
from prefect_fleet.journal import Journal
from prefect_fleet.plan import Item, PlanStatus
from prefect_fleet.server_state import read_pages

# Job variables for what one flow run may take, as `prefect_operations.limits` reads them.
LIMITS: dict[str, dict[str, Any]] = {
    "memory_max": {
        "title": "Memory at most",
        "description": (
            "Memory of a flow run with all processes that it starts, such as 512M or 2G. A run "
            "that wants more is ended, and Crashed for want of memory."
        ),
        "anyOf": [
            {"type": "string", "pattern": "^[0-9]+[KMGT]?$"},
            {"type": "integer", "minimum": 16 << 20},
            {"type": "null"},
        ],
        "default": None,
        "examples": ["512M", "2G"],
    },
    "cpu_quota": {
        "title": "Processor time at most",
        "description": (
            "Processor time of a flow run with all processes that it starts, in percent of one "
            "processor, such as 50%, or 150% for one and a half. A run that wants more waits."
        ),
        "anyOf": [{"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?%$"}, {"type": "null"}],
        "default": None,
        "examples": ["50%", "150%"],
    },
    "tasks_max": {
        "title": "Processes and threads at most",
        "description": (
            "Processes and threads of a flow run, Prefect's own included, such as 100. A run that "
            "wants more gets an error."
        ),
        "anyOf": [
            {"type": "integer", "minimum": 1},
            {"type": "string", "pattern": "^0*[1-9][0-9]*$"},
            {"type": "null"},
        ],
        "default": None,
        "examples": [100, 500],
    },
}


@dataclass(frozen=True)
class Pool:
    """A work pool as it should be.

    Attributes:
        name: its name.
        type: its worker type, for example process; Prefect can't change it later.
        concurrency_limit: flow runs at a time over all workers; None for no limit.
        work_queues: queues that it must have. A worker that is started for a queue that is not
            there gets no runs at all, not even those of its other queues.
    """

    name: str
    type: str
    concurrency_limit: int | None
    work_queues: tuple[str, ...] = ()


def parse_pools(entries: Any) -> list[Pool]:
    """Return the pools that the file lists.

    Raises:
        InputError: all faults of all entries.
    """
    if not isinstance(entries, list) or not entries:
        raise InputError('is no list of work pools; write [{"name": "default", "type": "process"}]')
    pools: list[Pool] = []
    faults: list[str] = []
    for number, entry in enumerate(entries, start=1):
        try:
            pool = _parse_pool(entry)
            if pool.name in {other.name for other in pools}:
                raise InputError("is listed twice")
            pools.append(pool)
        except InputError as error:
            name = entry.get("name") if isinstance(entry, dict) else None
            faults.append(f"work pool {name or f'number {number}'}: {error}")
    if faults:
        raise InputError("\n".join(faults))
    return pools


def _parse_pool(entry: Any) -> Pool:
    require_mapping(
        entry,
        required={"name": str, "type": str},
        optional={"concurrency_limit": int, "work_queues": list},
    )
    limit = entry.get("concurrency_limit")
    if limit == "" or (limit is not None and limit < 0):
        raise InputError("concurrency_limit is no number from 0; write null for no limit")
    if entry["type"] != "process" and _worker_class(entry["type"]) is None:
        from prefect.workers.base import BaseWorker

        known = ", ".join(sorted(BaseWorker.get_all_available_worker_types()))
        raise InputError(f"no worker of type {entry['type']!r} is installed; known: {known}")
    queues = entry.get("work_queues") or []
    if not all(isinstance(queue, str) and queue for queue in queues):
        raise InputError("work_queues holds something that is no name; write [host-a, host-b]")
    return Pool(entry["name"], entry["type"], limit, tuple(queues))


def _worker_class(worker_type: str) -> Any:
    """Return the class of a type's worker, or None. Importing workers takes half a second."""
    if worker_type == "process":
        from prefect.workers.process import ProcessWorker

        return ProcessWorker
    from prefect.workers.base import BaseWorker

    return BaseWorker.get_worker_class_from_type(worker_type)


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
    # Every pool is made with a queue of this name.
    there = queues if stored else {"default"}
    missing = tuple(name for name in dict.fromkeys(pool.work_queues) if name not in there)
    details = []
    if stored is not None and stored.concurrency_limit != pool.concurrency_limit:
        old, new = (_shown(one.concurrency_limit) for one in (stored, pool))
        details.append(f"concurrency_limit: {old} -> {new}")
    details += [f"work queue {name} is new" for name in missing]
    template = None
    if stored is not None and pool.type == "process":
        template, added = with_limits(stored.base_job_template or _default_template(pool))
        details += [f"job variable {name} is new" for name in added]
        template = template if added else None
    status: PlanStatus = "new" if stored is None else "changed" if details else "unchanged"
    item = Item("work pool", pool.name, status, details)
    return PoolChange(item, pool, stored, missing, template)


def _shown(limit: int | None) -> str:
    return "none" if limit is None else str(limit)


def _template(pool: Pool) -> dict[str, Any]:
    template = _default_template(pool)
    return with_limits(template)[0] if pool.type == "process" else template


def with_limits(template: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return a base job template that offers the limits, and the names of those that it had not."""
    made = copy.deepcopy(dict(template))
    variables = made.setdefault("variables", {}).setdefault("properties", {})
    configuration = made.setdefault("job_configuration", {})
    added = []
    for name, schema in LIMITS.items():
        # Somebody may have put a value in place of the variable, for nobody to change.
        if name not in configuration:
            configuration[name] = f"{{{{ {name} }}}}"
            variables.setdefault(name, copy.deepcopy(schema))
            added.append(name)
    return made, added


def _default_template(pool: Pool) -> dict[str, Any]:
    worker_class = _worker_class(pool.type)
    assert worker_class is not None, "parse_pools refuses types without a worker"
    return worker_class.get_default_base_job_template()


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


def main(arguments: list[str] | None = None) -> int:
    """Run the program; see the module's text."""
    path = file_argument(
        "python -m prefect_fleet.pools", __doc__, "YAML or JSON list of work pools", arguments
    )
    try:
        pools = parse_pools(read_file(path))
        with api_errors():
            items = asyncio.run(ensure_pools(pools))
    except (InputError, ApiError) as error:
        print(error, file=sys.stderr)
        return 1
    statuses = [{"name": item.name, "status": item.status} for item in items]
    print(json.dumps({"work_pools": statuses}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
