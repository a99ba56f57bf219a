"""What the API answers users of its host, of whom the gateway is one: with and without password."""

from __future__ import annotations

import pytest
from conftest import Hosts

READY = "curl --silent --fail --max-time 5 --output /dev/null {}/ready"


@pytest.fixture(scope="session")
def api(hosts: Hosts) -> str:
    """The API's address, once it is ready: after a reboot that takes a while."""
    url = "http://127.0.0.1:4200/api"
    hosts.eventually("core1", "sh", "-c", READY.format(url), user="nobody", seconds=180)
    return url


def test_it_answers_on_its_own_host_alone(hosts: Hosts, api: str) -> None:
    assert not hosts.reaches("client1", hosts.address("core1"), 4200)
    # The host itself is there.
    assert hosts.reaches("client1", hosts.address("core1"), 22)


def status(hosts: Hosts, url: str, auth: str = "") -> str:
    """The HTTP status; the password comes over standard input, for a command line is public."""
    argv = (
        "curl",
        "--silent",
        "--max-time",
        "20",
        "--output",
        "/dev/null",
        "--write-out",
        "%{http_code}",
    )
    setting = f'user = "{auth}"\n' if auth else ""
    return hosts.output("core1", *argv, "--config", "-", url, user="nobody", input=setting)


@pytest.mark.parametrize(
    "path", ["version", "admin/settings", "flows/00000000-0000-0000-0000-000000000000"]
)
def test_it_asks_for_the_password(
    hosts: Hosts, secrets: dict[str, str], api: str, path: str
) -> None:
    assert status(hosts, f"{api}/{path}") == "401"
    assert status(hosts, f"{api}/{path}", "admin:wrong") == "401"
    right = f"admin:{secrets['fleet_auth_password']}"
    answer = status(hosts, f"{api}/{path}", right)
    assert answer == ("404" if path.startswith("flows/") else "200")


def test_its_settings_and_its_data_are_its_own(hosts: Hosts, secrets: dict[str, str]) -> None:
    for user in ("nobody", "prefect"):
        for path in ("/etc/prefect/server.env", "/var/lib/prefect-server"):
            assert hosts.run("core1", "ls", f"{path}/.", user=user).returncode != 0
            assert hosts.run("core1", "cat", path, user=user).returncode != 0
    command_lines = hosts.output("core1", "sh", "-c", "cat /proc/[0-9]*/cmdline | tr '\\0' ' '")
    shown = [name for name, value in secrets.items() if value in command_lines]
    assert shown == []


def test_its_connections_to_the_database_are_kept(hosts: Hosts, api: str) -> None:
    """Each costs a TLS handshake and the preparation of its statements, so none is made twice."""

    def after_requests() -> set[str]:
        """The database's processes that serve the server, after 200 requests, 30 at a time."""
        requests = "curl --silent --parallel --parallel-max 30 --output /dev/null"
        hosts.output("core1", "sh", "-c", f"{requests} '{api}/ready?[1-200]'", user="nobody")
        query = "select pid from pg_stat_activity where usename = 'prefect'"
        return set(hosts.output("core1", "psql", "-Atc", query, user="postgres").split())

    first = after_requests()
    # Five are what Prefect keeps by itself.
    assert len(first) > 5
    assert first <= after_requests()
