"""Run a flow's hooks for a run whose process has ended: `python -m prefect_operations.hooks KIND`.

KIND is `cancellation` or `crashed`; on stdin are the flow run and its state as JSON. Environment
and working directory are those that the run had. For a run that a command starts, Prefect 3.9.1
loads the flow into the worker's own process instead, and changes its working directory and modules.
"""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import anyio
from prefect.client.schemas.objects import FlowRun, State
from prefect.flows import load_flow_from_flow_run
from prefect.logging.handlers import APILogHandler
from prefect.logging.loggers import flow_run_logger
from prefect.runner._hook_runner import HookRunner


class HookProcess:
    """Runs the hooks of one run, each kind in a process of its own.

    Args:
        environment: the run's.
        folder: its working directory.
    """

    def __init__(self, environment: dict[str, str], folder: Path | str | None) -> None:
        self._environment = environment
        self._folder = folder

    async def run_cancellation_hooks(self, flow_run: FlowRun, state: State[Any]) -> None:
        """Run those for a run that is being cancelled."""
        if state.is_cancelling():
            await self._run("cancellation", flow_run, state)

    async def run_crashed_hooks(self, flow_run: FlowRun, state: State[Any]) -> None:
        """Run those for a run that has crashed."""
        if state.is_crashed():
            await self._run("crashed", flow_run, state)

    async def _run(self, kind: str, flow_run: FlowRun, state: State[Any]) -> None:
        given = {
            name: one.model_dump(mode="json")
            for name, one in (("flow_run", flow_run), ("state", state))
        }
        try:
            done = await anyio.run_process(
                [sys.executable, "-m", "prefect_operations.hooks", kind],
                input=json.dumps(given).encode(),
                env=self._environment,
                cwd=self._folder,
                stdout=None,
                stderr=None,
                check=False,
            )
            if done.returncode == 0:
                return
            why = f"their process ended with status {done.returncode}"
        except OSError as error:
            why = str(error)
        flow_run_logger(flow_run).warning("The hooks for %s were not run: %s", kind, why)


async def run(kind: str, given: dict[str, Any]) -> None:
    """Run the hooks of this kind, in this process."""
    flow_run = FlowRun.model_validate(given["flow_run"])
    state: State[Any] = State.model_validate(given["state"])
    runner = HookRunner(resolve_flow=load_flow_from_flow_run)
    hooks = {"cancellation": runner.run_cancellation_hooks, "crashed": runner.run_crashed_hooks}
    await hooks[kind](flow_run, state)
    await APILogHandler.aflush()


if __name__ == "__main__":
    asyncio.run(run(sys.argv[1], json.load(sys.stdin)))
