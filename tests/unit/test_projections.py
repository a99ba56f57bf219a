"""Scoring projections."""

import math
from pathlib import Path

import pytest

from prefect_examples.projections import ProjectionsError, Score, read_values, score_groups
from tests.unit.shared import REPOSITORY


def test_scores_by_group():
    projections = {
        ("d1", "b"): 12.0,
        ("d2", "b"): 7.0,
        ("d3", "b"): 1.0,
        ("d1", "a"): 5.0,
        ("d9", "c"): 5.0,
    }
    results = {("d1", "b"): 10.0, ("d2", "b"): 11.0, ("d1", "a"): 5.0, ("d1", "z"): 1.0}
    assert score_groups(projections, results) == [
        Score("a", count=1, pending=0, mae=0.0, rmse=0.0, bias=0.0),
        Score("b", count=2, pending=1, mae=3.0, rmse=math.sqrt(10), bias=-1.0),
        Score("c", count=0, pending=1, mae=None, rmse=None, bias=None),
    ]


def test_the_sample_files_are_scored():
    data = REPOSITORY / "flows" / "data"
    scores = score_groups(
        read_values(data / "projections.csv", "projection"),
        read_values(data / "results.csv", "actual"),
    )
    assert len(scores) == 4
    assert all(score.count == 8 and score.pending == 2 for score in scores)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", r"no column date, group, actual; .* found nothing"),
        ("date,group,value\n", r"no column actual; .* found date, group, value"),
        ("date,group,actual\nd1,a,1\nd2,a,many\n", r"line 3: actual is 'many'"),
        ("date,group,actual\nd1,a,nan\n", r"line 2: actual is 'nan'"),
        ("date,group,actual\nd1,a\n", r"line 2: actual is None"),
        ("date,group,actual\n,a,1\n", r"line 2: date or group is empty"),
        ("date,group,actual\nd1,a,1\nd1,a,2\n", r"line 3: a second value for d1 a"),
    ],
)
def test_a_file_of_no_use_is_named_with_the_line(tmp_path: Path, content: str, said: str):
    path = tmp_path / "results.csv"
    path.write_text(content)
    with pytest.raises(ProjectionsError, match=said) as raised:
        read_values(path, "actual")
    assert str(raised.value).startswith(str(path))


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(ProjectionsError, match=r"none\.csv: can't be read: No such file"):
        read_values(tmp_path / "none.csv", "actual")


def test_a_file_that_is_no_text_is_named(tmp_path: Path):
    path = tmp_path / "results.csv"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ProjectionsError, match="not a CSV file in UTF-8"):
        read_values(path, "actual")


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path):
    path = tmp_path / "results.csv"
    path.write_text("\ufeffdate,group,actual\nd1,a,1\n")
    assert read_values(path, "actual") == {("d1", "a"): 1.0}
