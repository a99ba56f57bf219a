"""What is reached of a guarded host, by a neighbour of the fleet and by one that is none."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from conftest import SCENARIO, Hosts

from lab.fleet import PROJECT
from lab.podman import podman

FOR_NEIGHBOUR, FOR_EVERYBODY, FOR_NOBODY = 8000, 8001, 8002
PLAYBOOK = "molecule/firewall/converge.yml"


def stranger_reaches(address: str, port: int) -> bool:
    """Whether a machine on the same network that is no host of the fleet gets a connection."""
    script = f"exec 3<>/dev/tcp/{address}/{port}"
    name = SCENARIO.fleet.container("apt-cache")
    return podman("exec", name, "timeout", "3", "bash", "-c", script, check=False).returncode == 0


def ports_reached(reach: Callable[[int], bool]) -> set[int]:
    """Which ports, asked all at once, for each that nobody answers at takes seconds."""
    ports = range(FOR_NEIGHBOUR - 2, FOR_NOBODY + 2)
    with ThreadPoolExecutor(len(ports)) as asking:
        return {
            port for port, reached in zip(ports, asking.map(reach, ports), strict=True) if reached
        }


def converge(*settings: str) -> subprocess.Popen[str]:
    """Begin a converge of the guarded host."""
    argv = ["ansible-playbook", f"--inventory={SCENARIO.fleet.inventory}", PLAYBOOK]
    argv += [f"--extra-vars={setting}" for setting in (f"fleet_project={PROJECT}", *settings)]
    environment = {name: value for name, value in os.environ.items() if "ANSIBLE" not in name}
    return subprocess.Popen(
        argv, cwd=PROJECT, env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def rules(hosts: Hosts) -> str:
    """The rules in the guarded host's kernel, read past its network."""
    return SCENARIO.fleet.run("guarded1", "nft --stateless list table inet prefect_fleet").stdout


def eventually(
    hosts: Hosts, wanted: str, *, there: bool, over: Callable[[], object] = lambda: False
) -> None:
    """Wait until a word is in the rules, or no longer; not once `over` says that it won't be."""
    deadline = time.monotonic() + 120
    while (wanted in (found := rules(hosts))) != there:
        assert not over(), found
        assert time.monotonic() < deadline, found
        time.sleep(0.3)


def tried(hosts: Hosts, *settings: str) -> subprocess.Popen[str]:
    """Begin a converge whose rules forbid ssh, and wait until the host tries them."""
    process = converge("firewall_ssh_port=2222", *settings)

    def ended() -> bool:
        return process.poll() is not None

    try:
        eventually(hosts, "tcp dport 2222", there=True, over=ended)
    except AssertionError as error:
        if not ended():
            # It goes on for ever where it waits for the host.
            os.killpg(process.pid, signal.SIGKILL)
        said, _ = process.communicate()
        raise AssertionError(f"{error}\nThe converge said:\n{said}") from None
    return process


def test_a_neighbour_of_the_fleet_reaches_what_is_for_it(hosts: Hosts) -> None:
    address = hosts.address("guarded1")
    reached = ports_reached(lambda port: hosts.reaches("neighbour1", address, port))
    assert reached == {FOR_NEIGHBOUR, FOR_EVERYBODY}
    assert hosts.reaches("neighbour1", address, 22)


def test_a_stranger_reaches_what_is_for_everybody(hosts: Hosts) -> None:
    address = hosts.address("guarded1")
    assert ports_reached(lambda port: stranger_reaches(address, port)) == {FOR_EVERYBODY}
    assert stranger_reaches(address, 22)


def test_ipv6_is_no_way_around(hosts: Hosts) -> None:
    said = hosts.output("guarded1", "ip", "-6", "-brief", "address", "show", "eth0")
    address = next(word for word in said.split() if word.startswith("fe80:")).split("/")[0]
    hosts.output("neighbour1", "ping", "-c", "1", "-W", "5", f"{address}%eth0")
    reached = ports_reached(lambda port: hosts.reaches("neighbour1", f"{address}%eth0", port))
    assert reached == {FOR_EVERYBODY}


def test_the_host_reaches_itself_and_others_and_answers_pings(hosts: Hosts) -> None:
    assert hosts.reaches("guarded1", "127.0.0.1", FOR_NOBODY)
    assert hosts.reaches("guarded1", hosts.address("guarded1"), FOR_NOBODY)
    assert hosts.reaches("guarded1", hosts.address("neighbour1"), 22)
    hosts.output("neighbour1", "ping", "-c", "1", "-W", "5", hosts.address("guarded1"))


