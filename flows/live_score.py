"""Score forecasts against what has happened so far."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from dotenv import load_dotenv
from prefect import flow, get_run_logger
from prefect.artifacts import create_table_artifact

from prefect_examples.projections import ProjectionsError, read_values, score_groups

DATA = Path(__file__).resolve().parent / "data"
DECIMALS = 3


@flow(name="live_score")
def live_score(
    projections: str = "projections.csv", results: str = "results.csv"
) -> list[dict[str, Any]]:
    """Score projections by group with mean absolute error, root mean squared error and bias.

    Args:
        projections: CSV file with the columns date, group and projection. A relative path is
            relative to `flows/data`.
        results: CSV file with the columns date, group and actual; relative likewise.

    Returns:
        One row per group: group, count, pending, mae, rmse and bias, rounded to 3 decimals.

    Raises:
        prefect_examples.projections.ProjectionsError: a file is missing or is not as it must be,
            or no projection has a result yet.
    """
    scores = score_groups(
        read_values(DATA / projections, "projection"), read_values(DATA / results, "actual")
    )
    if not any(score.count for score in scores):
        raise ProjectionsError(f"{projections}: no projection has a result in {results} yet")
    rows = [
        {
            name: round(value, DECIMALS) if isinstance(value, float) else value
            for name, value in asdict(score).items()
        }
        for score in scores
    ]
    create_table_artifact(
        table=rows, key="live-score", description="Projections against results, by group"
    )
    get_run_logger().info("Scored %d projections.", sum(score.count for score in scores))
    return rows


if __name__ == "__main__":
    load_dotenv()
    live_score()
