"""What a client sees of a service with a certificate of the fleet's authority."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import yaml
from conftest import Hosts

from lab.scenario import Scenario

CA_FILE = "/etc/prefect/ca.pem"
CERTIFICATE, KEY = "/etc/tool/certificate.pem", "/etc/tool/key.pem"
PORT = 8443


@pytest.fixture(scope="module", autouse=True)
def service(hosts: Hosts) -> Iterator[None]:
    """A service on the first host that shows its certificate; it reads it for each start."""
    hosts.output(
        "host1", "systemd-run", "--quiet", "--unit=tool", "--collect", "--uid=nobody",
        "--gid=games", "openssl", "s_server", "-accept", str(PORT), "-cert", CERTIFICATE,
        "-key", KEY, "-quiet",
    )  # fmt: skip
    yield
    hosts.output("host1", "systemctl", "stop", "tool")


def verify(hosts: Hosts, *arguments: str, authority: str = CA_FILE) -> str:
    """How a client without rights on another host finds the service's certificate."""
    target = f"{hosts.address('host1')}:{PORT}"
    done = hosts.run(
        "client1", "openssl", "s_client", "-connect", target, "-CAfile", authority,
        "-no-CApath", "-no-CAstore", "-verify_return_error", *arguments, user="nobody",
        input="",
    )  # fmt: skip
    lines = (done.stdout + done.stderr).splitlines()
    if done.returncode == 0:
        return next(line for line in lines if line.startswith("Verify return code"))
    return next(line for line in lines if "verify error" in line)


@pytest.mark.parametrize("address", ["-verify_ip", "-verify_hostname"])
def test_a_client_verifies_the_service_by_each_of_its_names(hosts: Hosts, address: str) -> None:
    name = hosts.address("host1") if address == "-verify_ip" else "host1"
    hosts.eventually("client1", "openssl", "s_client", "-connect", f"host1:{PORT}", user="nobody")
    assert verify(hosts, address, name) == "Verify return code: 0 (ok)"


def test_another_host_cannot_be_taken_for_it(hosts: Hosts) -> None:
    assert "IP address mismatch" in verify(hosts, "-verify_ip", hosts.address("client1"))
    assert "hostname mismatch" in verify(hosts, "-verify_hostname", "client1")


def test_those_who_do_not_know_the_authority_refuse_it(hosts: Hosts) -> None:
    everybodys = "/etc/ssl/certs/ca-certificates.crt"
    assert "unable to get local issuer certificate" in verify(hosts, authority=everybodys)


def test_the_key_is_the_services_alone(hosts: Hosts) -> None:
    assert hosts.run("host1", "cat", KEY, user="nobody").returncode != 0
    assert hosts.run("host1", "cat", KEY, user="games").returncode == 0
    assert hosts.output("host1", "stat", "--format=%U:%G %a", KEY) == "root:games 640"


def test_a_client_has_the_authority_and_no_key(
    hosts: Hosts, scenario: Scenario, secrets: dict[str, str]
) -> None:
    known = hosts.output("client1", "cat", CA_FILE, user="nobody")
    inventory = scenario.fleet.inventory / "group_vars/all/secrets.yml"
    assert known == yaml.safe_load(inventory.read_text())["fleet_ca_certificate"].strip()
    argv = (
        "grep",
        "-rlsF",
        secrets["fleet_ca_key"],
        "/etc",
        "/root",
        "/tmp",
        "/var/lib",
        "/var/tmp",
    )
    for host in ("host1", "client1"):
        found = hosts.run(host, *argv).stdout
        assert found == ""


def days_left(hosts: Hosts, days: int) -> bool:
    """Whether the certificate is still good after so many days."""
    seconds = str(days * 86400)
    argv = ("openssl", "x509", "-in", CERTIFICATE, "-noout", "-checkend", seconds)
    return hosts.run("host1", *argv, user="nobody").returncode == 0


def test_a_certificate_about_to_end_is_renewed_for_the_same_key(
    hosts: Hosts, scenario: Scenario
) -> None:
    key = hosts.output("host1", "sha256sum", KEY)
    short = ("--extra-vars=certificates_days=119", "--extra-vars=certificates_renew_days=9")
    assert scenario.converge(*short, "--extra-vars=certificates_renew_now=true").changed
    assert scenario.converge(*short).changed == {}, "119 days are enough there"
    assert days_left(hosts, 118)
    assert not days_left(hosts, 119)
    # As configured, 120 days have to be left.
    planned = scenario.converge("--check", "--diff")
    renewed = scenario.converge()
    assert planned.changed == renewed.changed == {"host1": ["Install the certificates"]}
    assert days_left(hosts, 364)
    assert hosts.output("host1", "sha256sum", KEY) == key
    assert scenario.converge().changed == {}
    hosts.output("host1", "systemctl", "restart", "tool")
    hosts.eventually("client1", "openssl", "s_client", "-connect", f"host1:{PORT}", user="nobody")
    assert verify(hosts, "-verify_hostname", "host1") == "Verify return code: 0 (ok)"
