"""What benchmarks/all makes of the benchmarks that it runs."""

import json
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.unit.shared import REPOSITORY, load_by_path

ROW = {"name": "  requests, ms", "ours": 1.0, "theirs": 2.0, "ratio": 2.0, "n": 1, "spread": {}}


@pytest.fixture(scope="module")
def benchmarks() -> ModuleType:
    return load_by_path("benchmarks/all")


def test_each_benchmark_is_there(benchmarks: ModuleType):
    for some in benchmarks.BENCHMARKS.values():
        for name in some:
            assert os.access(REPOSITORY / "benchmarks" / name, os.X_OK)


def test_says_how_a_benchmark_ended(benchmarks: ModuleType):
    assert benchmarks.run(["true"], 60) == ""
    assert benchmarks.run(["sh", "-c", "exit 3"], 60) == "ended with status 3"


def test_ends_what_is_late_and_lets_it_tidy_up(benchmarks: ModuleType, tmp_path: Path):
    tidied = tmp_path / "tidied"
    late = f"trap 'touch {tidied}; exit' TERM; while :; do sleep 0.1; done"
    assert benchmarks.run(["sh", "-c", late], 1) == "was not done after 1 s, and is ended"
    assert tidied.exists()
    # What begins when the time is over is ended at once.
    assert "is ended" in benchmarks.run(["sleep", "600"], -1)


def test_rows_say_whose_they_are(benchmarks: ModuleType, tmp_path: Path):
    file = tmp_path / "gateway-1.json"
    file.write_text(json.dumps({"rows": [ROW]}))
    assert benchmarks.read_rows("gateway", {file}) == [{**ROW, "name": "gateway: requests, ms"}]


def test_all_of_it(benchmarks: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """One that writes its rows, one that fails before it could."""
    good, bad = f"import pathlib; pathlib.Path('{tmp_path}/good-1.json').write_text", "exit(3)"
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks/good").write_text(f"{good}({json.dumps({'rows': [ROW]})!r})")
    (tmp_path / "benchmarks/bad").write_text(bad)
    (tmp_path / "lab.py").write_text("import sys; open('down', 'w').write(' '.join(sys.argv[1:]))")
    monkeypatch.setattr(benchmarks, "BENCHMARKS", {"five": {"bad": "", "good": ""}})
    monkeypatch.setattr(benchmarks, "PROJECT", tmp_path)
    monkeypatch.setattr(benchmarks, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["all"])
    assert benchmarks.main() == 1
    said = capsys.readouterr()
    assert "good five: requests, ms" in said.out
    assert "bad five ended with status 3" in said.err
    assert (tmp_path / "down").read_text() == "--fleet five down"
    (kept,) = tmp_path.glob("all-*.json")
    assert [one["name"] for one in json.loads(kept.read_text())["rows"]] == [
        "good five: requests, ms"
    ]
