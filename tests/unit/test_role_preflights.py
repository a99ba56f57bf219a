"""What each role says about inputs that cannot work: all of them together, each with its fix."""

from functools import cache
from typing import Any

import pytest
from ansible.parsing.dataloader import DataLoader
from ansible.plugins.loader import init_plugin_loader
from ansible.template import Templar

from tests.unit.shared import REPOSITORY

BUCKET = {"name": "results", "access_key": "AK1", "secret_key": "SK1"}
POOL = {"name": "default", "type": "process"}
# Inputs with which each role begins its work.
GOOD: dict[str, dict[str, Any]] = {
    "headscale": {
        "headscale_port": 8088,
        "headscale_url": "http://10.89.7.2:8088",
        "headscale_prefix": "100.64.0.0/10",
        "headscale_user": "fleet",
    },
    "tailscale": {
        "tailscale_port": 41641,
        "tailscale_login_server": "",
        "tailscale_interface": "tailscale0",
        "tailscale_headscale_host": "net1",
        "groups": {"all": ["net1", "db1"]},
    },
    "firewall": {
        "firewall_ssh_port": 22,
        "firewall_tailscale_port": 41641,
        "firewall_interface": "tailscale0",
        "firewall_address": "100.64.0.1",
        "firewall_services": [{"port": ["4200", "8080-8081"]}, {"port": 5432, "from": []}],
        "firewall_everywhere": [{"port": 3478, "proto": "udp"}],
        "firewall_allow": [{"port": 9100, "from": ["10.0.0.0/8", "fd00:1::/64", "::1"]}],
        "firewall_confirm_seconds": 60,
    },
    "postgres": {
        "postgres_port": 5432,
        "postgres_clients": ["10.0.0.12", "100.64.0.255"],
        "postgres_database": "prefect",
        "postgres_user": "prefect_2",
        "postgres_password": "SECRET",
        "postgres_max_connections": 100,
        "postgres_memory": 1024,
    },
    "rustfs": {
        "rustfs_port": 9000,
        "rustfs_console_port": "9001",
        "rustfs_data": "/var/lib/rustfs/data",
        "rustfs_root_access_key": "AK0",
        "rustfs_root_secret_key": "SK0",
        "rustfs_rpc_secret": "SECRET",
        "rustfs_buckets": [
            BUCKET,
            {"name": "run-manifests2", "access_key": "A", "secret_key": "S"},
        ],
    },
    "certificates": {
        "certificates_days": 365,
        "certificates_renew_days": 120,
        "certificates_names": ["IP:10.0.0.11", "IP:fd00::1", "DNS:db-1.example.org"],
    },
    "prefect": {
        "prefect_home": "/opt/prefect",
        "prefect_data": "/var/lib/prefect",
        "prefect_config": "/etc/prefect",
        "prefect_requirements": str(REPOSITORY / "requirements/prefect.txt"),
        "prefect_uv_requirements": str(REPOSITORY / "requirements/uv.txt"),
        "prefect_api_url": "https://prefect.example.org/fleet/api",
        "prefect_auth_string": "admin:p@ss:w%rd$x/SECRET",
        "prefect_client_settings": {"DO_NOT_TRACK": "1", "PREFECT_LOGGING_LEVEL": "INFO"},
    },
    "prefect_server": {
        "prefect_server_port": 4200,
        "prefect_server_url": "http://10.0.0.12:4200",
        "prefect_server_auth_string": "",
        "prefect_server_database_url": "postgresql+asyncpg://prefect:SECRET@10.0.0.11:5432/prefect",
        "prefect_server_events_retention_days": 7,
        "prefect_server_runs_retention_days": 90,
        "prefect_server_vacuum": "events, flow_runs",
        "prefect_server_lost_seconds": 90,
        "prefect_server_sweep_seconds": 15,
        "prefect_server_settings": {"PREFECT_SERVER_API_DEFAULT_LIMIT": 200},
    },
    "prefect_gateway": {
        "prefect_gateway_address": "10.0.0.12",
        "prefect_gateway_port": 4200,
        "prefect_gateway_server": "127.0.0.1:4200",
        "prefect_gateway_guesses": 20,
        "prefect_gateway_guesses_seconds": 60,
        "prefect_gateway_websockets": 1200,
        "prefect_gateway_hold_seconds": 30,
        "prefect_gateway_connections": 4000,
        "prefect_gateway_stranger_connections": 200,
    },
    "prefect_worker": {
        "prefect_worker_pools": [
            POOL,
            {
                "name": "Heavy.2",
                "type": "process",
                "limit": 2,
                "environment": {"OMP_NUM_THREADS": 1},
            },
            {"name": "quiet", "type": "process", "healthcheck": False, "port": 8080},
        ],
        "prefect_worker_first_port": 8080,
        "prefect_worker_canary_pool": "canary",
        "prefect_worker_query_seconds": 0.5,
        "prefect_worker_drain_seconds": 300,
        "prefect_worker_linger_seconds": 600,
        "prefect_worker_heartbeat_seconds": 30,
        "prefect_worker_run_heartbeat_seconds": 30,
    },
    "prefect_manifests": {
        "prefect_manifests_seconds": 20,
        "prefect_manifests_stay_seconds": 300,
        "prefect_manifests_keep_days": 90,
        "prefect_manifests_store": {"endpoint_url": "https://10.0.0.13:9000", "secret_key": "SK"},
    },
}
# Inputs that are refused, and words of the message: the variable, what was found, what to write.
WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("headscale", {"headscale_port": 0}, "headscale_port is 0: write a port from 1 to 65535"),
    ("headscale", {"headscale_url": "http://192.0.2.1:8088"}, "headscale_url is http://192.0.2.1"),
    ("headscale", {"headscale_url": "http://headscale.lan"}, "headscale_url is http://headscale"),
    ("headscale", {"headscale_url": "http://172.32.0.1:80"}, "headscale_url is http://172.32.0.1"),
    ("headscale", {"headscale_url": "https://a.org/"}, "no path, and no slash at the end"),
    ("headscale", {"headscale_prefix": "10.0.0.0/8"}, "headscale_prefix is 10.0.0.0/8: write a"),
    ("headscale", {"headscale_prefix": "100.128.0.0/10"}, "headscale_prefix is 100.128.0.0/10"),
    ("headscale", {"headscale_user": "Fleet 1"}, "headscale_user is Fleet 1: write small letters"),
    ("tailscale", {"tailscale_port": 65536}, "tailscale_port is 65536: write a port"),
    ("tailscale", {"tailscale_login_server": "net1"}, "tailscale_login_server is net1: write an"),
    ("tailscale", {"tailscale_login_server": "https://a/"}, "without a slash at the end"),
    ("tailscale", {"tailscale_interface": "a" * 16}, "tailscale_interface is aaaaaaaaaaaaaaaa"),
    ("tailscale", {"tailscale_headscale_host": "net2"}, "net2, which the inventory does not name"),
    ("firewall", {"firewall_ssh_port": 0}, "firewall_ssh_port is 0 and"),
    ("firewall", {"firewall_allow": [{"port": "http"}]}, "has the port http: write a number"),
    ("firewall", {"firewall_services": [{"port": [1, "2-"]}]}, "has the port 2-: write a number"),
    (
        "firewall",
        {"firewall_allow": [{"port": 1, "from": ["10.0.0.1", "api1"]}]},
        "is from api1: write addresses or networks",
    ),
    ("firewall", {"firewall_interface": "eth 0"}, "firewall_interface is eth 0: write at most"),
    ("firewall", {"firewall_address": "fd00::1"}, "firewall_address is fd00::1: write this host's"),
    ("firewall", {"firewall_confirm_seconds": 5}, "firewall_confirm_seconds is 5: write 20 or"),
    ("postgres", {"postgres_port": 70000}, "postgres_port is 70000: write a port from 1 to 65535"),
    ("postgres", {"postgres_clients": []}, "postgres_clients is empty"),
    (
        "postgres",
        {"postgres_clients": ["10.0.0.12", "api1", "10.0.0.0/8", "10.0.0.256"]},
        "postgres_clients has api1, 10.0.0.0/8, 10.0.0.256: write IPv4 addresses",
    ),
    ("postgres", {"postgres_user": "all"}, "postgres_user is all: write small letters"),
    ("postgres", {"postgres_database": "Prefect DB"}, "postgres_database is Prefect DB and"),
    ("postgres", {"postgres_password": ""}, "postgres_password is empty: write one"),
    ("postgres", {"postgres_max_connections": 10}, "postgres_max_connections is 10: write 20 or"),
    ("postgres", {"postgres_memory": 64}, "postgres_memory is 64: write MiB, 512 or more"),
    (
        "certificates",
        {"certificates_renew_days": 365},
        "certificates_renew_days is 365 and certificates_days 365: write fewer for the first",
    ),
    ("certificates", {"certificates_renew_days": 0}, "certificates_renew_days is 0 and"),
    (
        "certificates",
        {"certificates_names": ["IP:10.0.0.11", "db1"]},
        "certificates_names has db1: write each name as IP:10.0.0.11 or as DNS:db1",
    ),
    ("certificates", {"certificates_names": []}, "certificates_names has no entry: write each"),
    ("rustfs", {"rustfs_port": 0}, "rustfs_port is 0 and rustfs_console_port is 9001: write ports"),
    ("rustfs", {"rustfs_console_port": "9000"}, "are both 9000: write different ones"),
    ("rustfs", {"rustfs_data": "data"}, "rustfs_data is data: write an absolute path"),
    ("rustfs", {"rustfs_data": "/data"}, "rustfs_data is /data: write an absolute path"),
    (
        "rustfs",
        {"rustfs_buckets": [BUCKET | {"name": "My_Bucket"}]},
        "rustfs_buckets names My_Bucket",
    ),
    (
        "rustfs",
        {"rustfs_buckets": [BUCKET | {"name": "ab"}]},
        "names ab: write 3 to 63 small letters",
    ),
    (
        "rustfs",
        {"rustfs_buckets": [BUCKET, BUCKET | {"access_key": "B"}]},
        "names results, results",
    ),
    ("rustfs", {"rustfs_buckets": [BUCKET, BUCKET | {"name": "abc"}]}, "is another bucket's, or"),
    ("rustfs", {"rustfs_buckets": [BUCKET | {"access_key": "AK0"}]}, "or rustfs_root_access_key"),
    (
        "rustfs",
        {"rustfs_buckets": [BUCKET | {"secret_key": ""}]},
        "a key in rustfs_buckets is empty",
    ),
    ("rustfs", {"rustfs_rpc_secret": ""}, "rustfs_rpc_secret, or a key in rustfs_buckets is empty"),
    (
        "prefect",
        {"prefect_home": "opt/prefect"},
        "prefect_config is opt/prefect: write an absolute",
    ),
    ("prefect", {"prefect_data": "/var/my data"}, "prefect_config is /var/my data: write an"),
    ("prefect", {"prefect_requirements": "/no/lock.txt"}, "is /no/lock.txt, which is no file"),
    ("prefect", {"prefect_api_url": "http://10.0.0.12:4200"}, "write an address that ends in /api"),
    ("prefect", {"prefect_auth_string": "adminSECRET"}, "prefect_auth_string is not of the form"),
    ("prefect", {"prefect_auth_string": "admin:SECRETø"}, "prefect_auth_string is not of the form"),
    ("prefect", {"prefect_auth_string": "admin:SEC'RET"}, "prefect_auth_string is not of the form"),
    (
        "prefect",
        {"prefect_client_settings": {"A-B": "1"}},
        "prefect_client_settings has A-B: write",
    ),
    ("prefect", {"prefect_client_settings": {"A": "it's"}}, "prefect_client_settings has A: write"),
    ("prefect_server", {"prefect_server_port": -1}, "prefect_server_port is -1: write a port"),
    (
        "prefect_server",
        {"prefect_server_url": "http://a/api"},
        "prefect_server_url is http://a/api",
    ),
    ("prefect_server", {"prefect_server_url": "http://a/"}, "without a slash at the end"),
    (
        "prefect_server",
        {"prefect_server_auth_string": "SECRET"},
        "prefect_server_auth_string is not",
    ),
    (
        "prefect_server",
        {"prefect_server_database_url": "sqlite:///SECRET"},
        "no address of PostgreSQL",
    ),
    (
        "prefect_server",
        {"prefect_server_events_retention_days": 0},
        "events_retention_days is 0 and",
    ),
    (
        "prefect_server",
        {"prefect_server_runs_retention_days": -5},
        "runs_retention_days is -5: write",
    ),
    (
        "prefect_server",
        {"prefect_server_vacuum": "events,logs"},
        "prefect_server_vacuum is events,logs",
    ),
    (
        "prefect_server",
        {"prefect_server_sweep_seconds": 91},
        "prefect_server_lost_seconds is 90 and prefect_server_sweep_seconds 91: write seconds",
    ),
    ("prefect_server", {"prefect_server_sweep_seconds": 0}, "prefect_server_sweep_seconds 0"),
    ("prefect_server", {"prefect_server_vacuum": ""}, "write one or more of events, flow_runs"),
    (
        "prefect_server",
        {"prefect_server_settings": {"A": "a\nB='1'"}},
        "prefect_server_settings has A",
    ),
    ("prefect_gateway", {"prefect_gateway_port": 0}, "prefect_gateway_port is 0: write a port"),
    (
        "prefect_gateway",
        {"prefect_gateway_server": "api1"},
        "prefect_gateway_server is api1: write",
    ),
    (
        "prefect_gateway",
        {"prefect_gateway_server": "10.0.0.12:4200"},
        "than the gateway's 10.0.0.12",
    ),
    (
        "prefect_gateway",
        {"prefect_gateway_guesses": 0, "prefect_gateway_hold_seconds": -1},
        "prefect_gateway_guesses, prefect_gateway_hold_seconds is less than 1: write 1 or more",
    ),
    (
        "prefect_gateway",
        {"prefect_gateway_stranger_connections": 5000},
        "is 5000, more than prefect_gateway_connections: write fewer than 4000",
    ),
    ("prefect_worker", {"prefect_worker_pools": []}, "prefect_worker_pools is empty: write"),
    (
        "prefect_worker",
        {"prefect_worker_pools": [POOL | {"name": "a b"}]},
        "names a b: write letters",
    ),
    (
        "prefect_worker",
        {"prefect_worker_pools": [POOL | {"name": "Prefect-1"}]},
        "are the server's own",
    ),
    (
        "prefect_worker",
        {"prefect_worker_pools": [POOL, POOL | {"port": 1}]},
        "write each pool once",
    ),
    ("prefect_worker", {"prefect_worker_pools": [POOL | {"name": "canary"}]}, "write another name"),
    (
        "prefect_worker",
        {"prefect_worker_pools": [POOL | {"limit": 0}]},
        "has the limit 0: write 1 or",
    ),
    (
        "prefect_worker",
        {"prefect_worker_pools": [POOL, {"name": "b", "type": "process", "port": 8080}]},
        "have the ports 8080, 8080: write different ones",
    ),
    ("prefect_worker", {"prefect_worker_first_port": 65535}, "have the ports 65535, 65536: write"),
    (
        "prefect_worker",
        {"prefect_worker_pools": [POOL | {"environment": {"omp": "1", "A": "it's"}}]},
        "An environment in prefect_worker_pools has omp, A: write names",
    ),
    (
        "prefect_worker",
        {"prefect_worker_drain_seconds": -1},
        "The limits of the drains are -1",
    ),
    (
        "prefect_worker",
        {"prefect_worker_pools": [POOL | {"drain_seconds": -5}]},
        "The limits of the drains are 300, -5",
    ),
    (
        "prefect_worker",
        {"prefect_worker_run_heartbeat_seconds": 0},
        "prefect_worker_run_heartbeat_seconds 0: write 1 or more seconds",
    ),
    ("prefect_worker", {"prefect_worker_query_seconds": 0}, "prefect_worker_query_seconds is 0"),
    (
        "prefect_worker",
        {"prefect_worker_linger_seconds": -1},
        "prefect_worker_linger_seconds is -1",
    ),
    (
        "prefect_manifests",
        {"prefect_manifests_seconds": 0},
        "prefect_manifests_seconds is 0: write",
    ),
    (
        "prefect_manifests",
        {"prefect_manifests_stay_seconds": -1},
        "prefect_manifests_stay_seconds is -1: write seconds, 0",
    ),
    ("prefect_manifests", {"prefect_manifests_keep_days": -1}, "prefect_manifests_keep_days is -1"),
    (
        "prefect_manifests",
        {"prefect_manifests_store": {"endpoint_url": "10.0.0.13:9000"}},
        "endpoint_url of prefect_manifests_store is 10.0.0.13:9000: write an address",
    ),
]


