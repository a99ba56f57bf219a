"""The filter `fleet_mistakes`: everything that is wrong with an inventory, each with its fix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key

SINGLE_GROUPS = ("postgres", "prefect_server", "rustfs")
POOL_TYPES = ("process",)
DRAIN_THEN = ("crash", "cancel", "reschedule")
SUPPORTED = ("Debian", "13")
AUTHORITY = ("fleet_ca_key", "fleet_ca_certificate")
MINIMUM_AUTHORITY_DAYS = 30  # that the authority's certificate must still be good for
ARCHITECTURES = ("x86_64", "aarch64")
MINIMUM_SECRET = 16  # characters
_MINIMUM_DISTINCT = 8  # different characters; fewer is a pattern, not a secret
_DEFAULTS = ("admin", "changeme", "default", "password", "postgres", "prefect", "rustfs", "secret")
_MAKE_SECRETS = "run: python scripts/make_secrets.py <your inventory>"


def group_mistakes(groups: Mapping[str, Sequence[str]]) -> list[str]:
    """Groups that are empty, or that have more hosts than their role can serve."""
    mistakes = []
    if not groups.get("all"):
        return [
            "The inventory names no host: give one with -i, or boot the local hosts first "
            "with: make lab"
        ]
    for group in (*SINGLE_GROUPS, "prefect_worker"):
        hosts = groups.get(group, [])
        if not hosts:
            mistakes.append(f"The group {group!r} is empty: put a host into it in the inventory.")
        elif group in SINGLE_GROUPS and len(hosts) > 1:
            mistakes.append(
                f"The group {group!r} has {len(hosts)} hosts ({', '.join(hosts)}): "
                "leave one in it; several are not supported."
            )
    if len(groups.get("headscale", [])) > 1:
        mistakes.append("The group 'headscale' has more than one host: leave one in it.")
    return mistakes


def host_mistakes(name: str, variables: Mapping[str, Any]) -> list[str]:
    """A host that cannot be reached, or whose system is not supported."""
    result = variables.get("__preflight_facts")
    if not result:
        return [f"{name} was not looked at: run without --limit, every host's address is needed."]
    facts = variables.get("ansible_facts") or {}
    # The task that gathers them never fails, so a refused sudo shows only in what is missing.
    if result.get("unreachable") or not facts.get("distribution"):
        said = " ".join(str(result.get("msg", "no answer")).split()).rstrip(".")
        address = variables.get("ansible_host", name)
        user = variables.get("ansible_user", "")
        target = f"{user}@{address}" if user else str(address)
        return [
            f"{name} cannot be used: {said}. Try `ssh {target} sudo true`, then mend ansible_host, "
            "ansible_user or the host itself."
        ]
    found = (facts.get("distribution"), str(facts.get("distribution_major_version")))
    if found != SUPPORTED:
        return [
            f"{name} runs {found[0]} {found[1]}: only {' '.join(SUPPORTED)} is supported; "
            "install that, or take the host out of the inventory."
        ]
    return []


def machine_mistakes(hosts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Names that lead to one machine, and machines of a kind that has no binaries.

    `hosts` has the variables of the hosts that were reached.
    """
    mistakes = []
    by_key: dict[str, list[str]] = {}
    architectures: dict[str, list[str]] = {}
    for name, variables in hosts.items():
        facts = variables.get("ansible_facts", {})
        if key := facts.get("machine_id"):
            by_key.setdefault(str(key), []).append(name)
        if architecture := facts.get("architecture"):
            architectures.setdefault(str(architecture), []).append(name)
    for names in by_key.values():
        if len(names) > 1:
            mistakes.append(
                f"{' and '.join(names)} are one machine: leave one of the names, in all of their "
                "groups. (Clones have one machine id too: `rm /etc/machine-id; "
                "systemd-machine-id-setup` and a reboot give a clone its own.)"
            )
    for architecture, names in architectures.items():
        if architecture not in ARCHITECTURES:
            mistakes.append(
                f"{', '.join(names)}: there are no binaries for {architecture}, only for "
                f"{' and '.join(ARCHITECTURES)}; take these hosts out of the inventory."
            )
    if len(architectures) > 1:
        found = "; ".join(f"{', '.join(names)}: {kind}" for kind, names in architectures.items())
        mistakes.append(f"The hosts are not of one architecture ({found}): use hosts of one.")
    return mistakes


