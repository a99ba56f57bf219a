"""Triggers of a deployment, which the server keeps as automations that the deployment owns.

The API does not show which automations a deployment owns, so a deploy keeps digests of the names
of those that it wrote.
"""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from prefect_fleet import stock

DIGEST_CHARACTERS = 12
COMPARED = (
    "name",
    "description",
    "enabled",
    "trigger",
    "actions",
    "actions_on_trigger",
    "actions_on_resolve",
)


def digest(name: str) -> str:
    """Return a short text for an automation's name."""
    return hashlib.sha256(name.encode()).hexdigest()[:DIGEST_CHARACTERS]


@dataclass(frozen=True)
class MergedTriggers:
    """What a deploy does to the triggers of a deployment.

    Attributes:
        bodies: the automations that it will have.
        stale: those of the server that go.
        details: what changes, a line each; empty for nothing.
        notes: what stays as it was set by hand, a line each.
    """

    bodies: list[dict[str, Any]]
    stale: list[dict[str, Any]] = field(default_factory=list)
    details: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def merge_triggers(
    deployment: str,
    deployment_id: str,
    stored: Iterable[dict[str, Any]],
    wanted: list[dict[str, Any]],
    says_enabled: list[bool],
    written: set[str],
) -> MergedTriggers:
    """Return what becomes of the automations that a deployment owns.

    Args:
        deployment: the deployment's own name.
        deployment_id: its id.
        stored: the automations of the server that run it, made by whomever.
        wanted: those of the file.
        says_enabled: for each of these, whether the file says if it is enabled.
        written: digests of the names of those that the last deploy wrote.
    """
    default_name = re.compile(re.escape(deployment) + r"__automation_\d+")
    names = {body["name"] for body in wanted}
    owned = {
        one["name"]: one
        for one in stored
        if one["name"] in names
        or digest(one["name"]) in written
        # That is how Prefect names them, if it was its own command that wrote them.
        or default_name.fullmatch(one["name"])
    }
    bodies: list[dict[str, Any]] = []
    details: list[str] = []
    notes: list[str] = []
    for body, says in zip(wanted, says_enabled, strict=True):
        body = with_id(body, deployment_id)
        old = owned.get(body["name"])
        if old is None:
            details.append(f"trigger {body['name']} is new")
        else:
            if not says and not old["enabled"]:
                body = body | {"enabled": False}
                notes.append(f"trigger disabled by hand, stays disabled: {body['name']}")
            changed = [key for key in COMPARED if _plain(old.get(key)) != _plain(body.get(key))]
            if changed:
                details.append(f"trigger {body['name']}: other {', '.join(changed)}")
        bodies.append(body)
    stale = [one for name, one in owned.items() if name not in names]
    details += [f"trigger {one['name']} is removed" for one in stale]
    return MergedTriggers(bodies, stale, details, notes)


def with_id(body: dict[str, Any], deployment_id: str) -> dict[str, Any]:
    """Return the body of an automation with the deployment's id where it was recorded without."""
    actions = [
        action | {"deployment_id": deployment_id}
        if action.get("deployment_id") == str(stock.NO_ID)
        else action
        for action in body["actions"]
    ]
    return body | {"actions": actions, "owner_resource": f"prefect.deployment.{deployment_id}"}


def _plain(value: Any) -> Any:
    """Drop ids, which the server gives, and the order of what is a set."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if key != "id"}
    if isinstance(value, list):
        if all(isinstance(item, str) for item in value):
            return sorted(value)
        return [_plain(item) for item in value]
    return value


def recreate(shown: dict[str, Any], old_id: str, new_id: str) -> dict[str, Any]:
    """Return the body that makes an automation of a deployment anew.

    Args:
        shown: the automation as the API showed it.
        old_id: what the deployment's id was then.
        new_id: what it is now.
    """
    body = {key: shown[key] for key in COMPARED if key in shown}
    actions = [
        action | {"deployment_id": new_id} if action.get("deployment_id") == old_id else action
        for action in shown["actions"]
    ]
    owner = f"prefect.deployment.{new_id}"
    return body | {"actions": actions, "tags": shown.get("tags") or [], "owner_resource": owner}
