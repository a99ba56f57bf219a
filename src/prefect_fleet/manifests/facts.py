"""What the Prefect API and the result storage know about a run, asked after it."""

import hashlib
import json
import os
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any
from uuid import UUID

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    ArtifactFilterKey,
    ArtifactFilterType,
)
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.objects import State as PrefectState
from prefect.client.schemas.sorting import ArtifactSort
from prefect.exceptions import ObjectNotFound
from prefect.results import resolve_result_storage
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, get_current_settings, temporary_settings

from prefect_fleet.manifests.errors import ApiAway, ResultAway
from prefect_fleet.manifests.hooks import result_of
from prefect_fleet.manifests.record import Artifact, Result, Source, State, Tasks, Usage
from prefect_fleet.manifests.redact import TEXT_LIMIT, scrub

_STATE_TYPES = (
    "COMPLETED",
    "FAILED",
    "CRASHED",
    "CANCELLED",
    "RUNNING",
    "PENDING",
    "SCHEDULED",
    "CANCELLING",
    "PAUSED",
)
_PAGE = 200
# The artifact that shows what a run has taken; not one of the run's own.
USAGE_KEY = "fleet-run-usage"


class Api:
    """The Prefect API, as a context manager.

    Raises:
        ApiAway: from every method, and on entering when no API is configured: Prefect would start
            one of its own, which knows nothing.
    """

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._blocks: dict[str, Any] = {}

    def __enter__(self) -> "Api":
        url = get_current_settings().api.url
        if not url:
            raise ApiAway("no Prefect API is configured; set PREFECT_API_URL")
        self._url = str(url)
        # The next pass is the retry. For the result storage's client likewise.
        self._stack.enter_context(temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}))
        os.environ.setdefault("AWS_MAX_ATTEMPTS", "2")
        self._client = self._stack.enter_context(
            get_client(sync_client=True, httpx_settings={"timeout": 20})
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def flow_run(self, key: str) -> FlowRun | None:
        """The flow run; None if the API does not know it."""
        try:
            return self._client.read_flow_run(UUID(key))
        except ObjectNotFound:
            return None
        except httpx.HTTPError as error:
            raise self._away(error) from error

    def deployment_name(self, key: str) -> str | None:
        """Name of the deployment; None if it is gone."""
        try:
            return self._client.read_deployment(UUID(key)).name
        except ObjectNotFound:
            return None
        except httpx.HTTPError as error:
            raise self._away(error) from error

    def tasks(self, key: str) -> Tasks:
        """Numbers of the run's task runs."""
        total = self._count(key, None)
        by_state: dict[str, int] = {}
        for kind in _STATE_TYPES:
            if sum(by_state.values()) >= total:
                break
            if count := self._count(key, kind):
                by_state[kind] = count
        return Tasks(total=total, by_state=by_state)

    def _count(self, key: str, kind: str | None) -> int:
        # The client has no method for counting task runs.
        body: dict[str, Any] = {"flow_runs": {"id": {"any_": [key]}}}
        if kind:
            body["task_runs"] = {"state": {"type": {"any_": [kind]}}}
        try:
            return int(self._client.request("POST", "/task_runs/count", json=body).json())
        except httpx.HTTPError as error:
            raise self._away(error) from error

    def artifacts(self, key: str) -> list[Artifact]:
        """References to the artifacts that the run and its tasks have made, by key."""
        found: list[Artifact] = []
        seen = 0
        # Those without a type are the server's own: one for each result that a state refers to.
        run_filter = ArtifactFilter(
            flow_run_id=ArtifactFilterFlowRunId(any_=[UUID(key)]),
            type=ArtifactFilterType(not_any_=["result"]),
        )
        while True:
            try:
                page = self._client.read_artifacts(
                    artifact_filter=run_filter,
                    sort=ArtifactSort.ID_DESC,
                    limit=_PAGE,
                    offset=seen,
                )
            except httpx.HTTPError as error:
                raise self._away(error) from error
            seen += len(page)
            for one in page:
                if one.key == USAGE_KEY:
                    continue
                data = artifact_bytes(one.data)
                found.append(
                    Artifact(
                        id=str(one.id),
                        key=one.key,
                        type=one.type,
                        size=len(data),
                        sha256=hashlib.sha256(data).hexdigest(),
                    )
                )
            if len(page) < _PAGE:
                return sorted(found, key=lambda one: (one.key or "", one.id))

    def show_usage(self, key: str, usage: Usage) -> None:
        """Show what a run has taken as its one artifact of that kind."""
        data = json.dumps(usage_table(usage))
        only = ArtifactFilter(
            flow_run_id=ArtifactFilterFlowRunId(any_=[UUID(key)]),
            key=ArtifactFilterKey(any_=[USAGE_KEY]),
        )
        try:
            there = self._client.read_artifacts(artifact_filter=only, limit=1)
            # The client's own methods emit an event, too, from a thread that is waited for.
            if not there:
                text = "What the run took, with all processes that it started"
                body = {"key": USAGE_KEY, "type": "table", "description": text, "data": data}
                self._client.request("POST", "/artifacts/", json=body | {"flow_run_id": key})
            elif there[0].data != data:
                path = f"/artifacts/{there[0].id}"
                self._client.request("PATCH", path, json={"data": data})  # type: ignore[arg-type]
        except httpx.HTTPError as error:
            raise self._away(error) from error

    def measure(self, result: Result) -> Result:
        """The result's reference with block, size and SHA-256, read from where it is stored.

        Raises:
            ResultAway: it can't be read.
        """
        block = None
        if result.block_id is None:
            size, digest = _measure_file(Path(result.storage_key))
        else:
            try:
                document = self._client.read_block_document(UUID(result.block_id))
            except ObjectNotFound as error:
                raise ResultAway("the block of its storage is gone") from error
            except httpx.HTTPError as error:
                raise self._away(error) from error
            kind = document.block_type.slug if document.block_type else document.block_type_name
            block = f"{kind}/{document.name}"
            size, digest = self._measure_stored(result.block_id, block, result.storage_key)
        return Result(
            storage_key=result.storage_key,
            block_id=result.block_id,
            block=block,
            size=size,
            sha256=digest,
        )

    def _measure_stored(self, block_id: str, shown: str, key: str) -> tuple[int, str]:
        into = _Measure()
        kept = self._blocks.get(block_id)
        if isinstance(kept, ResultAway):  # asked already, and perhaps waited for a minute
            raise kept
        try:
            if kept is None:
                kept = self._blocks[block_id] = resolve_result_storage(UUID(block_id), _sync=True)
            if hasattr(kept, "download_object_to_file_object"):  # S3, in pieces
                kept.download_object_to_file_object(key, into, _sync=True)
            else:
                into.write(kept.read_path(key, _sync=True))
        except Exception as error:  # whatever any storage block raises
            text = scrub(f"{type(error).__name__}: {error}")[:300]
            away = ResultAway(f"{shown} does not give it: {text}")
            if "404" not in text and "NoSuchKey" not in text:
                self._blocks[block_id] = away
            raise away from error
        return into.size, into.digest.hexdigest()

    def _away(self, error: httpx.HTTPError) -> ApiAway:
        if isinstance(error, httpx.HTTPStatusError):
            status = error.response.status_code
            advice = "; check PREFECT_API_AUTH_STRING" if status == 401 else ""
            return ApiAway(f"the Prefect API at {self._url} answered {status}{advice}")
        return ApiAway(
            f"the Prefect API at {self._url} does not answer ({type(error).__name__}); "
            "check PREFECT_API_URL"
        )


class _Measure:
    """A file that keeps nothing of what is written to it but its size and SHA-256."""

    def __init__(self) -> None:
        self.size = 0
        self.digest = hashlib.sha256()

    def write(self, content: bytes) -> int:
        self.size += len(content)
        self.digest.update(content)
        return len(content)


def _measure_file(path: Path) -> tuple[int, str]:
    into = _Measure()
    try:
        with path.open("rb") as file:
            while content := file.read(1 << 20):
                into.write(content)
    except OSError as error:
        raise ResultAway(f"{path} can't be read: {error.strerror}") from error
    return into.size, into.digest.hexdigest()


def usage_table(usage: Usage) -> list[dict[str, Any]]:
    """Rows of the artifact that shows it."""
    rows = [
        ("peak memory", usage.memory_peak, "bytes"),
        ("processor time", usage.processor_seconds, "seconds"),
        ("ended for want of memory", "yes" if usage.out_of_memory else "no", ""),
    ]
    return [
        {"what": what, "value": "not known" if value is None else value, "unit": unit}
        for what, value, unit in rows
    ]


def artifact_bytes(data: Any) -> bytes:
    """What size and hash of an artifact are those of: its text, else its canonical JSON."""
    if isinstance(data, str):
        return data.encode(errors="surrogatepass")
    return json.dumps(data, sort_keys=True, separators=(",", ":")).encode()


def state_of(state: PrefectState[Any], source: Source) -> State:
    """A state of the API's as the manifest has it."""
    message = scrub(state.message)[:TEXT_LIMIT] if state.message else None
    return State(type=state.type.value, name=state.name or "", message=message, source=source)


def result_of_state(state: PrefectState[Any]) -> Result | None:
    """The reference that a state of the API's makes to a stored result."""
    return result_of(state.data)
