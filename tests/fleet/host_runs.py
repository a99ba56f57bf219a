"""Flow runs that tests start on one worker host, and what is seen of them there."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId
from prefect.client.schemas.objects import State
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

from tests.fleet.conftest import Laptop, Site, connect, members

HOST = members("prefect_worker")[0]
POOL = "default"
UNIT = f"prefect-worker@{POOL}.service"
STOCK_COMMAND = "/opt/prefect/venv/bin/python -m prefect.engine"
_STEPS = "prefect.deployments.steps"
_WAIT_SECONDS = 300
_JOURNAL_LINES = 1500
T = TypeVar("T")


class HostRuns:
    """Runs of the flows of a file, on the host.

    The flows tell of themselves in a file of `told_in`, by the run's id, and those that wait do so
    until the file `until` is there.

    Attributes:
        folder: of the host, which the file of flows is copied to.
        told_in: folder of the host.
        until: file of the host.
    """

    def __init__(self, flows: Path, names: Iterable[str]) -> None:
        self._flows, self._names = flows, tuple(names)
        self._deployment = flows.stem.replace("_flows", "-tests")
        self._deployments: dict[str, UUID] = {}
        self.folder = f"/srv/{self._deployment}"
        self.told_in = f"/var/lib/prefect/{self._deployment}"
        self.until = f"{self.told_in}/finish"

    @contextlib.contextmanager
    def deployed(self, laptop: Laptop, site: Site) -> Iterator[None]:
        """Have the deployments, and what they run; both are removed afterwards."""
        host = connect(HOST)
        with temporary_settings({PREFECT_API_URL: laptop.url, PREFECT_API_AUTH_STRING: site.auth}):
            try:
                asyncio.run(self._remove())
                host.check_output(f"install -d {self.folder}")
                host.check_output(f"install -d -o prefect {self.told_in}")
                file = f"{self.folder}/{self._flows.name}"
                host.check_output("printf %%s %s > %s", self._flows.read_text(), file)
                self._deployments = asyncio.run(self._create())
                yield
            finally:
                self.finish()
                host.run(f"rm -r {self.folder} {self.told_in}")
                asyncio.run(self._remove())

    def ask(self, question: Callable[[PrefectClient], Awaitable[T]]) -> T:
        """Ask the API."""

        async def talk() -> T:
            async with get_client() as client:
                return await question(client)

        return asyncio.run(talk())

    def start(self, flow: str, variables: dict[str, Any] | None = None, **given: object) -> UUID:
        """Start a run with job variables and parameters, and return its id."""
        deployment = self._deployments[flow]
        return self.ask(
            lambda client: client.create_flow_run_from_deployment(
                deployment, parameters=given, job_variables=variables
            )
        ).id

    def state(self, run: UUID) -> State[Any]:
        """Return its state."""
        state = self.ask(lambda client: client.read_flow_run(run)).state
        assert state is not None
        return state

    def end(self, run: UUID) -> State[Any]:
        """Wait for its end, and return its state."""
        wait_until(lambda: self.state(run).is_final(), f"the end of {run}")
        return self.state(run)

    def told(self, run: UUID) -> dict[str, Any]:
        """Return what a run has told of itself."""
        path = f"{self.told_in}/{run}.json"
        wait_until(lambda: host_file(path), f"a word of {run}, {self.state(run)}")
        said: dict[str, Any] = json.loads(connect(HOST).check_output("cat %s", path))
        return said

    def messages(self, run: UUID) -> list[str]:
        """Return what stands in its log."""
        ours = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run]))
        return [log.message for log in self.ask(lambda client: client.read_logs(ours))]

    def finish(self) -> None:
        """Let those that wait go on."""
        connect(HOST).check_output(f"touch {self.until}")

    def let_wait(self) -> None:
        """Have those that are started from now on wait."""
        connect(HOST).check_output(f"rm -f {self.until}")

    async def _create(self) -> dict[str, UUID]:
        async with get_client() as client:
            return {
                flow: await client.create_deployment(
                    flow_id=await client.create_flow_from_name(flow.replace("_", "-")),
                    name=self._deployment,
                    work_pool_name=POOL,
                    entrypoint=f"{self._flows.name}:{flow}",
                    pull_steps=[{f"{_STEPS}.set_working_directory": {"directory": self.folder}}],
                    enforce_parameter_schema=False,
                )
                for flow in self._names
            }

    async def _remove(self) -> None:
        async with get_client() as client:
            for flow in self._names:
                with contextlib.suppress(ObjectNotFound):
                    name = f"{flow.replace('_', '-')}/{self._deployment}"
                    found = await client.read_deployment_by_name(name)
                    await client.delete_deployment(found.id)


def wait_until(true: Callable[[], object], what: str) -> None:
    """Wait until something is true."""
    deadline = time.monotonic() + _WAIT_SECONDS
    while not true():
        assert time.monotonic() < deadline, f"{what}: not in {_WAIT_SECONDS} s\n{journal()}"
        time.sleep(0.5)


def host_file(path: str) -> bool:
    """Return whether the host has a file."""
    return connect(HOST).run("test -e %s", path).rc == 0


def unit_group() -> str:
    """Return the control group of the worker's unit, as the kernel names it."""
    return connect(HOST).check_output(f"systemctl show -P ControlGroup {UNIT}")


def journal() -> str:
    """Return the last that the worker, its runs and their zygotes have said."""
    return connect(HOST).check_output(f"journalctl -u {UNIT} -n {_JOURNAL_LINES} -o cat")


def said_as_forked(run: UUID) -> bool:
    """Return whether a zygote has said how a run has ended."""
    return f"flow run {run}: ended" in journal()


def is_alive(pid: int) -> bool:
    """Return whether the host has a process, other than one that is only to be waited for."""
    return connect(HOST).run(f"grep -q '^State:[[:space:]]*[^Z]' /proc/{pid}/status").rc == 0


def kill_worker() -> None:
    """Kill the worker itself, and leave its end to systemd."""
    connect(HOST).check_output(f"systemctl kill --kill-whom=main -s KILL {UNIT}")
