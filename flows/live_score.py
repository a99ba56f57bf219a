"""Score forecasts against what has happened so far."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from dotenv import load_dotenv
from prefect import State, flow, get_run_logger
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.states import Completed
from pydantic import Field

from prefect_examples.projections import (
    ProjectionsError,
    Score,
    read_projections,
    read_results,
    score_groups,
)
from prefect_examples.stored_files import read_stored_file
from prefect_fleet.manifests import with_manifest

DATA = Path(__file__).resolve().parent / "data"
DECIMALS = 3


@with_manifest
@flow(name="live_score")
def live_score(
    projections: str = "projections.csv",
    results: str = "results.csv",
    drift_threshold: Annotated[float, Field(gt=0)] | None = None,
    drift_window: Annotated[int, Field(gt=0)] | None = None,
) -> list[dict[str, Any]] | State[list[dict[str, Any]]]:
    """Score projections by group, and end in the state Alert where they have drifted.

    A group's drift is its bias divided by its mean absolute result: 0.1 where its projections are
    10 % too high on the whole, -0.1 where they are 10 % too low.

    Args:
        projections: CSV or Parquet file with the columns date, group, projection and, if wished,
            probability: a local path, relative to `flows/data`, or `s3://bucket/key`.
        results: File with the columns date, group, actual and, if wished, outcome (0 or 1);
            likewise.
        drift_threshold: A group that drifts further from 0 is an alert; none for no alerts.
        drift_window: How many of a group's newest results count for its drift; none for all.

    Returns:
        One row per group: group, count, pending, mae, rmse, bias, brier, drift, rounded to 3
        decimals, and alert. Where a group is an alert, the run ends in a state of type COMPLETED
        and name Alert, whose result is the same rows.

    Raises:
        prefect_examples.stored_files.StoredFileError: a file can't be read.
        prefect_examples.projections.ProjectionsError: a file is not as it must be, or no
            projection has a result yet.
    """
    logger = get_run_logger()
    expected = read_projections(read_stored_file(projections, DATA), projections)
    happened = read_results(read_stored_file(results, DATA), results)
    scores = score_groups(expected, happened, drift_window)
    if not any(score.count for score in scores):
        raise ProjectionsError(
            f"{projections}: no projection has a result in {results} yet; date and group must be "
            "the same in both files"
        )
    logger.info("Scored %d projections.", sum(score.count for score in scores))
    if unforeseen := len(happened.keys() - expected.keys()):
        logger.warning("%d results have no projection and are not scored.", unforeseen)
    if any(one.probability is not None for one in expected.values()) and not any(
        one.outcome is not None for one in happened.values()
    ):
        logger.warning("There are probabilities, but no outcomes in %s: no Brier score.", results)

    alerts = [score for score in scores if drift_threshold and score.drifts(drift_threshold)]
    message = describe_drift(alerts, drift_threshold)
    rows = [make_row(score, score in alerts) for score in scores]
    create_table_artifact(
        table=rows, key="live-score", description="Projections against results, by group"
    )
    create_markdown_artifact(
        markdown=render_summary(rows, message),
        key="live-score-summary",
        description="Whether projections have drifted",
    )
    if alerts:
        logger.warning(message)
        return Completed(name="Alert", message=message, data=rows)
    return rows


def make_row(score: Score, alert: bool) -> dict[str, Any]:
    """Return a score as a row of the table; JSON has no infinity, so such a drift is None."""
    row = {
        name: (round(value, DECIMALS) if math.isfinite(value) else None)
        if isinstance(value, float)
        else value
        for name, value in asdict(score).items()
    }
    return {**row, "alert": alert}


def describe_drift(alerts: Sequence[Score], threshold: float | None) -> str:
    """Return a sentence that names the groups that are an alert, and their figures."""
    if threshold is None:
        return "There is no drift threshold."
    if not alerts:
        return f"No group drifts by more than {threshold:.1%}."
    groups = "; ".join(f"{score.group} {_describe(score.drift or 0)}" for score in alerts)
    return f"Drift of more than {threshold:.1%}: {groups}"


def _describe(drift: float) -> str:
    if math.isfinite(drift):
        return f"{drift:+.1%}"
    return f"too {'high' if drift > 0 else 'low'}, where every result is 0"


def render_summary(rows: Sequence[dict[str, Any]], message: str) -> str:
    """Return the table and the verdict as Markdown."""
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns)]
    lines += [["" if row[name] is None else str(row[name]) for name in columns] for row in rows]
    # A pipe in a group's name would end its cell.
    table = "\n".join(
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines
    )
    return f"# Live score\n\n{message}\n\n{table}\n"


if __name__ == "__main__":
    load_dotenv()
    live_score()
