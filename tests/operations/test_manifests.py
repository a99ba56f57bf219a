"""Run manifests tell the truth about runs that ended well, failed, were cancelled or killed."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import yaml
from prefect.client.orchestration import PrefectClient

from prefect_fleet.canary.__main__ import queue_of
from tests.fleet.conftest import FLEET, PROJECT, Laptop, Site, connect, members

WORKERS = members("prefect_worker")
Manifest = dict[str, Any]
_WAIT_SECONDS = 240


def read(host: str, run: str, *options: str) -> Manifest | None:
    """The manifest of a run as `host` shows it, None where there is none."""
    done = connect(host).run(f"prefect-manifests show {run} {' '.join(options)}")
    return json.loads(done.stdout) if done.rc == 0 else None


def wait_for(host: str, run: str, *options: str, until: Callable[[Manifest], bool]) -> Manifest:
    """The manifest once it is as `until` says; fails with the last one, and what workers said."""
    deadline = time.monotonic() + _WAIT_SECONDS
    manifest = None
    while time.monotonic() < deadline:
        manifest = read(host, run, *options)
        if manifest and until(manifest):
            return manifest
        time.sleep(2)
    shown = connect(host).run(f"prefect-manifests show {run} {' '.join(options)}")
    journal = connect(host).check_output(
        "journalctl --unit 'prefect-worker@*' --unit prefect-manifests --no-hostname --lines 80"
    )
    problem = f"{run} on {host} is not as expected after {_WAIT_SECONDS} s"
    seen = json.dumps(manifest, indent=1)
    pytest.fail("\n".join([problem, seen, shown.stderr, journal]), pytrace=False)


def ended(manifest: Manifest) -> bool:
    return manifest["state"]["type"] in {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}


def wait_for_copy(host: str, run: str) -> Manifest:
    """The manifest of an ended run, once its copy in the bucket is the same as the host's own."""
    wait_for(host, run, until=ended)
    return wait_for(
        host, run, "--from-store", until=lambda copy: ended(copy) and copy == read(host, run)
    )


def start(laptop: Laptop, deployment: str, queue: str | None = None, **parameters: object) -> str:
    """Start a run and return its id."""

    async def create(client: PrefectClient) -> str:
        found = await client.read_deployment_by_name(deployment)
        run = await client.create_flow_run_from_deployment(
            found.id, parameters=parameters, work_queue_name=queue
        )
        return str(run.id)

    return laptop.ask(create)


@contextlib.contextmanager
def canary_worker(host: str) -> Iterator[None]:
    """The worker that takes the canary's runs on one host."""
    connect(host).check_output("systemctl start prefect-worker@canary")
    try:
        yield
    finally:
        connect(host).run("systemctl stop prefect-worker@canary")


def start_canary(laptop: Laptop, host: str, seconds: int) -> tuple[str, Manifest]:
    """Start a canary run on a host; gives back its id and its manifest while it is running."""
    run = start(laptop, "canary/canary", queue_of(host), seconds=seconds)
    return run, wait_for(host, run, until=lambda manifest: manifest["process"]["pid"] > 0)


def host_of(run: str) -> str:
    """The worker host that has a run's manifest."""
    deadline = time.monotonic() + _WAIT_SECONDS
    while time.monotonic() < deadline:
        for host in WORKERS:
            if read(host, run):
                return host
        time.sleep(2)
    pytest.fail(f"no worker host has a manifest of {run}", pytrace=False)


def test_a_completed_run_is_described_in_full(laptop: Laptop, site: Site) -> None:
    run = start(laptop, "dhis2_ou/dhis2-ou")
    # What the API and the result storage know of it is added some seconds after its end.
    manifest = wait_for(
        host_of(run), run, "--from-store", until=lambda copy: ended(copy) and not copy["missing"]
    )
    assert manifest["state"]["type"] == "COMPLETED"
    assert manifest["run"]["parameters"]["server"] == "dhis2"
    assert manifest["deployment"]["name"] == "dhis2-ou"
    assert manifest["worker"]["pool"] == "default"
    host = connect(manifest["worker"]["host"])
    assert manifest["code"]["release"] in host.check_output("readlink /opt/prefect/current")
    assert manifest["code"]["lock"] in host.check_output("readlink /opt/prefect/venv")
    # The result's hash is that of the object in RustFS.
    script = """
import hashlib
body = client.get_object(Bucket="results", Key=V["key"])["Body"].read()
print(len(body), hashlib.sha256(body).hexdigest())
"""
    found = site.ask_results(script, key=manifest["result"]["storage_key"])
    assert found == f"{manifest['result']['size']} {manifest['result']['sha256']}"
    (artifact,) = manifest["artifacts"]
    assert artifact["size"] > 0


