"""Storing DHIS2 servers as blocks."""

from pathlib import Path
from types import ModuleType

import pytest
import yaml
from prefect.settings import PREFECT_API_URL, temporary_settings

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
    assert "server number 5: name is missing" in printed.err
    assert "server no-user: username is missing; write both, or a token" in printed.err
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


def variables(monkeypatch: pytest.MonkeyPatch, **values: str) -> None:
    for name, value in values.items():
        monkeypatch.setenv(f"DHIS2_SERVERS__{name}", value)


def test_servers_of_variables(prefect_api: str, program, monkeypatch, last_json, capsys):
    variables(
        monkeypatch,
        PLAY_DEV__BASE_URL="https://x.org/dev",
        PLAY_DEV__TOKEN="0123",
        PLAY_DEV__RETRIES="2",
        PLAY_DEV__VERIFY_TLS="false",
        PLAY_DEV__TIMEOUT_SECONDS="1.5",
    )
    assert program.main([]) == 0
    assert statuses(last_json()) == [("play-dev", "new")]
    block = Dhis2Credentials.load("play-dev")
    assert block.token.get_secret_value() == "0123"
    assert (block.base_url, block.retries, block.verify_tls, block.timeout_seconds) == (
        "https://x.org/dev",
        2,
        False,
        1.5,
    )
    assert program.main([]) == 0
    assert statuses(last_json()) == [("play-dev", "unchanged")]
    Dhis2Credentials.delete("play-dev")
    variables(monkeypatch, BAD__TOKEN="s3cret-word", BAD__RETRIES="many", ODD="s3cret-word")
    variables(monkeypatch, BAD__URL="https://x.org")
    assert program.main(["--dry-run"]) == 1
    printed = capsys.readouterr()
    assert "server bad: base_url is missing; url is not known" in printed.err
    assert "retries is a str, not a int" in printed.err
    assert "server odd: base_url is missing; DHIS2_SERVERS__ODD is not known" in printed.err
    assert "s3cret-word" not in printed.err


def test_without_any_server_there_is_nothing_to_do(program, last_json, capsys):
    assert program.main([]) == 0
    printed = capsys.readouterr()
    assert "there is no server in DHIS2_SERVERS__… variables" in printed.err
    assert printed.out == '{"blocks": []}\n'


def test_a_dry_run_says_what_it_would_do(prefect_api: str, program, write, last_json, capsys):
    assert program.main([write([PLAY])]) == 0
    listed = write([PLAY | {"password": "other"}, SECOND])
    assert program.main([listed, "--dry-run"]) == 0
    assert statuses(last_json()) == [("play", "changed"), ("second", "new")]
    assert Dhis2Credentials.load("play").password.get_secret_value() == "s3cret-word"
    assert program.main([write([SECOND]), "--dry-run", "--prune"]) == 0
    printed = capsys.readouterr()
    assert "would delete, as not in the list: play\n" in printed.err
    assert Dhis2Credentials.load("play")
    with pytest.raises(ValueError, match="second"):
        Dhis2Credentials.load("second")
    Dhis2Credentials.delete("play")


def test_only_the_servers_that_are_named(prefect_api: str, program, write, last_json, capsys):
    listed = write([PLAY, SECOND, {"name": "bad"}])
    assert program.main([listed, "--only", "second"]) == 0
    assert statuses(last_json()) == [("second", "new")]
    Dhis2Credentials.delete("second")
    assert program.main([listed, "--only", "second", "--only", "third"]) == 1
    assert "--only third: not in the list; it has play, second, bad" in capsys.readouterr().err
    with pytest.raises(ValueError, match="second"):
        Dhis2Credentials.load("second")


def test_pruning_names_what_it_deletes_and_keeps_the_rest(
    prefect_api: str, program, write, last_json, capsys
):
    assert program.main([write([PLAY, SECOND])]) == 0
    Dhis2Credentials(base_url="https://y.org", token="x").save("by-hand")
    last_json()
    assert program.main([write([PLAY])]) == 0
    assert statuses(last_json()) == [("play", "unchanged")]
    assert program.main([write([PLAY, {"name": "bad"}]), "--prune"]) == 1
    assert "nothing was deleted" in capsys.readouterr().err
    assert program.main([write([]), "--prune"]) == 1
    assert "would delete every block" in capsys.readouterr().err
    for name in ("play", "second", "by-hand"):
        assert Dhis2Credentials.load(name)
    assert program.main([write([PLAY]), "--prune"]) == 0
    printed = capsys.readouterr()
    assert "deleting, as not in the list: by-hand, second\n" in printed.err
    assert statuses(yaml.safe_load(printed.out.splitlines()[-1])) == [
        ("play", "unchanged"),
        ("by-hand", "deleted"),
        ("second", "deleted"),
    ]
    for name in ("second", "by-hand"):
        with pytest.raises(ValueError, match=name):
            Dhis2Credentials.load(name)
    Dhis2Credentials.delete("play")


def test_pruning_a_part_of_the_list_is_wrong_usage(program, write):
    with pytest.raises(SystemExit) as raised:
        program.main([write([PLAY]), "--prune", "--only", "play"])
    assert raised.value.code == 2


def test_an_api_that_is_away_is_said_for_each_server(prefect_api, program, write, capsys):
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        assert program.main([write([PLAY])]) == 1
    assert "server play: the Prefect API at http://127.0.0.1:9/api does not answer" in (
        capsys.readouterr().err
    )
