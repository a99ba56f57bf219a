"""What the tests of deploying share: files to deploy, and what the API shows afterwards."""

import asyncio
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent
from typing import Any

from prefect.client.orchestration import PrefectClient, get_client

from prefect_fleet import deploy
from prefect_fleet.server_state import read_state

FLOW = """
from prefect import flow
import helper

@flow(name="{flow}")
def sample(count: int = 1, names: list[str] | None = None):
    pass
"""
FILE = """
pull:
  - prefect.deployments.steps.set_working_directory:
      directory: /opt/prefect/deployments/{folder}
deployments:
  - name: nightly
    entrypoint: flow.py:sample
    schedules:
      - cron: "*/15 * * * *"
        timezone: UTC
      - interval: 900
    triggers:
      - expect: [prefect.flow-run.Completed, prefect.flow-run.Failed]
        match: {{prefect.resource.id: prefect.flow-run.*}}
    work_pool:
      name: {pool}
"""


def write(root: Path, folder: str, *, flow: str, pool: str = "default", file: str = FILE) -> Path:
    """Write a flow and its prefect.yaml to `root`/deployments/`folder`; return the latter."""
    if not (root / "prefect.yaml").exists():
        root.mkdir(parents=True, exist_ok=True)
        (root / "prefect.yaml").write_text(
            f"name: {root.name}\ndeployments:\n"
            f"  - {{name: top, entrypoint: 'top.py:top', work_pool: {{name: {pool}}}}}\n"
        )
        name = f"{root.name}-top"
        (root / "top.py").write_text(
            f"from prefect import flow\n\n@flow(name={name!r})\ndef top():\n    pass\n"
        )
    place = root / "deployments" / folder
    place.mkdir(parents=True)
    (place / "flow.py").write_text(dedent(FLOW).format(flow=flow))
    (place / "helper.py").touch()
    # A module of this name here must not get between Prefect and its own imports.
    (place / "httpx.py").write_text("raise RuntimeError('the wrong httpx')")
    path = place / "prefect.yaml"
    path.write_text(dedent(file).format(folder=folder, pool=pool))
    return path


def run(root: Path, *options: str) -> int:
    """Deploy `root` as a worker host that has no release yet."""
    return deploy.main(["--root", str(root), *options])


def deploy_by_prefect(prefect_command: Callable[..., Any], file: Path) -> None:
    """Deploy a file with Prefect's own command; it leaves traces of what it imports."""
    path, modules = list(sys.path), set(sys.modules)
    command = [sys.executable, "-P", "-m", "prefect", "--no-prompt", "deploy", "--all"]
    with warnings.catch_warnings():
        # It says that an empty list of schedules will mean something else one day.
        warnings.simplefilter("ignore", FutureWarning)
        done = prefect_command([*command, "--prefect-file", file.name], cwd=file.parent)
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(file.parent)):
            del sys.modules[name]
    assert done.returncode == 0, done.stdout


def statuses(printed: str) -> dict[str, str]:
    """Return the status of each thing by its name, from what the program printed."""
    plan = json.loads(printed.splitlines()[-1])["plan"]
    return {item["name"]: item["status"] for item in plan}


def details(printed: str, name: str) -> list[str]:
    """Return the details of one thing, from what the program printed."""
    plan = json.loads(printed.splitlines()[-1])["plan"]
    (item,) = (item for item in plan if item["name"] == name)
    return item["details"]


def request(method: str, path: str, **body: Any) -> Any:
    """Ask the API, and return its answer."""

    async def ask() -> Any:
        async with get_client() as client:
            response = await client.request(method, path, json=body)  # type: ignore[arg-type]
            return response.json() if response.content else None

    return asyncio.run(ask())


def stored(name: str) -> dict[str, Any]:
    """Return a deployment as the API shows it."""
    flow, _, deployment = name.partition("/")
    return request("GET", f"/deployments/name/{flow}/{deployment}")


def remove_dhis2_servers(prefix: str) -> None:
    """Remove the servers whose names begin so: other tests look at all that are stored."""
    path = "/block_types/slug/dhis2-credentials/block_documents"
    for one in request("GET", path):
        if one["name"].startswith(prefix):
            request("DELETE", f"/block_documents/{one['id']}")


async def show_everything(client: PrefectClient) -> dict[str, Any]:
    """Return what the API shows of all that a deploy writes, but for times and most ids."""
    state = await read_state(client)
    return {
        "flows": sorted(state.flows),
        "ids": sorted(one["id"] for one in state.deployments.values()),
        "pools": {
            name: (pool.concurrency_limit, pool.type, pool.base_job_template)
            for name, pool in state.pools.items()
        },
        "queues": state.queues,
        "deployments": {
            name: plain(one) | {"triggers": plain(state.automations.get(one["id"], []))}
            for name, one in state.deployments.items()
        },
    }


def everything() -> dict[str, Any]:
    """Return that by itself."""

    async def ask() -> dict[str, Any]:
        async with get_client() as client:
            return await show_everything(client)

    return asyncio.run(ask())


# When and by whom something was written, and what the server and workers make of it.
BOOKKEEPING = {
    "id", "created", "updated", "created_by", "updated_by", "flow_id", "work_queue_id",
    "deployment_id", "last_polled", "status", "active_slots", "prefect.flow.id",
}  # fmt: skip


def plain(shown: Any) -> Any:
    """Drop ids, times and the order of what has none."""
    if isinstance(shown, dict):
        kept = {key: plain(value) for key, value in shown.items() if key not in BOOKKEEPING}
        # It is `deployment:<id>`.
        return {
            key: value for key, value in kept.items() if not str(value).startswith("deployment:")
        }
    if isinstance(shown, list):
        items = [plain(item) for item in shown]
        return sorted(items, key=lambda item: json.dumps(item, sort_keys=True))
    return shown
