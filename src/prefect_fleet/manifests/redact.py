"""Keep secrets out of manifests: by type, by JSON schema, by name, and in texts by value."""

import dataclasses
import enum
import json
import re
import traceback
from collections.abc import Iterator, Mapping
from datetime import date, datetime, time, timedelta
from pathlib import PurePath
from types import TracebackType
from typing import Any
from urllib.parse import quote
from uuid import UUID

import pydantic

REDACTED = "********"
# The longest text, the most parameters' JSON and the longest traceback that a manifest holds.
TEXT_LIMIT = 4_096
PARAMETERS_LIMIT = 65_536
TRACEBACK_LIMIT = 32_768

_SURE = {"password", "passwd", "pwd", "passphrase", "secret", "secrets", "token", "tokens"}
_LIKELY = _SURE | {"key", "keys", "apikey", "auth", "authorization", "credential", "credentials"}
_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
# Words without which a pattern can't match: it is compiled only for texts that may need it, since
# each run pays for that.
_PATTERNS = (
    # A password in an address.
    (("://",), r"(\w://[^\s/:@'\"]*:)[^\s/@'\"]+(?=@)"),
    (("bearer", "basic", "apitoken"), r"(?i)\b((?:bearer|basic|apitoken)\s+)[\w.~+/=-]{8,}"),
    # password=…, "api_key": "…"
    (
        ("passw", "passphrase", "secret", "token", "key"),
        r"(?i)((?:password|passwd|passphrase|secret|token|api_?key|access_?key)['\"]?\s*[:=]\s*)"
        r"(?:'[^']+'|\"[^\"]+\"|[^\s'\",;&(){}\[\]]+)",
    ),
)
_DEEPEST = 12
_MOST_OBJECTS = 20_000


def is_secret_name(name: object, words: set[str] = _LIKELY) -> bool:
    """Whether something of that name holds a secret: apiKey, db_password, ACCESS_TOKEN, …"""
    text = str(name)
    return any(word.lower() in words for word in _WORDS.findall(text)) or any(
        word in text.lower() for word in ("password", "passphrase", "secret", "apikey")
    )


def redact(value: Any, schema: Mapping[str, Any] | None = None) -> Any:
    """Return `value` as JSON has it, secrets replaced and texts cut.

    Args:
        value: anything.
        schema: JSON schema of the value with its `definitions`, where secrets have the format
            `password`: values that come from the API are plain strings.
    """
    schema = schema or {}
    return _redact(value, [schema], schema.get("definitions", {}), 0)


def redact_parameters(parameters: Mapping[str, Any], schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return a flow's parameters for the manifest; where they are too many, without values."""
    redacted: dict[str, Any] = redact(dict(parameters), schema)
    if len(json.dumps(redacted)) <= PARAMETERS_LIMIT:
        return redacted
    kinds = {name: f"<{type(value).__name__}, left out>" for name, value in redacted.items()}
    return {
        name: value if len(json.dumps(value)) <= TEXT_LIMIT else kinds[name]
        for name, value in list(redacted.items())[:500]
    }


def _redact(value: Any, schemas: list[Any], definitions: Mapping[str, Any], depth: int) -> Any:
    schemas = list(_resolve(schemas, definitions))
    if value is None or isinstance(value, bool):
        return value
    if any(one.get("format") == "password" or one.get("writeOnly") for one in schemas):
        return REDACTED
    if isinstance(value, int | float):
        return value if abs(value) < float("inf") else str(value)  # nan, too, is no JSON
    if isinstance(value, enum.Enum):
        return _redact(value.value, schemas, definitions, depth)
    if isinstance(value, str):
        return _cut(scrub(value), TEXT_LIMIT)
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, UUID | PurePath):
        return scrub(str(value))
    if depth > _DEEPEST:
        return f"<{type(value).__name__}>"
    if (mapping := _as_mapping(value)) is not None:
        return {
            str(name): REDACTED
            if _hides(name, item)
            else _redact(
                item,
                [
                    one.get("properties", {}).get(str(name), one.get("additionalProperties"))
                    for one in schemas
                ],
                definitions,
                depth + 1,
            )
            for name, item in mapping.items()
        }
    if isinstance(value, list | tuple | set | frozenset):
        items = [one.get("items") for one in schemas]
        return [_redact(item, items, definitions, depth + 1) for item in value]
    # Of a secret type, or of one whose repr might show one.
    return REDACTED if hasattr(value, "get_secret_value") else f"<{type(value).__name__}>"


