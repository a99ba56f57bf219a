"""The checksum over what a host runs and has."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from ansible.module_utils.testing import patch_module_args

from tests.unit.shared import load_by_path

fleet_state = load_by_path("roles/fleet/library/fleet_state.py")

SHOWN = """Id=tool.service
ActiveState=active
StateChangeTimestamp=Sun 2026-11-22 05:46:11.250000 UTC
InvocationID=0123

Id=often.service
ActiveState=active
StateChangeTimestamp=Sun 2026-11-22 05:46:12.250000 UTC
InvocationID=4567
"""
Ask = Callable[[], tuple[str, str]]


@pytest.fixture
def ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ask:
    """Return a function that runs the module; a program of ours says what systemctl would."""
    program = tmp_path / "bin/systemctl"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ncat {tmp_path}/shown\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    (tmp_path / "shown").write_text(SHOWN)
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/a").write_text("a")
    (tmp_path / "etc/link").symlink_to("a")

    def run() -> tuple[str, str]:
        given = {
            "units": ["tool.service", "often.service"],
            "except_units": ["often.service"],
            "paths": [f"{tmp_path}/etc/*", f"{tmp_path}/none/*"],
            "note": f"{tmp_path}/note",
        }
        with patch_module_args(given), pytest.raises(SystemExit):
            fleet_state.main()
        said = json.loads(capsys.readouterr().out)
        assert not said["changed"]
        return said["state"], said["note"]

    return run


def relink(link: Path, target: str) -> None:
    link.unlink()
    link.symlink_to(target)


CHANGES: dict[str, tuple[Callable[[Path], object], bool]] = {
    "nothing": (lambda _folder: None, False),
    "a service was started": (
        lambda folder: (folder / "shown").write_text(SHOWN.replace("0123", "89ab")),
        True,
    ),
    "a service was reloaded": (
        lambda folder: (folder / "shown").write_text(SHOWN.replace("11.25", "13.25")),
        True,
    ),
    "one that does not count was started": (
        lambda folder: (folder / "shown").write_text(SHOWN.replace("4567", "89ab")),
        False,
    ),
    "a file was written": (lambda folder: (folder / "etc/a").write_text("a"), True),
    "a file was opened": (lambda folder: (folder / "etc/a").chmod(0o666), True),
    "a file is new": (lambda folder: (folder / "etc/b").touch(), True),
    "a link leads elsewhere": (lambda folder: relink(folder / "etc/link", "b"), True),
    "something else was written": (lambda folder: (folder / "other").touch(), False),
}


@pytest.mark.parametrize("title", CHANGES)
def test_it_is_another_one_after_a_change(ask: Ask, tmp_path: Path, title: str):
    change, counts = CHANGES[title]
    before, _ = ask()
    change(tmp_path)
    assert (ask()[0] != before) == counts


def test_the_note_is_given_back(ask: Ask, tmp_path: Path):
    assert ask()[1] == ""
    (tmp_path / "note").write_text("as it was")
    assert ask()[1] == "as it was"
