"""Plan and write the deployments of all prefect.yaml files.

A deployment's labels say which project made it and, as digests, which schedules and triggers the
last deploy wrote. The API takes labels only with `POST /deployments/`, which creates a deployment
or replaces what is there in one transaction and keeps its id and its runs.
"""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import jsonschema
import referencing.exceptions
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import WorkPool
from prefect.exceptions import ObjectNotFound
from prefect.settings import get_current_settings
from prefect.utilities.templating import PlaceholderType
from pydantic import ValidationError

from prefect_fleet import schedules, stock, triggers
from prefect_fleet.differences import differences
from prefect_fleet.faults import Fault
from prefect_fleet.journal import Journal, PutBackError
from prefect_fleet.plan import Item
from prefect_fleet.pool_changes import create_queue
from prefect_fleet.prefect_files import Entry, find_templates
from prefect_fleet.server_state import ServerState, read_automations, read_pages

PROJECT_LABEL = "prefect-fleet.project"
SCHEDULES_LABEL = "prefect-fleet.schedules"
TRIGGERS_LABEL = "prefect-fleet.triggers"
# What a deploy writes of a deployment, besides schedules, triggers and labels.
FIELDS = (
    "version", "description", "paused", "tags", "entrypoint", "path", "pull_steps",
    "work_pool_name", "work_queue_name", "job_variables", "parameters",
    "parameter_openapi_schema", "enforce_parameter_schema", "concurrency_limit",
    "concurrency_options",
)  # fmt: skip
DELETED_AT_ONCE = 50  # the most that the API takes


class StepError(RuntimeError):
    """A build or push step failed; the message says which deployment's and how."""


@dataclass
class Change:
    """A deployment of a file, and what it becomes.

    Attributes:
        item: for the plan.
        flow_name: name of its flow.
        body: the body of `POST /deployments/`, all but the flow's id.
        stored: the deployment as the server has it; None for a new one.
        triggers: its automations; None where they stay.
        queue: its pool and queue, where that queue is not there yet.
    """

    item: Item
    flow_name: str
    body: dict[str, Any]
    stored: dict[str, Any] | None
    triggers: list[dict[str, Any]] | None
    queue: tuple[str, str] | None


@dataclass
class Removal:
    """A deployment that is in no file any more."""

    item: Item
    stored: dict[str, Any]
    automations: list[dict[str, Any]] = field(default_factory=list)


def has_steps(entry: Entry) -> bool:
    """Tell whether deploying it runs build or push steps."""
    return bool(entry.steps("build") or entry.steps("push"))


