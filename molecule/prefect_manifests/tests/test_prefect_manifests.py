"""A run's manifest comes to the bucket by itself, and its keys stay where they are."""

from __future__ import annotations

import json

from conftest import Hosts

FETCH = """
import time, boto3
from botocore.config import Config
client = boto3.client("s3", endpoint_url=V["url"], region_name="us-east-1",
    verify="/etc/prefect/ca.pem",
    aws_access_key_id=V["access"], aws_secret_access_key=V["secret"],
    config=Config(s3={"addressing_style": "path"}))
deadline = time.monotonic() + 150
while time.monotonic() < deadline:
    for entry in client.list_objects_v2(Bucket="manifests").get("Contents", []):
        if V["run"] in entry["Key"]:
            text = client.get_object(Bucket="manifests", Key=entry["Key"])["Body"].read().decode()
            if "COMPLETED" in text:
                raise SystemExit(print(text))
    time.sleep(2)
raise SystemExit("no manifest of the run in the bucket")
"""

RUN = """
from prefect.deployments import run_deployment
run = run_deployment("live_score/live-score", timeout=150, as_subflow=False)
print(run.state.type.value, run.id)
"""


def test_the_manifest_of_a_run_is_read_from_the_bucket_by_another_host(
    hosts: Hosts, secrets: dict[str, str]
) -> None:
    hosts.await_api("client1")
    state, run = hosts.prefect("client1", RUN).split()
    assert state == "COMPLETED"
    program = "import json; print(json.load(open('/etc/prefect/manifests.json'))['endpoint_url'])"
    values = {
        "url": hosts.output("core1", "python3", "-c", program),
        "access": secrets["fleet_rustfs_manifests_access_key"],
        "secret": secrets["fleet_rustfs_manifests_secret_key"],
        "run": run,
    }
    text = f"V = {values!r}\n{FETCH}"
    said = hosts.run("client1", "python3", "-", user="nobody", input=text)
    assert said.returncode == 0, said.stderr
    assert json.loads(said.stdout)["state"]["type"] == "COMPLETED"
    shown = json.loads(hosts.output("core1", "prefect-manifests", "show", run))
    assert shown["state"]["type"] == "COMPLETED"


def test_flows_cannot_read_the_buckets_keys(hosts: Hosts) -> None:
    for user in ("prefect", "nobody"):
        refused = hosts.run("core1", "cat", "/etc/prefect/manifests.json", user=user)
        assert refused.returncode != 0
        refused = hosts.run("core1", "prefect-manifests", "ls", user=user)
        assert "cannot read" in refused.stderr
