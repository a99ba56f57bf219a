"""Find and check the `prefect.yaml` files of a folder, without asking the Prefect API.

`prefect deploy` finds a file's mistakes one by one while it deploys, skips some of them with exit
status 0 (an unnamed deployment, an unknown key), and takes a flow file that can't be imported for
one whose dependencies are installed elsewhere. Here all of them are faults, and all are found
before anything is deployed.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from prefect.client.schemas.objects import ConcurrencyOptions
from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule, RRuleSchedule
from prefect.flows import Flow
from prefect.settings import get_current_settings
from prefect.utilities.callables import parameter_schema
from prefect.utilities.templating import (
    Placeholder,
    PlaceholderType,
    apply_values,
    find_placeholders,
)
from pydantic import BaseModel, ValidationError

from prefect_fleet import stock
from prefect_fleet.faults import Fault
from prefect_fleet.flow_loading import load_flow
from prefect_fleet.pull_paths import pull_problems
from prefect_fleet.yaml_file import YamlFile

FILE_NAME = "prefect.yaml"
SKIPPED_FOLDERS = {"node_modules", "__pycache__"}
# `definitions` is where Prefect's documentation keeps YAML anchors.
TOP_LEVEL_KEYS = {
    field.alias or name for name, field in stock.PrefectYamlModel.model_fields.items()
} | {"definitions"}
DEPLOYMENT_KEYS = set(stock.DeploymentConfig.model_fields)
SCHEDULE_KEYS = set(stock.RawScheduleConfig.model_fields)
SCHEDULE_KINDS = ("cron", "interval", "rrule")
WORK_POOL_KEYS = set(stock.WorkPoolConfig.model_fields)
CONCURRENCY_KEYS = set(stock.ConcurrencyLimitSpec.model_fields)
STEP_KEYS = ("build", "push", "pull")
# These have checks of their own below; Prefect's model would report them a second time.
CHECKED_BY_HAND = {
    "name", "entrypoint", "schedule", "schedules", "work_pool", "concurrency_limit", "triggers",
    "sla",
}  # fmt: skip

Keys = tuple[str | int, ...]


@dataclass
class Entry:
    """A deployment of a file.

    Attributes:
        path: the file.
        shown: its path relative to the root.
        source: the file's content, and where its keys stand.
        index: which of the file's deployments it is, from 0.
        label: the deployment's own name; its number where it has none.
        given: what the file says of it, with environment variables filled in.
        flow: its flow, or None where that can't be imported.
        sound: no fault was found in it.
    """

    path: Path
    shown: str
    source: YamlFile
    index: int
    label: str
    given: dict[str, Any]
    flow: Flow[..., Any] | None = None
    sound: bool = True

    @property
    def raw(self) -> dict[str, Any]:
        """What the file says of it, as it is written."""
        raw: dict[str, Any] = self.source.data["deployments"][self.index]
        return raw

    @property
    def name(self) -> str:
        """`<flow name>/<deployment name>`, or the latter alone where there is no flow."""
        return f"{self.flow.name}/{self.label}" if self.flow else self.label

    def line(self, *keys: str | int) -> int:
        """Return the line of one of its keys; steps may stand beside the deployments."""
        if keys and keys[0] in STEP_KEYS and not self.has_own(str(keys[0])):
            return self.source.line(*keys)
        return self.source.line("deployments", self.index, *keys)

    def fault(self, text: str, *keys: str | int) -> Fault:
        """Return a fault of it, and remember that it has one."""
        self.sound = False
        return Fault(self.shown, self.line(*keys), self.label, text)

    def has_own(self, kind: str) -> bool:
        """Tell whether its own build, push or pull steps count, and not those of the file.

        With Prefect `build: null` means none, `push: []` those of the file, and `pull` may be
        either.
        """
        own = self.given.get(kind)
        return {"build": kind in self.given, "push": bool(own), "pull": bool(own) or own == []}[
            kind
        ]

    def steps(self, kind: str) -> Any:
        """Return the build, push or pull steps that count for it, whatever the file says."""
        return self.given[kind] if self.has_own(kind) else self.source.data.get(kind)

    def templates(self) -> Iterator[tuple[Keys, Placeholder]]:
        """Yield each template that deploying fills in, with its keys.

        Pull steps are no part of that: runs fill them in.
        """
        for key, value in self.raw.items():
            if key != "pull":
                yield from find_templates(value, (key,))


@dataclass
class Files:
    """All files below a root.

    Attributes:
        entries: their deployments, those with faults among them.
        faults: what is wrong.
        project: the name that the root's own prefect.yaml has, if any.
    """

    entries: list[Entry] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    project: str | None = None


def find_templates(value: Any, keys: Keys = ()) -> Iterator[tuple[Keys, Placeholder]]:
    """Yield each template below `value`, with the keys that lead to it."""
    if isinstance(value, str):
        for placeholder in sorted(find_placeholders(value)):
            yield keys, placeholder
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from find_templates(item, (*keys, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from find_templates(item, (*keys, index))


def find_files(root: Path) -> list[Path]:
    """Return every prefect.yaml below `root`, the upper ones first.

    Hidden folders, node_modules and virtual environments (Prefect's own package has recipes with
    this file name) are left out, and links to folders are not followed.
    """
    found: list[Path] = []
    for folder, subfolders, names in os.walk(root):
        if "pyvenv.cfg" in names:
            subfolders.clear()
            continue
        subfolders[:] = sorted(
            name for name in subfolders if not name.startswith(".") and name not in SKIPPED_FOLDERS
        )
        if FILE_NAME in names:
            found.append(Path(folder, FILE_NAME))
    return sorted(found, key=lambda path: (len(path.parts), path))


def check_files(root: Path, home: Path) -> Files:
    """Check every file below `root`.

    Args:
        root: the release's folder.
        home: where workers have the current release.
    """
    files = Files()
    for path in find_files(root):
        check = _FileCheck(path, root, home)
        data = check.run()
        files.entries += check.entries
        files.faults += check.faults
        if path.parent == root and isinstance(data.get("name"), str):
            files.project = data["name"]
    if not files.entries and not files.faults:
        text = f"there is none below {root}; write one there"
        files.faults.append(Fault(FILE_NAME, 1, None, text))
    files.faults += _find_duplicates(files.entries)
    files.faults.sort()
    return files


def _find_duplicates(entries: Iterable[Entry]) -> list[Fault]:
    """A later deployment of the same name would silently overwrite the earlier one."""
    faults: list[Fault] = []
    by_name: dict[str, str] = {}
    by_label: dict[tuple[str, str], str] = {}
    for entry in entries:
        place = f"{entry.shown}:{entry.line('name')}"
        # Without its flow it is not known what the deployment's whole name is.
        earlier = by_name.get(entry.name) if entry.flow else None
        earlier = earlier or by_label.get((entry.shown, entry.label))
        if earlier:
            text = f"is {earlier} already; write another name"
            faults.append(entry.fault(text, "name"))
        by_name.setdefault(entry.name, place)
        by_label.setdefault((entry.shown, entry.label), place)
    return faults


class _FileCheck:
    """The check of one file; `entries` and `faults` fill up while it runs."""

    def __init__(self, path: Path, root: Path, home: Path) -> None:
        self.path = path
        self.root = root
        self.home = home
        self.shown = path.relative_to(root).as_posix()
        self.entries: list[Entry] = []
        self.faults: list[Fault] = []

    def run(self) -> dict[Any, Any]:
        """Check the file and return what it says; an empty mapping where it can't be read."""
        source = self._read()
        if source is None:
            return {}
        data = source.data
        if not isinstance(data, dict):
            self._fault("holds no mapping; write deployments: and a list below it", 1)
            return {}
        for line, key in source.repeated_keys():
            self._fault(f"{key} stands twice in one mapping; the first one would be ignored", line)
        self._check_top_level(source, data)
        deployments = data.get("deployments")
        if not isinstance(deployments, list) or not deployments:
            text = "deployments is no list with entries; write - name: … below it"
            self._fault(text, source.line("deployments"))
            return data
        for index, config in enumerate(deployments):
            if isinstance(config, dict):
                self._check_deployment(source, index, config)
            else:
                text = "is no mapping; write - name: …"
                self._fault(text, source.line("deployments", index))
        return data

    def _fault(self, text: str, line: int) -> None:
        self.faults.append(Fault(self.shown, line, None, text))

    def _read(self) -> YamlFile | None:
        try:
            return YamlFile(self.path)
        except (OSError, UnicodeDecodeError) as error:
            self._fault(f"can't be read: {error}; write it as UTF-8 text", 1)
        except RecursionError:
            self._fault("an anchor holds an alias of itself; write the value itself", 1)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            problem = getattr(error, "problem", None) or error
            self._fault(f"is not YAML: {problem}", mark.line + 1 if mark else 1)
        return None

    def _check_top_level(self, source: YamlFile, data: dict[Any, Any]) -> None:
        for key in sorted(data.keys() - TOP_LEVEL_KEYS, key=str):
            text = f"{key} is not known; write one of {_list(TOP_LEVEL_KEYS)}"
            self._fault(text, source.line(key))
        rest = {key: value for key, value in data.items() if key != "deployments"}
        for key, problem in _model_errors(stock.PrefectYamlModel, rest):
            self._fault(f"{key}: {problem}", source.line(key))
        for kind in ("build", "push"):
            for keys, name in _unset_variables(find_templates(data.get(kind), (kind,))):
                self._fault(f"{_dotted(keys)}: {_unset(name)}", source.line(*keys))

    def _check_deployment(self, source: YamlFile, index: int, raw: dict[str, Any]) -> None:
        given = apply_values(raw, os.environ, remove_notset=False)
        name = given.get("name")
        label = name if isinstance(name, str) and name else f"number {index + 1}"
        entry = Entry(self.path, self.shown, source, index, label, given)
        self.entries.append(entry)

        def fault(text: str, *keys: str | int) -> None:
            self.faults.append(entry.fault(text, *keys))

        for key in sorted(given.keys() - DEPLOYMENT_KEYS, key=str):
            fault(f"{key} is not known; write one of {_list(DEPLOYMENT_KEYS)}", key)
        rest = {key: value for key, value in given.items() if key not in CHECKED_BY_HAND}
        for key, problem in _model_errors(stock.DeploymentConfig, rest):
            fault(f"{key}: {problem}", key)
        if problem := _name_problem(name):
            fault(f"name {problem}", "name")
        if given.get("sla") is not None:
            fault("sla is for Prefect Cloud; leave it out", "sla")
        for keys, variable in _unset_variables(entry.templates()):
            fault(f"{_dotted(keys)}: {_unset(variable)}", *keys)
        for problems in (
            _schedule_problems(given),
            _work_pool_problems(given.get("work_pool")),
            _concurrency_problems(given.get("concurrency_limit")),
            _trigger_problems(given.get("triggers")),
        ):
            for keys, problem in problems:
                fault(problem, *keys)
        entrypoint = given.get("entrypoint")
        for keys, problem in pull_problems(entry.steps("pull"), entrypoint, self.root, self.home):
            fault(problem, *keys)
        if isinstance(entrypoint, str) and "{{" in entrypoint:
            fault("entrypoint is a template that can't be filled in here; write it out")
            return
        entry.flow, problem = load_flow(entrypoint, self.path.parent)
        if entry.flow is None:
            fault(f"entrypoint {problem}", "entrypoint")
            return
        for keys, problem in _parameter_problems(entry.flow, given):
            fault(problem, *keys)


