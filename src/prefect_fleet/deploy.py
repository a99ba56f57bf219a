"""Deploy every prefect.yaml below a folder: `python -m prefect_fleet.deploy --root DIR [--check]`.

All files are checked before anything changes, the work pools against the API too, and all faults
are reported together on stderr as `path/prefect.yaml:LINE: deployment 'x': what is wrong; what to
write`. Then `prefect deploy --all` runs for each file, and the API is asked whether every
deployment is there and was written. What is on the server but in no file stays there.

The last line of stdout is
`{"deployments": [{"name": "flow/deployment", "status": "new|changed|unchanged"}]}`; with
`--check`, which changes nothing, the status is `new` or `existing`.
Exit status: 0 done, 1 faults, or not everything was deployed, 2 wrong usage.
"""

import argparse
import asyncio
import json
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from prefect.client.orchestration import PrefectClient, get_client
from prefect.exceptions import ObjectNotFound

from prefect_fleet.api import ApiError, Status, api_errors
from prefect_fleet.prefect_files import FILE_NAME, Deployment, Fault, PrefectFile, check_files

POOLS_PER_REQUEST = 200
# Build and push steps are part of a deploy and may take their time; a hanging one must end.
DEPLOY_TIMEOUT_SECONDS = 900
# What the API shows of a deployment that is no part of what was deployed: when and by whom it
# was written, what the server made of it, and what workers do to it.
BOOKKEEPING = {
    "id", "created", "updated", "created_by", "updated_by", "flow_id", "work_queue_id",
    "deployment_id", "last_polled", "status", "version_id", "version_info", "active_slots",
}  # fmt: skip


class DeployError(RuntimeError):
    """Prefect did not deploy what a file says."""


@dataclass(frozen=True)
class Snapshot:
    """A deployment as the API shows it: when it was written, and what it says."""

    updated: datetime
    content: dict[str, Any]


async def find_missing_pools(files: list[PrefectFile]) -> list[Fault]:
    """Return a fault for each deployment whose work pool the API does not have."""
    async with get_client() as client:
        pools = await _read_pool_names(client)
    known = ", ".join(sorted(pools)) or "none"
    return [
        Fault(
            file.shown,
            deployment.work_pool_line,
            deployment.name,
            f"there is no work pool {deployment.work_pool}; create it, or write one of: {known}",
        )
        for file in files
        for deployment in file.deployments
        if deployment.work_pool not in pools
    ]


async def _read_pool_names(client: PrefectClient) -> set[str]:
    names: set[str] = set()
    offset = 0
    while True:
        pools = await client.read_work_pools(limit=POOLS_PER_REQUEST, offset=offset)
        names |= {pool.name for pool in pools}
        offset += POOLS_PER_REQUEST
        if len(pools) < POOLS_PER_REQUEST:
            return names


async def take_snapshots(deployments: Iterable[Deployment]) -> dict[str, Snapshot]:
    """Return those of the deployments that the API has, by name."""
    snapshots: dict[str, Snapshot] = {}
    async with get_client() as client:
        for deployment in deployments:
            snapshot = await _take_snapshot(client, deployment)
            if snapshot is not None:
                snapshots[deployment.name] = snapshot
    return snapshots


async def _take_snapshot(client: PrefectClient, deployment: Deployment) -> Snapshot | None:
    try:
        found = await client.read_deployment_by_name(deployment.name)
    except ObjectNotFound:
        return None
    owner = f"prefect.deployment.{found.id}"
    content = _strip(found.model_dump(mode="json"))
    # Prefect 3.9.1 stores a missing description as "None" on the first deploy and as null later.
    if content["description"] == "None":
        content["description"] = None
    content["schedules"] = sorted(
        (_strip_schedule(one, deployment) for one in content["schedules"]), key=_sort_key
    )
    if content.get("global_concurrency_limit"):
        content["global_concurrency_limit"] = _strip(content["global_concurrency_limit"])
    # A file's triggers become automations that the deployment owns.
    content["triggers"] = sorted(
        (
            _strip_everywhere(automation.model_dump(mode="json"))
            for automation in await client.read_resource_related_automations(owner)
            if automation.owner_resource == owner
        ),
        key=_sort_key,
    )
    assert found.updated is not None, "the API states it for every deployment that it stores"
    return Snapshot(found.updated, content)


def _strip(shown: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in shown.items() if key not in BOOKKEEPING}


def _strip_everywhere(shown: Any) -> Any:
    if isinstance(shown, dict):
        return {key: _strip_everywhere(value) for key, value in _strip(shown).items()}
    if isinstance(shown, list):
        return [_strip_everywhere(item) for item in shown]
    return shown


