"""Create or update the work pools that a file lists: `python -m prefect_fleet.pools FILE`.

FILE is YAML or JSON: `[{"name": "default", "type": "process", "concurrency_limit": null,
"work_queues": ["host-a"]}, …]`; the last two keys may be left out. Pools and work queues that it
does not list, and everything else of the pools that it does (paused, base job template), stay as
they are; but the job variables of `LIMITS` are added to a template of a process pool without them.
Where the server has all of that already, as in nearly every converge, this is seen without Prefect,
whose import takes most of the time that the rest does.
The last line of stdout is
`{"work_pools": [{"name": "default", "status": "new|changed|unchanged"}]}`.
Exit status: 0 done, 1 nothing or not everything was done (reasons on stderr), 2 wrong usage.
"""

import asyncio
import copy
import json
import sys
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import httpx

from prefect_fleet.bare_api import CannotTellError, bare_client
from prefect_fleet.inputs import InputError, file_argument, read_file, require_mapping

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
    if entry["type"] != "process" and worker_class(entry["type"]) is None:
        from prefect.workers.base import BaseWorker

        known = ", ".join(sorted(BaseWorker.get_all_available_worker_types()))
        raise InputError(f"no worker of type {entry['type']!r} is installed; known: {known}")
    queues = entry.get("work_queues") or []
    if not all(isinstance(queue, str) and queue for queue in queues):
        raise InputError("work_queues holds something that is no name; write [host-a, host-b]")
    return Pool(entry["name"], entry["type"], limit, tuple(queues))


def worker_class(worker_type: str) -> Any:
    """Return the class of a type's worker, or None. Importing workers takes half a second."""
    if worker_type == "process":
        from prefect.workers.process import ProcessWorker

        return ProcessWorker
    from prefect.workers.base import BaseWorker

    return BaseWorker.get_worker_class_from_type(worker_type)


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


def differences(
    pool: Pool, limit: int | None, queues: Set[str], template: Mapping[str, Any]
) -> list[str]:
    """Return what has to change of a pool that is there, a line each.

    Args:
        pool: as it should be.
        limit: the concurrency limit that it has.
        queues: names of its work queues.
        template: its base job template.
    """
    found = []
    if limit != pool.concurrency_limit:
        old, new = ("none" if one is None else str(one) for one in (limit, pool.concurrency_limit))
        found.append(f"concurrency_limit: {old} -> {new}")
    found += [f"work queue {name} is new" for name in missing_queues(pool, queues)]
    if pool.type == "process":
        found += [f"job variable {name} is new" for name in with_limits(template)[1]]
    return found


def missing_queues(pool: Pool, queues: Set[str]) -> list[str]:
    """Return the work queues that a pool should have and that are not among these."""
    return [name for name in dict.fromkeys(pool.work_queues) if name not in queues]


def are_there(pools: list[Pool]) -> bool:
    """Whether the server has every pool as it should be; False, too, where it does not tell."""
    try:
        with bare_client() as client:
            return all(_is_there(client, pool) for pool in pools)
    except CannotTellError:
        return False


def _is_there(client: httpx.Client, pool: Pool) -> bool:
    path = f"/work_pools/{quote(pool.name, safe='')}"
    found = client.get(path)
    if not found.is_success:
        return False
    stored = found.json()
    # Prefect alone knows what becomes of a pool of another type, or without a template.
    if stored["type"] != pool.type or not (template := stored["base_job_template"]):
        return False
    queues = {
        name
        for name in pool.work_queues
        if client.get(f"{path}/queues/{quote(name, safe='')}").is_success
    }
    return not differences(pool, stored["concurrency_limit"], queues, template)


def main(arguments: list[str] | None = None) -> int:
    """Run the program; see the module's text."""
    path = file_argument(
        "python -m prefect_fleet.pools", __doc__, "YAML or JSON list of work pools", arguments
    )
    try:
        pools = parse_pools(read_file(path))
    except InputError as error:
        print(error, file=sys.stderr)
        return 1
    statuses = {pool.name: "unchanged" for pool in pools}
    if not are_there(pools):
        from prefect_fleet.api import ApiError, api_errors
        from prefect_fleet.pool_changes import ensure_pools

        try:
            with api_errors():
                items = asyncio.run(ensure_pools(pools))
        except (ApiError, InputError) as error:
            print(error, file=sys.stderr)
            return 1
        statuses = {item.name: item.status for item in items}
    listed = [{"name": name, "status": status} for name, status in statuses.items()]
    print(json.dumps({"work_pools": listed}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
