"""Flows of all kinds, for a worker host whose runs start warm; each notes where it runs."""

import json
import os
import sys
import time
from pathlib import Path

from prefect import flow, get_run_logger, suspend_flow_run, task
from prefect.context import FlowRunContext
from prefect.task_runners import ProcessPoolTaskRunner, ThreadPoolTaskRunner

TOLD = Path("/var/lib/prefect/warm-tests")


def tell(**more):
    """Write who this is, by the run's id."""
    context = FlowRunContext.get()
    found = {
        "pid": os.getpid(),
        "parent": os.getppid(),
        "python": sys.version_info[:2],
        "folder": str(Path.cwd()),
        **more,
    }
    path = TOLD / f"{context.flow_run.id}.json"
    path.with_suffix(".part").write_text(json.dumps(found))
    path.with_suffix(".part").rename(path)


def note(kind):
    """Return a hook that leaves a file."""

    def hook(flow, flow_run, state):
        (TOLD / f"{flow_run.id}.{kind}").touch()

    return hook


@task(retries=1)
def double(number):
    tried = TOLD / f"{FlowRunContext.get().flow_run.id}.tried" if number == 3 else None
    if tried and not tried.exists():
        tried.touch()
        raise ValueError("the first time")
    return 2 * number


@task
def square(number):
    return number * number


@task
async def triple(number):
    return 3 * number


@flow
def inner(number):
    return square(number)


@flow(log_prints=True)
def talkative():
    tell()
    print("printed")
    get_run_logger().warning("logged")


@flow(task_runner=ThreadPoolTaskRunner(max_workers=2))
def threads():
    tell()
    assert [future.result() for future in double.map([1, 2, 3])] == [2, 4, 6]
    assert inner(4) == 16


@flow(task_runner=ProcessPoolTaskRunner(max_workers=2))
def processes():
    tell()
    assert [future.result() for future in square.map([1, 2])] == [1, 4]


@flow
async def asynchronous():
    tell()
    assert await triple(2) == 6
    assert inner(5) == 25


@flow
def generator():
    tell()
    yield 1
    yield 2


@flow
async def async_generator():
    tell()
    yield 1


@flow
def failing():
    tell()
    raise ValueError("on purpose")


@flow(timeout_seconds=1)
def slow():
    tell()
    time.sleep(60)


@flow(retries=1)
def retried():
    tell()
    if FlowRunContext.get().flow_run.run_count == 1:
        raise ValueError("the first time")


@flow
def suspended():
    tell()
    suspend_flow_run(timeout=300, key="once")


@flow(on_cancellation=[note("cancelled")], on_crashed=[note("crashed")])
def waiting(until: str):
    tell()
    while not Path(until).exists():
        time.sleep(0.2)
