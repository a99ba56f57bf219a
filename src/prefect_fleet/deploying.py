"""Check what is to be deployed, plan it and write it: the work of `prefect_fleet.deploy`."""

import argparse
import asyncio
import contextlib
import io
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefect.blocks.core import Block
from prefect.exceptions import PrefectHTTPStatusError

from prefect_fleet import stock
from prefect_fleet.api import ApiError, api_errors, block_data, new_client
from prefect_fleet.blocks import (
    BlockPlan,
    BlockWriter,
    import_block_classes,
    plan_blocks,
    write_blocks,
)
from prefect_fleet.deployments import (
    Change,
    Deployments,
    DeploymentWriter,
    Removal,
    StepError,
    has_steps,
)
from prefect_fleet.inputs import InputError, require_mapping
from prefect_fleet.journal import Journal, finish
from prefect_fleet.plan import Item, count_changes, print_plan, to_json
from prefect_fleet.pool_changes import PoolChange, plan_pools, write_pool
from prefect_fleet.pools import Pool, parse_pools
from prefect_fleet.prefect_files import Files, check_files
from prefect_fleet.server_state import ServerState, read_state

SETTINGS = {
    "work_pools": list,
    "block_modules": list,
    "result_storage": dict,
    "dhis2_servers": list,
    "environment": dict,
}
NOTHING = "nothing to do: the server has what the files say"


class UsageError(ValueError):
    """Options that don't fit; the message says what to give instead."""


class FaultsError(RuntimeError):
    """There are faults; `lines` say them, one each."""

    def __init__(self, lines: list[str]) -> None:
        number = "1 fault" if len(lines) == 1 else f"{len(lines)} faults"
        super().__init__(f"{number}; nothing was changed")
        self.lines = lines


class WriteError(RuntimeError):
    """A write failed; the message says what was put back and what could not be."""


@dataclass
class Settings:
    """What is deployed besides the files: pools, block classes, and blocks by type and name."""

    pools: list[Pool] = field(default_factory=list)
    classes: list[type[Block]] = field(default_factory=list)
    blocks: dict[tuple[str, str], Block] = field(default_factory=dict)

    def add(self, name: str, block: Block) -> None:
        """Add a block that is to be stored."""
        self.blocks[block.get_block_type_slug(), name] = block


@dataclass
class Plan:
    """All that a deploy does."""

    pools: list[PoolChange]
    blocks: BlockPlan
    changes: list[Change]
    removals: list[Removal]

    def items(self) -> list[Item]:
        """Return what it does to each thing."""
        parts = (self.pools, self.changes, self.removals)
        pools, changes, removals = ([one.item for one in part] for part in parts)
        return [*pools, *self.blocks.items, *changes, *removals]


def parse_settings(given: Any) -> tuple[Settings, list[str]]:
    """Return the settings, and what is wrong with them, without a value of theirs."""
    settings = Settings()
    try:
        require_mapping(given, required={}, optional=dict(SETTINGS))
    except InputError as error:
        return settings, [f"settings: {error}"]
    faults: list[str] = []

    @contextlib.contextmanager
    def collecting(part: str) -> Iterator[None]:
        try:
            yield
        except InputError as error:
            faults.extend(f"settings: {part}: {line}" for line in str(error).splitlines())

    with collecting("work_pools"):
        if given.get("work_pools"):
            settings.pools = parse_pools(given["work_pools"])
    with collecting("block_modules"):
        settings.classes = import_block_classes(given.get("block_modules") or [])
    with collecting("result_storage"):
        if given.get("result_storage"):
            from prefect_fleet.results import build_block

            name, block = build_block(given["result_storage"])
            settings.add(name, block)
    if given.get("dhis2_servers"):
        from prefect_dhis2.servers import build_blocks

        blocks, problems = build_blocks(given["dhis2_servers"])
        faults += [f"settings: dhis2_servers: {problem}" for problem in problems]
        for name, block in blocks.items():
            settings.add(name, block)
    return settings, faults


def export(given: Any) -> None:
    """Set the settings' variables: Prefect's templating reads this process's and no others."""
    environment = given.get("environment") if isinstance(given, dict) else None
    if isinstance(environment, dict):
        os.environ.update({str(name): str(value) for name, value in environment.items()})


