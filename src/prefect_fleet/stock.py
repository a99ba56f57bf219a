"""What `prefect deploy` would store, from Prefect's own code, without storing it.

Prefect has no public way to ask for that, so this is the one module that reaches into the private
modules of its `deploy` command; tests/unit/test_deploy_stock.py says when an upgrade moves them.
The command's function for one deployment runs with a client that answers reads and keeps the
bodies of writes. What is planned from those bodies is what is written later.
"""

import contextlib
import json
import os
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import httpx
import prefect._internal.analytics as _analytics
import prefect.cli.deploy._core as _core
import prefect.deployments.runner as _runner
from prefect.cli.deploy._config import _merge_with_default_deploy_config
from prefect.cli.deploy._models import (
    ConcurrencyLimitSpec,
    DeploymentConfig,
    PrefectYamlModel,
    RawScheduleConfig,
    WorkPoolConfig,
)
from prefect.cli.deploy._triggers import DeploymentTriggerAdapter
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import BlockDocument, Variable, WorkPool
from prefect.context import AsyncClientContext
from prefect.exceptions import ObjectNotFound
from prefect.flows import Flow
from prefect.settings import get_current_settings
from rich.console import Console

from prefect_fleet.api import new_client

__all__ = [
    "ConcurrencyLimitSpec",
    "DeploymentConfig",
    "DeploymentTriggerAdapter",
    "PrefectYamlModel",
    "RawScheduleConfig",
    "Recorder",
    "Recording",
    "WorkPoolConfig",
    "load_configs",
    "not_found",
    "record",
]

# Stands for a deployment's id in what is recorded, until the server has given it one.
NO_ID = uuid.UUID(int=0)


@dataclass
class Recording:
    """What one deployment would write.

    Attributes:
        flow_name: name of its flow.
        body: the body of `POST /deployments/`, all but the flow's id.
        active: for each schedule of the body, whether the file says if it is active.
        automations: the bodies of `POST /automations/`; `NO_ID` stands for the deployment's id.
    """

    flow_name: str = ""
    body: dict[str, Any] = field(default_factory=dict)
    active: list[bool] = field(default_factory=list)
    automations: list[dict[str, Any]] = field(default_factory=list)


class Recorder(PrefectClient):
    """A client that reads what deploying needs, each thing once, and keeps what is written."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.recording = Recording()
        self.pools: Mapping[str, WorkPool] = {}
        # Blocks that the same run will store: by type slug and name, their data.
        self.coming_blocks: Mapping[tuple[str, str], dict[str, Any]] = {}
        self._variables: dict[str, Variable | None] = {}
        self._blocks: dict[tuple[str, str], BlockDocument | None] = {}

    async def request(  # type: ignore[override]
        self,
        method: str,
        path: str,
        params: dict[str, Any] | None = None,
        path_params: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> httpx.Response:
        """Keep what is written; only reads reach the API."""
        if method == "GET" or path.endswith("/filter"):
            return await super().request(method, path, params, path_params, **kwargs)
        body = json.loads(json.dumps(kwargs.get("json")))
        match method, path:
            case "POST", "/flows/":
                self.recording.flow_name = body["name"]
            case "POST", "/deployments/":
                del body["flow_id"]
                self.recording.body = body
            case "POST", "/automations/":
                self.recording.automations.append(body)
            case "DELETE", "/automations/owned-by/{resource_id}":
                pass
            case _:
                raise RuntimeError(f"prefect deploy does something new: {method} {path}")
        request = httpx.Request(method, "http://recorded")
        return httpx.Response(200, json={"id": str(NO_ID)}, request=request)

    async def create_deployment(self, *args: Any, **kwargs: Any) -> uuid.UUID:
        """Note what the bodies don't tell, and mend a description."""
        schedules = kwargs.get("schedules") or []
        self.recording.active = ["active" in one.model_fields_set for one in schedules]
        deployment_id = await super().create_deployment(*args, **kwargs)
        # Prefect 3.9.1 makes "None" of a missing description on the first deploy, null later on.
        if kwargs.get("description") is None:
            self.recording.body["description"] = None
        return deployment_id

    async def read_deployment_by_name(self, name: str) -> Any:
        """Let every deployment look new, so that the whole of it is written."""
        raise not_found(f"deployment {name}")

    async def read_work_pool(self, work_pool_name: str) -> WorkPool:
        """Return a pool that is there, or will be when deployments are written."""
        if work_pool_name not in self.pools:
            raise not_found(f"work pool {work_pool_name}")
        return self.pools[work_pool_name]

    async def read_workers_for_work_pool(self, *_args: Any, **_kwargs: Any) -> list[Any]:
        """Prefect asks in order to print a hint."""
        return []

    async def read_variable_by_name(self, name: str) -> Variable | None:
        """Ask for each variable once."""
        if name not in self._variables:
            self._variables[name] = await super().read_variable_by_name(name)
        return self._variables[name]

    async def read_block_document_by_name(
        self, name: str, block_type_slug: str, include_secrets: bool = True
    ) -> BlockDocument:
        """Ask for each block once; one that the same run stores counts as stored."""
        key = (block_type_slug, name)
        if key in self.coming_blocks:
            return BlockDocument.model_construct(name=name, data=self.coming_blocks[key])
        if key not in self._blocks:
            try:
                self._blocks[key] = await super().read_block_document_by_name(
                    name, block_type_slug, include_secrets
                )
            except ObjectNotFound:
                self._blocks[key] = None
        document = self._blocks[key]
        if document is None:
            raise not_found(f"block {block_type_slug}/{name}")
        return document