def _is_pattern(text: str) -> bool:
    """Whether a text repeats few characters, or few steps between them as abcdef… and 1234… do."""
    for word in _DEFAULTS:
        text = text.replace(word, "")
    steps = {ord(after) - ord(before) for before, after in pairwise(text)}
    return min(len(set(text)), len(steps)) < _MINIMUM_DISTINCT


def secret_mistakes(secrets: Mapping[str, Any]) -> list[str]:
    """Secrets that are missing, that everybody knows, that are weak or that break a program."""
    mistakes = []
    for name, value in secrets.items():
        text = str(value or "")
        lowered = text.lower()
        if not text:
            mistakes.append(f"The secret {name} is missing: {_MAKE_SECRETS}")
        elif any(lowered.startswith(word) and len(text) < len(word) + 8 for word in _DEFAULTS):
            mistakes.append(
                f"The secret {name} is a well-known default: remove it and {_MAKE_SECRETS}"
            )
        elif len(text) < MINIMUM_SECRET or _is_pattern(lowered):
            mistakes.append(
                f"The secret {name} is weak: at least {MINIMUM_SECRET} characters, "
                f"{_MINIMUM_DISTINCT} of them different and no sequence; "
                f"remove it and {_MAKE_SECRETS}"
            )
        elif not text.isascii() or not text.isprintable() or set(text) & set(" '\"\\`"):
            # Prefect's server answers 500 to everyone over a non-ASCII auth string (3.9.1), and
            # quotes do not survive in an EnvironmentFile.
            mistakes.append(
                f"The secret {name} has a space, a quote, a backslash or a character outside "
                "ASCII: use letters, digits and other signs"
            )
    return mistakes


