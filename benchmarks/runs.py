"""Runs of Ansible that are timed, for `benchmarks/converge`."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
PLAIN, MITOGEN = "plain", "mitogen"
_GRACE_SECONDS = 20  # for Ansible to end its own processes before they are killed
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_RECAP = re.compile(r"^(\S+)\s+: (ok=\d+\s+changed=\d+.*)$")
_TASK = re.compile(r"^(?:TASK|RUNNING HANDLER) \[(.*)\] \**$")
_CHANGED = re.compile(r"^changed: \[([^\]\s]+)")
_COST = re.compile(r"^(\S.*?) -+ (\d+\.\d+)s$")


class BenchmarkError(Exception):
    """What cannot be counted; the text says why, and where its output is."""


@dataclass(frozen=True)
class Run:
    """One run: its wall time and each task's, in seconds, and the recap by host."""

    seconds: float
    recap: dict[str, dict[str, int]]
    tasks: dict[str, float]


def parse_recap(output: str) -> dict[str, dict[str, int]]:
    """The counters of the play recap by host, such as `{"db1": {"ok": 12, "changed": 0, …}}`."""
    recap = {}
    for line in output.splitlines():
        if match := _RECAP.match(line):
            counters = (pair.split("=") for pair in match[2].split())
            recap[match[1]] = {name: int(count) for name, count in counters}
    return recap


def parse_task_costs(output: str) -> dict[str, float]:
    """Seconds by task from profile_tasks' summary; tasks of one name are added up."""
    costs: defaultdict[str, float] = defaultdict(float)
    _, found, summary = output.partition("\nTASKS RECAP ")
    for line in summary.splitlines() if found else ():
        if match := _COST.match(line):
            costs[match[1]] += float(match[2])
    return dict(costs)


def find_changes(output: str) -> list[str]:
    """`host: task` for each change that the output tells of, in its order."""
    changes, task = [], ""
    for line in output.splitlines():
        if match := _TASK.match(line):
            task = match[1]
        elif match := _CHANGED.match(line):
            changes.append(f"{match[1]}: {task}")
    return list(dict.fromkeys(changes))


def recap_faults(recap: dict[str, dict[str, int]], output: str, changing: bool | None) -> list[str]:
    """Why a run with this recap does not count; empty where it does.

    It counts if nothing went wrong, and if it changed something exactly if it is `changing`; with
    None it may.
    """
    if not recap:
        return ["there is no play recap in its output"]
    bad = ("unreachable", "failed", "rescued", "ignored")
    faults = [
        f"{host}: {counters[what]} {what}"
        for host, counters in recap.items()
        for what in (bad if changing is not False else ("changed", *bad))
        if counters.get(what)
    ]
    if changing and not any(counters.get("changed") for counters in recap.values()):
        faults.append("it changed nothing")
    return faults + (find_changes(output) if faults and changing is False else [])


def find_ansible() -> Path:
    """The ansible-playbook of .venv, else the one on PATH.

    Raises:
        BenchmarkError: there is none.
    """
    own = PROJECT / ".venv/bin/ansible-playbook"
    found = own if own.exists() else shutil.which("ansible-playbook")
    if not found:
        raise BenchmarkError("There is no ansible-playbook: run `make venv`.")
    return Path(found).absolute()


def python_of(ansible: Path) -> Path:
    """The Python that has Ansible's modules."""
    return ansible.resolve().parent / "python"


def ask_python(ansible: Path, expression: str, module: str) -> str:
    """What an expression over a module says in Ansible's own Python; empty without that module."""
    python = python_of(ansible)
    if not python.exists():
        return ""
    program = f"import {module}; print({expression})"
    done = subprocess.run([python, "-c", program], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def environment_of(mode: str) -> dict[str, str]:
    """The environment of a run: no colours, no progress, the tasks' times at the end."""
    environment = {
        **os.environ,
        "ANSIBLE_NOCOLOR": "1",
        "ANSIBLE_STDOUT_CALLBACK": "ansible.builtin.default",
        "ANSIBLE_CALLBACKS_ENABLED": "ansible.posix.profile_tasks",
        "PROFILE_TASKS_SUMMARY_ONLY": "true",
        "PROFILE_TASKS_TASK_OUTPUT_LIMIT": "all",
        "FLEET_MITOGEN": "1" if mode == MITOGEN else "0",
    }
    for name in ("ANSIBLE_FORCE_COLOR", "ANSIBLE_STRATEGY", "ANSIBLE_CALLBACK_PLUGINS"):
        environment.pop(name, None)
    return environment


def stop(process: subprocess.Popen[str]) -> None:
    """End a run and everything that it started."""
    for signal_number in (signal.SIGINT, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal_number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_SECONDS)
            return


def play(
    argv: list[str],
    environment: dict[str, str],
    log: Path,
    timeout: float,
    *,
    changing: bool | None,
) -> Run:
    """Run Ansible once, its output going to `log`.

    Raises:
        BenchmarkError: it failed, took longer than `timeout` seconds, or changed something although
            it is not `changing`, or nothing although it is.
    """
    started = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(
            argv,
            cwd=PROJECT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise BenchmarkError(f"It did not end within {timeout:g} s; see {log}") from None
        finally:
            if process.poll() is None:
                stop(process)
    seconds = time.monotonic() - started
    output = _COLOUR.sub("", log.read_text(errors="replace"))
    recap = parse_recap(output)
    faults = recap_faults(recap, output, changing)
    if status != 0:
        faults.insert(0, f"ansible-playbook ended with status {status}")
    if faults:
        told = "\n  ".join(faults)
        raise BenchmarkError(f"This run does not count:\n  {told}\nSee {log}")
    return Run(seconds, recap, parse_task_costs(output))
