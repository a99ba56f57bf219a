"""Manifests are written whole, by one writer at a time, and found again."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from prefect_fleet.manifests import host
from prefect_fleet.manifests.files import Care, Manifests, data_folder, replace_file
from prefect_fleet.manifests.host import is_alive, safe_name, this_process
from prefect_fleet.manifests.record import load
from tests.unit.shared import REPOSITORY

RUN = "0b1c2d3e-0000-4000-8000-000000000001"


@pytest.fixture
def manifests(tmp_path: Path) -> Manifests:
    return Manifests(tmp_path / "manifests")


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("dhis2_connection", "dhis2_connection"),
        ("My flow: äöü #1", "My-flow-äöü-1"),
        ("../../etc/passwd", "etc-passwd"),
        (".spool", "spool"),
        ("***", "flow"),
        ("ä" * 200, "ä" * 50),
    ],
)
def test_folder_names(name: str, folder: str) -> None:
    assert safe_name(name) == folder


def test_path_is_in_utc(manifests: Manifests) -> None:
    start = datetime(2026, 3, 29, 1, 30, 5, tzinfo=timezone(timedelta(hours=2)))
    assert manifests.path_of("a b", RUN, start) == f"2026-03-28/a-b/233005_{RUN}.json"


def test_data_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PREFECT_FLEET_DATA", str(tmp_path))
    assert data_folder() == tmp_path
    monkeypatch.delenv("PREFECT_FLEET_DATA")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert data_folder() == Path("/home/somebody/.local/share/prefect-fleet")


def test_paths_are_sorted_by_time_and_leave_out_what_is_no_manifest(manifests: Manifests) -> None:
    paths = [f"2026-01-01/z/000001_{RUN}.json", f"2026-01-01/a/000002_{RUN}.json"]
    paths.append(f"2026-01-02/a/000000_{RUN}.json")
    for path in reversed(paths):
        manifests.write(path, b"{}")
    manifests.set_care(RUN, Care(paths[0]))
    (manifests.root / paths[0]).with_name(f".{RUN}.json.12").touch()
    assert manifests.paths() == paths


def test_files_are_not_for_everybody(manifests: Manifests) -> None:
    manifests.write("2026-01-01/a/x_y.json", b"{}")
    assert (manifests.root / "2026-01-01/a/x_y.json").stat().st_mode & 0o777 == 0o640
    assert (manifests.root / "2026-01-01/a").stat().st_mode & 0o007 == 0


def test_a_failed_write_leaves_the_old_content_and_nothing_else(
    manifests: Manifests, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifests.write("2026-01-01/a/x_y.json", b"old")

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        manifests.write("2026-01-01/a/x_y.json", b"new")
    folder = manifests.root / "2026-01-01/a"
    assert [(file.name, file.read_bytes()) for file in folder.iterdir()] == [("x_y.json", b"old")]


def test_a_reader_never_sees_half_a_file_though_writers_are_killed(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    contents = {str(number).encode() * 400_000 for number in range(10)}
    replace_file(file, b"0" * 400_000)
    code = """
import sys, itertools
from pathlib import Path
from prefect_fleet.manifests.files import replace_file
print("ready", flush=True)
for number in itertools.cycle(range(10)):
    replace_file(Path(sys.argv[1]), str(number).encode() * 400_000)
"""
    for pause in (0.0, 0.003, 0.01, 0.02, 0.05):
        writer = subprocess.Popen(
            [sys.executable, "-c", code, str(file)],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY / "src")},
        )
        assert writer.stdout
        writer.stdout.readline()
        until = time.monotonic() + pause
        assert file.read_bytes() in contents
        while time.monotonic() < until:
            assert file.read_bytes() in contents
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
        assert file.read_bytes() in contents


def test_writers_take_turns(manifests: Manifests) -> None:
    path = "2026-01-01/a/x_y.json"
    with manifests.locked(path) as first:
        assert first
        with manifests.locked(path, seconds=0.05) as second:
            assert not second
        with manifests.locked("2026-01-01/b/x_y.json", seconds=0.05) as other:
            assert other
    with manifests.locked(path, seconds=0.05) as again:
        assert again


def test_remove_takes_what_killed_writers_have_left(manifests: Manifests) -> None:
    manifests.write("2026-01-01/a/x_y.json", b"{}")
    (manifests.root / "2026-01-01/a/.x_y.json.123").touch()
    manifests.remove("2026-01-01/a/x_y.json")
    assert not (manifests.root / "2026-01-01").exists()


def test_care_is_remembered(manifests: Manifests) -> None:
    assert manifests.care_of(RUN) is None
    assert manifests.cared_for() == []
    care = Care("2026-01-01/a/x.json", uploaded="abc", gone_since=5.0)
    manifests.set_care(RUN, care)
    assert manifests.care_of(RUN) == care
    assert manifests.cared_for() == [RUN]
    manifests.set_care(RUN, None)
    assert manifests.care_of(RUN) is None


def test_this_process_is_alive() -> None:
    assert is_alive(this_process(1))


def test_a_later_process_of_the_same_number_is_not_that_process() -> None:
    process = this_process(1)
    assert process.start_ticks
    assert not is_alive(replace(process, start_ticks=process.start_ticks - 1))
    assert not is_alive(replace(process, boot_id="another boot"))


def test_a_process_that_nobody_has_waited_for_is_gone() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    stat = host._stat(child.pid)
    assert stat
    process = replace(this_process(1), pid=child.pid, start_ticks=stat[1])
    assert is_alive(process)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not is_alive(process)
    child.communicate()


def test_release_and_lock_are_read_off_real_paths(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "releases/r7/flows").mkdir(parents=True)
    (tmp_path / "venvs/abc").mkdir(parents=True)
    (tmp_path / "flows").symlink_to("releases/r7/flows")
    (tmp_path / "venv").symlink_to("venvs/abc")
    monkeypatch.setattr(host, "RELEASES", tmp_path / "releases")
    monkeypatch.setattr(host, "ENVIRONMENTS", tmp_path / "venvs")
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "venv"))
    assert host.release_id("/tmp", tmp_path / "flows/x.py") == "r7"
    assert host.release_id("/tmp", tmp_path / "releases") is None
    assert host.lock_hash() == "abc"


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b'{"schema_version": 2}', b'{"schema_version": 1}']
)
def test_what_is_no_manifest(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"is no manifest|Expecting value"):
        load(content)
