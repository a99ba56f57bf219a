"""What hosts that want to join find, and what they do not."""

from __future__ import annotations

from conftest import Hosts

GRPC, METRICS, SERVER = 50443, 9090, 8088


def test_it_is_well_for_a_host_that_is_not_in_the_tailnet(hosts: Hosts) -> None:
    url = f"http://{hosts.address('net1')}:{SERVER}/health"
    argv = ("curl", "--silent", "--fail", "--max-time", "5", url)
    assert "pass" in hosts.eventually("node1", *argv, user="nobody")


def test_nothing_else_of_it_is_reached_from_there(hosts: Hosts) -> None:
    address = hosts.address("net1")
    assert hosts.reaches("node1", address, SERVER)
    assert not hosts.reaches("node1", address, METRICS)
    assert not hosts.reaches("node1", address, GRPC)


def test_its_keys_and_its_socket_are_not_for_other_users(hosts: Hosts) -> None:
    for command in (
        ["headscale", "users", "list"],
        ["cat", "/var/lib/headscale/noise_private.key"],
    ):
        assert hosts.run("net1", *command, user="nobody").returncode != 0
        assert hosts.run("net1", *command).returncode == 0


def test_it_knows_the_fleets_user(hosts: Hosts) -> None:
    assert "fleet" in hosts.output("net1", "headscale", "users", "list")