async def make_plan(
    recorder: stock.Recorder,
    state: ServerState,
    files: Files,
    settings: Settings,
    faults: list[str],
    options: argparse.Namespace,
) -> Plan:
    """Return what the deploy does.

    Raises:
        FaultsError: something is wrong, with all that was found, `faults` among it.
        StepError: a build or push step failed; only without `--plan`.
    """
    pools: list[PoolChange] = []
    try:
        pools = plan_pools(settings.pools, state.pools, state.queues)
    except InputError as error:
        faults = [*faults, *(f"settings: work_pools: {line}" for line in str(error).splitlines())]
    blocks = await plan_blocks(recorder, settings.classes, settings.blocks)
    recorder.pools = state.pools | {one.pool.name: one.result() for one in pools}
    recorder.coming_blocks = {key: block_data(block) for key, block in blocks.blocks.items()}
    for change in pools:
        known = state.queues.setdefault(change.pool.name, {"default"})
        known.update(change.queues)
    project = options.project or files.project
    planner = Deployments(recorder, state, project, prune=options.prune)
    changes = [await planner.plan(entry, run_steps=False) for entry in files.entries]
    file_faults = sorted({*files.faults, *planner.faults})
    faults = [*faults, *(str(fault) for fault in file_faults)]
    if faults:
        raise FaultsError(faults)
    removals = planner.plan_gone(files.entries)
    if not options.plan:
        # Steps have effects of their own, so they run only when nothing else is in the way.
        for index, entry in enumerate(files.entries):
            if has_steps(entry):
                changes[index] = await planner.plan(entry, run_steps=True)
        if planner.faults:
            raise FaultsError([str(fault) for fault in planner.faults])
    return Plan(pools, blocks, [change for change in changes if change], removals)


async def write(client: BlockWriter, state: ServerState, plan: Plan) -> None:
    """Write what the plan says, or put everything back.

    Raises:
        WriteError: a write failed.
    """
    journal = Journal()
    try:
        for pool in plan.pools:
            if pool.item.changes:
                await write_pool(client, journal, pool)
        await write_blocks(client, journal, plan.blocks)
        writer = DeploymentWriter(client, journal, state)
        for change in plan.changes:
            if change.item.changes:
                await writer.write(change)
        await writer.remove([one for one in plan.removals if one.item.changes])
    except BaseException as error:
        left = await finish(journal.put_back())
        cause = "it was stopped" if isinstance(error, asyncio.CancelledError) else _said(error)
        text = f"{cause}; what was written before is put back"
        if left:
            lines = "".join(f"\n  {line}" for line in left)
            text = f"{cause}; put back but for this, which a new deploy mends:{lines}"
        raise WriteError(text) from error


def _said(error: BaseException) -> str:
    """Say why a write failed; what the API quotes of a request may hold secrets."""
    if isinstance(error, PrefectHTTPStatusError):
        request = error.request
        answer = error.response.status_code
        return f"the API answered {answer} to {request.method} {request.url.path}"
    return f"a write failed: {type(error).__name__}: {error}"


async def deploy(files: Files, given: Any, options: argparse.Namespace) -> Plan:
    """Plan, print the plan, and write it unless `--plan` is given.

    Raises:
        ApiError: the API can't be asked. Faults that need no API are printed before.
        FaultsError: something is wrong.
        StepError: a build or push step failed.
        WriteError: a write failed.
    """
    settings, faults = parse_settings(given)
    try:
        with api_errors():
            async with stock.recorder() as recorder:
                state = await read_state(recorder)
                plan = await make_plan(recorder, state, files, settings, faults, options)
    except ApiError:
        _print_lines([*faults, *(str(fault) for fault in files.faults)])
        raise
    items = plan.items()
    print_plan(items, sys.stdout, nothing=NOTHING)
    if not options.plan and count_changes(items):
        sys.stdout.flush()
        with api_errors():
            async with new_client(BlockWriter) as client:
                await write(client, state, plan)
    print(to_json(items))
    return plan


def _print_lines(lines: list[str]) -> None:
    for line in lines:
        print(line, file=sys.stderr)


async def _until_stopped(files: Files, given: Any, options: argparse.Namespace) -> Plan:
    """Take SIGTERM as Ctrl-C is taken, so that it puts back what is half written."""
    task = asyncio.current_task()
    assert task, "asyncio.run makes one"
    loop = asyncio.get_running_loop()
    # Only a program's main thread may; elsewhere nobody sends it signals.
    with contextlib.suppress(RuntimeError, ValueError):
        loop.add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        return await deploy(files, given, options)
    finally:
        with contextlib.suppress(RuntimeError, ValueError):
            loop.remove_signal_handler(signal.SIGTERM)


def carry_out(root: Path, given: Any, options: argparse.Namespace) -> tuple[int, str | None]:
    """Do what the options say; return the exit status, and what was said if that says it all.

    Args:
        root: the folder with the files.
        given: the settings.
        options: of `prefect_fleet.deploy`.

    Returns:
        The text is None where something was or is to be done: changes, or build and push steps.

    Raises:
        UsageError: the options don't fit the files.
    """
    try:
        export(given)
        files = check_files(root, options.home)
        if options.prune and not (options.project or files.project):
            raise UsageError("--prune: write name: in the root's prefect.yaml, or give --project")
        plan = asyncio.run(_until_stopped(files, given or {}, options))
    except FaultsError as error:
        _print_lines([*error.lines, str(error)])
        return 1, None
    except (ApiError, InputError, StepError, WriteError) as error:
        print(error, file=sys.stderr)
        return 1, None
    items = plan.items()
    if count_changes(items) or any(has_steps(entry) for entry in files.entries):
        return 0, None
    said = io.StringIO()
    print_plan(items, said, nothing=NOTHING)
    print(to_json(items), file=said)
    return 0, said.getvalue()