class Deployments:
    """Plans deployments; `faults` fills up meanwhile."""

    def __init__(
        self,
        client: stock.Recorder,
        state: ServerState,
        project: str | None,
        *,
        prune: bool,
    ) -> None:
        self.client = client
        self.state = state
        self.project = project
        self.prune = prune
        self.faults: list[Fault] = []

    async def plan(self, entry: Entry, *, run_steps: bool) -> Change | None:
        """Return what a deployment becomes, or None where it has faults.

        Args:
            entry: the deployment.
            run_steps: run its build and push steps; otherwise what they say stays open.

        Raises:
            StepError: one of them failed.
        """
        await self._check_templates(entry)
        pool = self._check_pool(entry)
        if not entry.sound or pool is None or entry.flow is None:
            return None
        recording = await self._record(entry, run_steps=run_steps)
        if recording is None:
            return None
        self._check_values(entry, recording, pool)
        change = self._compare(entry, recording) if entry.sound else None
        return change if entry.sound else None

    def _fault(self, entry: Entry, text: str, *keys: str | int) -> None:
        self.faults.append(entry.fault(text, *keys))

    async def _check_templates(self, entry: Entry) -> None:
        """Find variables and blocks that are not there; Prefect would store an empty text."""
        templates = list(entry.templates())
        for kind in ("build", "push"):
            if not entry.has_own(kind):
                templates += find_templates(entry.source.data.get(kind), (kind,))
        for keys, placeholder in templates:
            where = ".".join(str(key) for key in keys)
            if placeholder.type is PlaceholderType.VARIABLE:
                name = placeholder.name.removeprefix("prefect.variables.")
                if await self.client.read_variable_by_name(name) is None:
                    text = f"{where}: there is no Prefect variable {name}; set it with "
                    self._fault(entry, f"{text}prefect variable set {name} VALUE", *keys)
            elif placeholder.type is PlaceholderType.BLOCK_DOCUMENT:
                parts = placeholder.name.removeprefix("prefect.blocks.").split(".", 2)
                if len(parts) < 2:
                    text = f"{where}: {placeholder.full_match} names no block; write"
                    self._fault(entry, f"{text} {{{{ prefect.blocks.<type>.<name> }}}}", *keys)
                    continue
                slug, name = parts[:2]
                try:
                    await self.client.read_block_document_by_name(name, slug)
                except ObjectNotFound:
                    text = f"{where}: there is no block {slug}/{name}; create it, or write another"
                    self._fault(entry, text, *keys)

    def _check_pool(self, entry: Entry) -> WorkPool | None:
        given = entry.given.get("work_pool") or {}
        name = given.get("name") if isinstance(given, dict) else None
        name = name or get_current_settings().deployments.default_work_pool_name
        if not isinstance(name, str):
            return None  # that is a fault of the file alone
        if "{{" in name:
            # A variable; Prefect finds out.
            return WorkPool.model_construct(name=name, base_job_template={})
        pool = self.client.pools.get(name)
        if pool is None:
            known = ", ".join(sorted(self.client.pools)) or "none"
            text = f"there is no work pool {name}; create it, or write one of: {known}"
            self._fault(entry, text, "work_pool", "name")
        elif pool.type == "prefect-agent":
            text = f"work pool {name} is for agents, which Prefect 3 has not; write another"
            self._fault(entry, text, "work_pool", "name")
        return pool

    async def _record(self, entry: Entry, *, run_steps: bool) -> stock.Recording | None:
        data = {key: entry.source.data.get(key) for key in ("build", "push", "pull")}
        data = {key: value for key, value in data.items() if value is not None}
        outputs = stock.placeholder_outputs(
            placeholder.name
            for _, placeholder in entry.templates()
            if placeholder.type is PlaceholderType.STANDARD
        )

        async def no_steps(*_args: Any, **_kwargs: Any) -> dict[str, Any]:
            return outputs

        assert entry.flow is not None, "entries without a flow are not planned"
        try:
            (config,), actions = stock.load_configs(data | {"deployments": [entry.raw]})
            return await stock.record(
                self.client,
                config,
                actions,
                entry.flow,
                entry.path.parent,
                None if run_steps else no_steps,
            )
        except ValidationError as error:
            for problem in error.errors():
                where = ".".join(str(key) for key in problem["loc"])
                self._fault(entry, f"{error.title} {where}: {problem['msg']}")
        except Exception as error:
            if run_steps and has_steps(entry):
                text = f"{entry.shown}: deployment {entry.label!r}: a build or push step failed: "
                raise StepError(f"{text}{type(error).__name__}: {error}") from error
            self._fault(entry, f"Prefect refuses it: {type(error).__name__}: {error}")
        return None

    def _check_values(self, entry: Entry, recording: stock.Recording, pool: WorkPool) -> None:
        """Find values that the server, or the flow when it runs, would refuse."""
        body = recording.body
        schema = body["parameter_openapi_schema"]
        if body.get("enforce_parameter_schema", True):
            raw = _raw_schedules(entry)
            values = [(("parameters",), body["parameters"])]
            for index, one in enumerate(body["schedules"]):
                at = ("schedules", index) if "schedules" in raw else ("schedule",)
                values.append(((*at, "parameters"), one.get("parameters") or {}))
            for keys, given in values:
                for path, problem in _schema_problems(given, schema):
                    where = ".".join(str(key) for key in (*keys, *path))
                    self._fault(entry, f"{where}: {problem}", *keys, *path)
        template = self.client.pools.get(body["work_pool_name"], pool).base_job_template
        for path, problem in _schema_problems(body["job_variables"], template.get("variables")):
            keys = ("work_pool", "job_variables", *path)
            where = ".".join(str(key) for key in keys)
            self._fault(entry, f"{where}: {problem}", *keys)

    def _compare(self, entry: Entry, recording: stock.Recording) -> Change:
        body = dict(recording.body)
        name = f"{recording.flow_name}/{body['name']}"
        stored = self.state.deployments.get(name)
        item = Item("deployment", name, "new" if stored is None else "unchanged")
        raw = entry.raw.get("schedules")
        single = entry.raw.get("schedule")
        wanted = schedules.of_file(
            body["schedules"], recording.active, raw if raw else [single] if single else []
        )
        notes = self._open_templates(entry)
        labels = (stored or {}).get("labels") or {}
        self._check_owner(entry, labels)
        if stored is None:
            merged = schedules.Merged(wanted)
            body["automations"] = None
            automations = [dict(one) for one in recording.automations]
            new_triggers: list[dict[str, Any]] | None = automations or None
            item.details += [f"schedule: {one}" for one in wanted]
            item.details += [f"trigger {one['name']}" for one in automations]
        else:
            merged = schedules.merge(
                schedules.of_server(stored["schedules"]),
                wanted if _manages_schedules(entry) else None,
                _digests(labels.get(SCHEDULES_LABEL)),
                entry.shown,
                prune=self.prune,
            )
            if merged.problem:
                self._fault(entry, merged.problem, "schedules")
            if entry.given.get("paused") is None:
                body["paused"] = stored["paused"]
                if stored["paused"]:
                    notes.append("paused by hand, stays paused")
            merged_triggers = triggers.merge_triggers(
                body["name"],
                stored["id"],
                self.state.automations.get(stored["id"], []),
                recording.automations,
                [
                    "enabled" in one
                    for one in entry.raw.get("triggers") or []
                    if isinstance(one, dict)
                ],
                _digests(labels.get(TRIGGERS_LABEL)) or set(),
            )
            lines, unknown = differences(
                said_by_server(stored),
                self._said(body),
                _hidden(entry),
            )
            item.details += lines + merged.details + merged_triggers.details
            notes += merged.notes + merged_triggers.notes
            if unknown or has_steps(entry):
                known = f", and say {', '.join(unknown)}" if unknown else ""
                notes.append(f"build and push steps run with each deploy{known}")
            new_triggers = merged_triggers.bodies if merged_triggers.details else None
        body["schedules"] = [one.body() for one in merged.schedules]
        body.pop("automations", None)
        kept = {key: value for key, value in labels.items() if not key.startswith("prefect-fleet.")}
        # What is gone from the file stays known, so that --prune can remove it later.
        known = _digests(labels.get(SCHEDULES_LABEL)) or set()
        written = {one.digest() for one in wanted}
        written |= {text for one in merged.gone for text in one.digests() & known}
        ours = self._labels(written, recording.automations)
        body["labels"] = kept | ours
        if stored is not None and body["labels"] != labels and not item.details:
            made = labels.get(PROJECT_LABEL)
            item.details.append(
                f"belongs to project {self.project} from now on"
                if made != self.project
                else "remembers the schedules and triggers that the file has now"
            )
        if stored is not None and item.details:
            item.status = "changed"
        pool, queue = body["work_pool_name"], body.get("work_queue_name")
        new_queue = (pool, queue) if queue and queue not in self._queues(pool) else None
        if new_queue:
            item.details.append(f"work queue {queue} of {pool} is new")
        item.details += notes
        return Change(item, recording.flow_name, body, stored, new_triggers, new_queue)

    def _queues(self, pool: str) -> set[str]:
        return self.state.queues.get(pool, {"default"})

    def _said(self, body: dict[str, Any]) -> dict[str, Any]:
        """Return the fields of a body as the API will show them."""
        said = {key: body.get(key) for key in FIELDS}
        pool = str(said["work_pool_name"])
        said["work_queue_name"] = said["work_queue_name"] or self.state.default_queues.get(
            pool, "default"
        )
        said["tags"] = sorted(said["tags"] or [])
        said["concurrency_options"] = _without_none(said["concurrency_options"])
        said["pull_steps"] = said["pull_steps"] or []
        if said["enforce_parameter_schema"] is None:
            said["enforce_parameter_schema"] = True
        return said

    def _check_owner(self, entry: Entry, labels: dict[str, Any]) -> None:
        owner = labels.get(PROJECT_LABEL)
        if owner is not None and owner != self.project:
            text = f"belongs to project {owner} on this server; write another name, or deploy with"
            self._fault(entry, f"{text} --project {owner}", "name")

    def _labels(self, written: set[str], automations: list[dict[str, Any]]) -> dict[str, str]:
        """Return the labels that say whose the deployment is and what was written of it."""
        labels = {
            PROJECT_LABEL: self.project,
            SCHEDULES_LABEL: ",".join(sorted(written)),
            TRIGGERS_LABEL: ",".join(sorted(triggers.digest(one["name"]) for one in automations)),
        }
        return {key: value for key, value in labels.items() if value}

    def _open_templates(self, entry: Entry) -> list[str]:
        """Name templates that nothing fills in; Prefect leaves out what they stand for."""
        if has_steps(entry):
            return []
        return [
            f"{'.'.join(map(str, keys))}: no step gives {placeholder.full_match}, so it is left out"
            for keys, placeholder in find_templates(entry.given)
            if placeholder.type is PlaceholderType.STANDARD
            and keys[0] not in {"pull", "build", "push"}
            and not placeholder.name.startswith("ctx.")
            and not (keys[0] == "triggers" and "parameters" in keys)
        ]

    def plan_gone(self, entries: Iterable[Entry]) -> list[Removal]:
        """Return the deployments of this project that are in no file."""
        if not self.project:
            return []
        wanted = {entry.name for entry in entries}
        found = []
        for name, stored in sorted(self.state.deployments.items()):
            labels = stored.get("labels") or {}
            if labels.get(PROJECT_LABEL) != self.project or name in wanted:
                continue
            item = Item("deployment", name, "removed" if self.prune else "gone")
            found.append(Removal(item, stored, self.state.automations.get(stored["id"], [])))
        return found


