"""Give a worker's flow runs a warm start, where the release has `prefect_fleet.warm`.

The parent of the forked runs is a child of the worker: a unit of its own would have another /tmp,
in which a run's working directory is not. A run whose job variables have a command keeps that.
"""

import asyncio
import contextlib
import importlib.util
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from prefect.workers.process import ProcessJobConfiguration

from prefect_operations.notify import say

# From the end of a parent to the next try; seconds.
_RETRY_SECONDS = 5.0


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
        package = importlib.util.find_spec("prefect_fleet")
        folders = package.submodule_search_locations if package else None
        # By the path that was asked for: it leads through the link to the current release.
        client = Path(folders[0], "warm", "client.py") if folders else None
        if client is None or not client.is_file():
            return None
        stock = [sys.executable, "-m", "prefect.engine"]
        return shlex.join([sys.executable, "-I", "-S", str(client), str(self._socket), *stock])

    async def keep(self) -> None:
        """Keep a parent running until this is cancelled; its runs outlive it."""
        self._folder.mkdir(parents=True, exist_ok=True)
        command = ["-m", "prefect_fleet.warm.parent", "--pool", self._pool]
        command += ["--state", str(self._folder), "--socket", str(self._socket)]
        # Only the worker itself tells systemd how the unit is.
        environment = {key: value for key, value in os.environ.items() if key != "NOTIFY_SOCKET"}
        while True:
            parent = await asyncio.create_subprocess_exec(
                sys.executable, *command, stdin=asyncio.subprocess.DEVNULL, env=environment
            )
            try:
                status = await parent.wait()
            finally:
                with contextlib.suppress(ProcessLookupError):
                    parent.terminate()
            say(f"Runs start by the stock command: the parent of warm starts ended ({status})")
            await asyncio.sleep(_RETRY_SECONDS)


def configuration(warm: WarmStart) -> type[ProcessJobConfiguration]:
    """Return the job configuration of a worker whose runs start warm."""

    class WarmJobConfiguration(ProcessJobConfiguration):
        def prepare_for_flow_run(self, *args: Any, **settings: Any) -> None:
            if self.command is None:
                self.command = warm.command()
            super().prepare_for_flow_run(*args, **settings)

    return WarmJobConfiguration
