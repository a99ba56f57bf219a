"""Plays run through mitogen where it can be imported and is not turned off, else as always."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.shared import REPOSITORY

# Tells who runs it, by the command line of its parent, which is the module's process, and on which
# processors.
SCRIPT = "tr '\\0' ' ' </proc/$PPID/cmdline; grep Cpus_allowed_list /proc/self/status"
TASK = {"ansible.builtin.command": {"argv": ["sh", "-c", SCRIPT]}}
PLAYS = [
    {
        "hosts": "localhost",
        "connection": "local",
        "gather_facts": False,
        "any_errors_fatal": False,
        "vars": {"ansible_python_interpreter": sys.executable},
        "tasks": [TASK],
        **strategy,
    }
    for strategy in (
        {},
        {"strategy": "ansible.builtin.free"},
        {"strategy": "ansible.builtin.host_pinned"},
    )
]


def run_plays(folder: Path, **environment: str) -> tuple[list[bool], str]:
    """Whether each of the plays ran through mitogen, and what Ansible said beside the results."""
    playbook = folder / "playbook.yml"
    playbook.write_text(json.dumps(PLAYS))
    done = subprocess.run(
        [Path(sys.executable).parent / "ansible-playbook", "-i", "localhost,", playbook],
        env={
            **{name: value for name, value in os.environ.items() if name != "FLEET_MITOGEN"},
            "ANSIBLE_CONFIG": str(REPOSITORY / "ansible.cfg"),
            "ANSIBLE_STDOUT_CALLBACK": "ansible.posix.json",
            **environment,
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said, brace, results = done.stdout.partition("{\n")
    tasks = [play["tasks"][-1] for play in json.loads(brace + results)["plays"]]
    runners = [task["hosts"]["localhost"]["stdout"] for task in tasks]
    assert all("python" in runner for runner in runners)
    # A local host that a task boots would never leave the one processor.
    (ours,) = re.findall("Cpus_allowed_list.*", Path("/proc/self/status").read_text())
    assert all(runner.endswith(ours) for runner in runners), runners
    return ["mitogen" in runner for runner in runners], said + done.stderr


def test_every_strategy_goes_through_mitogen_and_nothing_is_said_of_it(tmp_path: Path):
    through_mitogen, said = run_plays(tmp_path)
    assert through_mitogen == [True, True, True]
    assert "DEPRECAT" not in said
    assert "mitogen" not in said


def test_it_can_be_turned_off(tmp_path: Path):
    through_mitogen, said = run_plays(tmp_path, FLEET_MITOGEN="0")
    assert through_mitogen == [False, False, False]
    assert "DEPRECAT" not in said


@pytest.mark.parametrize(
    ("error", "warned"),
    [
        ("ModuleNotFoundError('no such module', name='ansible_mitogen')", False),
        ("ModuleNotFoundError('no such module', name='mitogen')", True),
        ("ImportError('this Ansible has no such class')", True),
    ],
    ids=["not installed", "half of it is installed", "does not fit"],
)
def test_without_it_plays_run_as_always(tmp_path: Path, error: str, warned: bool):
    package = tmp_path / "ansible_mitogen"
    package.mkdir()
    (package / "__init__.py").write_text(f"raise {error}\n")
    through_mitogen, said = run_plays(tmp_path, PYTHONPATH=str(tmp_path))
    assert through_mitogen == [False, False, False]
    assert ("mitogen cannot be used" in said) is warned