def _raw_schedules(entry: Entry) -> dict[str, Any]:
    return {key: entry.raw[key] for key in ("schedule", "schedules") if entry.raw.get(key)}


def _manages_schedules(entry: Entry) -> bool:
    """Tell whether a deploy writes schedules; as with Prefect, an empty list may keep them."""
    if entry.given.get("schedule") or entry.given.get("schedules"):
        return True
    clears = get_current_settings().deployments.clear_schedules_on_empty
    return entry.given.get("schedules") == [] and clears


def _digests(label: Any) -> set[str] | None:
    return set(label.split(",")) if isinstance(label, str) else None


def _hidden(entry: Entry) -> Any:
    """Return a function that tells which fields of a deployment templates fill in."""
    names = {
        ("work_pool", "name"): ("work_pool_name",),
        ("work_pool", "work_queue_name"): ("work_queue_name",),
        ("work_pool", "job_variables"): ("job_variables",),
        ("pull",): ("pull_steps",),
    }
    filled: set[tuple[str | int, ...]] = set()
    pull = find_templates(entry.raw.get("pull") or entry.source.data.get("pull"), ("pull",))
    for keys, _ in (*entry.templates(), *pull):
        for given, shown in names.items():
            if keys[: len(given)] == given:
                keys = (*shown, *keys[len(given) :])
        filled.add(keys)
    return lambda keys: any(keys[: len(one)] == one for one in filled)


