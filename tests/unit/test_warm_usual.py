"""For which runs a zygote reads settings, and which of them take what it has read."""

import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import pytest

from prefect_fleet.warm import client, internals
from prefect_fleet.warm.usual import Usual, has_only_environment
from prefect_fleet.warm.zygote import identity

GIVEN = {b"PREFECT_API_URL": b"http://one", b"HOME": b"/home/one", b"MINE": b"1"}
OTHER = GIVEN | {b"PREFECT_API_URL": b"http://other"}


class Reading:
    """Stands in for Prefect's settings: notes in which environments it was asked for them."""

    def __init__(self) -> None:
        self.environments: list[dict[bytes, bytes]] = []
        self.does: Callable[[], object] = lambda: None

    def __call__(self, said: TextIO) -> str | None:
        self.environments.append(dict(os.environb._data))  # not by its recorder
        assert os.environ["HOME"]
        refusal = self.does()
        return refusal if isinstance(refusal, str) else None


@pytest.fixture
def reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Reading:
    monkeypatch.setattr(internals, "setting_files", lambda: [str(tmp_path / "profiles")])
    monkeypatch.setattr("prefect_fleet.warm.imports.threads", lambda: 1)
    monkeypatch.chdir(tmp_path)
    return Reading()


@pytest.fixture
def usual(reading: Reading) -> Usual:
    return Usual(reading, identity, print)


def test_what_the_first_run_has_is_read_once(usual: Usual, reading: Reading) -> None:
    before = dict(os.environb)
    runs = [
        GIVEN | {b"PREFECT__FLOW_RUN_ID": b"%d" % number, client.GROUP: b"/group/%d" % number}
        for number in range(3)
    ]
    assert all(map(usual.fits, runs))
    assert reading.environments == runs[:1]
    assert dict(os.environb) == before


@pytest.mark.parametrize(
    ("name", "fits"),
    [
        (b"PREFECT_LOGGING_LEVEL", False),
        (b"prefect_logging_level", False),
        (b"HOME", False),
        (b"MINE", True),
    ],
)
def test_only_what_was_looked_at_counts(usual: Usual, name: bytes, fits: bool) -> None:
    assert usual.fits(GIVEN)
    assert usual.fits(GIVEN | {name: b"another"}) == fits
    assert usual.fits(GIVEN)


def test_what_two_runs_in_turn_have_is_read_instead(usual: Usual, reading: Reading) -> None:
    assert usual.fits(GIVEN)
    assert [usual.fits(run) for run in (OTHER, GIVEN, GIVEN)] == [False, True, True]
    assert [usual.fits(run) for run in (OTHER, OTHER, OTHER)] == [False, True, True]
    assert reading.environments == [GIVEN, OTHER]


def test_a_file_that_is_another_has_it_read_again(
    usual: Usual, reading: Reading, tmp_path: Path
) -> None:
    assert usual.fits(GIVEN)
    (tmp_path / "profiles").write_text("[profiles]")
    assert usual.fits(GIVEN)
    assert len(reading.environments) == 2


@pytest.mark.parametrize(
    "does",
    [
        lambda: "it can't be",
        lambda: 1 / 0,
        lambda: warnings.warn("an old name", stacklevel=1),
        lambda: list(os.environ),
        lambda: os.dup(0),
    ],
    ids=["refuses", "fails", "warns", "reads all variables", "opens a file"],
)
def test_a_run_whose_settings_are_more_than_values_reads_its_own(
    usual: Usual, reading: Reading, does: Callable[[], object]
) -> None:
    reading.does = does
    before = set(os.listdir("/proc/self/fd"))  # noqa: PTH208
    assert not usual.fits(GIVEN)
    reading.does = lambda: None
    # Not tried again for each run, nor are others kept from it.
    assert not usual.fits(GIVEN)
    assert usual.fits(OTHER)
    assert len(reading.environments) == 2
    for number in set(os.listdir("/proc/self/fd")) - before:  # noqa: PTH208
        if Path("/proc/self/fd", number).exists():
            os.close(int(number))


def test_what_is_said_belongs_to_the_run(reading: Reading) -> None:
    def read(said: TextIO) -> str | None:
        print("no such profile", file=said)
        return None

    assert not Usual(read, identity, print).fits(GIVEN)


@pytest.mark.parametrize("name", internals.CONFIGURED_BY)
def test_files_of_a_working_directory_count(usual: Usual, tmp_path: Path, name: str) -> None:
    assert has_only_environment()
    (tmp_path / name).touch()
    assert not has_only_environment()
    assert not usual.fits(GIVEN)


def test_colours_are_for_terminals(usual: Usual) -> None:
    controller, terminal = os.openpty()
    kept = os.dup(1)
    sys.stdout.flush()
    try:
        os.dup2(terminal, 1)
        found = has_only_environment(), usual.fits(GIVEN)
    finally:
        os.dup2(kept, 1)
        for number in (controller, terminal, kept):
            os.close(number)
    assert found == (False, False)
