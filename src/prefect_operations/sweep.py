"""Mark the runs of worker hosts that have died: `python -m prefect_operations.sweep`.

It runs beside the server. Every worker tells the server each half a minute that it lives. If one
has not for `--silent-seconds`, and neither has a run of its own, its processes are taken for gone,
and the run is marked. Prefect's own means, an automation on missing heartbeats, can't tell a dead
host from a server that was away itself: at its next start it would crash every run that goes on.
Here the time in which the server did not answer, or nobody looked, counts for nothing.

Exit status: 0 stopped, 2 wrong usage; while the API is away it waits.
"""

import argparse
import asyncio
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import httpx
from prefect.client.orchestration import PrefectClient, get_client
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from prefect_operations.lost_runs import OpenRun, close_lost, read_open_runs
from prefect_operations.notify import say, tell_systemd

Worker = tuple[str, str]  # names of its pool and of itself
# A pass that comes so many times later than it should means that nobody looked meanwhile: the
# machine was suspended, or far too busy to hear anybody.
_LATE = 3


@dataclass
class Watch:
    """Since when somebody has been listening, and to whom.

    Attributes:
        silent: how long a worker may say nothing.
        every: from one pass to the next.
        listening: since when the server has answered at every pass; None if it does not.
        passed: when the last pass was.
    """

    silent: timedelta
    every: timedelta
    listening: datetime | None = None
    passed: datetime | None = field(default=None)

    def begin_pass(self, now: datetime) -> None:
        """Note that somebody looks again."""
        if self.passed is None or now - self.passed > _LATE * self.every:
            self.listening = None
        self.passed = now

    def heard(self, now: datetime) -> None:
        """Note that the server has answered."""
        self.listening = self.listening or now

    def suspects(
        self, runs: list[OpenRun], beats: Mapping[Worker, datetime], now: datetime
    ) -> list[OpenRun]:
        """Return the runs whose worker has been silent for too long.

        A run that is about to begin and names no worker has one that ended between taking it and
        saying so; there the time counts from when it was taken.
        """
        if self.listening is None:
            return []
        found = []
        for run in runs:
            if run.pool is None or (run.worker is None and run.state != "PENDING"):
                continue  # started by hand
            heard = [self.listening, run.since]
            if run.worker is not None and (beat := beats.get((run.pool, run.worker))):
                heard.append(beat)
            if now - max(heard) >= self.silent:
                found.append(run)
        return found


async def read_beats(client: PrefectClient) -> dict[Worker, datetime]:
    """Return when each worker of a process pool was last heard."""
    beats = {}
    for pool in await client.read_work_pools():
        if pool.type != "process":
            continue
        for worker in await client.read_workers_for_work_pool(pool.name):
            if worker.last_heartbeat_time is not None:
                beats[pool.name, worker.name] = worker.last_heartbeat_time
    return beats


async def spoke_since(client: PrefectClient, run: OpenRun, since: datetime) -> bool:
    """Whether the run itself has sent an event, such as its own heartbeat, since then."""
    query = {
        "filter": {
            "occurred": {"since": since.isoformat()},
            "resource": {"id": [f"prefect.flow-run.{run.id}"]},
        },
        "limit": 1,
    }
    response = await client.request("POST", "/events/filter", json=query)  # type: ignore[arg-type]
    return bool(response.json()["events"])


async def sweep(client: PrefectClient, watch: Watch, now: Callable[[], datetime]) -> list[str]:
    """Make one pass; return what was done, a sentence each.

    Raises:
        httpx.HTTPError: the server does not answer, or refuses.
    """
    watch.begin_pass(now())
    try:
        runs = await read_open_runs(client)
        beats = await read_beats(client) if runs else {}
        watch.heard(now())
        done = []
        for run in watch.suspects(runs, beats, now()):
            if await spoke_since(client, run, now() - watch.silent):
                continue
            who = f"Worker {run.worker!r}" if run.worker else "The worker that had taken the run"
            seconds = int(watch.silent.total_seconds())
            why = f"{who} has not been heard for {seconds} s: its host is taken for dead."
            done += await close_lost(client, [run], why)
        return done
    except httpx.HTTPError:
        watch.listening = None
        raise


async def watch_for_ever(watch: Watch) -> None:
    """Pass after pass."""
    is_away = False
    with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}):  # the next pass is the retry
        async with get_client() as client:
            while True:
                try:
                    for line in await sweep(client, watch, lambda: datetime.now(UTC)):
                        say(f"Lost: {line}")
                    if is_away:
                        say("The Prefect API is back; silence counts from now on")
                    is_away = False
                except httpx.HTTPError as error:
                    if not is_away:
                        say(f"The Prefect API is away ({type(error).__name__}: {error})")
                    is_away = True
                await asyncio.sleep(watch.every.total_seconds())


async def serve(watch: Watch) -> None:
    """Watch until SIGTERM or SIGINT."""
    loop = asyncio.get_running_loop()
    watching = asyncio.create_task(watch_for_ever(watch))
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, watching.cancel)
    await asyncio.wait({watching})
    if not watching.cancelled():
        watching.result()


def main(argv: list[str] | None = None) -> int:
    """Watch, and say what was found."""
    parser = argparse.ArgumentParser(prog="python -m prefect_operations.sweep")
    parser.add_argument(
        "--silent-seconds", type=float, default=90, help="how long a living worker may say nothing"
    )
    parser.add_argument("--every-seconds", type=float, default=15, help="from one pass to the next")
    arguments = parser.parse_args(argv)
    if not 0 < arguments.every_seconds <= arguments.silent_seconds:
        parser.error("--silent-seconds must be no less than --every-seconds, and that above 0")
    watch = Watch(
        silent=timedelta(seconds=arguments.silent_seconds),
        every=timedelta(seconds=arguments.every_seconds),
    )
    tell_systemd("READY=1")
    say(f"Watching for workers that say nothing for {arguments.silent_seconds:g} s")
    asyncio.run(serve(watch))
    return 0


if __name__ == "__main__":
    sys.exit(main())
