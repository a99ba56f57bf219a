"""Have a worker look for runs the moment there may be one, instead of at its next poll.

The server tells over a websocket when a run of the pool becomes one to take; the worker itself
knows when one of its places gets free. Polls go on, and find what nobody told of: runs that fall
due.
"""

import asyncio

from prefect.events.clients import get_events_subscriber
from prefect.events.filters import EventAnyResourceFilter, EventFilter, EventNameFilter

from prefect_operations.draining import DrainingWorker
from prefect_operations.notify import say

# States in which a run is there to be taken, by their names.
_STATES = ("Scheduled", "AwaitingRetry", "AwaitingConcurrencySlot", "Resuming")
# From the end of a connection to the next try; seconds.
_RETRY_SECONDS = 5.0
# From a look that found nothing to the next: the server tells of a run a moment before it shows it.
_AGAIN_SECONDS = 0.25


async def wake(worker: DrainingWorker, longest: float) -> None:
    """Look for runs whenever there may be one, until this is cancelled.

    Args:
        worker: it is running, or about to.
        longest: seconds between two looks at the most while runs come that others take, so that
            many workers of one pool do not ask all the time.
    """
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(_listen(worker))
        tasks.create_task(_look(worker, longest))


async def _listen(worker: DrainingWorker) -> None:
    while worker.pool_id is None:
        await asyncio.sleep(_AGAIN_SECONDS)
    events = EventFilter(
        event=EventNameFilter(name=[f"prefect.flow-run.{name}" for name in _STATES]),
        any_resource=EventAnyResourceFilter(id=[f"prefect.work-pool.{worker.pool_id}"]),
    )
    is_told = True
    while True:
        try:
            async with get_events_subscriber(events, reconnect_on_clean_close=True) as told:
                is_told = True
                worker.may_have_runs.set()  # that came meanwhile
                async for _ in told:
                    worker.may_have_runs.set()
        except Exception as error:  # of the network, or what the server refuses
            if is_told:
                say(f"The server tells of no runs ({error}): they are found by polls alone")
            is_told = False
        await asyncio.sleep(_RETRY_SECONDS)


async def _look(worker: DrainingWorker, longest: float) -> None:
    pause = _AGAIN_SECONDS
    while True:
        await worker.may_have_runs.wait()
        worker.may_have_runs.clear()
        if await _take(worker):
            pause = _AGAIN_SECONDS
            continue
        await asyncio.sleep(pause)
        # Told again meanwhile, and still nothing: others take them.
        busy = worker.may_have_runs.is_set()
        found = await _take(worker)
        pause = min(2 * pause, longest) if busy and not found else _AGAIN_SECONDS


async def _take(worker: DrainingWorker) -> bool:
    try:
        return bool(await worker.get_and_submit_flow_runs())
    except Exception:
        return False  # the polls see it as well, and end the worker if it lasts
