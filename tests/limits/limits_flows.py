"""Flows that take much, and what they say of themselves: a file `<flow run>.json` in TOLD.

They are copied to the host; only Prefect is there besides.
"""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

from prefect import flow
from prefect.runtime import flow_run

from prefect_fleet.manifests import with_manifest

TOLD = Path(os.environ.get("LIMITS_TOLD", "/var/lib/prefect/limits-tests"))


def tell(**facts: object) -> None:
    """Say something of this run, all at once."""
    group = Path(os.environ["PREFECT_FLEET_GROUP"])
    draft = TOLD / f".{flow_run.id}"
    draft.write_text(json.dumps({"pid": os.getpid(), "group": str(group), **facts}))
    draft.rename(TOLD / f"{flow_run.id}.json")


def wait_for(path: str) -> None:
    """Wait until a file is there."""
    until = time.monotonic() + 600
    while not Path(path).exists():
        assert time.monotonic() < until, f"{path} did not come"
        time.sleep(0.1)


@with_manifest
@flow
def waits(until: str) -> None:
    """Wait until a file is there."""
    tell()
    wait_for(until)


@with_manifest
@flow
def eats(mebibytes: int) -> int:
    """Take memory in this process, and give it back."""
    tell()
    held = [os.urandom(1 << 20) for _ in range(mebibytes)]
    return len(held)


EATS = "import os, sys, time; held = [os.urandom(1 << 20) for _ in range(int(sys.argv[1]))]; "


@with_manifest
@flow
def eats_in_a_child(mebibytes: int) -> int:
    """Take memory in a process that this one waits for."""
    tell()
    return subprocess.run([sys.executable, "-c", EATS, str(mebibytes)], check=False).returncode


@with_manifest
@flow
def forks(threads: int) -> None:
    """Start threads until there are so many, or no more can be."""
    # Stacks count as the process's data, which has a limit of its own.
    threading.stack_size(1 << 18)
    begun: list[threading.Thread] = []
    enough = threading.Event()
    try:
        for _ in range(threads):
            one = threading.Thread(target=enough.wait)
            one.start()
            begun.append(one)
    finally:
        tell(begun=len(begun))
        enough.set()
        # The engine needs threads, too, to say how this has ended.
        for one in begun:
            one.join()


@with_manifest
@flow
def spins(seconds: float) -> None:
    """Take processor time."""
    until = time.process_time() + seconds
    while time.process_time() < until:
        pass
    stat = Path(os.environ["PREFECT_FLEET_GROUP"], "cpu.stat").read_text().split()
    tell(cpu=dict(zip(stat[::2], map(int, stat[1::2]), strict=True)))


@with_manifest
@flow
def leaves() -> None:
    """Leave a process behind, in a session of its own."""
    left = subprocess.Popen(
        ["sleep", "600"],
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    tell(left=left.pid)
