"""Who reaches what: from other hosts, from outside the fleet, with wrong credentials."""

from __future__ import annotations

import socket

import httpx
import pytest

from tests.fleet.conftest import FLEET, Laptop, Site, connect, members

CONNECT = """
import asyncio, asyncpg, ssl
authority = V.pop("authority", "/etc/prefect/ca.pem")
V["ssl"] = ssl.create_default_context(cafile=authority) if authority else False
async def main():
    try:
        connection = await asyncpg.connect(timeout=10, **V, port=5432, database="prefect")
        print(await connection.fetchval("select current_user"))
    except Exception as error:
        print(type(error).__name__, error)
asyncio.run(main())
"""

S3 = """
import boto3
from botocore.config import Config
from botocore.exceptions import ClientError
client = boto3.client("s3", endpoint_url=V["url"], region_name="us-east-1",
    aws_access_key_id=V["access"], aws_secret_access_key=V["secret"], verify="/etc/prefect/ca.pem",
    config=Config(s3={"addressing_style": "path"}, retries={"max_attempts": 1}))
def attempt(call, **arguments):
    try:
        call(**arguments)
        return "done"
    except ClientError as error:
        return error.response["Error"]["Code"]
"""


def other_addresses() -> list[tuple[str, int]]:
    """Addresses of service hosts on the containers' network, which this machine is a part of."""
    if FLEET.variables.get("fleet_interface"):
        return []
    ports = {"postgres": 5432, "prefect_server": 4200, "rustfs": 9000, "prefect_worker": 8080}
    return [
        (str(host.address), port)
        for host in FLEET.hosts
        for group, port in ports.items()
        if group in host.groups
    ]


def test_services_do_not_answer_outside_the_tailnet() -> None:
    for address, port in other_addresses():
        with pytest.raises(OSError):  # noqa: PT011 - refused or timed out: both are right
            socket.create_connection((address, port), timeout=3).close()
        # The host itself is there, so it is the service that is not.
        socket.create_connection((address, 22), timeout=3).close()


@pytest.mark.parametrize("path", ["version", "admin/settings", "deployments/name/canary/canary"])
def test_api_asks_for_the_password(laptop: Laptop, site: Site, path: str) -> None:
    assert httpx.get(f"{laptop.url}/{path}").status_code == 401
    assert httpx.get(f"{laptop.url}/{path}", auth=("admin", "wrong")).status_code == 401
    right = tuple(site.auth.split(":", 1))
    status = httpx.get(f"{laptop.url}/{path}", auth=right).status_code
    assert status == 200


def test_api_answers_every_host_on_the_tailnet(site: Site) -> None:
    for host in FLEET.hosts:
        code = (
            "curl --silent --max-time 20 --output /dev/null --write-out '%%{http_code}' %s/health"
        )
        assert connect(host.name).check_output(code, site.api) == "200"


def test_database_lets_in_the_server_and_nobody_else(site: Site) -> None:
    server, address = site.first("prefect_server"), site.address("postgres")
    right = {
        "host": address,
        "user": "prefect",
        "password": site.secrets["fleet_database_password"],
    }
    # Answers are looked at apart from the calls: pytest prints the arguments of calls in asserts.
    answer = site.python(server, CONNECT, **right)
    assert answer == "prefect"
    wrong = site.python(server, CONNECT, **{**right, "password": "x" * 20})
    assert "InvalidPassword" in wrong
    for name in set(members("prefect_worker")) - set(members("prefect_server")):
        answer = site.python(connect(name), CONNECT, **right)
        assert "no pg_hba.conf entry" in answer


def test_storage_user_reaches_its_bucket_only(site: Site) -> None:
    worker = site.first("prefect_worker")
    access = {
        "url": site.storage,
        "access": site.secrets["fleet_rustfs_results_access_key"],
        "secret": site.secrets["fleet_rustfs_results_secret_key"],
    }
    script = f"""{S3}
print(attempt(client.list_objects_v2, Bucket="results", MaxKeys=1),
      attempt(client.create_bucket, Bucket="mine"),
      attempt(client.delete_bucket, Bucket="results"))
"""
    answer = site.python(worker, script, **access)
    assert answer == "done AccessDenied AccessDenied"
    wrong = site.python(worker, script, **{**access, "secret": "x" * 40}).split()[0]
    assert wrong in ("SignatureDoesNotMatch", "AccessDenied", "InvalidAccessKeyId")