def test_the_organisation_units_in_rustfs_are_those_of_the_server(
    laptop: Laptop, site: Site
) -> None:
    run = start(laptop, "dhis2_ou/dhis2-ou")
    ended_run = wait_for(host_of(run), run, until=ended)
    assert ended_run["state"]["type"] == "COMPLETED"
    inventory = yaml.safe_load((FLEET.inventory / "hosts.yml").read_text())
    (server,) = inventory["all"]["vars"]["prefect_deploy_dhis2_servers"]
    script = """
import io, sys
import httpx, pyarrow.parquet
body = client.get_object(Bucket="results", Key="dhis2/dhis2/organisation-units.parquet")["Body"]
kept = pyarrow.parquet.read_table(io.BytesIO(body.read())).to_pylist()
answer = httpx.get(V["dhis2"] + "/api/organisationUnits", auth=(V["user"], V["password"]),
    params=dict(paging="false", fields="id,name,level,path"), trust_env=False)
served = answer.json()["organisationUnits"]
assert len(served) > 10
key = lambda unit: unit["id"]
short = [dict((name, unit[name]) for name in ("id", "name", "level", "path")) for unit in kept]
assert sorted(short, key=key) == sorted(served, key=key), (short[:2], served[:2])
print(len(served))
"""
    found = site.ask_results(
        script,
        dhis2=server["base_url"],
        user=server["username"],
        password=server["password"],
    )
    assert int(found) > 0


def test_a_failed_run_shows_why(laptop: Laptop) -> None:
    run = start(laptop, "dhis2_ou/dhis2-ou", server="nowhere")
    manifest = wait_for_copy(host_of(run), run)
    assert manifest["state"]["type"] == "FAILED"
    assert "nowhere" in manifest["error"]["traceback"]


def test_a_cancelled_run_is_shown_as_cancelled(laptop: Laptop, site: Site) -> None:
    with canary_worker(WORKERS[0]):
        run, _ = start_canary(laptop, WORKERS[0], 600)
        assert laptop.prefect("flow-run", "cancel", run).returncode == 0
        manifest = wait_for_copy(WORKERS[0], run)
    assert manifest["state"]["type"] == "CANCELLED"


def test_a_killed_run_is_shown_as_crashed(laptop: Laptop, site: Site) -> None:
    with canary_worker(WORKERS[0]):
        run, manifest = start_canary(laptop, WORKERS[0], 600)
        connect(WORKERS[0]).check_output(f"kill -9 {manifest['process']['pid']}")
        manifest = wait_for_copy(WORKERS[0], run)
    assert manifest["state"]["type"] == "CRASHED"


def test_a_power_cut_is_shown_as_a_crash_when_the_host_is_back(laptop: Laptop, site: Site) -> None:
    host = WORKERS[-1]
    with canary_worker(host):
        run, _ = start_canary(laptop, host, 600)
        # What is known of the run is safe before the host is lost.
        running = wait_for(host, run, "--from-store", until=lambda _: True)
        assert not ended(running)
        subprocess.run(
            [sys.executable, "-m", "lab", "--fleet", FLEET.name, "reboot", "--hard", host],
            cwd=PROJECT,
            check=True,
        )
        manifest = wait_for_copy(host, run)
    assert manifest["state"]["type"] == "CRASHED"
    assert manifest["end"] is not None


def test_manifests_wait_for_object_storage_that_is_away(laptop: Laptop, site: Site) -> None:
    store, host = site.first("rustfs"), WORKERS[0]
    store.check_output("systemctl stop rustfs")
    try:
        # Fails before it writes anything there, and leaves no result.
        run = start(laptop, "dhis2_ou/dhis2-ou", server="nowhere")
        host = host_of(run)
        wait_for(host, run, until=ended)
        waiting = connect(host).check_output("find /var/lib/prefect/manifests -name '*%s*'", run)
        assert len(waiting.splitlines()) > 1, "nothing says that a copy is still to be made"
    finally:
        store.check_output("systemctl start rustfs")
    wait_for_copy(host, run)


def test_manifests_are_read_while_the_api_is_away(site: Site) -> None:
    server = site.first("prefect_server")
    server.check_output("systemctl stop prefect-server")
    try:
        listed = connect(WORKERS[0]).check_output("prefect-manifests ls --from-store --json")
        verified = connect(WORKERS[0]).run("prefect-manifests verify")
    finally:
        server.check_output("systemctl start prefect-server")
    hosts = {json.loads(line)["worker"]["host"] for line in listed.splitlines()}
    assert hosts == set(WORKERS)
    assert verified.rc == 0, verified.stdout + verified.stderr
