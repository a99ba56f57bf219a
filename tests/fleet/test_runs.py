"""Flow runs end Completed, started from a laptop, and their results are in RustFS."""

from __future__ import annotations

import re
from uuid import UUID

import pytest
from prefect.results import ResultRecordMetadata

from tests.fleet.conftest import Laptop, Site

DEPLOYMENTS = ["dhis2_connection/dhis2-connection", "dhis2_ou/dhis2-ou", "live_score/live-score"]


def storage_key(laptop: Laptop, flow_run: UUID) -> str:
    """Name of the object that holds a flow run's result."""
    run = laptop.ask(lambda client: client.read_flow_run(flow_run))
    assert run.state is not None
    assert run.state.is_completed()
    assert isinstance(run.state.data, ResultRecordMetadata)
    return run.state.data.storage_key


@pytest.mark.parametrize("deployment", DEPLOYMENTS)
def test_run_from_a_laptop_completes(site: Site, laptop: Laptop, deployment: str) -> None:
    done = laptop.prefect("deployment", "run", deployment, "--watch", "--watch-timeout", "240")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Completed" in done.stdout
    flow_run = re.search(r"UUID: ([0-9a-f-]{36})", done.stdout)
    assert flow_run, done.stdout
    key = storage_key(laptop, UUID(flow_run.group(1)))
    size = site.ask_results(
        'print(client.head_object(Bucket="results", Key=V["key"])["ContentLength"])', key=key
    )
    assert int(size) > 0


def test_the_laptop_without_the_password_is_refused(laptop: Laptop) -> None:
    env = laptop.folder / ".env"
    whole = env.read_text()
    try:
        env.write_text(whole.splitlines()[0] + "\n")
        refused = laptop.prefect("deployment", "ls")
    finally:
        env.write_text(whole)
    assert refused.returncode != 0
    assert "401" in refused.stdout + refused.stderr