def _resolve(schemas: list[Any], definitions: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The schemas, references and alternatives followed."""
    seen: set[str] = set()
    while schemas:
        schema, *schemas = schemas
        if not isinstance(schema, Mapping):
            continue
        yield schema
        reference = str(schema.get("$ref", "")).rpartition("/")[2]
        if reference and reference not in seen:
            seen.add(reference)
            schemas = [*schemas, definitions.get(reference)]
        for kind in ("anyOf", "allOf", "oneOf"):
            schemas = [*schemas, *schema.get(kind, [])]


def _hides(name: object, value: Any) -> bool:
    if value in (None, "") or isinstance(value, bool):
        return False
    # `credentials` and `auth` often hold a mapping in which only some entries are secret.
    return is_secret_name(name, _SURE if isinstance(value, Mapping) else _LIKELY)


def _as_mapping(value: Any) -> Mapping[Any, Any] | None:
    if isinstance(value, Mapping):
        return value
    if isinstance(value, pydantic.BaseModel):
        return dict(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {one.name: getattr(value, one.name, None) for one in dataclasses.fields(value)}
    return None


def find_secrets(*values: Any) -> set[str]:
    """Return every text in the values that is secret by its type or its name."""
    found: set[str] = set()
    _find(values, found, is_hidden=False, words=_LIKELY, budget=[_MOST_OBJECTS], depth=0)
    return found


def find_secrets_of_traceback(error: BaseException) -> set[str]:
    """Return the secrets among the local variables of the code that the error passed.

    That finds blocks and passwords which the flow has loaded itself. Variables named `key` don't
    count: too often they are keys of a mapping.
    """
    found: set[str] = set()
    budget = [_MOST_OBJECTS]
    for one in _chain(error):
        frames: TracebackType | None = one.__traceback__
        while frames is not None:
            module = str(frames.tb_frame.f_globals.get("__name__", ""))
            if module.partition(".")[0] != "prefect":
                local = dict(frames.tb_frame.f_locals)
                _find(local, found, is_hidden=False, words=_SURE, budget=budget, depth=0)
            frames = frames.tb_next
    return found


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    todo: list[BaseException | None] = [error]
    while todo:
        one = todo.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        todo += [one.__cause__, one.__context__]
        if isinstance(one, BaseExceptionGroup):
            todo += one.exceptions


def _find(
    value: Any, found: set[str], *, is_hidden: bool, words: set[str], budget: list[int], depth: int
) -> None:
    budget[0] -= 1
    if budget[0] < 0 or depth > _DEEPEST or value is None:
        return
    if callable(reveal := getattr(type(value), "get_secret_value", None)):
        value, is_hidden = reveal(value), True
    if isinstance(value, bytes) and is_hidden:
        value = value.decode(errors="replace")
    if isinstance(value, str):
        if is_hidden and value and set(value) != {"*"}:
            found.add(value)
        return
    if (mapping := _as_mapping(value)) is not None:
        for name, item in list(mapping.items()):
            hidden = is_hidden or is_secret_name(
                name, _SURE if _as_mapping(item) is not None else words
            )
            _find(item, found, is_hidden=hidden, words=words, budget=budget, depth=depth + 1)
    elif isinstance(value, list | tuple | set | frozenset):
        for item in list(value):
            _find(item, found, is_hidden=is_hidden, words=words, budget=budget, depth=depth + 1)


def scrub(text: str, secrets: set[str] = frozenset()) -> str:  # type: ignore[assignment]
    """Return the text without these secrets, however they are written, and without what looks
    like one."""
    forms: set[str] = set()
    for secret in secrets:
        forms |= {secret, quote(secret, safe=""), repr(secret)[1:-1], json.dumps(secret)[1:-1]}
    for form in sorted(forms, key=len, reverse=True):
        if len(form) >= 6:
            text = text.replace(form, REDACTED)
        else:  # short ones only as words of their own: else they would be found everywhere
            text = re.sub(rf"(?<!\w){re.escape(form)}(?!\w)", REDACTED, text)
    folded = text.lower()
    for words, pattern in _PATTERNS:
        if any(word in folded for word in words):
            text = re.sub(pattern, rf"\1{REDACTED}", text)
    return text


def format_traceback(error: BaseException, secrets: set[str]) -> str:
    """Return the traceback with these secrets replaced, its middle left out where it is long."""
    text = scrub("".join(traceback.format_exception(error)), secrets)
    if len(text) <= TRACEBACK_LIMIT:
        return text
    half = TRACEBACK_LIMIT // 2
    return f"{text[:half]}\n… {len(text) - 2 * half} characters left out …\n{text[-half:]}"


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text)} characters)"