def not_found(what: str) -> ObjectNotFound:
    """Return what the client raises for a thing that is not there."""
    request = httpx.Request("GET", "http://recorded")
    response = httpx.Response(404, request=request)
    return ObjectNotFound(httpx.HTTPStatusError(what, request=request, response=response))


@contextlib.asynccontextmanager
async def recorder() -> AsyncIterator[Recorder]:
    """Open a recorder for the API of the settings, with which Prefect's own code then works."""
    client = new_client(Recorder)
    async with client:
        # As `AsyncClientContext()`, which can't be given a client of another class.
        context = AsyncClientContext.model_construct(client=client)
        with context:
            yield client


def load_configs(data: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the deployments and the steps of a file as `prefect deploy --all` sees them.

    Args:
        data: the file's content, valid for `PrefectYamlModel`.
    """
    model = PrefectYamlModel.model_validate(data)
    actions = {"build": model.build or [], "push": model.push or [], "pull": model.pull}
    pool = get_current_settings().deployments.default_work_pool_name
    configs = []
    for deployment in model.deployments:
        config = _merge_with_default_deploy_config(
            deployment.model_dump(exclude_unset=True, mode="json")
        )
        if config["work_pool"].get("name") is None and pool:
            config["work_pool"]["name"] = pool
        configs.append(config)
    return configs, actions


async def record(
    client: Recorder,
    config: dict[str, Any],
    actions: dict[str, Any],
    flow: Flow[..., Any],
    folder: Path,
    run_steps: Callable[..., Coroutine[Any, Any, dict[str, Any]]] | None,
) -> Recording:
    """Return what `prefect deploy` would write for one deployment.

    Args:
        client: from `recorder`.
        config: the deployment, from `load_configs`.
        actions: the file's steps, from `load_configs`.
        flow: the flow that its entrypoint names.
        folder: the file's folder, against which Prefect takes relative paths.
        run_steps: what to do in place of build and push steps; None runs them.

    Raises:
        Exception: whatever Prefect's code raises where it would refuse the deployment.
    """
    config, actions = _leave_pull_steps_alone(config, actions)
    client.recording = Recording()
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.chdir(folder))

        def replace(module: ModuleType, name: str, value: Any) -> None:
            stack.enter_context(mock.patch.object(module, name, value))

        # Importing a flow file takes time, and `deploy` would take one that can't be imported.
        replace(_core, "load_flow_from_entrypoint", lambda *_args, **_kwargs: flow)
        replace(_runner, "get_inferred_version_info", _version_info(folder))
        # Nothing has been deployed yet.
        replace(_analytics, "try_mark_milestone", lambda *_args: False)
        if run_steps:
            replace(_core, "run_steps", run_steps)
        with open(os.devnull, "w", encoding="utf-8") as nowhere:  # noqa: PTH123
            await _core._run_single_deploy(
                config,
                actions,
                client=client,
                console=Console(file=nowhere),
                is_interactive=lambda: False,
            )
    return client.recording


def _leave_pull_steps_alone(
    config: dict[str, Any], actions: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Move a deployment's own pull steps to where Prefect does not look for blocks.

    Prefect stores both kinds as they are written, but reads the blocks that a deployment's own
    name, and fails where a block that only runs need isn't there yet.
    """
    if "pull" not in config:
        return config, actions
    rest = {key: value for key, value in config.items() if key != "pull"}
    pull = config["pull"]
    return rest, (actions | {"pull": pull} if pull or pull == [] else actions)


def _version_info(folder: Path) -> Callable[..., Coroutine[Any, Any, Any]]:
    """Return `get_inferred_version_info` without the processes it starts outside of git.

    It calls git five times a deployment. Outside of a work tree each of these fails, and there
    is no version information.
    """
    inferred = _runner.get_inferred_version_info

    async def infer(version_type: str | None = None) -> Any:
        if "GIT_DIR" not in os.environ and not any(
            (parent / ".git").exists() for parent in (folder, *folder.parents)
        ):
            return None
        return await inferred(version_type)

    return infer


def placeholder_outputs(names: Iterator[str]) -> dict[str, Any]:
    """Return step outputs in which each dotted name has a text that says it is not known yet."""
    outputs: dict[str, Any] = {}
    for name in names:
        *parents, last = name.split(".")
        place = outputs
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = UNKNOWN
    return outputs


# Stands in a plan for what a build or push step will say.
UNKNOWN = "(known after the build steps have run)"
