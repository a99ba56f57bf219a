"""Find and check the `prefect.yaml` files of a folder, without asking the Prefect API.

`prefect deploy` finds a file's mistakes one by one while it deploys, skips some of them with exit
status 0 (an unnamed deployment, an unknown key), and takes a flow file that can't be imported for
one whose dependencies are installed elsewhere. Here all of them are faults, and all are found
before anything is deployed.
"""

import contextlib
import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import yaml

# Prefect has no public schema of prefect.yaml. This is the one that `prefect deploy` reads with.
from prefect.cli.deploy._models import (
    DeploymentConfig,
    PrefectYamlModel,
    RawScheduleConfig,
    WorkPoolConfig,
)
from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule, RRuleSchedule
from prefect.exceptions import MissingFlowError, ScriptError
from prefect.flows import Flow, load_flow_from_entrypoint
from prefect.utilities.callables import parameter_schema
from prefect.utilities.templating import apply_values
from pydantic import BaseModel, ValidationError

FILE_NAME = "prefect.yaml"
SKIPPED_FOLDERS = {"node_modules", "__pycache__"}
# `definitions` is where Prefect's documentation keeps YAML anchors.
TOP_LEVEL_KEYS = {field.alias or name for name, field in PrefectYamlModel.model_fields.items()} | {
    "definitions"
}
DEPLOYMENT_KEYS = set(DeploymentConfig.model_fields)
SCHEDULE_KEYS = set(RawScheduleConfig.model_fields)
SCHEDULE_KINDS = ("cron", "interval", "rrule")
WORK_POOL_KEYS = set(WorkPoolConfig.model_fields)
# These have checks of their own below; Prefect's model would report them a second time.
CHECKED_BY_HAND = {"name", "entrypoint", "schedule", "schedules", "work_pool"}


@dataclass(frozen=True, order=True)
class Fault:
    """One mistake.

    Attributes:
        path: the prefect.yaml, relative to the root.
        line: where in it, from 1.
        deployment: name of the deployment, or None for the file as a whole.
        text: what is wrong; what to write.
    """

    path: str
    line: int
    deployment: str | None
    text: str

    def __str__(self) -> str:
        subject = f"deployment {self.deployment!r}: " if self.deployment else ""
        return f"{self.path}:{self.line}: {subject}{self.text}"


@dataclass(frozen=True)
class Deployment:
    """A deployment of a file, checked.

    Attributes:
        name: `<flow name>/<deployment name>`.
        work_pool: name of its work pool.
        line: where in the file its name stands.
        work_pool_line: where its work pool's name stands.
        has_floating_anchor: an interval schedule has no `anchor_date`, so that Prefect anchors
            it at the time of each deploy.
    """

    name: str
    work_pool: str
    line: int
    work_pool_line: int
    has_floating_anchor: bool


@dataclass(frozen=True)
class PrefectFile:
    """A prefect.yaml, checked; `shown` is its path relative to the root."""

    path: Path
    shown: str
    deployments: tuple[Deployment, ...]


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


def check_files(root: Path) -> tuple[list[PrefectFile], list[Fault]]:
    """Check every file below `root`; the files are complete only where there are no faults."""
    files: list[PrefectFile] = []
    faults: list[Fault] = []
    for path in find_files(root):
        check = _FileCheck(path, path.relative_to(root).as_posix())
        files.append(check.run())
        faults += check.faults
    if not files:
        faults.append(Fault(FILE_NAME, 1, None, f"there is none below {root}; write one there"))
    faults += _find_duplicates(files)
    return files, sorted(faults)


def _find_duplicates(files: list[PrefectFile]) -> list[Fault]:
    """A later deployment of the same name would silently overwrite the earlier one."""
    first: dict[str, str] = {}
    faults: list[Fault] = []
    for file in files:
        for deployment in file.deployments:
            place = f"{file.shown}:{deployment.line}"
            if deployment.name in first:
                text = f"is {first[deployment.name]} already; write another name"
                faults.append(Fault(file.shown, deployment.line, deployment.name, text))
            first.setdefault(deployment.name, place)
    return faults


