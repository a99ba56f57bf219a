"""The flows, run against a Prefect server and the stand-in for DHIS2."""

import ast
import asyncio
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from prefect.client.schemas.sorting import ArtifactSort
from prefect.flows import Flow, load_flow_from_entrypoint

from prefect_dhis2 import Dhis2Credentials
from prefect_examples.dhis2 import Dhis2Error
from tests.unit.shared import DHIS2_PASSWORD, DHIS2_UNITS, DHIS2_USERNAME, REPOSITORY

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
        [sys.executable, str(REPOSITORY / "flows" / "canary.py")],
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
def servers(dhis2: str) -> Iterator[dict[str, Dhis2Credentials]]:
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


def test_connection_says_what_each_server_answered(servers):
    outcomes = asyncio.run(load("deployments/dhis2_connection/flow.py:dhis2_connection_flow")())
    (outcome,) = outcomes
    assert outcome["server"] == "good"
    assert outcome["ok"] is True
    assert outcome["version"].startswith("2.")
    assert outcome["error"] is None
    assert json.loads(json.dumps(outcomes)) == outcomes
    assert newest_artifact("dhis2-connection")


def test_connection_fails_when_any_server_fails_and_names_it(servers, dhis2, dead_address):
    servers["locked"] = Dhis2Credentials(
        base_url=dhis2, username=DHIS2_USERNAME, password="s3cret-guess"
    )
    servers["away"] = Dhis2Credentials(base_url=dead_address, username="u", password="p")
    for name in ("locked", "away"):
        servers[name].save(name)
    with pytest.raises(RuntimeError, match="2 of 3 servers failed") as raised:
        asyncio.run(load("deployments/dhis2_connection/flow.py:dhis2_connection_flow")())
    message = str(raised.value)
    assert "away: " in message
    assert "locked: " in message
    assert "good" not in message
    table = newest_artifact("dhis2-connection")
    assert {row["server"]: row["ok"] for row in json.loads(table)} == {
        "away": False,
        "good": True,
        "locked": False,
    }
    assert "s3cret-guess" not in f"{message} {table}"


def test_connection_with_no_server_is_no_failure():
    flow = load("deployments/dhis2_connection/flow.py:dhis2_connection_flow")
    assert asyncio.run(flow()) == []


def test_organisation_units_are_counted(servers):
    flow = load("deployments/dhis2_ou/flow.py:dhis2_ou_flow")
    summary = asyncio.run(flow(server="good", page_size=20))
    assert summary["total"] == DHIS2_UNITS
    assert summary["by_level"] == {"1": 1, "2": 4, "3": 20, "4": DHIS2_UNITS - 25}
    assert json.loads(json.dumps(summary)) == summary
    assert f"{DHIS2_UNITS} units" in newest_artifact("dhis2-organisation-units")


def test_organisation_units_of_an_unknown_server_fail():
    with pytest.raises(ValueError, match="nowhere"):
        asyncio.run(load("deployments/dhis2_ou/flow.py:dhis2_ou_flow")(server="nowhere"))


def test_organisation_units_of_a_dead_server_fail(servers, dead_address):
    servers["away"] = Dhis2Credentials(base_url=dead_address, username="u", password="p")
    servers["away"].save("away")
    with pytest.raises(Dhis2Error, match="did not answer"):
        asyncio.run(load("deployments/dhis2_ou/flow.py:dhis2_ou_flow")(server="away"))


def test_canary_returns_the_token_and_where_it_ran():
    returned = load("flows/canary.py:canary")(host="elsewhere", token="t-1")
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
