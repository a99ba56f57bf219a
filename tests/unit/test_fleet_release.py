"""The module that switches a host from one release to another."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from ansible.module_utils.testing import patch_module_args

from tests.unit.shared import load_by_path

fleet_release = load_by_path("roles/prefect_deploy/library/fleet_release.py")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A host with five releases, r1 the oldest, none of them in use."""
    for age, name in enumerate(["r1", "r2", "r3", "r4", "r5"]):
        folder = tmp_path / "releases" / name
        folder.mkdir(parents=True)
        (folder / "complete").touch()
        os.utime(folder, (age, age))
    return tmp_path


@pytest.fixture
def run(home: Path, capsys: pytest.CaptureFixture[str]):
    """Return a function that runs the module and gives back what it says."""

    def run(release: str, keep: int = 5, check: bool = False) -> dict[str, Any]:
        arguments = {"home": str(home), "id": release, "keep": keep, "_ansible_check_mode": check}
        said: dict[str, Any] = {}

        def end(_: object, **told: Any) -> None:
            said.update(told)
            raise SystemExit

        def fail(_: object, **told: Any) -> None:
            end(_, failed=True, **told)

        with patch_module_args(arguments), pytest.MonkeyPatch.context() as patch:
            patch.setattr(fleet_release.AnsibleModule, "exit_json", end)
            patch.setattr(fleet_release.AnsibleModule, "fail_json", fail)
            with pytest.raises(SystemExit):
                fleet_release.main()
        return said

    return run


def in_use(home: Path) -> str:
    return (home / "current").resolve().name


def releases(home: Path) -> set[str]:
    return {folder.name for folder in (home / "releases").iterdir()}


def test_the_first_switch_makes_all_links(home: Path, run):
    (home / "releases/r1/src").mkdir()
    assert run("r1") == {"changed": True, "previous": ""}
    assert (home / "src").resolve() == home / "releases/r1/src"
    assert {path.name for path in home.iterdir()} == {
        "current", "deployments", "flows", "releases", "src",
    }  # fmt: skip


def test_a_second_run_changes_nothing(home: Path, run):
    run("r2")
    links = {path.name: path.lstat().st_mtime_ns for path in home.iterdir()}
    assert run("r2") == {"changed": False, "previous": "r2"}
    assert links == {path.name: path.lstat().st_mtime_ns for path in home.iterdir()}


def test_a_switch_tells_what_was_in_use_and_goes_back(home: Path, run):
    run("r1")
    assert run("r2") == {"changed": True, "previous": "r1"}
    assert in_use(home) == "r2"
    assert run("r1")["previous"] == "r2"
    assert in_use(home) == "r1"


def test_old_releases_go_but_never_the_one_before(home: Path, run):
    run("r1")
    run("r5", keep=3)
    assert releases(home) == {"r1", "r4", "r5"}
    run("r4", keep=1)
    assert releases(home) == {"r4", "r5"}


def test_nothing_goes_while_nothing_is_switched(home: Path, run):
    run("r5", keep=5)
    run("r5", keep=1)
    assert len(releases(home)) == 5


def test_check_mode_touches_nothing(home: Path, run):
    assert run("r1", check=True) == {"changed": True, "previous": ""}
    assert not (home / "current").is_symlink()


def test_an_interrupted_switch_is_finished(home: Path, run):
    run("r1")
    (home / ".current.partial").symlink_to("releases/r2")
    (home / "flows").unlink()
    assert run("r2")["changed"]
    assert in_use(home) == "r2"
    assert (home / "flows").readlink() == Path("current/flows")
    assert not (home / ".current.partial").is_symlink()


@pytest.mark.parametrize("broken", ["missing", "half"])
def test_a_release_that_is_not_whole_is_refused(home: Path, run, broken: str):
    run("r1")
    if broken == "missing":
        shutil.rmtree(home / "releases/r2")
    else:
        (home / "releases/r2/complete").unlink()
    said = run("r2")
    assert said["failed"]
    assert "unpack it first" in said["msg"]
    assert in_use(home) == "r1"
