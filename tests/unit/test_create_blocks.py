"""Storing DHIS2 servers as blocks."""

from pathlib import Path
from types import ModuleType

import pytest
import yaml

from prefect_dhis2 import Dhis2Credentials
from tests.unit.shared import load_by_path

PLAY = {"name": "play", "base_url": "https://x.org", "username": "u", "password": "s3cret-word"}
SECOND = PLAY | {"name": "second", "verify_tls": False}


@pytest.fixture(scope="module")
def program() -> ModuleType:
    return load_by_path("scripts/create_blocks.py")


@pytest.fixture
def write(tmp_path: Path):
    def write(entries: object, mode: int = 0o600) -> str:
        path = tmp_path / "servers.yaml"
        path.write_text(yaml.safe_dump(entries))
        path.chmod(mode)
        return str(path)

    return write


def statuses(said: dict) -> list[tuple[str, str]]:
    return [(block["name"], block["status"]) for block in said["blocks"]]


def test_blocks_are_made_changed_and_left_alone(prefect_api: str, program, write, last_json):
    assert program.main([write([PLAY, SECOND])]) == 0
    assert statuses(last_json()) == [("play", "new"), ("second", "new")]
    assert program.main([write([PLAY, SECOND | {"password": "other"}])]) == 0
    assert statuses(last_json()) == [("play", "unchanged"), ("second", "changed")]
    second = Dhis2Credentials.load("second")
    assert second.password.get_secret_value() == "other"
    assert second.verify_tls is False
    # Without verify_tls the default is back.
    assert program.main([write([PLAY | {"name": "second"}])]) == 0
    assert statuses(last_json()) == [("second", "changed")]
    assert Dhis2Credentials.load("second").verify_tls is True
    for name in ("play", "second"):
        Dhis2Credentials.delete(name)


def test_bad_entries_are_named_and_the_others_stored(prefect_api: str, program, write, capsys):
    entries = [
        PLAY | {"name": "bad-url", "base_url": "x.org"},
        PLAY | {"name": "Bad Name"},
        PLAY | {"name": "no-user", "username": ""},
        PLAY | {"name": "odd", "verify_tls": "no"},
        {"base_url": "https://x.org"},
        "text",
        PLAY,
        PLAY | {"username": "twice"},
    ]
    assert program.main([write(entries)]) == 1
    printed = capsys.readouterr()
    said = yaml.safe_load(printed.out.splitlines()[-1])
    assert statuses(said) == [
        ("bad-url", "failed"),
        ("Bad Name", "failed"),
        ("no-user", "failed"),
        ("odd", "failed"),
        ("number 5", "failed"),
        ("number 6", "failed"),
        ("play", "new"),
        ("play", "failed"),
    ]
    assert "server bad-url: base_url: " in printed.err
    assert "server odd: verify_tls is a str, not a bool" in printed.err
    assert "server number 5: name is missing; username is missing; password is missing" in (
        printed.err
    )
    assert "server play: is listed twice" in printed.err
    assert "s3cret-word" not in printed.err
    assert Dhis2Credentials.load("play").username == "u"
    Dhis2Credentials.delete("play")


@pytest.mark.parametrize(
    ("entries", "mode", "said"),
    [({}, 0o600, "is no list"), ([PLAY], 0o644, "chmod 600")],
)
def test_a_file_of_no_use_is_refused(program, write, capsys, entries, mode: int, said: str):
    assert program.main([write(entries, mode)]) == 1
    printed = capsys.readouterr()
    assert said in printed.err
    assert not printed.out