def _unset_variables(templates: Iterable[tuple[Keys, Placeholder]]) -> Iterator[tuple[Keys, str]]:
    for keys, placeholder in templates:
        if placeholder.type is PlaceholderType.ENV_VAR:
            name = placeholder.name.lstrip("$")
            if name not in os.environ:
                yield keys, name


def _unset(name: str) -> str:
    return f"the environment variable {name} is not set here; set it, or write the value itself"


def _dotted(keys: Keys) -> str:
    return ".".join(str(key) for key in keys)


def _model_errors(model: type[BaseModel], data: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield each key that Prefect's own model refuses, with the model's reason."""
    try:
        model.model_validate(data)
    except ValidationError as error:
        reasons: dict[str, str] = {}
        for problem in error.errors():
            reasons.setdefault(str(problem["loc"][0] if problem["loc"] else ""), problem["msg"])
        yield from reasons.items()


def _name_problem(name: Any) -> str | None:
    if not isinstance(name, str) or not name.strip():
        return "is missing; write for example name: nightly"
    if "{{" in name:
        return "is a template that nothing fills in here; write the name itself"
    if any(character in name for character in "/%&<>"):
        return "has one of / % & < >, which Prefect refuses; write another name"
    return None


def _schedules(config: dict[str, Any]) -> list[tuple[Keys, Any]]:
    """Return the schedules of a deployment, each with its keys in the file."""
    single = config.get("schedule")
    listed = config.get("schedules")
    found: list[tuple[Keys, Any]] = []
    if single:
        found.append((("schedule",), single))
    if isinstance(listed, list):
        found += [(("schedules", index), schedule) for index, schedule in enumerate(listed)]
    return found


def _schedule_problems(config: dict[str, Any]) -> Iterator[tuple[Keys, str]]:
    listed = config.get("schedules")
    if listed is not None and not isinstance(listed, list):
        yield ("schedules",), "schedules is no list; write - cron: … below it"
    if config.get("schedule") and listed is not None:
        yield ("schedule",), "has both schedule and schedules; write schedules only"
    for keys, schedule in _schedules(config):
        if not isinstance(schedule, dict):
            yield keys, "schedule is no mapping; write - cron: …"
            continue
        for key in schedule.keys() - SCHEDULE_KEYS:
            yield (
                (*keys, key),
                f"schedule: {key} is not known; write one of {_list(SCHEDULE_KEYS)}",
            )
        kinds = [kind for kind in SCHEDULE_KINDS if schedule.get(kind) is not None]
        if len(kinds) != 1:
            yield keys, f"schedule: write exactly one of {', '.join(SCHEDULE_KINDS)}"
        elif problem := _schedule_problem(kinds[0], schedule):
            yield (*keys, problem[0]), f"schedule: {problem[1]}"


def _schedule_problem(kind: str, schedule: dict[str, Any]) -> tuple[str, str] | None:
    """Return the key at fault and what is wrong with it."""
    models: dict[str, type[BaseModel]] = {
        "cron": CronSchedule,
        "interval": IntervalSchedule,
        "rrule": RRuleSchedule,
    }
    given = {
        key: schedule[key]
        for key in (kind, "timezone", "anchor_date")
        if schedule.get(key) is not None and "{{" not in str(schedule[key])
    }
    if kind not in given:
        return None
    if kind != "interval":
        given.pop("anchor_date", None)
    for key, problem in _model_errors(models[kind], given):
        hint = {
            "cron": 'write for example "*/15 * * * *"',
            "timezone": "write an IANA name, for example UTC or Europe/Oslo",
            "interval": "write seconds, for example 900",
            "anchor_date": "write for example 2026-01-01T00:00:00Z",
        }.get(key, "write it as RFC 5545 has it")
        return key or kind, f"{key or kind} {schedule.get(key or kind)!r}: {problem}; {hint}"
    return None


def _work_pool_problems(work_pool: Any) -> Iterator[tuple[Keys, str]]:
    default = get_current_settings().deployments.default_work_pool_name
    if work_pool is None and default:
        return
    if not isinstance(work_pool, dict):
        yield ("work_pool",), "names no work pool; write work_pool: and name: default below it"
        return
    for key in work_pool.keys() - WORK_POOL_KEYS:
        text = f"work_pool: {key} is not known; write one of {_list(WORK_POOL_KEYS)}"
        yield ("work_pool", key), text
    name = work_pool.get("name")
    if (not isinstance(name, str) or not name) and not (name is None and default):
        yield ("work_pool", "name"), "names no work pool; write name: default below work_pool"
    rest = {key: value for key, value in work_pool.items() if key != "name"}
    for key, problem in _model_errors(stock.WorkPoolConfig, rest):
        yield ("work_pool", key), f"work_pool: {key}: {problem}"


def _concurrency_problems(limit: Any) -> Iterator[tuple[Keys, str]]:
    at = ("concurrency_limit",)
    number, options = limit, {}
    if isinstance(limit, dict):
        for key in sorted(limit.keys() - CONCURRENCY_KEYS, key=str):
            text = f"concurrency_limit: {key} is not known; write one of {_list(CONCURRENCY_KEYS)}"
            yield (*at, key), text
        number = limit.get("limit")
        known = CONCURRENCY_KEYS - {"limit"}
        options = {key: value for key, value in limit.items() if key in known}
        at = ("concurrency_limit", "limit")
        if number is None:
            yield at, "concurrency_limit: limit is missing; write for example limit: 1"
    if isinstance(number, str) and "{{" in number:
        return
    # bool is an int to isinstance.
    if number is not None and (type(number) is not int or number < 1):
        yield at, f"concurrency_limit {number!r} is no whole number from 1; write for example 1"
    if options and "{{" not in str(options):
        for key, problem in _model_errors(ConcurrencyOptions, options):
            yield ("concurrency_limit", key), f"concurrency_limit: {key}: {problem}"


def _trigger_problems(triggers: Any) -> Iterator[tuple[Keys, str]]:
    if triggers is None:
        return
    if not isinstance(triggers, list):
        yield ("triggers",), "triggers is no list; write - expect: […] below it"
        return
    for index, trigger in enumerate(triggers):
        at: Keys = ("triggers", index)
        if not isinstance(trigger, dict):
            yield at, "trigger is no mapping; write - expect: […]"
            continue
        # Templates of events in parameters are filled in when the trigger fires.
        if any("{{" in str(value) for key, value in trigger.items() if key != "parameters"):
            continue
        try:
            known = stock.DeploymentTriggerAdapter.validate_python(trigger)
        except ValidationError as error:
            for problem in error.errors():
                # The first part is which kind of trigger Prefect took it for.
                keys = problem["loc"][1:]
                where = f"{_dotted(keys)}: " if keys else ""
                yield (*at, *keys), f"trigger: {where}{problem['msg']}"
            continue
        for keys, problem in _server_trigger_problems(known, at):
            yield keys, f"trigger: {problem}"
        for key in sorted(trigger.keys() - type(known).model_fields.keys(), key=str):
            fields = _list(type(known).model_fields)
            yield (*at, key), f"trigger: {key} is not known; write one of {fields}"


def _server_trigger_problems(trigger: Any, at: Keys) -> Iterator[tuple[Keys, str]]:
    """Yield what Prefect's command takes and a server of one's own refuses."""
    if trigger.type == "metric":
        yield at, "metric is for Prefect Cloud; write another type"
    elif trigger.type in {"compound", "sequence"}:
        if trigger.within is None:
            yield at, "within is missing; write for how many seconds, for example within: 60"
        for index, part in enumerate(trigger.triggers):
            yield from _server_trigger_problems(part, (*at, "triggers", index))


def _parameter_problems(flow: Flow[..., Any], given: dict[str, Any]) -> Iterator[tuple[Keys, str]]:
    """Yield parameters that the flow does not have, and those that it needs to run by itself."""
    if not flow.should_validate_parameters:
        return
    schema = parameter_schema(flow)
    known = _list(schema.properties) or "none"
    parameters = given.get("parameters") or {}
    if not isinstance(parameters, dict):
        return
    runs: list[tuple[Keys, Any]] = []
    for keys, schedule in _schedules(given):
        if isinstance(schedule, dict) and schedule.get("active") is not False:
            runs.append((keys, schedule.get("parameters") or {}))
    triggers = given.get("triggers")
    for index, trigger in enumerate(triggers if isinstance(triggers, list) else []):
        if isinstance(trigger, dict):
            runs.append((("triggers", index), trigger.get("parameters") or {}))
    for keys, values in [((), parameters), *runs]:
        for name in sorted(values.keys() - schema.properties.keys(), key=str):
            text = f"the flow has no parameter {name}; its parameters: {known}"
            yield (*keys, "parameters", name), text
    for keys, values in runs:
        for name in sorted(set(schema.required) - parameters.keys() - values.keys()):
            what = f"{keys[0]}".removesuffix("s")
            text = f"the flow needs a parameter {name}; write it below parameters"
            yield keys, f"{what}: {text}"


def _list(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
