"""Converges that are killed at random tasks, each going on where the last one ended.

Nothing waits and nothing is told, as when the laptop's lid is closed; the hosts may be in the
middle of a task and go on with it. The converge and idempotence steps after this one show that
nothing of it stays. Each scenario has seeds of its own; INTERRUPTIONS sets how many.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
from pathlib import Path

from lab.fleet import PROJECT, Fleet

CALLBACKS = Path(__file__).resolve().parent / "callback_plugins"
LONGEST_SECONDS = 3.0  # after a task's start; most take less
FLEET = Fleet.load(os.environ["LAB_FLEET"])


def tasks() -> int:
    """How many tasks the site has; those of included files count once."""
    argv = ["ansible-playbook", "-i", str(FLEET.inventory), "site.yml", "--list-tasks"]
    listed = subprocess.run(argv, cwd=PROJECT, capture_output=True, text=True, check=True).stdout
    return sum("TAGS:" in line for line in listed.splitlines() if not line.startswith("  play"))


def interrupt(task: int, seconds: float) -> subprocess.CompletedProcess[str]:
    """Converge, and be killed `seconds` after the start of the task of that number."""
    environment = {
        **os.environ,
        "ANSIBLE_CONFIG": str(PROJECT / "ansible.cfg"),
        # The project's own as well, as ansible.cfg has them.
        "ANSIBLE_CALLBACK_PLUGINS": f"{PROJECT / 'plugins/callback'}:{CALLBACKS}",
        "ANSIBLE_CALLBACKS_ENABLED": "interrupt",
        "ANSIBLE_NOCOLOR": "1",
        "INTERRUPT_TASK": str(task),
        "INTERRUPT_SECONDS": str(seconds),
    }
    return subprocess.run(
        ["ansible-playbook", "-i", str(FLEET.inventory), "site.yml"],
        cwd=PROJECT,
        env=environment,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def test_a_killed_converge_can_be_run_again() -> None:
    last = tasks()
    count = int(os.environ.get("INTERRUPTIONS", "5"))
    moments = []
    for number in range(count):
        chance = random.Random(f"{FLEET.name} {number}")
        moments.append((chance.randint(1, last), chance.uniform(0, LONGEST_SECONDS)))
    killed = 0
    for task, seconds in sorted(moments):
        print(f"to be killed {seconds:.1f} s after the start of task {task} of {last}")
        done = interrupt(task, seconds)
        # It may reach its end in the seconds before it is to be killed.
        assert done.returncode in (-signal.SIGKILL, 0), done.stdout
        killed += done.returncode != 0
    assert killed * 2 >= count, f"only {killed} of {count} converges were killed"
