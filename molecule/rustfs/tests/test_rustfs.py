"""What the owner of a bucket, a stranger and another host's user can do."""

from __future__ import annotations

import json

import pytest
from conftest import Hosts

from tests.fleet.programs import S3

CA_FILE = "/etc/prefect/ca.pem"


@pytest.fixture(scope="session")
def url(hosts: Hosts) -> str:
    """Where it says that it is ready, to a client that verifies it."""
    address = f"https://{hosts.address('store1')}:9000"
    argv = ("curl", "--silent", "--fail", "--max-time", "5", "--output", "/dev/null")
    health = f"{address}/health/ready"
    hosts.eventually("client1", *argv, "--cacert", CA_FILE, health, user="nobody")
    return address


def ask(hosts: Hosts, calls: list[str], **values: str) -> list[str]:
    """What became of S3 calls, made by a user without rights on another host."""
    program = f"V = {values!r}\n{S3}\n" + "".join(f"print(attempt({call}))\n" for call in calls)
    return hosts.output("client1", "python3", "-", user="nobody", input=program).splitlines()


def test_each_user_has_its_bucket_and_nothing_else(
    hosts: Hosts, secrets: dict[str, str], url: str
) -> None:
    buckets = ["results", "manifests"]
    for own, other in (buckets, buckets[::-1]):
        answers = ask(
            hosts,
            [
                f'client.put_object, Bucket="{own}", Key="tests/a", Body=b"1"',
                f'client.delete_object, Bucket="{own}", Key="tests/a"',
                f'client.put_object, Bucket="{other}", Key="tests/a", Body=b"1"',
                f'client.list_objects_v2, Bucket="{other}"',
                'client.create_bucket, Bucket="mine"',
                f'client.delete_bucket, Bucket="{own}"',
            ],
            url=url,
            access=secrets[f"fleet_rustfs_{own}_access_key"],
            secret=secrets[f"fleet_rustfs_{own}_secret_key"],
        )
        assert answers == ["done", "done"] + ["AccessDenied"] * 4


def test_a_wrong_key_is_refused(hosts: Hosts, secrets: dict[str, str], url: str) -> None:
    access = secrets["fleet_rustfs_results_access_key"]
    call = ['client.list_objects_v2, Bucket="results"']
    (answer,) = ask(hosts, call, url=url, access=access, secret="x" * 40)
    assert answer in ("SignatureDoesNotMatch", "AccessDenied", "InvalidAccessKeyId")


def test_nothing_is_read_without_a_key(hosts: Hosts, url: str) -> None:
    argv = (
        "curl",
        "--silent",
        "--cacert",
        CA_FILE,
        "--output",
        "/dev/null",
        "--write-out",
        "%{http_code}",
    )
    assert hosts.output("client1", *argv, f"{url}/results?list-type=2", user="nobody") == "403"


def test_its_root_keys_are_not_for_other_users(hosts: Hosts, secrets: dict[str, str]) -> None:
    for path in ("/etc/rustfs/secret_key", "/etc/rustfs/rustfs.env"):
        assert hosts.run("store1", "cat", path, user="nobody").returncode != 0
    command_lines = hosts.output("store1", "sh", "-c", "cat /proc/[0-9]*/cmdline | tr '\\0' ' '")
    assert json.dumps([s for s in secrets.values() if s in command_lines]) == "[]"