def test_it_forwards_nothing(hosts: Hosts) -> None:
    """A neighbour that takes the host for its router gets no packet through it."""
    beyond, host = "192.0.2.1", hosts.address("guarded1")
    SCENARIO.fleet.run(
        "guarded1",
        # Without IPv6 only what is forwarded, and the search for its receiver, is sent there.
        "sysctl -q -w net.ipv4.ip_forward=1; ip link add beyond0 type veth peer beyond1; "
        "sysctl -q -w net.ipv6.conf.beyond0.disable_ipv6=1; ip link set beyond1 up; "
        "ip link set beyond0 up; ip route add 192.0.2.0/24 dev beyond0",
        check=True,
    )
    count = "cat /sys/class/net/beyond0/statistics/tx_packets"
    before = SCENARIO.fleet.run("guarded1", count, check=True).stdout
    try:
        hosts.output("neighbour1", "ip", "route", "add", f"{beyond}/32", "via", host)
        assert not hosts.reaches("neighbour1", beyond, 22)
        assert SCENARIO.fleet.run("guarded1", count, check=True).stdout == before
    finally:
        hosts.run("neighbour1", "ip", "route", "del", f"{beyond}/32")
        SCENARIO.fleet.run(
            "guarded1", "ip link del beyond0; sysctl -q -w net.ipv4.ip_forward=0", check=True
        )


def test_rules_of_others_stay_and_their_reload_does_not_open_the_host(hosts: Hosts) -> None:
    hosts.output("guarded1", "nft", "add", "table", "inet", "somebody_else")
    hosts.output("guarded1", "systemctl", "restart", "prefect-firewall.service")
    assert "somebody_else" in hosts.output("guarded1", "nft", "list", "tables")
    hosts.output("guarded1", "systemctl", "start", "nftables.service")
    for verb in ("reload", "restart", "stop", "start"):
        # Debian's own rules begin with `flush ruleset`.
        hosts.output("guarded1", "nft", "add", "table", "inet", "somebody_else")
        hosts.output("guarded1", "systemctl", verb, "nftables.service")
        assert "somebody_else" not in hosts.output("guarded1", "nft", "list", "tables")
        assert not hosts.reaches("neighbour1", hosts.address("guarded1"), FOR_NOBODY)
        assert hosts.reaches("neighbour1", hosts.address("guarded1"), FOR_NEIGHBOUR)
    hosts.output("guarded1", "systemctl", "stop", "nftables.service")


def test_rules_that_forbid_ssh_are_taken_back(hosts: Hosts) -> None:
    before = rules(hosts)
    process = tried(hosts, "firewall_confirm_seconds=20")
    assert not stranger_reaches(hosts.address("guarded1"), 22)
    said, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "The new firewall rules kept ssh from guarded1. The host has taken them back" in said
    assert rules(hosts) == before
    assert hosts.reaches("neighbour1", hosts.address("guarded1"), 22)
    # What is loaded at boot is what was confirmed.
    assert "2222" not in hosts.output("guarded1", "cat", "/etc/prefect-firewall.nft")


def test_an_interrupted_converge_is_taken_back(hosts: Hosts) -> None:
    before = rules(hosts)
    process = tried(hosts, "firewall_confirm_seconds=20")
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    eventually(hosts, "tcp dport 2222", there=False)
    assert rules(hosts) == before
    # A whole one puts right what the other left.
    said, _ = (process := converge()).communicate(timeout=300)
    assert process.returncode == 0, said
    assert rules(hosts) == before
    assert hosts.run("guarded1", "cmp", *hosts.output("guarded1", "sh", "-c",
        "ls /etc/prefect-firewall*").split()).returncode == 0  # fmt: skip


def test_it_can_be_left_out(hosts: Hosts) -> None:
    said, _ = (process := converge("fleet_firewall_enabled=false")).communicate(timeout=300)
    assert process.returncode == 0, said
    assert rules(hosts) == ""
    assert hosts.reaches("neighbour1", hosts.address("guarded1"), FOR_NOBODY)
    said, _ = (process := converge()).communicate(timeout=300)
    assert process.returncode == 0, said
    assert not hosts.reaches("neighbour1", hosts.address("guarded1"), FOR_NOBODY)
