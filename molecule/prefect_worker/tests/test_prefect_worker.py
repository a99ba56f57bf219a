"""Workers are well, run flows, and hold nothing that flows must not have."""

from __future__ import annotations

import pytest
from conftest import Hosts

WORKERS = ("worker1", "worker2")

FLOW = """
from prefect import flow
@flow
def scenario(): return 1
"""

# Run on the server's host, as a client of it. Results go to a folder: nothing is deployed here.
RUN = """
from prefect.client.orchestration import get_client
from prefect.deployments import run_deployment
from prefect.filesystems import LocalFileSystem
LocalFileSystem(basepath="/var/lib/prefect/scenario").save("scenario", overwrite=True)
with get_client(sync_client=True) as client:
    client.create_deployment(
        flow_id=client.create_flow_from_name("scenario"),
        name=V["pool"],
        work_pool_name=V["pool"],
        entrypoint="scenario.py:scenario",
        pull_steps=[{"prefect.deployments.steps.set_working_directory": {"directory": "/srv"}}],
        job_variables={"env": {
            "PREFECT_RESULTS_DEFAULT_STORAGE_BLOCK": "local-file-system/scenario",
        }},
    )
run = run_deployment("scenario/" + V["pool"], timeout=V["seconds"], as_subflow=False)
print(run.state.type.value, run.labels["prefect.worker.name"], run.id)
"""


@pytest.mark.parametrize(("pool", "is_warm"), [("default", True), ("projections-local", False)])
def test_a_run_of_each_pool_completes_on_a_worker_host(
    hosts: Hosts, pool: str, is_warm: bool
) -> None:
    for worker in WORKERS:
        hosts.output(worker, "sh", "-c", "cat > /srv/scenario.py", input=FLOW)
    values = {"pool": pool, "seconds": 150}
    # A worker that has just started leaves runs to the stock command until it can fork them.
    for _ in range(5):
        state, worker, run = hosts.prefect("core1", RUN, **values).split()
        assert state == "COMPLETED"
        host = worker.removesuffix(f"-{pool}")
        assert host in WORKERS
        unit = f"prefect-worker@{pool}.service"
        journal = hosts.output(host, "journalctl", "--boot", "--output=cat", f"--unit={unit}")
        was_forked = f"flow run {run}: ended with status 0" in journal
        if was_forked == is_warm:
            break
    assert was_forked == is_warm


@pytest.mark.parametrize("worker", WORKERS)
def test_each_worker_says_to_other_hosts_that_it_is_well(hosts: Hosts, worker: str) -> None:
    for port in (8080, 8081):
        url = f"http://{hosts.address(worker)}:{port}/health"
        argv = ("curl", "--silent", "--fail", "--max-time", "5", "--output", "/dev/null", url)
        hosts.eventually("core1", *argv, user="nobody")


def test_flows_can_read_none_of_the_secrets_that_are_not_theirs(
    hosts: Hosts, secrets: dict[str, str]
) -> None:
    others = {
        name
        for name in secrets
        if "database" in name or "root" in name or "rpc" in name or "ca_key" in name
    }
    # As patterns over standard input, for a command line is public.
    for worker in WORKERS:
        search = "grep -rlsF -f - /etc /srv /opt/prefect/releases /var/lib /run/systemd"
        found = hosts.run(
            worker, "sh", "-c", search, input="\n".join(secrets[name] for name in others)
        )
        assert found.stdout == ""
