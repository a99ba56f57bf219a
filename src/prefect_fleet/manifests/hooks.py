"""The hooks that write a flow run's manifest: `@with_manifest` above `@flow`.

Which process calls them (Prefect 3.9.1): the run's own for Running, Completed, Failed and for a
Crashed that it could still report; the worker, which loads the flow anew, for a process that died
and for a cancellation. Runs that end without any hook are found by `settle`.
"""

import contextlib
import os
from datetime import datetime
from typing import Any, TypeVar
from uuid import UUID

import prefect
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.objects import State as PrefectState
from prefect.context import FlowRunContext
from prefect.flows import Flow as PrefectFlow
from prefect.logging.loggers import flow_run_logger
from prefect.results import ResultRecord, ResultRecordMetadata
from prefect.settings import get_current_settings
from prefect.utilities.callables import get_call_parameters, parameters_to_args_kwargs

from prefect_fleet.manifests import redact
from prefect_fleet.manifests.files import Care, Manifests
from prefect_fleet.manifests.host import (
    hostname,
    lock_hash,
    python_version,
    release_id,
    this_process,
)
from prefect_fleet.manifests.record import (
    FACTS,
    NOT_YET,
    SCHEMA_VERSION,
    Code,
    Deployment,
    Error,
    Flow,
    Manifest,
    Result,
    Run,
    State,
    Worker,
    load,
    timestamp,
)

AnyFlow = TypeVar("AnyFlow", bound=PrefectFlow[Any, Any])

_HOOKS = (
    "on_running_hooks",
    "on_completion_hooks",
    "on_failure_hooks",
    "on_crashed_hooks",
    "on_cancellation_hooks",
)
_warned: set[UUID] = set()


def with_manifest(flow: AnyFlow) -> AnyFlow:
    """Let each run of the flow write its manifest; the flow's own hooks stay.

    Raises:
        TypeError: it is no flow.
    """
    if not isinstance(flow, PrefectFlow):
        raise TypeError(f"with_manifest needs a flow, not {flow!r}; write it above @flow")
    for name in _HOOKS:
        hooks = getattr(flow, name)
        if write_manifest not in hooks:
            # A new list: the flow's may be the caller's own, shared by several flows. First in
            # it: a hook of the flow's own may take long, or end the process.
            setattr(flow, name, [write_manifest, *hooks])
    return flow


def write_manifest(
    flow: PrefectFlow[Any, Any], flow_run: FlowRun, state: PrefectState[Any]
) -> None:
    """Write down that the run has entered the state; a fault is one warning in the run's log."""
    try:
        _write(Manifests(), flow, flow_run, state)
    except Exception as error:
        if flow_run.id not in _warned:
            _warned.add(flow_run.id)
            reason = error.strerror if isinstance(error, OSError) else None
            flow_run_logger(flow_run, flow).warning(
                "The run manifest could not be written: %s. The run goes on without it.",
                reason or f"{type(error).__name__}: {error}",
            )


def _write(
    manifests: Manifests,
    flow: PrefectFlow[Any, Any],
    flow_run: FlowRun,
    state: PrefectState[Any],
) -> None:
    key = str(flow_run.id)
    care = manifests.care_of(key)
    # When a run begins its first attempt, its start time is that of this very state.
    path = (
        care.path
        if care
        else manifests.path_of(flow.name, key, flow_run.start_time or state.timestamp)
    )
    with manifests.locked(path):
        content = manifests.read(path)
        manifest = None
        if content is not None:
            with contextlib.suppress(ValueError):  # damaged: what is known now is better
                manifest = load(content)
        if manifest is None:
            manifest = _begin(flow, flow_run, state)
        if state.is_running():
            _enter(manifest, flow, flow_run, state)
        else:
            _leave(manifest, flow, flow_run, state)
        # First the note that the run needs care: without it a killed run would stay open. What is
        # noted about an earlier attempt does not count any more.
        if (noted := manifests.care_of(key)) is None:
            manifests.set_care(key, Care(path))
        elif state.is_running() and noted != (fresh := Care(path, noted.uploaded)):
            manifests.set_care(key, fresh)
        manifest.updated = timestamp(datetime.now().astimezone())
        manifests.write(path, manifest.dump())


def _begin(flow: PrefectFlow[Any, Any], flow_run: FlowRun, state: PrefectState[Any]) -> Manifest:
    parameters = flow_run.parameters
    with contextlib.suppress(Exception):  # parameters that don't fit: the run fails over them
        parameters = get_call_parameters(flow.fn, *parameters_to_args_kwargs(flow.fn, parameters))
    schema = flow.parameters.model_dump()
    environment = os.environ
    deployment = None
    if flow_run.deployment_id:
        known = environment.get("PREFECT__DEPLOYMENT_ID") == str(flow_run.deployment_id)
        name = environment.get("PREFECT__DEPLOYMENT_NAME") if known else None
        deployment = Deployment(id=str(flow_run.deployment_id), name=name)
    return Manifest(
        schema_version=SCHEMA_VERSION,
        flow=Flow(id=str(flow_run.flow_id), name=flow.name, version=flow.version),
        deployment=deployment,
        run=Run(
            id=str(flow_run.id),
            name=flow_run.name,
            parent_id=_parent(flow_run),
            attempts=0,
            tags=sorted(flow_run.tags),
            parameters=redact.redact_parameters(parameters, schema),
        ),
        state=State(type="", name="", message=None, source="run"),
        start=timestamp(flow_run.start_time or state.timestamp),
        end=None,
        duration=None,
        worker=_worker(flow_run),
        process=None,
        code=_code(flow),
    )


