"""A control group for each flow run, under the worker's unit.

The unit is the worker's own (`Delegate=`), and the worker and its helpers live in a group of it
(`DelegateSubgroup=worker`). Beside that, each run gets one: what it may take is limited there, what
it has taken is read there, and what it leaves behind is ended by it. Where there are no such groups
runs go on without: no run fails for want of one.

A run's process enters its group before it becomes what runs the flow, so all that it starts is in
there. A zygote's child is no descendant of it: it enters the group that `GROUP` names.
"""

import asyncio
import contextlib
import json
import os
import time
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
import prefect.runner._starter_engine as starter_engine
from prefect.client.schemas.objects import FlowRun
from prefect.logging.loggers import flow_run_logger
from prefect.runner._process_manager import ProcessHandle
from prefect.utilities.processutils import run_process

from prefect_operations.limits import Limits, size

# In the environment of a run: the folder of its group, and, where the kernel does not measure its
# memory, the file in which the zygote notes what its child has taken.
GROUP = "PREFECT_FLEET_GROUP"
PEAK_FILE = "PREFECT_FLEET_PEAK_FILE"
# As the unit has it.
WORKERS_GROUP = "worker"
_PREFIX = "run-"
# A killed process is gone when the kernel has freed what it held.
_SECONDS_TO_GO = 10.0
# The process enters the group, and becomes the command.
_ENTER = 'echo 0 >"$0/cgroup.procs"; exec "$@"'
# Prefect calls it by this name to start a run's process.
INTERNALS = ("run_process",)


@dataclass
class Usage:
    """What a run has taken, with all processes that it has started.

    Attributes:
        memory_peak: bytes at most; None where the kernel does not say.
        processor_seconds: of all processors.
        out_of_memory: the kernel has ended it because there was no more.
    """

    memory_peak: int | None
    processor_seconds: float | None
    out_of_memory: bool


class RunGroups:
    """Makes the groups.

    Args:
        unit: folder of the worker's unit; None if there can be no groups.
        why: there are none.
        usage: folder for a file with each run's usage; None for none.
    """

    def __init__(self, unit: Path | None, why: str = "", usage: Path | None = None) -> None:
        self._unit = unit
        self._usage = usage
        self.why = why
        self._left: set[Path] = set()
        self._controllers: frozenset[str] = frozenset()
        if unit is not None:
            self._controllers = _enable(unit)
            self._left.update(unit.glob(f"{_PREFIX}*"))
            self._clear()

    @classmethod
    def find(cls) -> "RunGroups":
        """Return those of the unit that this process is in."""
        data = os.environ.get("PREFECT_FLEET_DATA")
        usage = Path(data, "manifests", ".usage") if data else None
        own = own_folder()
        if own is None:
            return cls(None, "no control groups (version 2) are mounted here", usage)
        if own.name != WORKERS_GROUP:
            return cls(None, f"the worker's unit has no DelegateSubgroup={WORKERS_GROUP}", usage)
        if not os.access(own.parent, os.W_OK):
            return cls(None, f"{own.parent} can't be written", usage)
        return cls(own.parent, usage=usage)

    def make(self, flow_run: FlowRun, limits: Limits) -> "RunGroup":
        """Return a group for a run; without a folder, if none can be made."""
        self._clear()
        note = self._usage / f"{flow_run.id}.json" if self._usage else None
        if note:
            with contextlib.suppress(OSError):
                note.parent.mkdir(parents=True, exist_ok=True)
                # Of an attempt before this one.
                note.unlink(missing_ok=True)
        group = RunGroup(None, limits, note, self._forget)
        if self._unit is None:
            group.refused = [f"{name}: {self.why}" for name in _asked(limits)]
            return group
        folder = self._unit / f"{_PREFIX}{flow_run.id}"
        try:
            if folder.exists():
                _remove(folder)
            folder.mkdir()
        except OSError as error:
            group.why = f"{folder} can't be made: {error.strerror}"
            group.refused = [f"{name}: {group.why}" for name in _asked(limits)]
            return group
        group.folder = folder
        group.limit(self._controllers)
        return group

    def _forget(self, folder: Path) -> None:
        self._left.add(folder)
        self._clear()

    def _clear(self) -> None:
        """Remove the groups of runs that have ended."""
        for folder in list(self._left):
            with contextlib.suppress(OSError):
                _write(folder, "cgroup.kill", "1")
            try:
                _remove(folder)
            except FileNotFoundError:
                pass
            except OSError:
                continue  # a process in it is not gone yet
            self._left.discard(folder)


