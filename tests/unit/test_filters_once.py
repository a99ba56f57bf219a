"""Ansible loads filters before a play, and not again in each of its processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.shared import REPOSITORY

# Writes down each time that it is loaded.
FILTERS = """
import pathlib
with pathlib.Path({log!r}).open("a") as log:
    log.write("loaded\\n")

class FilterModule:
    def filters(self):
        return {{{name!r}: lambda value: f"{name} {{value}}"}}
"""
LOG = "loaded.txt"


def write_filter(folder: Path, name: str, log: Path) -> None:
    """Put a filter into the place beside a playbook, or in a role, where Ansible finds it."""
    (folder / "filter_plugins").mkdir(parents=True)
    (folder / f"filter_plugins/{name}s.py").write_text(FILTERS.format(log=str(log), name=name))


def run_play(folder: Path, tasks: list[dict[str, object]], callbacks: Path) -> str:
    """Run tasks on three hosts that are this machine, and give back what Ansible printed."""
    play = {"hosts": "all", "connection": "local", "gather_facts": False, "tasks": tasks}
    (folder / "playbook.yml").write_text(json.dumps([play]))
    done = subprocess.run(
        [
            Path(sys.executable).parent / "ansible-playbook",
            *("-i", "a,b,c", folder / "playbook.yml"),
        ],
        env={
            **os.environ,
            "ANSIBLE_CONFIG": str(REPOSITORY / "ansible.cfg"),
            "ANSIBLE_CALLBACK_PLUGINS": str(callbacks),
            "ANSIBLE_ROLES_PATH": str(folder / "roles"),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("callbacks", "times"), [(REPOSITORY / "plugins/callback", 1), (Path("/nowhere"), 6)]
)
def test_filters_are_loaded_once_and_not_by_each_host_and_task(
    tmp_path: Path, callbacks: Path, times: int
):
    """Six times is what this is for: if it is less one day, the plugin can go."""
    write_filter(tmp_path, "marked", tmp_path / LOG)
    task = {"ansible.builtin.debug": {"msg": "{{ inventory_hostname | marked }}"}}
    printed = run_play(tmp_path, [task, task], callbacks)
    assert all(printed.count(f"marked {host}") == 2 for host in "abc")
    assert len((tmp_path / LOG).read_text().splitlines()) == times


def test_filters_of_a_role_that_comes_later_are_found(tmp_path: Path):
    write_filter(tmp_path / "roles/later", "late", tmp_path / LOG)
    (tmp_path / "roles/later/tasks").mkdir()
    task = {"ansible.builtin.debug": {"msg": "{{ inventory_hostname | late }}"}}
    (tmp_path / "roles/later/tasks/main.yml").write_text(json.dumps([task]))
    include = {"ansible.builtin.include_role": {"name": "later"}}
    printed = run_play(tmp_path, [include], REPOSITORY / "plugins/callback")
    assert all(f"late {host}" in printed for host in "abc")