def _schema_problems(
    values: dict[str, Any], schema: dict[str, Any] | None
) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Yield what of `values` a schema refuses, without the values."""
    if not schema or not values:
        return
    # Prefect's own check takes more than this one, but imports SQLAlchemy, which takes a second.
    optional = {key: value for key, value in schema.items() if key != "required"}
    checker = jsonschema.Draft202012Validator
    with contextlib.suppress(jsonschema.SchemaError, referencing.exceptions.Unresolvable):
        if checker(optional, format_checker=checker.FORMAT_CHECKER).is_valid(values):
            return
    from prefect.utilities.schema_tools.validation import CircularSchemaRefError, validate
    from prefect.utilities.schema_tools.validation import ValidationError as SchemaError

    try:
        problems = validate(values, schema, ignore_required=True)
    except (SchemaError, CircularSchemaRefError) as error:
        yield (), f"can't be checked: {error}"
        return
    for problem in problems:
        path = tuple(problem.absolute_path)
        value: Any = values
        for key in path:
            value = value[key]
        if (isinstance(value, str) and "{{" in value) or _is_reference(value):
            continue
        if problem.validator == "additionalProperties":
            yield path, "has something that is not known there"
            continue
        expected = _expected(problem)
        yield path, f"is a {type(value).__name__} that does not fit; write {expected}"


def _is_reference(value: Any) -> bool:
    """Tell whether a run fills a value in: a block, or one of Prefect's template kinds."""
    return isinstance(value, dict) and ("$ref" in value or "__prefect_kind" in value)


