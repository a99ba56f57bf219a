"""Who reaches what: from other hosts, from outside the fleet, with wrong credentials."""

from __future__ import annotations

import json

import httpx
import pytest

from lab.fleet import Host as Machine
from tests.fleet.conftest import FLEET, Laptop, Site, connect, members, neighbour
from tests.fleet.programs import CONNECT

# Runs on a machine of the same network that is in no tailnet: which of a host's ports answer
# (open), say that nothing listens (closed), or say nothing (filtered).
SCAN = """
import asyncio, errno, json, socket, sys
request = json.load(sys.stdin)
async def tcp(port, gate):
    async with gate:
        try:
            _, writer = await asyncio.wait_for(asyncio.open_connection(request["address"], port), 4)
        except (TimeoutError, asyncio.TimeoutError):
            return "filtered"
        except OSError as error:
            return "closed" if error.errno == errno.ECONNREFUSED else "filtered"
        writer.close()
        return "open"
async def udp(port, gate):
    async with gate:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.setblocking(False)
            sender.connect((request["address"], port))
            loop = asyncio.get_running_loop()
            try:
                await loop.sock_sendall(sender, b"?")
                await asyncio.wait_for(loop.sock_recv(sender, 64), 2)
            except (TimeoutError, asyncio.TimeoutError):
                return "filtered"
            except OSError:
                return "closed"
            return "open"
async def main():
    gate = asyncio.Semaphore(200)
    ways = {"tcp": tcp, "udp": udp}
    looks = [(kind, port) for kind in ways for port in request[kind]]
    found = await asyncio.gather(*(ways[kind](port, gate) for kind, port in looks))
    print(json.dumps([[kind, port, state] for (kind, port), state in zip(looks, found)]))
asyncio.run(main())
"""
SAMPLE = {
    "tcp": [1, 21, 23, 25, 53, 80, 111, 443, 2049, 3306, 4200, 5432, 6379, 8080, 9000, 9090, 65535],
    "udp": [1, 53, 111, 123, 161, 5353, 41642, 65535],
}
USES_TAILSCALE = not str(FLEET.variables.get("fleet_interface", "")).startswith("eth")


def listening(host: str) -> dict[str, list[int]]:
    """All ports on which something listens on a host, by protocol."""
    ports = {}
    for kind, flag in (("tcp", "t"), ("udp", "u")):
        said = connect(host).check_output(f"ss --no-header -ln{flag}")
        ports[kind] = sorted({int(line.split()[3].rsplit(":", 1)[1]) for line in said.splitlines()})
    return ports


def answering(address: str, ports: dict[str, list[int]]) -> set[tuple[str, int]]:
    """Ports of an address that the neighbour has any answer from."""
    both = {kind: sorted({*ports[kind], *SAMPLE[kind]}) for kind in SAMPLE}
    request = json.dumps({"address": address, **both})
    found = json.loads(neighbour("python3", "-c", SCAN, input=request))
    return {(kind, port) for kind, port, state in found if state != "filtered"}


@pytest.mark.parametrize("host", FLEET.hosts, ids=lambda host: host.name)
def test_a_neighbour_outside_the_fleet_finds_ssh_and_nothing_else(
    site: Site, host: Machine
) -> None:
    ports = listening(host.name)
    assert ports["tcp"] != [22]
    allowed = {("tcp", 22)}
    if "headscale" in host.groups:  # asked by hosts that are not in the tailnet yet
        allowed.add(("tcp", 8088))
    assert answering(str(host.address), ports) == allowed


@pytest.mark.skipif(
    not USES_TAILSCALE, reason="the fleet's addresses are the neighbour's network's"
)
@pytest.mark.parametrize("host", FLEET.hosts, ids=lambda host: host.name)
def test_a_neighbour_that_routes_tailnet_addresses_by_hand_finds_nothing(
    site: Site, host: Machine
) -> None:
    address = site.addresses[host.name]
    neighbour("ip", "route", "add", f"{address}/32", "via", str(host.address))
    try:
        assert answering(address, listening(host.name)) == set()
    finally:
        neighbour("ip", "route", "del", f"{address}/32")


def reached(host: str, targets: set[tuple[str, int]]) -> set[tuple[str, int]]:
    """Those of the addresses and ports that a host of the fleet gets a connection to."""
    # All at once: whatever is dropped takes as long as the patience with it.
    attempt = "timeout 5 bash -c 'exec 3<>/dev/tcp/'$t 2>/dev/null && echo $t"
    script = f"for t in $0 $@; do {{ {attempt}; }} & done; wait"
    words = " ".join(f"{address}/{port}" for address, port in sorted(targets))
    said = connect(host).run(f"bash -c %s {words}", script).stdout
    pairs = (line.split("/") for line in said.split())
    return {(address, int(port)) for address, port in pairs}


@pytest.mark.skipif(len(FLEET.hosts) == 1, reason="a host reaches itself")
def test_hosts_reach_what_they_ask_for_and_nothing_else(site: Site) -> None:
    """A worker's flows run anybody's code: what it reaches is what an intruder there reaches."""
    services = {"postgres": 5432, "prefect_server": 4200, "rustfs": 9000, "prefect_worker": 8080}
    wanted = {
        "prefect_worker": {("prefect_server", 4200), ("rustfs", 9000)},
        "prefect_server": {("prefect_server", 4200), ("postgres", 5432)},
        "postgres": {("prefect_server", 4200)},
        "rustfs": {("prefect_server", 4200)},
        "headscale": {("prefect_server", 4200)},
    }
    ports = {22, *services.values(), 9001}
    for host in FLEET.hosts:
        others = [
            other for other in FLEET.hosts if other != host and services.keys() & set(other.groups)
        ]
        expected = set()
        for other in others:
            may = {port for own in host.groups for to, port in wanted[own] if to in other.groups}
            if not USES_TAILSCALE:
                may.add(22)  # a plain network has no policy of its own
            expected |= {(site.addresses[other.name], port) for port in may}
        targets = {(site.addresses[other.name], port) for other in others for port in ports}
        assert reached(host.name, targets) == expected, host.name


@pytest.mark.parametrize("path", ["version", "admin/settings", "deployments/name/canary/canary"])
def test_api_asks_for_the_password(laptop: Laptop, site: Site, path: str) -> None:
    assert httpx.get(f"{laptop.url}/{path}").status_code == 401
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
        assert "TimeoutError" in answer


def test_storage_user_reaches_its_bucket_only(site: Site) -> None:
    script = """
print(attempt(client.list_objects_v2, Bucket="results", MaxKeys=1),
      attempt(client.create_bucket, Bucket="mine"),
      attempt(client.delete_bucket, Bucket="results"))
"""
    answer = site.ask_results(script)
    assert answer == "done AccessDenied AccessDenied"
    wrong = site.ask_results(script, secret="x" * 40).split()[0]
    assert wrong in ("SignatureDoesNotMatch", "AccessDenied", "InvalidAccessKeyId")