@dataclass
class RunGroup:
    """The group of one run.

    Attributes:
        folder: of the group; None: there is none.
        limits: of the run.
        note: file for its usage.
        forget: called with the folder when nothing is to be read there any more.
        refused: limits that this host can't give, and why.
        why: there is no group, where this host has groups.
        usage: when it has ended.
    """

    folder: Path | None
    limits: Limits
    note: Path | None
    forget: Callable[[Path], None]
    refused: list[str] = field(default_factory=list)
    why: str = ""
    usage: Usage | None = None
    _own_limit: bool = False

    def limit(self, controllers: Iterable[str]) -> None:
        """Set the limits."""
        folder, limits = self.folder, self.limits
        assert folder is not None
        if "memory" in controllers:
            # A run that has lost one of its processes is none; the kernel ends all of it.
            with contextlib.suppress(OSError):
                _write(folder, "memory.oom.group", "1")
        wanted: list[tuple[str, str, list[tuple[str, str]]]] = []
        if limits.memory_max is not None:
            files = [("memory.max", str(limits.memory_max)), ("memory.swap.max", "0")]
            wanted.append(("memory_max", "memory", files))
        if limits.cpu_quota is not None:
            # Microseconds of processor time in each period of 0.1 s.
            files = [("cpu.max", f"{limits.cpu_quota * 1000:.0f} 100000")]
            wanted.append(("cpu_quota", "cpu", files))
        if limits.tasks_max is not None:
            wanted.append(("tasks_max", "pids", [("pids.max", str(limits.tasks_max))]))
        for name, controller, files in wanted:
            if controller not in controllers:
                self.refused.append(f"{name}: this host's control groups have no {controller}")
                continue
            try:
                for file, value in files:
                    # A kernel without swap has no limit for it.
                    if file != "memory.swap.max" or (folder / file).exists():
                        _write(folder, file, value)
            except OSError as error:
                self.refused.append(f"{name}: {folder / file}: {error.strerror}")

    def command(self, command: list[str]) -> list[str]:
        """Return what enters the group and becomes a command."""
        if self.folder is None:
            return command
        return ["/bin/sh", "-c", _ENTER, str(self.folder), *command]

    def environment(self) -> dict[str, str]:
        """Return what a run's environment has besides."""
        if self.folder is None:
            return {}
        peak = self._peak_file()
        return {GROUP: str(self.folder)} | ({PEAK_FILE: str(peak)} if peak else {})

    def _peak_file(self) -> Path | None:
        assert self.folder is not None
        if self.note is None or (self.folder / "memory.peak").exists():
            return None
        return self.note.with_suffix(".peak")

    async def end(self) -> None:
        """End what is left of the run, read what it has taken, and remove the group."""
        folder = self.folder
        if folder is None:
            return
        try:
            await _empty(folder)
            self.usage = self._read()
            if self.note:
                draft = self.note.with_suffix(".draft")
                draft.write_text(json.dumps(asdict(self.usage)))
                draft.replace(self.note)
        except OSError:
            pass  # the run has ended in any case
        finally:
            self.folder = None
            self.forget(folder)

    def _read(self) -> Usage:
        assert self.folder is not None
        microseconds = _table(self.folder / "cpu.stat").get("usage_usec")
        peak = _number(self.folder / "memory.peak")
        if file := self._peak_file():
            peak = _number(file)
            file.unlink(missing_ok=True)
        events = _table(self.folder / "memory.events")
        self._own_limit = events.get("oom", 0) > 0
        return Usage(
            memory_peak=peak,
            processor_seconds=None if microseconds is None else microseconds / 1e6,
            out_of_memory=events.get("oom_kill", 0) > 0,
        )

    def explain(self, message: str) -> str:
        """Return the message of a run that has crashed: that memory was out, or what is given."""
        if self.usage is None or not self.usage.out_of_memory:
            return message
        if self._own_limit and self.limits.memory_max is not None:
            limit = size(self.limits.memory_max)
            return (
                f"Out of memory: the run wanted more than its memory_max of {limit}, and the "
                "kernel ended it. Give its deployment a larger memory_max, or let the flow hold "
                "less at a time."
            )
        return (
            "Out of memory: this pool's runs together, or all of the host, had no more, and the "
            "kernel ended this run. Give runs a memory_max, let fewer run at a time, or let the "
            "flow hold less at a time."
        )


