"""Packing the code of a release."""

import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.shared import load_by_path

build_release = load_by_path("scripts/build_release.py")

FILES = {
    "deployments/one/flow.py": "one",
    "deployments/one/prefect.yaml": "deployments: []",
    "flows/canary.py": "canary",
    "flows/data/sample.csv": "a,b",
    "prefect.yaml": "deployments: []",
    "scripts/create_blocks.py": "blocks",
    "src/prefect_dhis2/__init__.py": "own",
    "src/prefect_fleet/__init__.py": "own",
    "src/tool/__init__.py": "",
}
LEFT_OUT = (
    ".env",
    "deployments/.secret/flow.py",
    "flows/.hidden",
    "flows/__pycache__/canary.cpython-313.pyc.140",
    "inventory/mine/hosts.yml",
    "scripts/make_secrets.py",
    "src/tool.egg-info/PKG-INFO",
    "src/tool/old.pyc",
)


def write(code: Path, names: list[str]) -> Path:
    """The code of a release, its files made in the given order."""
    for name in names:
        path = code / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(FILES.get(name, "x"))
    return code


@pytest.fixture
def build(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[[Path], tuple[str, Path]]:
    """Return a function that packs some code and gives back the release's id and file."""

    def build(code: Path, out: Path = tmp_path / "out") -> tuple[str, Path]:
        assert build_release.main([str(code), str(out)]) == 0
        said = json.loads(capsys.readouterr().out.splitlines()[-1])
        return said["id"], Path(said["path"])

    return build


def test_the_release_holds_the_code_and_nothing_else(tmp_path: Path, build):
    code = write(tmp_path / "code", [*FILES, *LEFT_OUT])
    release, path = build(code)
    assert path == tmp_path / "out" / f"{release}.tar.gz"
    with tarfile.open(path) as archive:
        assert archive.getnames() == [f"{release}/{name}" for name in [*sorted(FILES), "complete"]]
        for entry in archive:
            assert (entry.uid, entry.gid, entry.mtime, entry.mode) == (0, 0, 0, 0o644)
            content = archive.extractfile(entry)
            assert content
            name = entry.name.removeprefix(f"{release}/")
            assert content.read().decode() == (FILES | {"complete": ""})[name]
    assert [path] == list(path.parent.iterdir()), "or something half done is left behind"


def test_what_every_fleet_needs_is_given_where_the_code_lacks_it(tmp_path: Path, build):
    code = write(tmp_path / "code", ["prefect.yaml", "src/prefect_dhis2/__init__.py"])
    release, path = build(code)
    with tarfile.open(path) as archive:
        names = {name.removeprefix(f"{release}/") for name in archive.getnames()}
    assert {"scripts/create_blocks.py", "src/prefect_fleet/deploy.py"} < names
    assert {name for name in names if name.startswith("src/prefect_dhis2")} == {
        "src/prefect_dhis2/__init__.py"
    }
    assert not any(name.startswith("flows/") for name in names)


def test_the_same_content_makes_the_same_id_and_bytes(tmp_path: Path, build, monkeypatch):
    first = write(tmp_path / "one", list(FILES))
    second = write(tmp_path / "two", [*reversed(FILES), *LEFT_OUT])
    for number, name in enumerate(FILES):
        os.utime(second / name, (number, number))
        (second / name).chmod(0o600)
    one = build(first, tmp_path / "a")
    # File systems differ in the order in which they list a folder.
    rglob = Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda path, glob: reversed(list(rglob(path, glob))))
    two = build(second, tmp_path / "b")
    assert one[0] == two[0]
    assert len(one[0]) == 12
    assert one[1].read_bytes() == two[1].read_bytes()
    assert one[1].read_bytes()[4:8] == bytes(4), "the time of packing is in gzip's header"


def test_the_id_does_not_hang_on_how_it_was_compressed(tmp_path: Path, build, monkeypatch):
    """Another machine's zlib makes other bytes of the same content."""
    code = write(tmp_path / "code", list(FILES))
    release, path = build(code)
    compress = build_release.gzip.compress
    monkeypatch.setattr(
        build_release.gzip, "compress", lambda data, mtime: compress(data, 1, mtime=mtime)
    )
    other_release, other_path = build(code, tmp_path / "other")
    assert other_path.read_bytes() != path.read_bytes()
    assert other_release == release


def change(name: str, content: str) -> Callable[[Path], object]:
    return lambda code: (code / name).write_text(content)


@pytest.mark.parametrize(
    "change",
    [
        change("flows/canary.py", "canarY"),
        change("flows/new.py", ""),
        lambda code: (code / "flows/canary.py").unlink(),
        lambda code: (code / "flows/canary.py").rename(code / "flows/other.py"),
        lambda code: (code / "flows/canary.py").chmod(0o755),
    ],
    ids=["content", "added", "removed", "renamed", "executable"],
)
def test_every_change_makes_another_id(tmp_path: Path, build, change):
    code = write(tmp_path / "code", list(FILES))
    before = build(code)[0]
    change(code)
    assert build(code)[0] != before


def test_a_program_stays_executable(tmp_path: Path, build):
    code = write(tmp_path / "code", list(FILES))
    (code / "flows/canary.py").chmod(0o700)
    release, path = build(code)
    with tarfile.open(path) as archive:
        assert archive.getmember(f"{release}/flows/canary.py").mode == 0o755


def test_a_release_that_is_there_is_not_written_again(tmp_path: Path, build):
    code = write(tmp_path / "code", list(FILES))
    path = build(code)[1]
    os.utime(path, (1, 1))
    assert build(code)[1] == path
    assert path.stat().st_mtime == 1


@pytest.mark.parametrize("name", ["prefect.yaml", "deployments/one/prefect.yaml"])
def test_one_prefect_yaml_is_enough(tmp_path: Path, build, name: str):
    build(write(tmp_path / "code", [name]))


@pytest.mark.parametrize(
    "names",
    [[], ["flows/canary.py"], ["elsewhere/prefect.yaml"], ["deployments/.old/prefect.yaml"]],
)
def test_nothing_to_deploy_is_said(tmp_path: Path, capsys, names: list[str]):
    code, out = write(tmp_path / "code", names), tmp_path / "out"
    assert build_release.main([str(code), str(out)]) == 1
    printed = capsys.readouterr()
    assert f"{code} has no prefect.yaml" in printed.err
    assert "set fleet_code to the folder of your flows" in printed.err
    assert not printed.out
    assert not out.exists()


@pytest.mark.parametrize("arguments", [[], ["code"], ["code", "out", "more"]])
def test_wrong_usage(capsys, arguments: list[str]):
    assert build_release.main(arguments) == 2
    assert capsys.readouterr().err.startswith("usage: ")