def _enter(
    manifest: Manifest,
    flow: PrefectFlow[Any, Any],
    flow_run: FlowRun,
    state: PrefectState[Any],
) -> None:
    """An attempt begins, in this process."""
    manifest.reopen()
    # As the server counts; `run_count` is from before this state.
    resumed = flow_run.run_count > 0 and bool(flow_run.empirical_policy.resuming)
    manifest.run.attempts = max(
        manifest.run.attempts, flow_run.run_count if resumed else flow_run.run_count + 1
    )
    manifest.run.name = flow_run.name
    manifest.worker = _worker(flow_run)
    manifest.process = this_process(manifest.run.attempts)
    manifest.code = _code(flow)
    manifest.state = _state(state, "run", set())


def _leave(
    manifest: Manifest,
    flow: PrefectFlow[Any, Any],
    flow_run: FlowRun,
    state: PrefectState[Any],
) -> None:
    """The run has ended, or is about to: the hook for a cancellation comes before its state."""
    if manifest.process is not None:
        is_own = manifest.process == this_process(manifest.process.attempt)
    else:  # it never began to run
        is_own = os.environ.get("PREFECT__FLOW_RUN_ID") == manifest.run.id or (
            flow_run.deployment_id is None
        )
        manifest.worker = _worker(flow_run)
    secrets = _known_secrets(flow_run)
    error = _exception_of(state)
    if error is not None:
        secrets |= redact.find_secrets_of_traceback(error)
    manifest.state = _state(state, "run" if is_own else "worker", secrets)
    if flow_run.name:
        manifest.run.name = redact.scrub(flow_run.name, secrets)
    if not manifest.is_final:
        return
    manifest.missing = dict.fromkeys(FACTS, NOT_YET)
    manifest.result = _result(state)
    manifest.finish(state.timestamp)
    if error is not None:
        manifest.error = Error(
            type=f"{type(error).__module__}.{type(error).__qualname__}",
            message=redact.scrub(str(error), secrets)[: redact.TEXT_LIMIT]
            or manifest.state.message,
            traceback=redact.format_traceback(error, secrets),
        )
    elif state.is_completed():
        manifest.error = None
    elif manifest.error is None:  # else the run itself has said more than its worker can
        manifest.error = Error(type=None, message=manifest.state.message, traceback=None)


def _known_secrets(flow_run: FlowRun) -> set[str]:
    """Secrets that a message of this run might quote: its parameters', the API's password."""
    api = get_current_settings().api
    values: list[Any] = [api.auth_string, api.key, flow_run.parameters]
    if context := FlowRunContext.get():
        values.append(context.parameters)
    secrets = redact.find_secrets(*values)
    if api.auth_string:
        secrets.add(api.auth_string.get_secret_value().partition(":")[2])
    return secrets - {""}


def _exception_of(state: PrefectState[Any]) -> BaseException | None:
    data = state.data.result if isinstance(state.data, ResultRecord) else state.data
    return data if isinstance(data, BaseException) and not state.is_completed() else None


def _result(state: PrefectState[Any]) -> Result | None:
    data = state.data
    if isinstance(data, ResultRecord):
        data = data.metadata if data.is_persisted else None
    return result_of(data)


def result_of(metadata: Any) -> Result | None:
    """The reference that a state's data makes to a stored result; None if there is none."""
    if not isinstance(metadata, ResultRecordMetadata) or not metadata.storage_key:
        return None
    return Result(storage_key=metadata.storage_key, block_id=_text(metadata.storage_block_id))


def _state(state: PrefectState[Any], source: Any, secrets: set[str]) -> State:
    message = redact.scrub(state.message, secrets)[: redact.TEXT_LIMIT] if state.message else None
    return State(type=state.type.value, name=state.name or "", message=message, source=source)


def _parent(flow_run: FlowRun) -> str | None:
    """Id of the flow run that a subflow's is part of: its hook runs in the parent's context."""
    context = FlowRunContext.get()
    if flow_run.parent_task_run_id is None or context is None or context.flow_run is None:
        return None
    return _text(context.flow_run.id) if context.flow_run.id != flow_run.id else None


def _worker(flow_run: FlowRun) -> Worker:
    return Worker(
        host=hostname(),
        pool=flow_run.work_pool_name,
        queue=flow_run.work_queue_name,
        name=os.environ.get("PREFECT__WORKER_NAME") or None,
    )


def _code(flow: PrefectFlow[Any, Any]) -> Code:
    places = [flow.fn.__code__.co_filename] if hasattr(flow.fn, "__code__") else []
    with contextlib.suppress(OSError):  # the working directory is gone
        places = [os.getcwd(), *places]  # noqa: PTH109 - a str, as the file's name is
    return Code(
        release=release_id(*places),
        lock=lock_hash(),
        prefect=prefect.__version__,
        python=python_version(),
    )


def _text(value: UUID | None) -> str | None:
    return str(value) if value else None