class _FileCheck:
    """The check of one file; `faults` fills up while it runs."""

    def __init__(self, path: Path, shown: str) -> None:
        self.path = path
        self.shown = shown
        self.faults: list[Fault] = []
        self._tree: yaml.Node | None = None

    def run(self) -> PrefectFile:
        data = self._read()
        deployments: list[Deployment] = []
        if data is not None:
            self._check_top_level(data)
            for index, config in enumerate(self._list_deployments(data)):
                deployment = self._check_deployment(index, config)
                if deployment is not None:
                    deployments.append(deployment)
        return PrefectFile(self.path, self.shown, tuple(deployments))

    def _fault(self, text: str, *keys: str | int, deployment: str | None = None) -> None:
        self.faults.append(Fault(self.shown, self._line(*keys), deployment, text))

    def _line(self, *keys: str | int) -> int:
        """Return the line of a key, or of the nearest thing around it that stands in the file."""
        node, line = self._tree, 1
        for key in keys:
            if isinstance(node, yaml.MappingNode):
                pairs = {name.value: (name, value) for name, value in node.value}
                if key not in pairs:
                    break
                name, node = pairs[key]
                line = name.start_mark.line + 1
            elif isinstance(node, yaml.SequenceNode) and isinstance(key, int):
                node = node.value[key]
                line = node.start_mark.line + 1
            else:
                break
        return line

    def _read(self) -> dict[Any, Any] | None:
        try:
            text = self.path.read_text(encoding="utf-8")
            self._tree = yaml.compose(text, Loader=yaml.SafeLoader)
            data = yaml.safe_load(text)
        except (OSError, UnicodeDecodeError) as error:
            self._fault(f"can't be read: {error}; write it as UTF-8 text")
            return None
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            problem = getattr(error, "problem", None) or error
            line = mark.line + 1 if mark else 1
            self.faults.append(Fault(self.shown, line, None, f"is not YAML: {problem}"))
            return None
        if not isinstance(data, dict):
            self._fault("holds no mapping; write deployments: and a list below it")
            return None
        for line, key in _repeated_keys(self._tree):
            text = f"{key} stands twice in one mapping; the first one would be ignored"
            self.faults.append(Fault(self.shown, line, None, text))
        return data

    def _check_top_level(self, data: dict[Any, Any]) -> None:
        for key in data.keys() - TOP_LEVEL_KEYS:
            self._fault(f"{key} is not known; write one of {_list(TOP_LEVEL_KEYS)}", key)
        rest = {key: value for key, value in data.items() if key != "deployments"}
        for key, problem in _model_errors(PrefectYamlModel, rest):
            self._fault(f"{key}: {problem}", key)

    def _list_deployments(self, data: dict[Any, Any]) -> list[Any]:
        deployments = data.get("deployments")
        if isinstance(deployments, list) and deployments:
            return deployments
        self._fault("deployments is no list with entries; write - name: … below it", "deployments")
        return []

    def _check_deployment(self, index: int, config: Any) -> Deployment | None:
        at = ("deployments", index)
        if not isinstance(config, dict):
            self._fault("is no mapping; write - name: …", *at)
            return None
        config = apply_values(_dates_as_text(config), os.environ, remove_notset=False)
        name = config.get("name")
        label = name if isinstance(name, str) and name else f"number {index + 1}"

        def fault(text: str, *keys: str | int) -> None:
            self._fault(text, *at, *keys, deployment=label)

        for key in config.keys() - DEPLOYMENT_KEYS:
            fault(f"{key} is not known; write one of {_list(DEPLOYMENT_KEYS)}", key)
        rest = {key: value for key, value in config.items() if key not in CHECKED_BY_HAND}
        for key, problem in _model_errors(DeploymentConfig, rest):
            fault(f"{key}: {problem}", key)
        if problem := _name_problem(name):
            fault(f"name {problem}", "name")
        for keys, problem in _schedule_problems(config):
            fault(problem, *keys)
        for keys, problem in _work_pool_problems(config.get("work_pool")):
            fault(problem, *keys)
        flow, problem = _load_flow(config.get("entrypoint"), self.path.parent)
        if flow is None:
            fault(f"entrypoint {problem}", "entrypoint")
            return None
        for parameter in _unknown_parameters(flow, config.get("parameters")):
            known = _list(parameter_schema(flow).properties) or "none"
            text = f"the flow has no parameter {parameter}; its parameters: {known}"
            fault(text, "parameters", parameter)
        work_pool = config.get("work_pool")
        if not isinstance(work_pool, dict) or not isinstance(work_pool.get("name"), str):
            return None
        return Deployment(
            name=f"{flow.name}/{label}",
            work_pool=work_pool["name"],
            line=self._line(*at, "name"),
            work_pool_line=self._line(*at, "work_pool", "name"),
            has_floating_anchor=any(
                "interval" in schedule and not schedule.get("anchor_date")
                for _, schedule in _schedules(config)
                if isinstance(schedule, dict)
            ),
        )


