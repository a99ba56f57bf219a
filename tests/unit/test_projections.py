"""Reading and scoring projections."""

import io
import math
from datetime import UTC, date, datetime
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from prefect_examples.projections import (
    Projection,
    ProjectionsError,
    Result,
    Score,
    read_projections,
    read_results,
    score_groups,
)
from tests.unit.shared import REPOSITORY

DAYS = [datetime(2026, 1, day, tzinfo=UTC) for day in range(1, 10)]


def parquet(**columns: list[Any]) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    return file.getvalue()


def score_one(*pairs: tuple[float, float], window: int | None = None) -> Score:
    """Score a group `a` with a (projection, result) a day."""
    projections = {(day, "a"): Projection(pair[0]) for day, pair in zip(DAYS, pairs, strict=False)}
    results = {(day, "a"): Result(pair[1]) for day, pair in zip(DAYS, pairs, strict=False)}
    (score,) = score_groups(projections, results, window)
    return score


def test_scores_by_group():
    projections = {
        (DAYS[0], "b"): Projection(12.0),
        (DAYS[1], "b"): Projection(7.0),
        (DAYS[2], "b"): Projection(1.0),
        (DAYS[0], "a"): Projection(5.0),
        (DAYS[8], "c"): Projection(5.0),
    }
    results = {
        (DAYS[0], "b"): Result(10.0),
        (DAYS[1], "b"): Result(11.0),
        (DAYS[0], "a"): Result(5.0),
        (DAYS[0], "z"): Result(1.0),
    }
    assert score_groups(projections, results) == [
        Score("a", count=1, pending=0, mae=0.0, rmse=0.0, bias=0.0, drift=0.0),
        Score("b", count=2, pending=1, mae=3.0, rmse=math.sqrt(10), bias=-1.0, drift=-1 / 10.5),
        Score("c", count=0, pending=1),
    ]


def test_the_brier_score_counts_where_probability_and_outcome_are_both_known():
    projections = {
        (DAYS[0], "a"): Projection(1.0, 0.75),
        (DAYS[1], "a"): Projection(1.0, 0.5),
        (DAYS[2], "a"): Projection(1.0, 0.9),
        (DAYS[3], "a"): Projection(1.0),
        (DAYS[0], "b"): Projection(1.0, 0.0),
        (DAYS[0], "c"): Projection(1.0, 1.0),
    }
    results = {
        (DAYS[0], "a"): Result(1.0, 1.0),
        (DAYS[1], "a"): Result(1.0, 0.0),
        (DAYS[2], "a"): Result(1.0),
        (DAYS[3], "a"): Result(1.0, 1.0),
        (DAYS[0], "b"): Result(1.0),
        (DAYS[0], "c"): Result(1.0, 0.0),
    }
    scores = {score.group: score.brier for score in score_groups(projections, results)}
    assert scores == {"a": (0.25**2 + 0.5**2) / 2, "b": None, "c": 1.0}


def test_drift_is_bias_relative_to_the_mean_absolute_result():
    assert score_one((12, 10), (33, 30)).drift == 5 / 40
    assert score_one((8, 10), (27, 30)).drift == -5 / 40
    assert score_one((-12, -10), (33, 30)).drift == 1 / 40
    assert score_one((12, 10), (8, 10)).drift == 0


def test_drift_over_a_window_counts_the_newest_results_only():
    pairs = [(20, 10), (10, 10), (13, 10), (11, 10)]
    assert score_one(*pairs).drift == 14 / 40
    assert score_one(*pairs, window=2).drift == 4 / 20
    assert score_one(*pairs, window=99).drift == 14 / 40
    projections = {(day, "a"): Projection(pair[0]) for day, pair in zip(DAYS, pairs, strict=False)}
    backwards = dict(reversed(projections.items()))
    results = {(day, "a"): Result(10) for day in DAYS[:4]}
    assert score_groups(backwards, results, 1)[0].drift == 1 / 10


def test_drift_where_every_result_is_0():
    assert score_one((0, 0), (0, 0)).drift == 0
    assert score_one((1, 0), (0, 0)).drift == math.inf
    assert score_one((-1, 0), (0, 0)).drift == -math.inf


def test_a_threshold_is_for_both_directions_and_is_itself_no_drift():
    high, low = score_one((12, 8)), score_one((4, 8))
    assert (high.drift, low.drift) == (0.5, -0.5)
    for score in (high, low):
        assert score.drifts(0.49)
        assert not score.drifts(0.5)
    assert score_one((1, 0)).drifts(1e9)
    assert not Score("a", 0, 3).drifts(0.01)