@pytest.fixture(scope="module", autouse=True)
def _plugins() -> None:
    init_plugin_loader()


@cache
def private_variables(role: str) -> dict[str, Any]:
    path = REPOSITORY / "roles" / role / "vars/main.yml"
    return DataLoader().load_from_file(str(path), trusted_as_template=True)


def look(role: str, changes: dict[str, Any]) -> list[str]:
    """The mistakes that a role's first task tells of, with good inputs but for the changes."""
    private = private_variables(role)
    templar = Templar(DataLoader(), variables={**GOOD[role], **private, **changes})
    return list(templar.template(private[f"__{role}_mistakes"]))


@pytest.mark.parametrize("role", GOOD)
def test_good_inputs_have_no_mistakes(role: str):
    assert look(role, {}) == []


@pytest.mark.parametrize(
    ("role", "changes", "said"), WRONG, ids=[f"{role}-{said[:40]}" for role, _, said in WRONG]
)
def test_a_mistake_is_told_with_its_fix(role: str, changes: dict[str, Any], said: str):
    (mistake,) = look(role, changes)
    assert said in mistake
    assert "write" in mistake
    assert mistake.endswith(".")
    assert "\n" not in mistake
    assert "SECRET" not in mistake


def test_mistakes_are_told_together():
    changes = {"postgres_port": 0, "postgres_clients": ["api1"], "postgres_memory": 1}
    assert len(look("postgres", changes)) == 3


@pytest.mark.parametrize("role", GOOD)
def test_every_check_is_seen_to_find_something(role: str):
    checks = private_variables(role)[f"__{role}_checks"]
    found = {look(role, changes)[0] for name, changes, _ in WRONG if name == role}
    starts = {mistake.split(" ")[0] for mistake in found}
    assert len(found) >= len(checks)
    assert starts >= {check["say"].split(" ")[0] for check in checks if check["say"][0] != "{"}


@pytest.mark.parametrize("role", GOOD)
def test_it_is_the_first_thing_that_a_role_does(role: str):
    tasks = DataLoader().load_from_file(str(REPOSITORY / "roles" / role / "tasks/main.yml"))
    assert tasks[0]["when"] == f"__{role}_mistakes | length > 0"
    refusals = [task for task in tasks if "ansible.builtin.fail" in task]
    assert refusals == tasks[:1]
