"""The flows, run against a Prefect server and the stand-in for DHIS2."""

import ast
import asyncio
import contextlib
import hashlib
import io
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow.parquet as pq
import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterKey,
    FlowRunFilter,
    FlowRunFilterId,
)
from prefect.client.schemas.objects import StateType
from prefect.client.schemas.sorting import ArtifactSort
from prefect.exceptions import ParameterTypeError
from prefect.flows import Flow, load_flow_from_entrypoint
from prefect.settings import (
    PREFECT_LOCAL_STORAGE_PATH,
    PREFECT_RESULTS_DEFAULT_STORAGE_BLOCK,
    PREFECT_RESULTS_PERSIST_BY_DEFAULT,
    temporary_settings,
)
from prefect_aws import S3Bucket

from lab.dhis2_standin import Fault, StandinServer, Units
from prefect_dhis2 import Dhis2Credentials, Dhis2Error
from prefect_dhis2.servers import read_stored_names
from prefect_fleet.results import build_block
from tests.unit.shared import (
    DHIS2_PASSWORD,
    DHIS2_UNITS,
    DHIS2_USERNAME,
    REPOSITORY,
    ObjectStore,
)

UNITS_KEY = "dhis2/good/organisation-units.parquet"
# For tests of the flow itself; those of the storage run against each store.
ONE_STORE = pytest.mark.parametrize("object_store", ["s3_standin"], indirect=True)
pytestmark = pytest.mark.usefixtures("prefect_api")


def load(entrypoint: str) -> Flow[..., Any]:
    return load_flow_from_entrypoint(str(REPOSITORY / entrypoint), use_placeholder_flow=False)


