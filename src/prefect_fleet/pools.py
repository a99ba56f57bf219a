"""Create or update the work pools that a file lists: `python -m prefect_fleet.pools FILE`.

FILE is YAML or JSON: `[{"name": "default", "type": "process", "concurrency_limit": null,
"work_queues": ["host-a"]}, …]`; the last two keys may be left out. Pools and work queues that it
does not list, and everything else of the pools that it does (paused, base job template), stay as
they are. The last line of stdout is
`{"work_pools": [{"name": "default", "status": "new|changed|unchanged"}]}`.
Exit status: 0 done, 1 nothing or not everything was done (reasons on stderr), 2 wrong usage.
"""

import asyncio
import json
import sys
from dataclasses import dataclass
from typing import Any

from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.client.schemas.objects import WorkPool
from prefect.exceptions import ObjectNotFound
from prefect.workers.base import BaseWorker
from prefect.workers.process import ProcessWorker

from prefect_fleet.api import ApiError, Status, api_errors
from prefect_fleet.inputs import InputError, file_argument, read_file, require_mapping


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
    if _worker_class(entry["type"]) is None:
        known = ", ".join(sorted(BaseWorker.get_all_available_worker_types()))
        raise InputError(f"no worker of type {entry['type']!r} is installed; known: {known}")
    queues = entry.get("work_queues") or []
    if not all(isinstance(queue, str) and queue for queue in queues):
        raise InputError("work_queues holds something that is no name; write [host-a, host-b]")
    return Pool(entry["name"], entry["type"], limit, tuple(queues))


def _worker_class(worker_type: str) -> type[BaseWorker[Any, Any, Any]] | None:
    if worker_type == ProcessWorker.type:
        return ProcessWorker
    return BaseWorker.get_worker_class_from_type(worker_type)


async def ensure_pools(pools: list[Pool]) -> list[dict[str, str]]:
    """Create and update; nothing is changed when one of them would need another type.

    Raises:
        InputError: a pool exists with another type.
    """
    async with get_client() as client:
        existing = {pool.name: await _read(client, pool.name) for pool in pools}
        faults = [
            f"work pool {pool.name}: has type {found.type}, which can't become {pool.type}; write "
            f"type {found.type}, or delete it first (prefect work-pool delete {pool.name})"
            for pool in pools
            if (found := existing[pool.name]) and found.type != pool.type
        ]
        if faults:
            raise InputError("\n".join(faults))
        return [
            {"name": pool.name, "status": await _ensure(client, pool, existing[pool.name])}
            for pool in pools
        ]


async def _read(client: PrefectClient, name: str) -> WorkPool | None:
    try:
        return await client.read_work_pool(name)
    except ObjectNotFound:
        return None


async def _ensure(client: PrefectClient, pool: Pool, existing: WorkPool | None) -> Status:
    status = await _ensure_pool(client, pool, existing)
    if await _add_queues(client, pool) and status == "unchanged":
        return "changed"
    return status


async def _ensure_pool(client: PrefectClient, pool: Pool, existing: WorkPool | None) -> Status:
    if existing is None:
        worker_class = _worker_class(pool.type)
        assert worker_class is not None, "parse_pools refuses types without a worker"
        await client.create_work_pool(
            WorkPoolCreate(
                name=pool.name,
                type=pool.type,
                # Without a template the pool can't run anything before a worker has filled it in.
                base_job_template=worker_class.get_default_base_job_template(),
                concurrency_limit=pool.concurrency_limit,
            )
        )
        return "new"
    if existing.concurrency_limit == pool.concurrency_limit:
        return "unchanged"
    await client.update_work_pool(
        pool.name, WorkPoolUpdate(concurrency_limit=pool.concurrency_limit)
    )
    return "changed"


async def _add_queues(client: PrefectClient, pool: Pool) -> bool:
    """Create the queues that are missing, and tell whether there were any."""
    missing = []
    for queue in dict.fromkeys(pool.work_queues):
        try:
            await client.read_work_queue_by_name(queue, work_pool_name=pool.name)
        except ObjectNotFound:
            missing.append(queue)
    for queue in missing:
        await client.create_work_queue(queue, work_pool_name=pool.name)
    return bool(missing)


def main(arguments: list[str] | None = None) -> int:
    """Run the program; see the module's text."""
    path = file_argument(
        "python -m prefect_fleet.pools", __doc__, "YAML or JSON list of work pools", arguments
    )
    try:
        pools = parse_pools(read_file(path))
        with api_errors():
            statuses = asyncio.run(ensure_pools(pools))
    except (InputError, ApiError) as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps({"work_pools": statuses}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
