"""Prefect's process worker, with an end that loses no runs.

Stock Prefect 3.9.1 kills its flow runs when it is stopped and leaves them `Running` for ever
(PrefectHQ/prefect issues 16746 and 22528). Everything here that relies on Prefect's internals is
named in `INTERNALS`; a test fails when one of them is no longer there. When Prefect drains by
itself, this module can go.

A run's process is whatever the pool's `command` starts. What is counted on is that the run has
ended when that process has: a command that hands the run to another process has to stay until
that one ends, to pass SIGTERM on to it, and to take it along when it is killed itself.
"""

import abc
import asyncio
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal, get_args
from uuid import UUID

import anyio
import anyio.abc
import httpx
import prefect.workers.process as process_worker
from prefect._internal.attempt_control import Intent
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import FlowRun, State
from prefect.exceptions import ObjectNotFound
from prefect.runner._control_channel import ControlSignalStatus
from prefect.runner._flow_run_executor import FlowRunExecutor, FlowRunExecutorContext
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings
from prefect.states import AwaitingRetry, Cancelled, Cancelling, Crashed
from prefect.workers.base import BaseWorker
from prefect.workers.process import ProcessJobConfiguration, ProcessWorker, ProcessWorkerResult

from prefect_operations.limits import Limits, RunJobConfiguration
from prefect_operations.lost_runs import close_children, close_lost, propose, read_open_runs
from prefect_operations.run_groups import ExplainingProposer, GroupedStarter, RunGroups

Then = Literal["reschedule", "crash", "cancel"]
THEN: tuple[Then, ...] = get_args(Then)

# What is overridden, called or replaced, by where it is.
INTERNALS: dict[Any, tuple[str, ...]] = {
    BaseWorker: (
        "_sync_and_initialize",
        "_submit_scheduled_flow_runs",
        "_submit_run",
        "_get_scheduled_flow_runs",
        "_release_limit_slot",
    ),
    process_worker: ("FlowRunExecutorContext",),
    FlowRunExecutorContext: ("create_executor",),
    FlowRunExecutor: ("submit",),
}
# Of a FlowRunExecutor.
EXECUTOR_INTERNALS = ("_hook_runner", "_state_proposer")

# What a run's process is told, so that it leaves its state to the worker.
_INTENTS: dict[Then, Intent] = {
    "reschedule": "reschedule",
    "crash": "relinquish",
    "cancel": "cancel",
}

# How long a run that was told to end may take to clean up; seconds.
GRACE_SECONDS = 10.0
# How long the worker may take after that to tell the server about it; seconds.
REPORT_SECONDS = 30.0


@dataclass(eq=False)
class Attempt:
    """A run that this worker has taken.

    Attributes:
        run: the flow run as it was then.
        scope: ends the worker's care for it, and kills its process if there is one.
        context: what Prefect holds of its process; None before it has one.
        executor: the same, for its hooks.
        limits: of what it may take.
        groups: makes its control group; None for a run without.
        starter: starts it in that.
        reported: set when the drain, which is ending the run, has told the server; None when
            nobody is ending it. What Prefect holds is kept until then.
        is_told: the server has the state that the drain gave it, or a better one.
        over_since: when the server was first seen to have it as ended, by the event loop's clock.
    """

    run: FlowRun
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    context: "DrainingContext | None" = None
    executor: FlowRunExecutor | None = None
    limits: Limits = field(default_factory=Limits)
    groups: RunGroups | None = None
    starter: GroupedStarter | None = None
    reported: anyio.Event | None = None
    is_told: bool = False
    over_since: float | None = None


_attempt: ContextVar[Attempt | None] = ContextVar("_attempt", default=None)


