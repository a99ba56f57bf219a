"""The flow that scores projections, run against a Prefect server."""

import asyncio
import contextlib
import gc
import json
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect import State
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.sorting import ArtifactSort
from prefect.exceptions import ParameterTypeError
from prefect.flows import Flow, load_flow_from_entrypoint
from prefect.results import ResultRecordMetadata
from prefect.settings import (
    PREFECT_LOCAL_STORAGE_PATH,
    PREFECT_RESULTS_DEFAULT_STORAGE_BLOCK,
    PREFECT_RESULTS_PERSIST_BY_DEFAULT,
    temporary_settings,
)

from prefect_examples.projections import ProjectionsError
from prefect_examples.stored_files import StoredFileError
from prefect_fleet.results import build_block
from tests.unit.shared import REPOSITORY, ObjectStore

pytestmark = pytest.mark.usefixtures("prefect_api")

PROJECTIONS = """date,group,projection,probability
2026-01-01,north,110,0.9
2026-01-02,north,110,0.9
2026-01-01,so|uth,99,
2026-01-02,so|uth,101,
"""
RESULTS = """date,group,actual,outcome
2026-01-01,north,100,1
2026-01-02,north,100,0
2026-01-01,so|uth,100,
2026-01-02,so|uth,100,
"""


@pytest.fixture(scope="module")
def live_score() -> Flow[..., Any]:
    return load_flow_from_entrypoint(
        str(REPOSITORY / "flows/live_score.py:live_score"), use_placeholder_flow=False
    )


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """Files in which `north` is 10 % too high, as arguments of the flow."""
    (tmp_path / "projections.csv").write_text(PROJECTIONS)
    (tmp_path / "results.csv").write_text(RESULTS)
    return {name: str(tmp_path / f"{name}.csv") for name in ("projections", "results")}


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


def stored_run(state: State[Any]) -> tuple[FlowRun, Any]:
    """Return a run as the API has it, and its result as another process would read it."""

    async def read(flow_run: UUID) -> FlowRun:
        async with get_client() as client:
            return await client.read_flow_run(flow_run)

    assert state.state_details.flow_run_id
    run = asyncio.run(read(state.state_details.flow_run_id))
    assert run.state
    assert isinstance(run.state.data, ResultRecordMetadata)
    return run, run.state.result()


def test_the_sample_is_scored(live_score):
    rows = live_score()
    assert [row["group"] for row in rows] == ["east", "north", "south", "west"]
    assert all(row["mae"] > 0 and row["count"] == 8 for row in rows)
    assert json.loads(newest_artifact("live-score")) == rows
    assert "There is no drift threshold." in newest_artifact("live-score-summary")


def test_drift_above_the_threshold_ends_in_an_alert_with_a_stored_result(
    live_score, files, tmp_path
):
    with temporary_settings(
        {
            PREFECT_RESULTS_PERSIST_BY_DEFAULT: True,
            PREFECT_LOCAL_STORAGE_PATH: tmp_path / "stored",
        }
    ):
        state = live_score(**files, drift_threshold=0.09, return_state=True)
        run, rows = stored_run(state)
    assert (run.state.type, run.state.name) == (StateType.COMPLETED, "Alert")
    assert run.state_name == "Alert"
    assert run.state.message == "Drift of more than 9.0%: north +10.0%"
    assert rows == [
        {
            "group": "north",
            "count": 2,
            "pending": 0,
            "mae": 10.0,
            "rmse": 10.0,
            "bias": 10.0,
            "brier": 0.41,
            "drift": 0.1,
            "alert": True,
        },
        {
            "group": "so|uth",
            "count": 2,
            "pending": 0,
            "mae": 1.0,
            "rmse": 1.0,
            "bias": 0.0,
            "brier": None,
            "drift": 0.0,
            "alert": False,
        },
    ]
    assert json.loads(newest_artifact("live-score")) == rows
    summary = newest_artifact("live-score-summary")
    assert run.state.message in summary
    assert "| north | 2 | 0 | 10.0 |" in summary
    assert "| so\\|uth | 2 |" in summary