_group: ContextVar[RunGroup | None] = ContextVar("_group", default=None)


async def _run_process(command: list[str], **settings: Any) -> anyio.abc.Process:
    group = _group.get()
    if group is not None and group.folder is not None:
        command = group.command(command)
        settings["env"] = {**(settings.get("env") or os.environ), **group.environment()}
    return await run_process(command, **settings)


# EngineCommandStarter, which starts all of a worker's runs, calls it by this name "to override".
starter_engine.run_process = _run_process  # type: ignore[assignment]


class GroupedStarter:
    """Starts a run as another starter does, in a group.

    Args:
        starter: the other.
        groups: makes it.
        limits: of the run.
    """

    def __init__(self, starter: Any, groups: RunGroups, limits: Limits) -> None:
        self._starter = starter
        self._groups = groups
        self._limits = limits
        self._made: RunGroup | None = None

    async def start(
        self,
        flow_run: FlowRun,
        task_status: anyio.abc.TaskStatus[ProcessHandle] = anyio.TASK_STATUS_IGNORED,
    ) -> None:
        """Run it to its end, and end what it leaves behind."""
        self._made = group = self._groups.make(flow_run, self._limits)
        for reason in group.refused:
            flow_run_logger(flow_run).warning("The run goes on without %s", reason)
        token = _group.set(group)
        try:
            await self._starter.start(flow_run, task_status=task_status)
        finally:
            _group.reset(token)
            with anyio.CancelScope(shield=True):
                await group.end()

    def explain(self, message: str) -> str:
        """Return the message of a run that has crashed."""
        return self._made.explain(message) if self._made else message


class ExplainingProposer:
    """Prefect's proposer of states, which says of a crash that the memory was out.

    Args:
        proposer: Prefect's.
        explain: makes a message of one.
    """

    def __init__(self, proposer: Any, explain: Callable[[str], str]) -> None:
        self._proposer = proposer
        self._explain = explain

    def __getattr__(self, name: str) -> Any:
        return getattr(self._proposer, name)

    async def propose_crashed(self, flow_run: FlowRun, message: str) -> Any:
        """As Prefect's."""
        return await self._proposer.propose_crashed(flow_run, message=self._explain(message))


def own_folder() -> Path | None:
    """Return the folder of the control group (version 2) that this process is in, or None."""
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        path = next(line[3:] for line in lines if line.startswith("0::"))
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            before, _, after = line.partition(" - ")
            if after.startswith("cgroup2 "):
                root, point = before.split()[3:5]
                return Path(point) / Path(path).relative_to(root).as_posix()
    return None


def _enable(unit: Path) -> frozenset[str]:
    """Let the unit's groups have what the unit has; return what that is."""
    for name in ("memory", "pids", "cpu"):
        with contextlib.suppress(OSError):
            _write(unit, "cgroup.subtree_control", f"+{name}")
    with contextlib.suppress(OSError):
        return frozenset((unit / "cgroup.subtree_control").read_text().split())
    return frozenset()


def _asked(limits: Limits) -> list[str]:
    return [name for name, value in asdict(limits).items() if value is not None]


async def _empty(folder: Path) -> None:
    """Kill all processes of a group, and wait until they are gone."""
    until = time.monotonic() + _SECONDS_TO_GO
    while _table(folder / "cgroup.events").get("populated"):
        _write(folder, "cgroup.kill", "1")
        if time.monotonic() > until:
            return
        await asyncio.sleep(0.01)


def _remove(folder: Path) -> None:
    """Remove a group and those that a run has made in it."""
    for inner in sorted(folder.glob("**/"), reverse=True):
        inner.rmdir()


def _write(folder: Path, name: str, value: str) -> None:
    # Not made where the kernel has not made it.
    number = os.open(folder / name, os.O_WRONLY)
    try:
        os.write(number, value.encode())
    finally:
        os.close(number)


def _table(path: Path) -> dict[str, int]:
    try:
        lines = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {line[0]: int(line[1]) for line in lines}


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