class DrainingContext(FlowRunExecutorContext):
    """Prefect's own, which the worker can find again by its run."""

    async def __aenter__(self) -> FlowRunExecutorContext:
        entered = await super().__aenter__()
        self._of = _attempt.get()
        if self._of:
            self._of.context = self
        return entered

    async def __aexit__(self, *error: Any) -> bool | None:
        # The hooks of a run need files that go with this.
        if self._of and self._of.reported:
            with anyio.CancelScope(shield=True):
                await self._of.reported.wait()
        return await super().__aexit__(*error)

    def create_executor(
        self, flow_run: FlowRun, starter: Any, *args: Any, **settings: Any
    ) -> FlowRunExecutor:
        attempt = _attempt.get()
        if attempt and attempt.groups:
            starter = attempt.starter = GroupedStarter(starter, attempt.groups, attempt.limits)
        executor = super().create_executor(flow_run, starter, *args, **settings)
        if attempt:
            attempt.executor = executor
            if attempt.starter:
                explain = attempt.starter.explain
                executor._state_proposer = ExplainingProposer(  # type: ignore[assignment]
                    executor._state_proposer, explain
                )
        return executor


# The process worker makes one for each run, by this name.
process_worker.FlowRunExecutorContext = DrainingContext  # type: ignore[misc]


