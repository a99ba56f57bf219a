"""A plan: what a deploy would do, to be read by people and by programs."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, TextIO

Kind = Literal["work pool", "block type", "block", "deployment"]
PlanStatus = Literal["new", "changed", "unchanged", "gone", "removed"]
SIGNS: dict[str, str] = {"new": "+", "changed": "~", "unchanged": "=", "gone": "?", "removed": "-"}


@dataclass
class Item:
    """One thing on the server.

    Attributes:
        kind: what it is.
        name: its name; `<flow>/<deployment>`, `<type>/<block>`.
        status: what becomes of it; `gone` is on the server, in no file, and stays.
        details: what changes, or is worth knowing, a line each. Holds no secret.
    """

    kind: Kind
    name: str
    status: PlanStatus
    details: list[str] = field(default_factory=list)

    @property
    def changes(self) -> bool:
        """Whether something is written."""
        return self.status in {"new", "changed", "removed"}


def count_changes(items: Iterable[Item]) -> int:
    """Return how many items are written."""
    return sum(item.changes for item in items)


def print_plan(items: list[Item], out: TextIO, *, nothing: str) -> None:
    """Print a line for each item that is not unchanged, its details below it.

    Args:
        items: the plan.
        out: where to.
        nothing: what to say where nothing is to do.
    """
    for item in items:
        if item.status == "unchanged" and not item.details:
            continue
        print(f"{SIGNS[item.status]} {item.kind} {item.name}: {item.status}", file=out)
        for detail in item.details:
            print(f"    {detail}", file=out)
    unchanged = sum(item.status == "unchanged" for item in items)
    gone = sum(item.status == "gone" for item in items)
    if not count_changes(items):
        print(nothing, file=out)
    if gone:
        print(f"{gone} gone from the files; --prune removes them", file=out)
    print(f"{unchanged} unchanged", file=out)


def to_json(items: list[Item]) -> str:
    """Return the plan in one line for programs."""
    plan = [
        {"kind": item.kind, "name": item.name, "status": item.status, "details": item.details}
        for item in items
    ]
    return json.dumps({"changes": count_changes(items), "plan": plan}, ensure_ascii=False)
