"""Start a worker that drains when it is stopped: `python -m prefect_operations.worker`.

The first SIGTERM or SIGINT begins the drain: no run is taken any more, those in hand may finish
within `--drain-seconds`, and what is left then is ended as `--drain-then` says. The second one ends
the wait. Exit status: 0 stopped, 1 the worker failed, 2 wrong usage.
"""

import argparse
import asyncio
import contextlib
import os
import signal
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path

import anyio
import httpx
from prefect.settings import get_current_settings

from prefect_operations.draining import THEN, DrainingWorker
from prefect_operations.notify import say, tell_systemd
from prefect_operations.run_groups import RunGroups
from prefect_operations.waking import wake
from prefect_operations.warm import WarmStart, configuration

# From one try to clear up after an earlier process to the next; seconds.
_RETRY_SECONDS = 5.0
# From one look for processes that outlast their runs to the next; seconds.
_LOOK_SECONDS = 60.0
# How long a worker that has drained may take to part from the server; seconds. Prefect's own limits
# add up to minutes where that does not answer, in which the host would not reboot.
_PARTING_SECONDS = 10.0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return what the command line says; the options of `prefect worker start` keep their names."""
    parser = argparse.ArgumentParser(prog="python -m prefect_operations.worker")
    parser.add_argument("--pool", required=True, help="work pool")
    parser.add_argument("--name", required=True, help="name of the worker; no other may have it")
    parser.add_argument("--type", choices=["process"], default="process")
    parser.add_argument("--work-queue", action="append", help="queue of the pool; may be repeated")
    parser.add_argument("--limit", type=int, help="runs at a time")
    parser.add_argument("--with-healthcheck", action="store_true", help="answer /health")
    parser.add_argument(
        "--drain-seconds", type=float, default=60, help="how long runs may go on after a stop"
    )
    parser.add_argument(
        "--drain-then", choices=THEN, default="crash", help="what becomes of runs after that"
    )
    parser.add_argument(
        "--linger-seconds",
        type=float,
        default=600,
        help="how long a run's process may stay when the run has ended; 0: for ever",
    )
    parser.add_argument(
        "--warm-start", type=Path, metavar="FOLDER", help="fork runs; what that needs is here"
    )
    return parser.parse_args(argv)


async def serve(arguments: argparse.Namespace) -> None:
    """Run the worker until it has drained."""
    began = datetime.now(UTC)
    settings = get_current_settings()
    worker = DrainingWorker(
        work_pool_name=arguments.pool,
        name=arguments.name,
        work_queues=arguments.work_queue,
        limit=arguments.limit,
        create_pool_if_not_found=False,
        heartbeat_interval_seconds=int(settings.worker.heartbeat_seconds),
    )
    worker.groups = RunGroups.find()
    if worker.groups.why:
        say(f"Runs have no control groups of their own: {worker.groups.why}")
    warming = None
    if arguments.warm_start:
        warm = WarmStart(arguments.pool, arguments.warm_start)
        worker.job_configuration = configuration(warm)
        warming = asyncio.create_task(warm.keep())
    waking = asyncio.create_task(wake(worker, settings.worker.query_seconds))
    lingering = None
    if arguments.linger_seconds:
        lingering = asyncio.create_task(end_lingering(worker, arguments.linger_seconds))
    stop, hurry = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (hurry if stop.is_set() else stop).set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    serving = asyncio.create_task(
        worker.start(with_healthcheck=arguments.with_healthcheck, printer=say)
    )
    clearing = asyncio.create_task(clear_up(worker, began))
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
    clearing.cancel()
    if stop.is_set() and not serving.done():
        tell_systemd("STOPPING=1")
        await worker.drain(
            seconds=arguments.drain_seconds,
            then=arguments.drain_then,
            hurry=hurry,
            tell=say,
        )
        leave_within(_PARTING_SECONDS)
        serving.cancel()
    stopping.cancel()
    others = list(filter(None, (waking, warming, lingering)))
    for task in others:
        task.cancel()
    for task in others:
        with contextlib.suppress(asyncio.CancelledError):
            await task
    with contextlib.suppress(asyncio.CancelledError):
        await serving


def leave_within(seconds: float) -> None:
    """End this process after so many seconds, if it is still there; all that matters is done."""

    def leave() -> None:
        say("Stopped, without a word to the server, which does not answer")
        os._exit(0)

    timer = threading.Timer(seconds, leave)
    timer.daemon = True
    timer.start()


async def end_lingering(worker: DrainingWorker, seconds: float) -> None:
    """Look again and again for processes whose runs have been over for so long, and end them."""
    while True:
        await anyio.sleep(min(_LOOK_SECONDS, seconds))
        try:
            if worker.is_setup:
                await worker.end_lingering(seconds, say)
        except httpx.HTTPError:
            pass  # the worker itself says that the API is away
        except Exception as error:
            say(f"It could not be seen whether processes outlast their runs: {error}")


async def clear_up(worker: DrainingWorker, began: datetime) -> None:
    """Mark the runs that an earlier process of this worker, which was killed, has left behind.

    None of their processes lives: systemd kills all of a unit's before it starts the unit anew.
    """
    why = f"Worker {worker.name!r} had ended without a word before it was started again."
    while True:
        if worker.is_setup:
            try:
                for line in await worker.close_left_over(began, why):
                    say(f"Left over: {line}")
                return
            except httpx.HTTPError:
                pass  # the worker itself says that the API is away
        await anyio.sleep(0.2 if not worker.is_setup else _RETRY_SECONDS)


def main(argv: list[str] | None = None) -> int:
    """Run the worker, and say why it ended if it was not asked to."""
    arguments = parse(argv)
    try:
        asyncio.run(serve(arguments))
    except Exception as error:
        say(f"The worker failed: {type(error).__name__}: {error}")
        return 1
    say("Stopped")
    return 0


if __name__ == "__main__":
    sys.exit(main())