def authority_mistakes(key_text: str, certificate_text: str) -> list[str]:
    """What is wrong with the authority that signs the certificates of the fleet's services."""
    key_name, certificate_name = AUTHORITY
    for name, text in ((key_name, key_text), (certificate_name, certificate_text)):
        if not text:
            return [f"The secret {name} is missing: {_MAKE_SECRETS}"]
    anew = (
        f"restore it, or remove {' and '.join(AUTHORITY)} for a new authority and {_MAKE_SECRETS}"
    )
    try:
        certificate = x509.load_pem_x509_certificate(certificate_text.encode())
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    except (ValueError, x509.ExtensionNotFound):
        return [f"The secret {certificate_name} is no certificate of an authority: {anew}"]
    try:
        key = load_pem_private_key(key_text.encode(), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        return [f"The secret {key_name} is no private key in PEM without a password: {anew}"]
    if not constraints.value.ca:
        return [f"The secret {certificate_name} is no certificate of an authority: {anew}"]
    if key.public_key() != certificate.public_key():
        return [f"The secret {key_name} does not belong to {certificate_name}: {anew}"]
    left = (certificate.not_valid_after_utc - datetime.now(UTC)).days
    if left < MINIMUM_AUTHORITY_DAYS:
        ends = "has ended" if left < 0 else f"ends in {left} days"
        return [
            f"The authority in {certificate_name} {ends}: remove {' and '.join(AUTHORITY)} for a "
            f"new one and {_MAKE_SECRETS}"
        ]
    return []


def pool_mistakes(pools: Any) -> list[str]:
    """Work pools that have no name, a type that no worker here can serve, or that stand twice."""
    if not isinstance(pools, Sequence) or isinstance(pools, str) or not pools:
        return ["fleet_work_pools names no work pool: write [{name: default, type: process}]."]
    mistakes, seen = [], set()
    for number, pool in enumerate(pools, start=1):
        if not isinstance(pool, Mapping) or not pool.get("name"):
            mistakes.append(
                f"Entry {number} of fleet_work_pools has no name: "
                "write it as {name: default, type: process}."
            )
            continue
        name = pool["name"]
        if pool.get("type") not in POOL_TYPES:
            mistakes.append(
                f"The work pool {name!r} in fleet_work_pools has the type {pool.get('type')!r}: "
                f"write one of: {', '.join(POOL_TYPES)}"
            )
        if (then := pool.get("drain_then", DRAIN_THEN[0])) not in DRAIN_THEN:
            mistakes.append(
                f"The work pool {name!r} in fleet_work_pools has drain_then {then!r}: "
                f"write one of: {', '.join(DRAIN_THEN)}"
            )
        seconds = pool.get("drain_seconds", 0)
        if isinstance(seconds, bool) or not isinstance(seconds, int) or seconds < 0:
            mistakes.append(
                f"The work pool {name!r} in fleet_work_pools has drain_seconds {seconds!r}: "
                "write a whole number of seconds, such as 300."
            )
        if name in seen:
            mistakes.append(f"The work pool {name!r} stands twice in fleet_work_pools: remove one.")
        seen.add(name)
    return mistakes


def port_mistakes(
    ports: Mapping[str, Mapping[str, Any]], groups: Mapping[str, Sequence[str]]
) -> list[str]:
    """Services that would want one port of a host; `ports` by group and by variable."""
    mistakes: list[str] = []
    for name in groups.get("all", []):
        taken: dict[str, str] = {}
        for group, wanted in ports.items():
            for variable, port in wanted.items() if name in groups.get(group, []) else ():
                first = taken.setdefault(str(port), variable)
                mistake = f"{first} and {variable} are both {port}: write different ports."
                if first != variable and mistake not in mistakes:
                    mistakes.append(mistake)
    return mistakes


def interface_mistakes(interface: str, hosts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Hosts without the interface that everything is to bind to."""
    mistakes = []
    for name, variables in hosts.items():
        facts = variables.get("ansible_facts", {})
        found = facts.get("interfaces", [interface])
        if interface not in found:
            mistakes.append(
                f"{name} has no interface {interface}: it has {', '.join(sorted(found))}; "
                "set fleet_interface."
            )
    return mistakes


def tailnet_mistakes(
    uses_tailscale: bool, groups: Mapping[str, Sequence[str]], auth_keys: Sequence[str]
) -> list[str]:
    """A tailnet that hosts have no way into."""
    if not uses_tailscale or groups.get("headscale") or all(auth_keys):
        return []
    return [
        "The fleet uses Tailscale but has neither an auth key nor a headscale host: set "
        "tailscale_auth_key (a secret), or put a host into the group 'headscale', or set "
        "fleet_interface to a private network's interface."
    ]


def fleet_mistakes(
    hostvars: Mapping[str, Mapping[str, Any]],
    groups: Mapping[str, Sequence[str]],
    settings: Mapping[str, Any],
) -> list[str]:
    """All mistakes of an inventory, in the order in which a person would mend them.

    `settings` holds `uses_tailscale` (bool), `interface` (name), `work_pools` (list), `ports` (by
    group and variable) and `secrets` (names; their values are the same for every host, so the first
    one's are looked at).
    """
    hosts = groups.get("all", [])
    mistakes = group_mistakes(groups)
    if not hosts:
        return mistakes
    for name in hosts:
        mistakes += host_mistakes(name, hostvars[name])
    mistakes += machine_mistakes({name: hostvars[name] for name in hosts})
    if not settings["uses_tailscale"]:
        named = {name: hostvars[name] for name in hosts}
        mistakes += interface_mistakes(str(settings["interface"]), named)
    keys = [str(hostvars[name].get("tailscale_auth_key") or "") for name in hosts]
    mistakes += tailnet_mistakes(bool(settings["uses_tailscale"]), groups, keys)
    values = hostvars[hosts[0]]
    mistakes += secret_mistakes({name: values.get(name) for name in settings["secrets"]})
    mistakes += authority_mistakes(*(str(values.get(name) or "") for name in AUTHORITY))
    mistakes += pool_mistakes(settings["work_pools"])
    mistakes += port_mistakes(settings["ports"], groups)
    return mistakes


class FilterModule:
    """Ansible's entry point."""

    def filters(self) -> dict[str, Any]:
        """The filters of this file by name."""
        return {"fleet_mistakes": fleet_mistakes}
