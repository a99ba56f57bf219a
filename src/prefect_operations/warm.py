"""Give a worker's flow runs a warm start, where the release has `prefect_fleet.warm`.

The parent of the forked runs is a child of the worker: a unit of its own would have another /tmp,
in which a run's working directory is not. A run whose job variables have a command keeps that.

What relies on Prefect's internals is named in `INTERNALS`; a test fails when one of them is no
longer there.
"""

import asyncio
import contextlib
import importlib.util
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import prefect.workers.process as process_worker
from prefect.client.schemas.objects import FlowRun
from prefect.runner._flow_run_executor import FlowRunExecutor
from prefect.runner._starter_engine import EngineCommandStarter
from prefect.settings import get_current_settings
from prefect.utilities.processutils import sanitize_subprocess_env

from prefect_operations.draining import DrainingContext
from prefect_operations.hooks import HookProcess
from prefect_operations.limits import RunJobConfiguration
from prefect_operations.notify import say

# From the end of a parent to the next try; seconds.
_RETRY_SECONDS = 5.0
# Of an EngineCommandStarter.
INTERNALS = ("_command", "_cwd", "_env", "_env_overrides_settings", "_isolate_process_group")
_CLIENT = Path("prefect_fleet", "warm", "client.py")
# Modules to import beforehand, in the folder of a release.
_LIST = "warm-imports.txt"


class WarmStart:
    """The warm start of one work pool's runs on this host.

    Args:
        pool: the work pool.
        folder: for its socket, and for what it learns.
    """

    def __init__(self, pool: str, folder: Path) -> None:
        self._pool = pool
        self._folder = folder
        self._socket = folder / f"{pool}.socket"

    def command(self) -> str | None:
        """Return what starts a run, or None if the release that is current has no warm starts."""
        source = _source()
        if source is None:
            return None
        stock = [sys.executable, "-m", "prefect.engine"]
        return shlex.join(
            [sys.executable, "-I", "-S", str(source / _CLIENT), str(self._socket), *stock]
        )

    async def keep(self) -> None:
        """Keep a parent running until this is cancelled; its runs outlive it."""
        while True:
            source = _source()
            if source is None:
                say("Runs start by the stock command: the release has no warm starts")
                while source is None:
                    await asyncio.sleep(_RETRY_SECONDS)
                    source = _source()
            status = await self._run_parent(source)
            if status:
                say(f"Runs start by the stock command: the parent of warm starts ended ({status})")
                await asyncio.sleep(_RETRY_SECONDS)

    async def _run_parent(self, source: Path) -> int:
        """Run a parent to its end; return its status, which is 0 when another is to follow."""
        command = ["-m", "prefect_fleet.warm.parent", "--pool", self._pool]
        command += ["--state", str(self._folder), "--socket", str(self._socket)]
        # The folder of the release has another name in each, so the kernel is to go there.
        command += ["--list", f"{source}/../{_LIST}", "--watch", str(source)]
        # Only the worker itself tells systemd how the unit is.
        environment = {key: value for key, value in os.environ.items() if key != "NOTIFY_SOCKET"}
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            parent = await asyncio.create_subprocess_exec(
                sys.executable,
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                env=environment,
                # Flows can write to the worker's own, and Python would import from there.
                cwd="/",
            )
        except OSError as error:
            say(f"Warm starts cannot begin: {error}")
            return 1
        try:
            return await parent.wait()
        finally:
            with contextlib.suppress(ProcessLookupError):
                parent.terminate()


def _source() -> Path | None:
    """Return the folder of the current release's packages, by the path that leads there.

    That path leads through the link to the release. None: it has no warm starts.
    """
    importlib.invalidate_caches()
    package = importlib.util.find_spec("prefect_fleet")
    folders = package.submodule_search_locations if package else None
    for folder in folders or ():
        if (source := Path(folder).parent).joinpath(_CLIENT).is_file():
            return source
    return None


def configuration(warm: WarmStart) -> type[RunJobConfiguration]:
    """Return the job configuration of a worker whose runs start warm."""

    class WarmJobConfiguration(RunJobConfiguration):
        def prepare_for_flow_run(self, *args: Any, **settings: Any) -> None:
            # What Prefect installs for a run is to be in a Python of its own.
            if self.command is None and not get_current_settings().runner.auto_install_dependencies:
                self.command = warm.command()
            super().prepare_for_flow_run(*args, **settings)

    return WarmJobConfiguration


class _Context(DrainingContext):
    """Starts a run that is forked as Prefect starts those without a command."""

    def create_executor(
        self, flow_run: FlowRun, starter: Any, *args: Any, **settings: Any
    ) -> FlowRunExecutor:
        if isinstance(starter, EngineCommandStarter) and str(_CLIENT) in (starter._command or ""):
            # The environment of a deployment goes before the worker's own settings, and a signal
            # to the worker's process group is not for the run.
            starter._env_overrides_settings = True
            starter._isolate_process_group = True
            mine = {"PREFECT__FLOW_RUN_ID": str(flow_run.id)}
            environment = sanitize_subprocess_env({**os.environ, **starter._env, **mine})
            settings.pop("resolve_flow", None)
            settings["hook_runner"] = HookProcess(environment, starter._cwd)
        return super().create_executor(flow_run, starter, *args, **settings)


# As in `draining`.
process_worker.FlowRunExecutorContext = _Context  # type: ignore[misc]
