"""One role's Molecule scenario: what its steps have in common.

A scenario is a folder molecule/<role> beside a fleet of the same name:

- prepare.yml    what other roles have to do first (may be left out)
- converge.yml   the role, as a play of its users would have it
- steps.toml     what the common steps are to do (see `Steps`)
- tests/         what the role promises, seen from other hosts

`python -m lab.scenario down` is Molecule's destroy: of a scenario that failed it shows the journal
of the role's units first.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lab.fleet import PROJECT, Fleet
from lab.podman import LabError, ensure_tools

_JOURNAL_LINES = 60
_WRONG = "wrong"
"""Prefix of the inventory names under which a host is given wrong input."""

# What a dry run must leave alone: settings with their times, what is installed, where data lies,
# which services run and as which process. Ansible itself refreshes apt's lists in a dry run, and
# has folders of its own in the homes of those it becomes. Workers note when they like what their
# runs import, and a schedule may start a run at any time.
_FINGERPRINT = r"""
find /etc /usr/local /root/.ssh -xdev -printf '%p %M %u:%g %T@ %l\n'
find /opt /srv /home /var/lib -xdev -maxdepth 3 \
    \( -path /var/lib/apt -o -path /var/lib/prefect/warm -o \
        -path '/var/lib/prefect/manifests/*' -o -name .ansible \) -prune \
    -o -printf '%p %M %u:%g %l\n'
systemctl list-unit-files --no-legend --plain
sysctl net.ipv4.ip_nonlocal_bind
for unit in $(systemctl list-units --type=service --state=running --plain --no-legend |
    awk '$1 !~ /^(user@|systemd-)/ {print $1}'); do
    echo "$unit $(systemctl show --value --property=MainPID "$unit")"
done
"""


class ScenarioError(Exception):
    """A scenario's description is wrong, or Ansible could not be run; the text says how."""


@dataclass(frozen=True)
class Outcome:
    """What one run of Ansible did."""

    status: int
    changed: dict[str, list[str]]
    """Names of the tasks that changed something, by host, in order; a role's name is left out."""
    failures: dict[str, str]
    """The message of the task that failed, by host."""
    text: str = field(repr=False)
    """All that Ansible told, as JSON."""

    def explain(self) -> str:
        """What failed, or the end of what was said where no task did."""
        if self.failures:
            return "\n".join(f"{host}: {message}" for host, message in self.failures.items())
        return self.text[-3000:]


@dataclass(frozen=True)
class Steps:
    """steps.toml of a scenario.

    ```toml
    # Units whose journals are shown when the scenario fails.
    units = ["postgresql@17-main.service"]

    # Done to hosts by hand, and what a converge then changes: exactly that. An entry, a converge.
    [[drift]]
    title = "settings are edited"
    db1 = "echo 'port = 1' >> /etc/…"
    changed.db1 = ["Configure PostgreSQL", "Run PostgreSQL with what is configured"]

    # Variables that the role refuses on a host, and words of its message.
    [[wrong]]
    host = "db1"
    variables.postgres_port = "many"
    message = "postgres_port"

    # Why a step has nothing to do here, where it has not.
    [none]
    wrong = "…"
    ```
    """

    units: tuple[str, ...]
    drift: tuple[dict[str, Any], ...]
    wrong: tuple[dict[str, Any], ...]
    none: dict[str, str]

    @classmethod
    def read(cls, path: Path) -> Steps:
        """Read steps.toml.

        Raises:
            ScenarioError: it has a key too many, or a step neither has entries nor says why.
        """
        data = tomllib.loads(path.read_text())
        if unknown := data.keys() - {"units", "drift", "wrong", "none"}:
            raise ScenarioError(f"{path} has unknown keys: {', '.join(sorted(unknown))}")
        none = data.get("none", {})
        for step in ("drift", "wrong"):
            if bool(data.get(step)) == bool(none.get(step)):
                raise ScenarioError(
                    f"{path}: give either [[{step}]] entries or none.{step}, a reason"
                )
        return cls(
            tuple(data.get("units", ())),
            tuple(data.get("drift", ())),
            tuple(data.get("wrong", ())),
            none,
        )