def _dates_as_text(value: Any) -> Any:
    """Write the dates that YAML makes of unquoted ones as text, as Prefect does on loading."""
    if isinstance(value, dict):
        return {key: _dates_as_text(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_dates_as_text(item) for item in value]
    return value.isoformat() if isinstance(value, date) else value


def _repeated_keys(node: yaml.Node | None) -> Iterator[tuple[int, str]]:
    """Yield line and name of every key that stands a second time in its mapping."""
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if key.value in seen:
                yield key.start_mark.line + 1, key.value
            seen.add(key.value)
            yield from _repeated_keys(value)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _repeated_keys(item)


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


def _schedules(config: dict[str, Any]) -> list[tuple[tuple[str | int, ...], Any]]:
    """Return the schedules of a deployment, each with its keys in the file."""
    single = config.get("schedule")
    listed = config.get("schedules")
    found: list[tuple[tuple[str | int, ...], Any]] = []
    if single:
        found.append((("schedule",), single))
    if isinstance(listed, list):
        found += [(("schedules", index), schedule) for index, schedule in enumerate(listed)]
    return found


def _schedule_problems(config: dict[str, Any]) -> Iterator[tuple[tuple[str | int, ...], str]]:
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


def _work_pool_problems(work_pool: Any) -> Iterator[tuple[tuple[str, ...], str]]:
    if not isinstance(work_pool, dict):
        yield ("work_pool",), "names no work pool; write work_pool: and name: default below it"
        return
    for key in work_pool.keys() - WORK_POOL_KEYS:
        text = f"work_pool: {key} is not known; write one of {_list(WORK_POOL_KEYS)}"
        yield ("work_pool", key), text
    name = work_pool.get("name")
    if not isinstance(name, str) or not name:
        yield ("work_pool", "name"), "names no work pool; write name: default below work_pool"
    rest = {key: value for key, value in work_pool.items() if key != "name"}
    for key, problem in _model_errors(WorkPoolConfig, rest):
        yield ("work_pool", key), f"work_pool: {key}: {problem}"


def _load_flow(entrypoint: Any, folder: Path) -> tuple[Flow[..., Any] | None, str]:
    """Return the flow that the entrypoint names, or None and what is wrong with it."""
    example = "write for example flow.py:my_flow"
    if not isinstance(entrypoint, str) or not entrypoint:
        return None, f"is missing; {example}"
    if entrypoint.endswith(".py") or not re.fullmatch(r".+\.py:[\w.]+|[\w.]+[:.]\w+", entrypoint):
        return None, f"{entrypoint!r} names no function of a file; {example}"
    file_name, _, _ = entrypoint.rpartition(":")
    function = re.split("[:.]", entrypoint)[-1]
    if file_name.endswith(".py") and not (folder / file_name).is_file():
        return None, f"{entrypoint!r}: there is no file {file_name} in the folder of this file"
    try:
        with _standing_in(folder):
            return load_flow_from_entrypoint(entrypoint, use_placeholder_flow=False), ""
    except MissingFlowError:
        text = f"there is no flow {function}; write the name of a function that has @flow"
        return None, f"{entrypoint!r}: {text}"
    except ScriptError as error:
        cause: BaseException = error.user_exc
    except (Exception, SystemExit) as error:
        cause = error
    reason = f"{type(cause).__name__}: {cause}".splitlines()[0]
    return None, f"{entrypoint!r}: the file can't be imported ({reason})"


@contextlib.contextmanager
def _standing_in(folder: Path) -> Iterator[None]:
    """Import flow files as `prefect deploy` in `folder` would, and leave no trace of it.

    Prefect puts the flow's folder on `sys.path` for good: without the clean-up a module next to
    one flow would be found by the next folder's flow too. What flows print goes to stderr.
    """
    path, modules = list(sys.path), set(sys.modules)
    try:
        with contextlib.chdir(folder), contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        sys.path[:] = path
        for name in set(sys.modules) - modules:
            origin = getattr(sys.modules[name], "__file__", None)
            if origin and Path(origin).resolve().is_relative_to(folder.resolve()):
                del sys.modules[name]


def _unknown_parameters(flow: Flow[..., Any], parameters: Any) -> list[str]:
    if not isinstance(parameters, dict) or not flow.should_validate_parameters:
        return []
    return sorted(parameters.keys() - parameter_schema(flow).properties.keys())


def _list(names: Any) -> str:
    return ", ".join(sorted(names))