def _strip_schedule(shown: dict[str, Any], deployment: Deployment) -> dict[str, Any]:
    """Drop the bookkeeping, and an anchor that is only the time of the deploy."""
    kept = _strip(shown)
    if deployment.has_floating_anchor:
        kept["schedule"] = {
            key: value for key, value in kept["schedule"].items() if key != "anchor_date"
        }
    return kept


def _sort_key(shown: dict[str, Any]) -> str:
    return json.dumps(shown, sort_keys=True)


def run_prefect_deploy(file: PrefectFile) -> str:
    """Run Prefect's own command for one file and return what it printed.

    It runs in the file's folder: Prefect resolves entrypoints against the current directory, also
    where `--prefect-file` names a file elsewhere. `-P` keeps that folder off `sys.path`, so that
    nothing in it can stand in for a module that Prefect imports.

    Raises:
        DeployError: it ended with another status than 0, or not in time.
    """
    command = [sys.executable, "-P", "-m", "prefect", "--no-prompt"]
    command += ["deploy", "--all", "--prefect-file", FILE_NAME]
    try:
        done = subprocess.run(
            command,
            cwd=file.path.parent,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=DEPLOY_TIMEOUT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise DeployError(
            f"{file.shown}: prefect deploy did not end within {DEPLOY_TIMEOUT_SECONDS} s"
        ) from error
    if done.returncode != 0:
        raise DeployError(
            f"{file.shown}: prefect deploy ended with status {done.returncode}:\n{done.stdout}"
        )
    return done.stdout


def deploy_file(file: PrefectFile) -> list[dict[str, str]]:
    """Deploy one file and return name and status of each of its deployments.

    Raises:
        DeployError: Prefect failed, or a deployment is not there or was not written afterwards.
    """
    before = asyncio.run(take_snapshots(file.deployments))
    output = run_prefect_deploy(file)
    after = asyncio.run(take_snapshots(file.deployments))
    lost = [
        deployment.name
        for deployment in file.deployments
        if deployment.name not in after
        or (
            deployment.name in before
            and after[deployment.name].updated <= before[deployment.name].updated
        )
    ]
    if lost:
        raise DeployError(
            f"{file.shown}: prefect deploy ended with status 0 and did not write "
            f"{', '.join(lost)}:\n{output}"
        )
    return [
        {"name": deployment.name, "status": _compare(deployment.name, before, after)}
        for deployment in file.deployments
    ]


def _compare(name: str, before: dict[str, Snapshot], after: dict[str, Snapshot]) -> Status:
    if name not in before:
        return "new"
    return "unchanged" if before[name].content == after[name].content else "changed"


def check(root: Path) -> tuple[list[PrefectFile], list[Fault]]:
    """Check all files below `root` by themselves and against the API.

    Raises:
        ApiError: the API can't be asked. The files' own faults are printed before.
    """
    files, faults = check_files(root)
    try:
        with api_errors():
            faults += asyncio.run(find_missing_pools(files))
    except ApiError:
        _print_faults(faults)
        raise
    return files, sorted(faults)


def _print_faults(faults: list[Fault]) -> None:
    for fault in faults:
        print(fault, file=sys.stderr)


def _check_statuses(files: list[PrefectFile]) -> list[dict[str, str]]:
    deployments = [deployment for file in files for deployment in file.deployments]
    found = asyncio.run(take_snapshots(deployments))
    return [
        {"name": deployment.name, "status": "existing" if deployment.name in found else "new"}
        for deployment in deployments
    ]


def _deploy_all(files: list[PrefectFile]) -> list[dict[str, str]]:
    statuses: list[dict[str, str]] = []
    for file in files:
        try:
            statuses += deploy_file(file)
        except DeployError as error:
            done = ", ".join(status["name"] for status in statuses) or "none"
            raise DeployError(f"{error}\ndeployed before it: {done}") from error
    return statuses


def main(arguments: list[str] | None = None) -> int:
    """Run the program; see the module's text."""
    parser = argparse.ArgumentParser(prog="python -m prefect_fleet.deploy", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--root", type=Path, required=True, help="folder with the files below it")
    parser.add_argument("--check", action="store_true", help="check everything, change nothing")
    options = parser.parse_args(arguments)
    root: Path = options.root.resolve()
    if not root.is_dir():
        parser.error(f"--root {options.root}: there is no such folder")
    try:
        files, faults = check(root)
        if faults:
            _print_faults(faults)
            print(f"{len(faults)} faults; nothing was deployed", file=sys.stderr)
            return 1
        with api_errors():
            statuses = _check_statuses(files) if options.check else _deploy_all(files)
    except (ApiError, DeployError) as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps({"deployments": statuses}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