# Among the bases so that Prefect's registry of worker types keeps its own class.
class DrainingWorker(ProcessWorker, abc.ABC):
    """Takes and runs flow runs as Prefect's does, until it is asked to drain."""

    job_configuration = RunJobConfiguration
    # Control groups of the runs; None for runs without.
    groups: RunGroups | None = None

    def __init__(self, *, work_pool_name: str, **settings: Any) -> None:
        super().__init__(work_pool_name=work_pool_name, **settings)
        self._attempts: set[Attempt] = set()
        self._is_draining = False
        self._is_away = False
        self._looking = asyncio.Lock()
        # Set when there may be runs to take before the next poll.
        self.may_have_runs = asyncio.Event()

    @classmethod
    def get_default_base_job_template(cls) -> dict[str, Any]:
        """Return Prefect's own, for a pool that was made without one.

        A deploy adds the limits: the server refuses variables of a configuration that a template
        does not describe.
        """
        return ProcessWorker.get_default_base_job_template()

    @property
    def in_hand(self) -> int:
        """How many runs this worker has taken and not finished."""
        return len(self._attempts)

    @property
    def pool_id(self) -> UUID | None:
        """Of its work pool; None until the server has told."""
        try:
            return self.work_pool.id
        except RuntimeError:
            return None

    # Prefect's loops give up, and the worker with all of its runs, after some failures in a row.

    async def get_and_submit_flow_runs(self) -> list[FlowRun]:
        """Look for runs, unless draining; a server that is away is waited for."""
        # One look at a time: two would be given the same runs.
        async with self._looking:
            if self._is_draining:
                return []
            return await self._patiently(super().get_and_submit_flow_runs) or []

    async def _sync_and_initialize(self) -> None:
        # The next beat is the retry, and comes sooner.
        with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 1}):
            await self._patiently(super()._sync_and_initialize)

    async def _patiently(self, work: Callable[[], Awaitable[Any]]) -> Any:
        try:
            done = await work()
        except httpx.HTTPStatusError as error:
            if error.response.status_code < 500:
                raise
            self._note_away(f"answers {error.response.status_code}")
        except httpx.TransportError as error:
            self._note_away(f"does not answer ({type(error).__name__})")
        else:
            if self._is_away:
                self._is_away = False
                self._logger.info("The Prefect API is back.")
            return done
        return None

    def _note_away(self, how: str) -> None:
        if not self._is_away:
            self._is_away = True
            self._logger.warning(
                "The Prefect API %s; %d runs go on, and it is tried again.", how, self.in_hand
            )

    async def _get_scheduled_flow_runs(self) -> Any:
        # As above; what is done about a run is retried as often as the settings say.
        with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 1}):
            return await super()._get_scheduled_flow_runs()

    async def _submit_scheduled_flow_runs(self, flow_run_response: Any) -> Any:
        # The drain may have begun while the server was asked.
        if self._is_draining:
            return []
        return await super()._submit_scheduled_flow_runs(flow_run_response)

    def _release_limit_slot(self, flow_run_id: UUID) -> None:
        was_full = self._limiter is not None and self._limiter.available_tokens == 0
        super()._release_limit_slot(flow_run_id)
        if was_full:
            self.may_have_runs.set()

    async def _submit_run(self, flow_run: FlowRun) -> None:
        """Take a run, as far as the start of its process."""
        attempt = Attempt(flow_run)
        self._attempts.add(attempt)
        _attempt.set(attempt)  # of this task, and of those that it starts
        handed_over = False
        try:
            with attempt.scope:
                await super()._submit_run(flow_run)
                handed_over = attempt.executor is not None
        finally:
            # From there on it is `run` that says when it has ended.
            if not handed_over:
                self._attempts.discard(attempt)

    async def run(
        self,
        flow_run: FlowRun,
        configuration: ProcessJobConfiguration,
        task_status: anyio.abc.TaskStatus[int] | None = None,
    ) -> ProcessWorkerResult:
        """Run it in a process, and return when that has ended."""
        attempt = _attempt.get()
        if attempt is None:  # it was submitted by code, not taken from the pool
            return await super().run(flow_run, configuration, task_status)
        attempt.groups = self.groups
        if isinstance(configuration, RunJobConfiguration):
            attempt.limits = configuration.limits
        try:
            with anyio.CancelScope() as attempt.scope:
                return await super().run(flow_run, configuration, task_status)
        finally:
            self._attempts.discard(attempt)
        return ProcessWorkerResult(status_code=0, identifier="ended by the worker")

    async def end_lingering(self, seconds: float, tell: Callable[[str], None]) -> None:
        """End processes whose runs have been over for so long; to be called now and then.

        A process waits at its end for each thread that is no daemon. One that is kept for ever
        holds its place under the worker's limit. Hooks, too, run after a run's end.

        Args:
            seconds: how long they may stay.
            tell: called with a sentence for each that is ended.
        """
        if self._is_draining:
            return
        attempts = {attempt.run.id: attempt for attempt in self._attempts if attempt.context}
        if not attempts:
            return
        ours = FlowRunFilter(id=FlowRunFilterId(any_=list(attempts)))
        now = asyncio.get_running_loop().time()
        for run in await self.client.read_flow_runs(flow_run_filter=ours):
            attempt = attempts[run.id]
            if run.state is None or not run.state.is_final():
                attempt.over_since = None
            elif attempt.over_since is None:
                attempt.over_since = now
            elif now - attempt.over_since >= seconds:
                tell(
                    f"Flow run {run.id} has been {run.state.name} for more than {seconds:g} s, and "
                    "its process was still there: it is ended"
                )
                await self._kill(attempt)

    async def close_left_over(self, before: Any, why: str) -> list[str]:
        """Mark the runs that an earlier process of this worker had and left without a word.

        Args:
            before: when this process began: what has changed since is not the earlier one's.
            why: for the state message.
        """
        with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 1}):  # the caller tries again
            runs = await read_open_runs(self.client, self._work_pool_name)
            left = [run for run in runs if run.worker == self.name and run.since < before]
            return await close_lost(self.client, left, why)

    async def drain(
        self,
        *,
        seconds: float,
        then: Then,
        hurry: asyncio.Event,
        tell: Callable[[str], None],
    ) -> None:
        """Take no more runs, wait for those in hand, and end what is left.

        Args:
            seconds: how long to wait.
            then: what becomes of runs that are running after that. Those that have not begun go
                back to the queue in any case.
            hurry: set to end the wait at once.
            tell: called with a sentence when there is something to say.
        """
        self._is_draining = True
        began = asyncio.get_running_loop().time()
        last: int | None = None
        while self._attempts:
            left = began + seconds - asyncio.get_running_loop().time()
            if hurry.is_set() or left <= 0:
                break
            if self.in_hand != last:
                last = self.in_hand
                tell(f"Draining: waiting up to {left:.0f} s for {_runs(last)}")
            with anyio.move_on_after(min(0.2, left)):
                await hurry.wait()
        if not self._attempts:
            tell("Drained: no run is left")
            return
        why = (
            f"Worker {self.name!r} was told to end at once."
            if hurry.is_set()
            else f"Worker {self.name!r} was stopped, and the run was not done {seconds:g} s later."
        )
        tell(f"Ending {_runs(self.in_hand)} ({then}): {why}")
        attempts = list(self._attempts)
        with anyio.move_on_after(GRACE_SECONDS + REPORT_SECONDS):
            async with anyio.create_task_group() as endings:
                for attempt in attempts:
                    endings.start_soon(self._end, attempt, then, why)
        untold = sum(not attempt.is_told for attempt in attempts)
        tell(
            f"Drained, but the server was not told of {_runs(untold)}: that is made up for when "
            "the worker starts again"
            if untold
            else "Drained: what was left has been ended"
        )

    async def _end(self, attempt: Attempt, then: Then, why: str) -> None:
        attempt.reported = anyio.Event()
        try:
            if attempt.executor is None or attempt.context is None:
                await self._give_back(attempt, why)
            else:
                await self._stop(attempt, then, why)
            attempt.is_told = True
        except Exception as error:
            self._logger.error("Flow run %s could not be ended: %s", attempt.run.id, error)
        finally:
            attempt.reported.set()

    async def _give_back(self, attempt: Attempt, why: str) -> None:
        """A run that has no process yet."""
        attempt.scope.cancel()
        run = await self.client.read_flow_run(attempt.run.id)
        if run.state is not None and run.state.is_pending():
            message = f"{why} The run had not begun."
            await propose(self.client, run.id, AwaitingRetry(message=message))

    async def _stop(self, attempt: Attempt, then: Then, why: str) -> None:
        """End a run's process, then set its state: the run itself says nothing any more."""
        run, context, executor = attempt.run, attempt.context, attempt.executor
        assert context is not None
        assert executor is not None
        status = await context.control_channel.signal(run.id, _INTENTS[then])
        if status is ControlSignalStatus.ALREADY_CONCLUDED:
            return  # it has just ended by itself
        if status is ControlSignalStatus.ACKNOWLEDGED:
            with anyio.move_on_after(GRACE_SECONDS):
                await context.process_manager.kill(run.id, grace_seconds=GRACE_SECONDS)
        await self._kill(attempt)
        try:
            now = await self.client.read_flow_run(run.id)
        except ObjectNotFound:
            return
        if now.state is None or now.state.is_final() or now.state.is_scheduled():
            return
        has_begun = not now.state.is_pending()
        state: State[Any]
        if then == "reschedule" or not has_begun:
            state = AwaitingRetry(message=why if has_begun else f"{why} The run had not begun.")
        else:
            state = Crashed(message=why) if then == "crash" else Cancelled(message=why)
        is_taken = await propose(self.client, run.id, state)
        attempt.is_told = True
        if not is_taken or not state.is_final():
            return
        await close_children(self.client, run.id, why)
        hooks = executor._hook_runner
        if state.is_crashed():
            await hooks.run_crashed_hooks(now, state)
        else:
            await hooks.run_cancellation_hooks(now, Cancelling(message=why))

    async def _kill(self, attempt: Attempt) -> None:
        """Make sure that a run's process is gone; the worker forgets the run."""
        context = attempt.context
        assert context is not None
        if attempt.run.id in context.process_manager.flow_run_ids():
            await context.process_manager.kill(attempt.run.id, force=True)
        # At once: else Prefect would see the exit status, and report a crash of its own.
        attempt.scope.cancel()


def _runs(count: int) -> str:
    return f"{count} run" if count == 1 else f"{count} runs"
