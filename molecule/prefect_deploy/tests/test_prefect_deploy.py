"""What is on the server and on the worker hosts after a deploy."""

from __future__ import annotations

import json

import pytest
from conftest import Hosts

WORKERS = ("core1", "worker1")

BLOCK = """
from prefect_aws import S3Bucket
block = S3Bucket.load("results")
block.write_path("tests/scenario", V["text"].encode())
print(block.read_path("tests/scenario").decode())
"""


@pytest.fixture(scope="session", autouse=True)
def _ready(hosts: Hosts) -> None:
    hosts.await_api("worker1")


def test_the_deployments_are_there(hosts: Hosts) -> None:
    said = hosts.output(
        "worker1", "prefect-cli", "deployment", "ls", "--output", "json", user="prefect"
    )
    names = {deployment["name"] for deployment in json.loads(said)}
    assert names >= {"live-score", "dhis2-ou", "canary"}


def test_every_worker_host_has_the_same_release_and_flows_cannot_change_it(hosts: Hosts) -> None:
    releases = {hosts.output(host, "readlink", "-f", "/opt/prefect/current") for host in WORKERS}
    assert len(releases) == 1
    for host in WORKERS:
        script = "find -L /opt/prefect/current/ -writable | head -n 3"
        assert hosts.output(host, "sh", "-c", script, user="prefect") == ""
        hosts.output(host, "cat", "/opt/prefect/flows/live_score.py", user="nobody")


def test_the_result_block_reaches_the_storage_from_another_host(hosts: Hosts) -> None:
    assert hosts.prefect("worker1", BLOCK, text="as written") == "as written"
