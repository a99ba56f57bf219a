"""Say what differs between a deployment on the server and one of a file, without secrets.

What the server has may hold a secret that a template of an earlier release filled in, so its
texts are shown only where a secret can hardly be. A value that a template fills in now is never
shown.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

from prefect_fleet.stock import UNKNOWN

Keys = tuple[str | int, ...]
SECRET_NAME = re.compile(r"pass|secret|token|key|cred|auth|private|connection", re.IGNORECASE)
WITH_PASSWORD = re.compile(r"://[^/\s]*@")
# Values of these are shown as they were; below the others only texts of the file are.
PLAIN = {
    "version", "description", "paused", "tags", "work_pool_name", "work_queue_name", "path",
    "entrypoint", "enforce_parameter_schema", "concurrency_limit", "concurrency_options",
}  # fmt: skip
LONGEST = 60
ABSENT = object()


def differences(
    stored: dict[str, Any], wanted: dict[str, Any], hidden: Callable[[Keys], bool]
) -> tuple[list[str], list[str]]:
    """Return a line for each difference, and the names of what is not known yet.

    Args:
        stored: fields of the deployment on the server.
        wanted: the same fields as they will be.
        hidden: tells whether a value must not be shown.
    """
    lines: list[str] = []
    unknown: list[str] = []
    for name in wanted:
        if name == "parameter_openapi_schema":
            lines += _schema_difference(stored.get(name), wanted[name])
            continue
        for keys, old, new in _walk((name,), stored.get(name), wanted[name]):
            where = ".".join(str(key) for key in keys)
            if isinstance(new, str) and UNKNOWN in new:
                unknown.append(where)
            else:
                lines.append(f"{where}: {_change(keys, old, new, hidden)}")
    return lines, unknown


def _walk(keys: Keys, old: Any, new: Any) -> Iterator[tuple[Keys, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys(), key=str):
            yield from _walk((*keys, key), old.get(key, ABSENT), new.get(key, ABSENT))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, pair in enumerate(zip(old, new, strict=True)):
            yield from _walk((*keys, index), *pair)
    # True equals 1, but is another value.
    elif old != new or isinstance(old, bool) != isinstance(new, bool):
        yield keys, old, new


def _change(keys: Keys, old: Any, new: Any, hidden: Callable[[Keys], bool]) -> str:
    if new is ABSENT:
        return "removed"
    if hidden(keys):
        return "other value, filled in from a template"
    if any(SECRET_NAME.search(str(key)) for key in keys[1:]):
        return "other value"
    plain = keys[0] in PLAIN or keys[-1] == "directory" or not isinstance(old, str | list | dict)
    if old is ABSENT:
        return f"{_shown(new)} is new"
    return f"{_shown(old)} -> {_shown(new)}" if plain else f"now {_shown(new)}"


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return f"{{{', '.join(sorted(map(str, value)))}}}"
    if isinstance(value, list):
        return f"[{', '.join(_shown(item) for item in value)}]"
    text = WITH_PASSWORD.sub("://…@", " ".join(str(value).split()))
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def _schema_difference(old: Any, new: Any) -> Iterator[str]:
    if old == new:
        return
    before = (old or {}).get("properties") or {}
    after = (new or {}).get("properties") or {}
    said = [f"{name} is new" for name in after.keys() - before.keys()]
    said += [f"{name} is gone" for name in before.keys() - after.keys()]
    said += [
        f"{name} is other" for name in after.keys() & before.keys() if after[name] != before[name]
    ]
    yield f"the flow's parameters: {', '.join(sorted(said)) or 'other details'}"