def _expected(problem: Any) -> str:
    if examples := problem.schema.get("examples"):
        return f"something like {' or '.join(map(str, examples))}"
    match problem.validator, problem.validator_value:
        case "type", str(kind):
            return f"a value of type {kind}"
        case "enum", list(choices):
            return f"one of {', '.join(map(str, choices))}"
        case "anyOf" | "oneOf", list(choices):
            kinds = [str(one["type"]) for one in choices if isinstance(one, dict) and "type" in one]
            return f"a value of type {' or '.join(kinds)}" if kinds else "what its schema allows"
        case name, (int() | float() | str()) as limit:
            return f"one with {name} {limit}"
    return "what its schema allows"


def _without_none(options: dict[str, Any] | None) -> dict[str, Any] | None:
    return {key: value for key, value in options.items() if value is not None} if options else None


def said_by_server(stored: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a deployment that a deploy writes, as the server has them."""
    said = {key: stored.get(key) for key in FIELDS}
    limit = stored.get("global_concurrency_limit")
    said["concurrency_limit"] = limit["limit"] if limit else None
    said["concurrency_options"] = _without_none(said["concurrency_options"])
    said["tags"] = sorted(said["tags"] or [])
    said["pull_steps"] = said["pull_steps"] or []
    return said


def restoring_body(stored: dict[str, Any]) -> dict[str, Any]:
    """Return the body of `POST /deployments/` that makes a deployment what it was."""
    limit = stored.get("global_concurrency_limit")
    body = {key: stored.get(key) for key in FIELDS if key != "concurrency_limit"}
    body |= {key: stored[key] for key in ("name", "flow_id", "labels")}
    body |= {
        "storage_document_id": stored.get("storage_document_id"),
        "infrastructure_document_id": stored.get("infrastructure_document_id"),
        "schedules": [one.body() for one in schedules.of_server(stored["schedules"])],
    }
    if limit and limit["name"] != f"deployment:{stored['id']}":
        return body | {"global_concurrency_limit_id": limit["id"]}
    return body | {"concurrency_limit": limit["limit"] if limit else None}


class DeploymentWriter:
    """Writes planned deployments through a journal."""

    def __init__(self, client: PrefectClient, journal: Journal, state: ServerState) -> None:
        self.client = client
        self.journal = journal
        self.flows = dict(state.flows)
        self.queues: set[tuple[str, str]] = set()

    async def write(self, change: Change) -> None:
        """Create a deployment, or make it what its file says."""
        flow_id = await self._ensure_flow(change.flow_name)
        if change.queue and change.queue not in self.queues:
            await create_queue(self.client, self.journal, *change.queue)
            self.queues.add(change.queue)
        name = change.item.name
        body = change.body | {"flow_id": flow_id}

        async def write() -> str:
            response = await self.client.request("POST", "/deployments/", json=body)
            return str(response.json()["id"])

        async def restore() -> None:
            if change.stored is None:
                await self._delete_by_name(name)
            else:
                await self.client.request(
                    "POST", "/deployments/", json=restoring_body(change.stored)
                )

        deployment_id = await self.journal.write(f"deployment {name}", write, restore)
        if change.triggers is not None:
            await self._replace_triggers(name, deployment_id, change.triggers)

    async def _ensure_flow(self, name: str) -> str:
        if name in self.flows:
            return self.flows[name]

        async def create() -> str:
            return str(await self.client.create_flow_from_name(name))

        async def delete() -> None:
            wanted = {"name": {"any_": [name]}}
            for flow in await read_pages(self.client, "/flows/filter", flows=wanted):
                await self.client.delete_flow(UUID(flow["id"]))

        self.flows[name] = await self.journal.write(f"flow {name}", create, delete)
        return self.flows[name]

    async def _delete_by_name(self, name: str) -> None:
        try:
            found = await self.client.read_deployment_by_name(name)
            await self._delete_owned(str(found.id))
            await self.client.delete_deployment(found.id)
        except ObjectNotFound:
            return

    async def _delete_owned(self, deployment_id: str) -> None:
        await self.client.delete_resource_owned_automations(f"prefect.deployment.{deployment_id}")

    async def _replace_triggers(
        self, name: str, deployment_id: str, bodies: list[dict[str, Any]]
    ) -> None:
        """Remove the automations that the deployment owns, and create these."""
        before = await read_automations(self.client, UUID(deployment_id))

        async def remove() -> None:
            await self._delete_owned(deployment_id)

        async def recreate() -> None:
            # Where the deployment itself was made anew, it has another id.
            current = str((await self.client.read_deployment_by_name(name)).id)
            # The API tells which ones a deployment owns only by removing them.
            await self._delete_owned(current)
            left = {one["id"] for one in await read_automations(self.client, UUID(current))}
            for one in before:
                if one["id"] not in left:
                    body = triggers.recreate(one, deployment_id, current)
                    await self.client.request("POST", "/automations/", json=body)

        await self.journal.write(f"triggers of deployment {name}", remove, recreate)
        for body in bodies:
            # What undoes the removal undoes this too.
            await self.client.request(
                "POST", "/automations/", json=triggers.with_id(body, deployment_id)
            )

    async def remove(self, removals: list[Removal]) -> None:
        """Remove deployments, after everything else has been written.

        They can be made anew, but with other ids: their earlier runs would not belong to them.
        """
        for removal in removals:
            stored = removal.stored
            if removal.automations:
                await self._replace_triggers(removal.item.name, stored["id"], [])
        for start in range(0, len(removals), DELETED_AT_ONCE):
            batch = removals[start : start + DELETED_AT_ONCE]
            await self._remove_batch(batch)

    async def _remove_batch(self, batch: list[Removal]) -> None:
        ids = [removal.stored["id"] for removal in batch]

        async def delete() -> None:
            await self.client.request(
                "POST",
                "/deployments/bulk_delete",  # type: ignore[arg-type]
                json={"deployments": {"id": {"any_": ids}}, "limit": DELETED_AT_ONCE},
            )

        async def make_anew() -> None:
            made: list[str] = []
            for removal in batch:
                try:
                    await self.client.read_deployment(UUID(removal.stored["id"]))
                except ObjectNotFound:
                    body = restoring_body(removal.stored)
                    await self.client.request("POST", "/deployments/", json=body)
                    made.append(removal.item.name)
            if made:
                raise PutBackError("made anew; their earlier runs belong to no deployment now")

        names = ", ".join(removal.item.name for removal in batch)
        await self.journal.write(f"removed deployments {names}", delete, make_anew)
