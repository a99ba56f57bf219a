"""The flow that scores projections, run against a Prefect server."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from prefect.client.schemas.sorting import ArtifactSort
from prefect.flows import Flow, load_flow_from_entrypoint

from prefect_examples.projections import ProjectionsError
from tests.unit.shared import REPOSITORY

pytestmark = pytest.mark.usefixtures("prefect_api")


def load(entrypoint: str) -> Flow[..., Any]:
    return load_flow_from_entrypoint(str(REPOSITORY / entrypoint), use_placeholder_flow=False)


def newest_artifact(key: str) -> Any:
    async def read() -> Any:
        async with get_client() as client:
            found = await client.read_artifacts(
                artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=[key])),
                sort=ArtifactSort.CREATED_DESC,
                limit=1,
            )
            return found[0].data

    return asyncio.run(read())


def test_live_score_scores_the_sample():
    rows = load("flows/live_score.py:live_score")()
    assert [row["group"] for row in rows] == ["east", "north", "south", "west"]
    assert all(row["mae"] > 0 and row["count"] == 8 for row in rows)
    assert json.loads(newest_artifact("live-score")) == rows


def test_live_score_names_a_missing_file():
    with pytest.raises(ProjectionsError, match=r"none\.csv: can't be read"):
        load("flows/live_score.py:live_score")(results="none.csv")


def test_live_score_without_any_result_fails(tmp_path: Path):
    results = tmp_path / "results.csv"
    results.write_text("date,group,actual\n")
    with pytest.raises(ProjectionsError, match="no projection has a result"):
        load("flows/live_score.py:live_score")(results=str(results))
