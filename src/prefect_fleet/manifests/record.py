"""What a manifest holds. The dataclasses are the schema: docs/manifests.md explains each field.

Only the standard library is imported: a flow run loads this, and so does a pass over the manifests
that has nothing to do. Every time is UTC in ISO 8601, every size in bytes, every duration in
seconds, and what is not known is null.
"""

import json
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any, ClassVar, Literal

SCHEMA_VERSION = 1
FINAL_TYPES = frozenset({"COMPLETED", "FAILED", "CRASHED", "CANCELLED"})

# run: the run's own process said so; worker: the worker that looked after that process; api: the
# Prefect API, asked later; sweep: nobody, but the process is gone.
Source = Literal["run", "worker", "api", "sweep"]
# Facts that are filled in after the run, because they cost requests.
Fact = Literal["tasks", "result", "artifacts", "usage"]
FACTS: tuple[Fact, ...] = ("tasks", "result", "artifacts", "usage")
NOT_YET = "not looked up yet"
NO_RESULT = "the run stored no result"
NO_USAGE = "nobody measured it"

_STRICT: dict[str, Any] = {"extra": "forbid"}
# Methods that nobody calls would double what this module's import costs each run.
_part = dataclass(repr=False)


@_part
class Flow:
    """The flow; `version` is Prefect's, a hash of the file unless the flow sets one."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT
    id: str
    name: str
    version: str | None


@_part
class Deployment:
    """The deployment that the run belongs to."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT
    id: str
    name: str | None


@_part
class Run:
    """The flow run: who it is and what it was given.

    Attributes:
        parent_id: of the flow run that it is part of, for a subflow.
        attempts: how often it began, as Prefect's run count.
        parameters: what the flow was called with, defaults included, secrets replaced.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT
    id: str
    name: str
    parent_id: str | None
    attempts: int
    tags: list[str]
    parameters: dict[str, Any]


@_part
class State:
    """The latest known state, and who said so."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT
    type: str
    name: str
    message: str | None
    source: Source


@_part
class Worker:
    """Where the latest attempt ran."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT
    host: str
    pool: str | None
    queue: str | None
    name: str | None


@_part
class Process:
    """The process of the latest attempt, so that it can't be taken for a later one.

    Attributes:
        start_ticks: when it started, in clock ticks since boot; null where there is no /proc.
        boot_id: which boot of the machine; null where there is no /proc.
        attempt: which attempt of the run it is, from 1.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT
    pid: int
    start_ticks: int | None
    boot_id: str | None
    attempt: int = 0


@_part
class Code:
    """What ran: the release's id, the hash of the locked packages, versions."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT
    release: str | None
    lock: str | None
    prefect: str
    python: str


@_part
class Tasks:
    """Number of task runs, in all and by Prefect's state types."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT
    total: int
    by_state: dict[str, int]


@_part
class Result:
    """Reference to what the run returned (or raised), as Prefect's result storage holds it.

    Attributes:
        storage_key: key in the storage block, or a path on the host when there is no block.
        block_id: id of the storage block's document.
        block: `<type>/<name>` of that block.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT
    storage_key: str
    block_id: str | None
    block: str | None = None
    size: int | None = None
    sha256: str | None = None


@_part
class Artifact:
    """Reference to an artifact; size and hash are those of its data."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT
    id: str
    key: str | None
    type: str | None
    size: int
    sha256: str


@_part
class Usage:
    """What the latest attempt took, with all processes that it started on its host.

    Attributes:
        memory_peak: the most memory that it had at a time, shared with none of the pool's others.
        processor_seconds: of all processors together.
        out_of_memory: the kernel has ended it because there was no more memory.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT
    memory_peak: int | None
    processor_seconds: float | None
    out_of_memory: bool


@_part
class Error:
    """Why the run did not complete; secrets are replaced."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT
    type: str | None
    message: str | None
    traceback: str | None


@_part
class Manifest:
    """One flow run.

    Attributes:
        start: when the first attempt began, as Prefect has it.
        duration: end - start, waiting between attempts included.
        missing: why a fact is null or incomplete, by its name.
        updated: when this file was last written.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT
    schema_version: Literal[1]
    flow: Flow
    deployment: Deployment | None
    run: Run
    state: State
    start: str
    end: str | None
    duration: float | None
    worker: Worker
    process: Process | None
    code: Code
    tasks: Tasks | None = None
    result: Result | None = None
    artifacts: list[Artifact] | None = None
    usage: Usage | None = None
    error: Error | None = None
    missing: dict[Fact, str] = field(default_factory=dict)
    updated: str = ""

    @property
    def is_final(self) -> bool:
        """The run has ended, as far as this manifest knows."""
        return self.state.type in FINAL_TYPES

    @property
    def latest_attempt(self) -> int:
        """The latest attempt whose process this manifest names; 0 if none began."""
        return self.process.attempt if self.process else 0

    @property
    def is_complete(self) -> bool:
        """Every fact that is filled in after a run is there."""
        return all(reason in (NO_RESULT, NO_USAGE) for reason in self.missing.values())

    def finish(self, end: datetime) -> None:
        """Note when the run ended."""
        self.end = timestamp(end)
        self.duration = max(0.0, (end - datetime.fromisoformat(self.start)).total_seconds())

    def reopen(self) -> None:
        """Forget how an earlier attempt ended."""
        self.end = self.duration = self.error = None
        self.tasks = self.result = self.artifacts = self.usage = None
        self.missing = {}

    def dump(self) -> bytes:
        """The manifest as the file has it."""
        text = json.dumps(asdict(self), indent=1, ensure_ascii=False)
        # A lone surrogate, as in a file name that is no UTF-8, must not cost the whole record.
        return text.encode(errors="backslashreplace") + b"\n"


def load(content: bytes) -> Manifest:
    """Read a manifest, quickly: only its shape is looked at (`verify` looks at everything).

    Raises:
        ValueError: it is no manifest of this schema version.
    """
    data = json.loads(content)
    if not isinstance(data, dict) or data.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(f"is no manifest of schema version {SCHEMA_VERSION}")
    parts: dict[str, type] = {
        "flow": Flow,
        "deployment": Deployment,
        "run": Run,
        "state": State,
        "worker": Worker,
        "process": Process,
        "code": Code,
        "tasks": Tasks,
        "result": Result,
        "usage": Usage,
        "error": Error,
    }
    try:
        for name, part in parts.items():
            if data.get(name) is not None:
                data[name] = part(**data[name])
        if data.get("artifacts") is not None:
            data["artifacts"] = [Artifact(**one) for one in data["artifacts"]]
        return Manifest(**data)
    except TypeError as error:
        raise ValueError(f"is no manifest of schema version {SCHEMA_VERSION}: {error}") from error


def timestamp(moment: datetime) -> str:
    """UTC in ISO 8601 with microseconds."""
    return moment.astimezone(UTC).isoformat(timespec="microseconds")
