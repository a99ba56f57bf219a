"""Secrets stay out of manifests."""

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, SecretStr

from prefect_fleet.manifests import redact
from prefect_fleet.manifests.redact import REDACTED


class Nested(BaseModel):
    user: str = "reader"
    pin: SecretStr = SecretStr("0815-4711")


@dataclass
class Connection:
    url: str
    password: str


class Colour(Enum):
    RED = "red"


@pytest.mark.parametrize(
    "name",
    ["password", "dbPassword", "API_KEY", "apiKey", "key", "accessToken", "client_secret", "PWD"],
)
def test_secret_names(name: str) -> None:
    assert redact.is_secret_name(name)


@pytest.mark.parametrize("name", ["keyboard", "monkey", "user", "authors", "tokenize", "passage"])
def test_other_names(name: str) -> None:
    assert not redact.is_secret_name(name)


def test_values_of_every_kind() -> None:
    value = {
        "nested": Nested(),
        "connection": Connection("http://me:s3cr3t@host/x", "s3cr3t"),
        "list": [{"token": "abc"}, (1, 2.5, None, True)],
        "secret": SecretStr("x"),
        "plain": SecretStr("x"),
        "credentials": {"user": "me", "password": "x", "secrets": {"a": "b"}},
        "auth": "me:x",
        "password": "",
        "when": datetime(2026, 3, 29, tzinfo=UTC),
        "where": Path("/x"),
        "colour": Colour.RED,
        "other": object(),
        "not a number": float("nan"),
    }
    assert redact.redact(value) == {
        "nested": {"user": "reader", "pin": REDACTED},
        "connection": {"url": f"http://me:{REDACTED}@host/x", "password": REDACTED},
        "list": [{"token": REDACTED}, [1, 2.5, None, True]],
        "secret": REDACTED,
        "plain": REDACTED,
        "credentials": {"user": "me", "password": REDACTED, "secrets": REDACTED},
        "auth": REDACTED,
        "password": "",
        "when": "2026-03-29T00:00:00+00:00",
        "where": "/x",
        "colour": "red",
        "other": "<object>",
        "not a number": "nan",
    }


def test_plain_strings_that_the_schema_calls_secret() -> None:
    class Outer(BaseModel):
        inner: Nested | None
        several: dict[str, Nested]
        pins: list[SecretStr]

    schema = Outer.model_json_schema(ref_template="#/definitions/{model}")
    schema["definitions"] = schema.pop("$defs")
    value = {
        "inner": {"user": "me", "pin": "1"},
        "several": {"a": {"user": "me", "pin": "2"}},
        "pins": ["3"],
    }
    assert redact.redact(value, schema) == {
        "inner": {"user": "me", "pin": REDACTED},
        "several": {"a": {"user": "me", "pin": REDACTED}},
        "pins": [REDACTED],
    }


def test_a_value_within_itself_ends() -> None:
    value: dict[str, Any] = {}
    value["again"] = value
    assert json.dumps(redact.redact(value)).count("again") < 20
    assert redact.find_secrets(value) == set()


def test_too_many_parameters_are_left_out_by_name() -> None:
    redacted = redact.redact_parameters({"rows": list(range(50_000)), "limit": 5}, {})
    assert redacted == {"rows": "<list, left out>", "limit": 5}


def test_long_texts_are_cut() -> None:
    redacted = redact.redact("x" * 10_000)
    assert redacted.startswith("xxx")
    assert redacted.endswith("… (10000 characters)")
    assert len(redacted) < 5_000


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("bad pässword/1 of me", "pässword/1"),
        ("at http://h/?p=p%C3%A4ssword%2F1", "p%C3%A4ssword%2F1"),
        (json.dumps("pässword/1"), "p\\u00e4ssword/1"),
        ("postgresql://me:hunter2@db/x", "hunter2"),
        ("Authorization: Bearer abcdefgh12", "abcdefgh12"),
        ('{"api_key": "abc"}', "abc"),
        ("login(password='hun ter2')", "hun ter2"),
        ("the pin 12 is wrong", "12 "),
    ],
)
def test_texts(text: str, hidden: str) -> None:
    scrubbed = redact.scrub(text, {"pässword/1", "12"})
    assert hidden not in scrubbed
    assert REDACTED in scrubbed


def test_short_secrets_do_not_eat_other_words() -> None:
    assert redact.scrub("12 of 120", {"12"}) == f"{REDACTED} of 120"


def test_secrets_among_the_variables_that_an_error_passed() -> None:
    def fail(block: Nested, key: str) -> None:
        token = "t0p-s3cret"  # noqa: F841
        raise ValueError(f"{block.pin.get_secret_value()} {key}")

    with pytest.raises(ValueError, match="4711") as caught:
        fail(Nested(), "plain-key")
    secrets = redact.find_secrets_of_traceback(caught.value)
    assert {"0815-4711", "t0p-s3cret"} <= secrets
    assert "plain-key" not in secrets
    text = redact.format_traceback(caught.value, secrets)
    assert f"ValueError: {REDACTED} plain-key" in text
    assert "t0p-s3cret" not in text


def test_long_tracebacks_keep_both_ends() -> None:
    text = redact.format_traceback(ValueError("x" * 100_000 + "end"), set())
    assert text.startswith("ValueError: xxx")
    assert text.endswith("end\n")
    assert len(text) < redact.TRACEBACK_LIMIT + 100