def test_the_sample_files_are_scored_and_do_not_drift_far():
    data = REPOSITORY / "flows" / "data"
    scores = score_groups(
        read_projections((data / "projections.csv").read_bytes(), "projections.csv"),
        read_results((data / "results.csv").read_bytes(), "results.csv"),
    )
    assert len(scores) == 4
    assert all(score.count == 8 and score.pending == 2 for score in scores)
    assert all(score.brier is not None and 0 < score.brier < 0.25 for score in scores)
    assert not any(score.drifts(0.05) for score in scores)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", r"is empty; write a header, date,group,actual"),
        (" \n\n", r"is empty"),
        ("date,group,actual\n", r"has no rows; write one"),
        ("date,group,value\n", r"line 1: no column actual; .*found date, group, value"),
        ("date;group;actual\n", r"line 1: no column .*separated by commas\), found date;group;"),
        ("date,group,actual,outcom\n", r"line 1: column 'outcom' is not known; .* outcome$"),
        ("date,group,actual,group\n", r"line 1: column group stands twice"),
        ("date,group,actual\n2026-01-01,a,1\n2026-01-02,a,many\n", r"line 3: actual is 'many'"),
        ("date,group,actual\n2026-01-01,a,nan\n", r"line 2: actual is 'nan', .* not a number"),
        ("date,group,actual\n2026-01-01,a,1e999\n", r"line 2: actual is '1e999'"),
        ("date,group,actual\n2026-01-01,a,\n", r"line 2: actual is ''"),
        ('date,group,actual\n2026-01-01,a,"3,5"\n', r"line 2: actual is '3,5'.* example 3\.5"),
        ("date,group,actual\n2026-01-01,a\n", r"line 2: 2 cells where the header has 3"),
        ("date,group,actual\n2026-01-01,a,3,5\n", r"line 2: 4 cells .* a dot in numbers"),
        ("date,group,actual\n2026-01-01,,1\n", r"line 2: group is empty"),
        ("date,group,actual\n,a,1\n", r"line 2: date is ''; write an ISO 8601 date"),
        ("date,group,actual\n31.1.2026,a,1\n", r"line 2: date is '31\.1\.2026'"),
        ("date,group,actual\n2026-02-30,a,1\n", r"line 2: date is '2026-02-30'"),
        (
            "date,group,actual\n2026-01-01,a,1\n2026-01-02,a,1\n2026-01-01T00:00Z, a,2\n",
            r"line 4: a second row for date 2026-01-01T00:00Z and group a; line 2 is the first",
        ),
        ("date,group,actual,outcome\n2026-01-01,a,1,0.5\n", r"line 2: outcome is '0\.5'; write 1"),
        ("date,group,actual,outcome\n2026-01-01,a,1,yes\n", r"line 2: outcome is 'yes'"),
        ('date,group,actual\n2026-01-01,"a,1\n2026-01-02,b,1\n', r"not a CSV file in UTF-8"),
        ("date,group,actual\n2026-01-01,\0\n", r"results\.csv"),
    ],
)
def test_results_of_no_use_are_named_with_the_line(content: str, said: str):
    with pytest.raises(ProjectionsError, match=said) as raised:
        read_results(content.encode(), "some/results.csv")
    assert str(raised.value).startswith("some/results.csv")


@pytest.mark.parametrize("probability", ["1.01", "-0.1", "55%", "inf", "55"])
def test_a_probability_outside_0_to_1_is_named(probability: str):
    content = f"date,group,projection,probability\n2026-01-01,a,1,{probability}\n"
    with pytest.raises(ProjectionsError, match=rf"line 2: probability is '{probability}'"):
        read_projections(content.encode(), "projections.csv")


def test_results_have_no_probability():
    with pytest.raises(ProjectionsError, match="column 'probability' is not known"):
        read_results(b"date,group,actual,probability\n", "results.csv")


def test_a_file_that_is_no_text_is_named():
    with pytest.raises(ProjectionsError, match="not a CSV file in UTF-8"):
        read_results(b"\xff\xfe\x00", "results.csv")


def test_csv_as_spreadsheets_write_it_is_read():
    content = "\ufeffdate, group ,actual,outcome\r\n2026-01-01, a ,1,\r\n\r\n2026-01-02,a,2,1\r\n"
    assert read_results(content.encode(), "results.csv") == {
        (DAYS[0], "a"): Result(1.0),
        (DAYS[1], "a"): Result(2.0, 1.0),
    }


def test_times_are_the_same_however_they_are_written():
    content = b"date,group,actual\n2026-01-01T02:00+02:00,a,1\n20260102,a,1\n"
    assert [day for day, _ in read_results(content, "results.csv")] == DAYS[:2]


def test_parquet_is_read_with_its_types():
    content = parquet(
        date=[date(2026, 1, 1), date(2026, 1, 2)],
        group=["a", "a"],
        actual=[1, 2],
        outcome=[None, True],
    )
    assert read_results(content, "results.parquet") == {
        (DAYS[0], "a"): Result(1.0),
        (DAYS[1], "a"): Result(2.0, 1.0),
    }
    content = parquet(date=DAYS[:1], group=[7], projection=[1.5], probability=[0.25])
    assert read_projections(content, "projections.parquet") == {
        (DAYS[0], "7"): Projection(1.5, 0.25)
    }


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (parquet(date=DAYS[:1], group=["a"]), r"no column actual; .* found date, group"),
        (parquet(date=[], group=[], actual=[]), "has no rows"),
        (
            parquet(date=DAYS[:2], group=["a", "a"], actual=[1.0, None]),
            "row 2: actual is '', which is not a number",
        ),
        (parquet(date=DAYS[:1], group=["a"], actual=[1.0])[:-20], "not a Parquet file"),
        (b"PAR1 is how it begins", "not a Parquet file"),
    ],
)
def test_parquet_of_no_use_is_named_with_the_row(content: bytes, said: str):
    with pytest.raises(ProjectionsError, match=said) as raised:
        read_results(content, "results.parquet")
    assert str(raised.value).startswith("results.parquet")