@dataclass(frozen=True)
class Scenario:
    """The scenario of a role, on its fleet."""

    fleet: Fleet
    folder: Path
    steps: Steps

    @classmethod
    def load(cls, name: str) -> Scenario:
        """The scenario of that name.

        Raises:
            LabError: there is no such fleet.
            ScenarioError: its steps.toml is wrong.
        """
        folder = PROJECT / "molecule" / name
        return cls(Fleet.load(name), folder, Steps.read(folder / "steps.toml"))

    @property
    def passed(self) -> Path:
        """There, as long as the fleet is, once the last step has passed."""
        return self.fleet.state / "passed"

    def secrets(self) -> dict[str, str]:
        """The secrets of the fleet's inventory; of a key in PEM, its first line of base64."""
        path = self.fleet.inventory / "group_vars/all/secrets.yml"
        return {
            name: next(line for line in str(value).splitlines() if "-----" not in line)
            for name, value in yaml.safe_load(path.read_text()).items()
            if "certificate" not in name  # public
        }

    def converge(self, *arguments: str, inventory: Path | None = None) -> Outcome:
        """Apply the role again, by the settings that Molecule gave this step.

        Raises:
            ScenarioError: Ansible said nothing that can be read.
        """
        more = [f"--inventory={inventory}"] if inventory else []
        done = subprocess.run(
            [
                "ansible-playbook", f"--inventory={self.fleet.inventory}", *more,
                f"--extra-vars=fleet_project={PROJECT}", *arguments, self.folder / "converge.yml",
            ],
            cwd=PROJECT, capture_output=True, text=True, check=False,
            env={
                **os.environ,
                "ANSIBLE_STDOUT_CALLBACK": "ansible.posix.json",
                "ANSIBLE_ANY_ERRORS_FATAL": "false",
            },
        )  # fmt: skip
        # Warnings may come before the JSON.
        start = done.stdout.find("{\n")
        try:
            data = json.loads(done.stdout[start:])
        except ValueError as error:
            raise ScenarioError(f"ansible-playbook: {done.stdout}\n{done.stderr}") from error
        return Outcome(done.returncode, *_read(data), done.stdout)

    def fingerprint(self) -> dict[str, set[str]]:
        """What a dry run must not change, by host, a line a thing."""
        return {
            host.name: set(self.fleet.run(host.name, _FINGERPRINT, check=True).stdout.splitlines())
            for host in self.fleet.hosts
        }

    def refuse(self) -> dict[str, str]:
        """Give each wrong input to a host, all in one dry run; gives back what was said to each.

        The keys are the messages that steps.toml expects.

        Each case is one more name for its host in the inventory, with its wrong variables.
        """
        groups: dict[str, Any] = {}
        for number, case in enumerate(self.steps.wrong):
            host = self.fleet.host(case["host"])
            variables = {"ansible_host": str(host.address), **case["variables"]}
            for group in host.groups or ("ungrouped",):
                hosts = groups.setdefault(group, {"hosts": {}})["hosts"]
                hosts[f"{_WRONG}{number}"] = variables
        with tempfile.NamedTemporaryFile("w", suffix=".yml") as file:
            yaml.safe_dump({"all": {"children": groups}}, file)
            file.flush()
            outcome = self.converge(
                "--check", "--limit", f"{_WRONG}*:localhost:all", inventory=Path(file.name)
            )
        return {
            case["message"]: outcome.failures.get(f"{_WRONG}{number}", "was not refused")
            for number, case in enumerate(self.steps.wrong)
        }

    def journals(self) -> str:
        """The end of the journals of the role's units, from every host that has them."""
        parts = []
        for host in self.fleet.hosts:
            for unit in self.steps.units:
                said = self.fleet.run(
                    host.name,
                    f"systemctl cat '{unit}' >/dev/null 2>&1 &&"
                    f" journalctl --no-pager --lines={_JOURNAL_LINES} --unit='{unit}'",
                ).stdout.strip()
                if said:
                    parts.append(f"--- {host.name}: {unit}\n{said}")
        return "\n".join(parts)


def _read(data: dict[str, Any]) -> tuple[dict[str, list[str]], dict[str, str]]:
    """What changed and what failed, from Ansible's JSON."""
    changed: dict[str, list[str]] = {}
    failures: dict[str, str] = {}
    for task in (task for play in data["plays"] for task in play["tasks"]):
        name = task["task"]["name"].rpartition(" : ")[2]
        for host, result in task["hosts"].items():
            if result.get("failed") or result.get("unreachable"):
                failures[host] = _message(result)
            elif result.get("changed"):
                changed.setdefault(host, []).append(name)
    return changed, failures


def _message(result: dict[str, Any]) -> str:
    """Why a task failed; of a loop, why its items did."""
    items: Iterable[dict[str, Any]] = result.get("results", ())
    parts = [str(item["msg"]) for item in items if item.get("failed") and "msg" in item]
    parts += [
        str(result[key])
        for key in ("msg", "argument_errors", "stderr", "censored")
        if result.get(key)
    ]
    return "\n".join(parts)


def main() -> int:
    """`down`: show the journals of a failed scenario, then remove its hosts."""
    name = os.environ["LAB_FLEET"]
    try:
        ensure_tools()
        fleet = Fleet.load(name)
        if (PROJECT / "molecule" / name / "steps.toml").exists() and fleet.state.exists():
            scenario = Scenario.load(name)
            if not scenario.passed.exists():
                print(scenario.journals())
        fleet.down()
    except (LabError, ScenarioError) as error:
        print(f"lab: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