@pytest.fixture(scope="module", autouse=True)
def by_hand(
    prefect_api: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[subprocess.Popen[str]]:
    """A flow that is run by hand, while the other tests of this module run: it takes its time."""
    folder = tmp_path_factory.mktemp("by-hand")
    (folder / ".env").write_text("PREFECT_LOGGING_LEVEL=CRITICAL\n")
    with subprocess.Popen(
        [sys.executable, str(REPOSITORY / "src/prefect_fleet/canary/flow.py")],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        yield process
        process.kill()


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


@pytest.fixture
def no_servers() -> None:
    """Remove what tests of other programs have stored: the flow asks all servers there are."""
    for name in asyncio.run(read_stored_names()):
        Dhis2Credentials.delete(name)


@pytest.fixture
def servers(no_servers: None, dhis2: str) -> Iterator[dict[str, Dhis2Credentials]]:
    """Store the DHIS2 servers that a test puts in, and remove them after it."""
    stored: dict[str, Dhis2Credentials] = {
        "good": Dhis2Credentials(base_url=dhis2, username=DHIS2_USERNAME, password=DHIS2_PASSWORD)
    }
    stored["good"].save("good", overwrite=True)
    yield stored
    for name in stored:
        Dhis2Credentials.delete(name)


@pytest.fixture
def dead_address() -> Iterator[str]:
    """An address that nothing answers on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


@pytest.fixture(scope="module")
def check_connections() -> Flow[..., Any]:
    return load("deployments/dhis2_connection/flow.py:dhis2_connection_flow")


@pytest.fixture(scope="module")
def keep_units() -> Flow[..., Any]:
    return load("deployments/dhis2_ou/flow.py:dhis2_ou_flow")


@pytest.fixture
def failing(servers, dhis2: str, dead_address: str) -> None:
    """Two more servers: one that refuses the password, and one that is away."""
    servers["locked"] = Dhis2Credentials(
        base_url=dhis2, username=DHIS2_USERNAME, password="s3cret-guess"
    )
    servers["away"] = Dhis2Credentials(base_url=dead_address, username="u", password="p", retries=0)
    for name in ("locked", "away"):
        servers[name].save(name)


def test_connection_says_what_each_server_answered(servers, check_connections):
    outcomes = asyncio.run(check_connections())
    (outcome,) = outcomes
    assert (outcome["server"], outcome["status"], outcome["error"]) == ("good", "ok", None)
    assert outcome["version"].startswith("2.")
    assert outcome["latency_seconds"] > 0
    assert json.loads(json.dumps(outcomes)) == outcomes
    assert json.loads(newest_artifact("dhis2-connection")) == outcomes


def test_connection_asks_all_servers_at_the_same_time(
    servers, dhis2_server: StandinServer, check_connections
):
    """Each answer waits for the other question: one after the other they would time out."""
    servers["second"] = servers["good"].model_copy()
    servers["second"].save("second")
    barrier = threading.Barrier(2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dhis2_server, "take_fault", lambda path: barrier.wait(20) and None)
        outcomes = asyncio.run(check_connections())
    assert [outcome["status"] for outcome in outcomes] == ["ok", "ok"]


def test_connection_fails_when_any_server_fails_and_names_it(failing, check_connections):
    with pytest.raises(RuntimeError, match="2 of 3 servers failed") as raised:
        asyncio.run(check_connections())
    message = str(raised.value)
    assert "away: http" in message
    assert "locked: http" in message
    assert "good" not in message
    table = newest_artifact("dhis2-connection")
    assert {row["server"]: row["status"] for row in json.loads(table)} == {
        "away": "failed",
        "good": "ok",
        "locked": "failed",
    }
    assert "s3cret-guess" not in f"{message} {table}"


def test_connection_fails_only_as_it_is_told(servers, failing, check_connections):
    for fail_on in ("all", "never"):
        assert len(asyncio.run(check_connections(fail_on=fail_on))) == 3
    Dhis2Credentials.delete("good")
    del servers["good"]
    with pytest.raises(RuntimeError, match="2 of 2 servers failed"):
        asyncio.run(check_connections(fail_on="all"))
    assert len(asyncio.run(check_connections(fail_on="never"))) == 2


def test_a_failed_server_is_a_failed_task_run(failing, check_connections):
    state = asyncio.run(check_connections(fail_on="never", return_state=True))

    async def read() -> dict[str, StateType]:
        async with get_client() as client:
            runs = await client.read_task_runs(
                flow_run_filter=FlowRunFilter(
                    id=FlowRunFilterId(any_=[state.state_details.flow_run_id])
                )
            )
            return {run.name: run.state_type for run in runs}

    wanted = {
        "check-away": StateType.FAILED,
        "check-good": StateType.COMPLETED,
        "check-locked": StateType.FAILED,
    }
    # Prefect records task runs from events, a moment after the run.
    for _ in range(100):
        found = asyncio.run(read())
        if found == wanted:
            break
        time.sleep(0.1)
    assert found == wanted


def test_connection_with_no_server_is_no_failure(no_servers, check_connections):
    assert asyncio.run(check_connections()) == []


@pytest.fixture
def results_bucket(object_store: ObjectStore) -> Iterator[ObjectStore]:
    """A bucket as the storage of flow results, as on the fleet."""
    settings = {
        # Prefect keeps a result storage that it has loaded once, by its name.
        "name": f"results-{urlsplit(object_store.endpoint_url).port}",
        "bucket": "results",
        "endpoint_url": object_store.endpoint_url,
        "access_key": object_store.access_key,
        "secret_key": object_store.secret_key,
        "region": "us-east-1",
    }
    name, block = build_block(settings)
    block.save(name, overwrite=True)
    with temporary_settings(
        {
            PREFECT_RESULTS_DEFAULT_STORAGE_BLOCK: f"s3-bucket/{name}",
            PREFECT_RESULTS_PERSIST_BY_DEFAULT: True,
        }
    ):
        yield object_store
    S3Bucket.delete(name)


def read_units(store: ObjectStore) -> tuple[bytes, list[dict[str, Any]]]:
    """The bytes that the bucket holds, and their rows."""
    with contextlib.closing(store.client()) as client:
        content = client.get_object(Bucket="results", Key=UNITS_KEY)["Body"].read()
    return content, pq.read_table(io.BytesIO(content)).to_pylist()


def test_organisation_units_are_kept_where_results_are(
    servers, dhis2_server: StandinServer, results_bucket: ObjectStore, keep_units
):
    summary = asyncio.run(keep_units(server="good", page_size=20))
    content, rows = read_units(results_bucket)
    assert summary["written"] == {
        "url": f"s3://results/{UNITS_KEY}",
        "bucket": "results",
        "key": UNITS_KEY,
        "rows": DHIS2_UNITS,
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    assert {row["id"] for row in rows} == {unit["id"] for unit in dhis2_server.units}
    assert summary["total"] == DHIS2_UNITS
    assert summary["by_level"] == {"1": 1, "2": 4, "3": 20, "4": DHIS2_UNITS - 25}
    assert (summary["changes"], summary["skipped"]) == (None, 0)
    assert json.loads(json.dumps(summary)) == summary
    text = newest_artifact("dhis2-organisation-units")
    assert f"{DHIS2_UNITS} units, read from" in text
    assert "| 3 | 20 |" in text
    assert summary["written"]["sha256"] in text
    assert "There is no earlier file" in text

    units = list(dhis2_server.units)
    dhis2_server.units = [
        *units[:-2],
        units[-2] | {"name": "A|B <b>"},
        *Units(DHIS2_UNITS + 3)[-3:],
    ]
    changes = asyncio.run(keep_units(server="good"))["changes"]
    assert changes == {"added": 3, "removed": 1, "renamed": 1, "moved": 0}
    text = newest_artifact("dhis2-organisation-units")
    assert rf"| renamed | 1 | {units[-2]['name']} → A\|B \<b\> |" in text


@ONE_STORE
def test_a_run_that_fails_leaves_the_file_before(
    servers, dhis2_server: StandinServer, results_bucket: ObjectStore, keep_units
):
    asyncio.run(keep_units(server="good"))
    before, _ = read_units(results_bucket)
    page_2 = "/api/organisationUnits?order=id%3Aasc&paging=true&page=2&"
    dhis2_server.faults.append(Fault("cut-json", path=page_2, times=None))
    with pytest.raises(Dhis2Error, match="it is cut short"):
        asyncio.run(keep_units(server="good", page_size=100))
    dhis2_server.faults.clear()
    dhis2_server.units = [*Units(DHIS2_UNITS), {"id": "bad", "name": "No unit"}]
    with pytest.raises(ValueError, match=r"1 of 124 organisation units of good .*bad \(No unit\)"):
        asyncio.run(keep_units(server="good"))
    assert read_units(results_bucket)[0] == before
    summary = asyncio.run(keep_units(server="good", bad_units="skip"))
    assert (summary["total"], summary["skipped"]) == (DHIS2_UNITS, 1)
    assert "bad (No unit)" in newest_artifact("dhis2-organisation-units")
    assert read_units(results_bucket)[0] == before


@ONE_STORE
def test_a_file_before_that_is_broken_does_not_stop_the_next(
    servers, results_bucket: ObjectStore, keep_units
):
    with contextlib.closing(results_bucket.client()) as client:
        client.put_object(Bucket="results", Key=UNITS_KEY, Body=b"no parquet")
    assert asyncio.run(keep_units(server="good"))["changes"] is None
    assert len(read_units(results_bucket)[1]) == DHIS2_UNITS


@ONE_STORE
def test_organisation_units_go_to_the_bucket_that_is_named(
    servers, results_bucket: ObjectStore, keep_units, tmp_path: Path
):
    storage = PREFECT_RESULTS_DEFAULT_STORAGE_BLOCK.value().removeprefix("s3-bucket/")
    with temporary_settings(
        {PREFECT_RESULTS_DEFAULT_STORAGE_BLOCK: None, PREFECT_LOCAL_STORAGE_PATH: tmp_path}
    ):
        summary = asyncio.run(keep_units(server="good", storage=storage))
        assert summary["written"]["bucket"] == "results"
        with pytest.raises(ValueError, match="nowhere"):
            asyncio.run(keep_units(server="good", storage="nowhere"))


def test_organisation_units_without_a_bucket_go_to_a_folder_which_is_said(
    servers, keep_units, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    with temporary_settings({PREFECT_LOCAL_STORAGE_PATH: tmp_path}):
        summary = asyncio.run(keep_units(server="good"))
        assert asyncio.run(keep_units(server="good"))["changes"] == dict.fromkeys(
            ("added", "removed", "renamed", "moved"), 0
        )
    path = tmp_path / UNITS_KEY
    assert summary["written"]["url"] == path.as_uri()
    assert pq.read_metadata(path).num_rows == DHIS2_UNITS
    assert f"the file goes to {tmp_path}" in caplog.text


def test_organisation_units_of_an_unknown_server_fail(keep_units):
    with pytest.raises(ValueError, match="nowhere"):
        asyncio.run(keep_units(server="nowhere"))


def test_organisation_units_of_a_dead_server_fail(failing, keep_units):
    with pytest.raises(Dhis2Error, match="did not answer"):
        asyncio.run(keep_units(server="away"))


@pytest.mark.parametrize("page_size", [0, 10_001])
def test_a_page_size_of_no_use_is_refused(keep_units, page_size: int):
    with pytest.raises(ParameterTypeError, match="page_size"):
        asyncio.run(keep_units(server="good", page_size=page_size))


def test_canary_returns_the_token_and_where_it_ran():
    returned = load("src/prefect_fleet/canary/flow.py:canary")(host="elsewhere", token="t-1")
    assert returned["token"] == "t-1"
    assert returned["hostname"] == socket.gethostname()
    assert returned["python"] == ".".join(map(str, sys.version_info[:3]))


def test_a_flow_runs_by_hand_with_the_settings_of_a_dotenv_file(by_hand: subprocess.Popen[str]):
    out, error = by_hand.communicate(timeout=120)
    assert by_hand.returncode == 0, error
    assert socket.gethostname() in out
    assert "Aimed at" not in out + error


@pytest.mark.parametrize(
    "path",
    [*(REPOSITORY / "flows").glob("*.py"), *(REPOSITORY / "deployments").glob("*/*.py")],
    ids=lambda path: path.relative_to(REPOSITORY).as_posix(),
)
def test_every_flow_file_reads_the_dotenv_file_when_it_is_run_by_hand(path: Path):
    last = ast.parse(path.read_text()).body[-1]
    assert isinstance(last, ast.If)
    assert ast.unparse(last.test) == "__name__ == '__main__'"
    assert ast.unparse(last.body[0]) == "load_dotenv()"