def test_an_alert_returns_the_rows_as_a_run_without_one_does(live_score, files):
    alert = live_score(**files, drift_threshold=0.09)
    state = live_score(**files, drift_threshold=0.11, return_state=True)
    assert (state.type, state.name) == (StateType.COMPLETED, "Completed")
    calm = asyncio.run(state.aresult())
    assert [row["alert"] for row in alert] == [True, False]
    assert [row["alert"] for row in calm] == [False, False]
    assert [{**row, "alert": None} for row in alert] == [{**row, "alert": None} for row in calm]
    assert "No group drifts by more than 11.0%." in newest_artifact("live-score-summary")


def test_a_window_is_what_drift_is_measured_over(live_score, files):
    with Path(files["projections"]).open("a") as file:
        file.write("2026-01-03,north,80,0.5\n")
    with Path(files["results"]).open("a") as file:
        file.write("2026-01-03,north,100,1\n")
    assert not any(row["alert"] for row in live_score(**files, drift_threshold=0.09))
    state = live_score(**files, drift_threshold=0.09, drift_window=1, return_state=True)
    assert state.name == "Alert"
    assert "north -20.0%" in state.message


def test_drift_from_results_that_are_all_0_is_an_alert_that_json_can_hold(live_score, files):
    Path(files["results"]).write_text("date,group,actual\n2026-01-01,north,0\n")
    state = live_score(**files, drift_threshold=0.09, return_state=True)
    assert state.name == "Alert"
    assert "north too high, where every result is 0" in state.message
    row = json.loads(newest_artifact("live-score"), parse_constant=pytest.fail)[0]
    assert (row["drift"], row["alert"]) == (None, True)


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"drift_threshold": 0}, "drift_threshold"),
        ({"drift_threshold": -0.1}, "drift_threshold"),
        ({"drift_window": 0}, "drift_window"),
    ],
)
def test_parameters_of_no_use_are_refused(live_score, parameters: dict[str, float], said: str):
    with pytest.raises(ParameterTypeError, match=said):
        live_score(**parameters)


def test_a_missing_file_is_named(live_score):
    with pytest.raises(StoredFileError, match=r"flows/data/none\.csv: can't be read: No such file"):
        live_score(results="none.csv")


def test_files_without_a_common_date_and_group_fail(live_score, files):
    Path(files["results"]).write_text("date,group,actual\n2026-01-01,North,1\n")
    with pytest.raises(ProjectionsError, match=r"no projection has a result .* must be the same"):
        live_score(**files)


def test_what_is_not_scored_is_said(live_score, files, caplog):
    Path(files["results"]).write_text("date,group,actual\n2026-01-01,north,1\n2026-01-01,North,1\n")
    live_score(**files)
    assert "1 results have no projection" in caplog.text
    assert "no Brier score" in caplog.text


@pytest.mark.filterwarnings("ignore:unclosed transport:ResourceWarning")
def test_files_and_result_in_rustfs(live_score, rustfs: ObjectStore):
    """As on the fleet: the block that keeps the result has the keys to read the files."""
    name, block = build_block(
        {
            "name": "live-score-results",
            "bucket": "live-score-results",
            "endpoint_url": rustfs.endpoint_url,
            "access_key": rustfs.access_key,
            "secret_key": rustfs.secret_key,
            "region": "us-east-1",
        }
    )
    block.save(name)
    with contextlib.closing(rustfs.client()) as client:
        for bucket in ("live-score-results", "measured-live"):
            client.create_bucket(Bucket=bucket)
        client.put_object(Bucket="measured-live", Key="in/p.csv", Body=PROJECTIONS.encode())
        client.put_object(Bucket="measured-live", Key="in/r.csv", Body=RESULTS.encode())
        with temporary_settings(
            {
                PREFECT_RESULTS_PERSIST_BY_DEFAULT: True,
                PREFECT_RESULTS_DEFAULT_STORAGE_BLOCK: f"s3-bucket/{name}",
            }
        ):
            state = live_score(
                projections="s3://measured-live/in/p.csv",
                results="s3://measured-live/in/r.csv",
                drift_threshold=0.09,
                return_state=True,
            )
            run, rows = stored_run(state)
        assert run.state.name == "Alert"
        assert [(row["group"], row["alert"]) for row in rows] == [
            ("north", True),
            ("so|uth", False),
        ]
        stored = client.list_objects_v2(Bucket="live-score-results")["Contents"]
        assert [entry["Key"] for entry in stored] == [run.state.data.storage_key]
    # Prefect leaves a connection of its result storage's block to the garbage collector.
    gc.collect()
