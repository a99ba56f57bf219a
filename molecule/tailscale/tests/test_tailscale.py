"""Hosts reach one another over the tailnet, and keep their way into it to themselves."""

from __future__ import annotations

from conftest import Hosts


def tailnet_address(hosts: Hosts, host: str) -> str:
    return hosts.eventually(host, "tailscale", "ip", "-4")


def test_hosts_reach_one_another_by_their_tailnet_addresses(hosts: Hosts) -> None:
    for one, other in (("net1", "node1"), ("node1", "net1")):
        address = tailnet_address(hosts, other)
        assert address.startswith("100.")
        # ssh listens everywhere: what is looked at is the way there.
        script = f"exec 3<>/dev/tcp/{address}/22 && head -c 4 <&3"
        argv = ("timeout", "10", "bash", "-c", script)
        assert hosts.eventually(one, *argv, user="nobody") == "SSH-"
        route = hosts.output(one, "ip", "route", "get", address, user="nobody")
        assert " dev tailscale0 " in route


def test_other_users_cannot_take_a_host_out_of_the_tailnet(hosts: Hosts) -> None:
    assert hosts.run("node1", "tailscale", "down", user="nobody").returncode != 0
    state = "/var/lib/tailscale/tailscaled.state"
    assert hosts.run("node1", "cat", state, user="nobody").returncode != 0
    assert hosts.output("node1", "tailscale", "status")


def test_the_key_that_let_it_in_is_gone_and_no_second_host_can_use_it(hosts: Hosts) -> None:
    for host in ("net1", "node1"):
        assert hosts.run(host, "test", "-e", "/run/tailscale-auth-key").returncode == 1
    keys = hosts.output("net1", "headscale", "preauthkeys", "list", "--output", "json")
    assert '"used": true' in keys or '"used":true' in keys
    assert '"reusable": true' not in keys
