"""The filter `fleet_variable_mistakes`: what an inventory sets that no role reads as it stands.

It looks at what the inventory says and at nothing else: `hostvars` holds no role's defaults.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml
from ansible.errors import AnsibleError
from ansible.module_utils.common.arg_spec import ArgumentSpecValidator

ROLES = Path(__file__).resolve().parents[2]
# Of role `fleet`: what the control node reads as well, so that it can't differ between hosts.
SHARED = ("inputs", "secrets")
_ALIKE = 0.85  # names this similar are one name and a slip of the pen
_UNSET = object()
# A value that hangs on what a converge finds out: when it is read, and when a part of it is.
_LATER = (AnsibleError, jinja2.UndefinedError)


def read_specs(roles: Path = ROLES) -> dict[str, dict[str, dict[str, Any]]]:
    """The options of every role's entry points: `{role: {entry point: {name: attributes}}}`."""
    return {
        path.parent.parent.name: {
            name: entry.get("options", {})
            for name, entry in yaml.safe_load(path.read_text())["argument_specs"].items()
        }
        for path in sorted(roles.glob("*/meta/argument_specs.yml"))
    }


def slip_mistakes(names: set[str], known: Mapping[str, Any], roles: Sequence[str]) -> list[str]:
    """Names that begin as a role's variables do, and are almost one of them."""
    mistakes = []
    for name in sorted(names - set(known)):
        if not any(name.startswith(f"{role}_") for role in roles):
            continue
        if meant := difflib.get_close_matches(name, known, n=1, cutoff=_ALIKE):
            mistakes.append(
                f"No role reads {name}: write {meant[0]}, or name it otherwise if it is your own."
            )
    return mistakes


def type_mistakes(name: str, attributes: Mapping[str, Any], value: Any) -> list[str]:
    """A value of another type than a role takes, or with keys that it doesn't know.

    Ansible's words quote a number or a truth value that is none, and no other value.
    """
    found = ArgumentSpecValidator({name: attributes}).validate({name: value}).error_messages
    # A wrong entry of a list is told twice, the second time with the option's name.
    told = [text for text in found if name in text] or found
    return [f"{name} is not what its role takes: {'; '.join(told).rstrip('.')}."] if told else []


def read_value(variables: Mapping[str, Any], name: str) -> Any:
    """The value of a variable, or `_UNSET` where it hangs on what a converge finds out later."""
    try:
        value = variables[name]
    except _LATER:
        return _UNSET
    return _UNSET if isinstance(value, jinja2.Undefined) else value


def plain(value: Any) -> Any:
    """A copy without Ansible's own lists and dicts, which carry all that templates could need.

    Ansible's check of a value makes copies of it, of which each would take all of that along.
    """
    if isinstance(value, Mapping):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return value


def value_mistakes(
    hosts: Mapping[str, Mapping[str, Any]], known: Mapping[str, Mapping[str, Any]]
) -> Iterator[tuple[str, str]]:
    """Each host with each mistake in a value of its variables."""
    # Most hosts have the value that the one before has.
    before: dict[str, tuple[Any, list[str]]] = {}
    for host, variables in hosts.items():
        for name in sorted(set(variables) & set(known)):
            if (value := read_value(variables, name)) is _UNSET:
                continue
            try:
                value = plain(value)
                if name not in before or before[name][0] != value:
                    before[name] = value, type_mistakes(name, known[name], value)
            except _LATER:
                continue
            for mistake in before[name][1]:
                yield mistake, host


def shared_mistakes(hosts: Mapping[str, Mapping[str, Any]], shared: Sequence[str]) -> list[str]:
    """Variables of the whole fleet that are not the same for all hosts."""
    mistakes = []
    for name in shared:
        values: list[Any] = []
        with contextlib.suppress(*_LATER):
            for variables in hosts.values():
                value = read_value(variables, name) if name in variables else _UNSET
                if value not in values:
                    values.append(value)
        if len(values) > 1:
            mistakes.append(
                f"{name} is not the same for all hosts: write it once, in group_vars/all."
            )
    return mistakes


def fleet_variable_mistakes(
    hostvars: Mapping[str, Mapping[str, Any]],
    groups: Mapping[str, Sequence[str]],
    specs: Mapping[str, Mapping[str, Mapping[str, Any]]] | None = None,
) -> list[str]:
    """All mistakes in the variables of an inventory, each with its fix, none with a secret.

    `specs` are those of this project's roles, unless others are given.
    """
    specs = read_specs() if specs is None else specs
    known: dict[str, Any] = {}
    for entry_points in specs.values():
        for options in entry_points.values():
            known |= options
    hosts = {name: hostvars[name] for name in groups.get("all", [])}
    names = {name for variables in hosts.values() for name in variables}
    mistakes = slip_mistakes(names, known, list(specs))
    where: dict[str, list[str]] = {}
    for mistake, host in value_mistakes(hosts, known):
        where.setdefault(mistake, []).append(host)
    for mistake, affected in where.items():
        only = "" if len(affected) == len(hosts) else f"{', '.join(affected)}: "
        mistakes.append(f"{only}{mistake}")
    fleet = specs.get("fleet", {})
    return mistakes + shared_mistakes(
        hosts, [name for entry in SHARED for name in fleet.get(entry, {})]
    )


class FilterModule:
    """Ansible's entry point."""

    def filters(self) -> dict[str, Any]:
        """The filters of this file by name."""
        return {"fleet_variable_mistakes": fleet_variable_mistakes}
