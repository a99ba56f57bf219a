"""Every service runs, comes back at boot and listens where it should and nowhere else."""

from __future__ import annotations

import json

import pytest

from tests.fleet.conftest import FLEET, Site, connect, members

UNITS = {
    "headscale": ["headscale.service"],
    "postgres": ["postgresql@17-main.service"],
    "prefect_server": ["prefect-server.service", "haproxy.service"],
    "prefect_worker": [
        "prefect-worker@default.service",
        "prefect-worker@projections-local.service",
        "prefect-manifests.timer",
    ],
    "rustfs": ["rustfs.service"],
}
PORTS = {
    "postgres": [5432],
    "prefect_server": [4200],
    "rustfs": [9000],
    "prefect_worker": [8080, 8081],
}
USES_TAILSCALE = not str(FLEET.variables.get("fleet_interface", "")).startswith("eth")


def units() -> list[tuple[str, str]]:
    """Pairs of host and unit that have to run."""
    pairs = [
        (host, unit) for group, names in UNITS.items() for host in members(group) for unit in names
    ]
    if USES_TAILSCALE:
        pairs += [(host.name, "tailscaled.service") for host in FLEET.hosts]
    return pairs


@pytest.mark.parametrize(("host", "unit"), units())
def test_unit_runs_and_is_enabled(site: Site, host: str, unit: str) -> None:
    service = connect(host).service(unit)
    assert service.is_enabled
    assert service.is_running, connect(host).check_output("journalctl -n 30 --no-pager -u %s", unit)


@pytest.mark.parametrize("host", [host.name for host in FLEET.hosts])
def test_no_unit_has_failed(site: Site, host: str) -> None:
    assert connect(host).check_output("systemctl list-units --failed --plain --no-legend") == ""


@pytest.mark.parametrize(("group", "port"), [(g, p) for g, ports in PORTS.items() for p in ports])
def test_listens_on_the_fleet_address_only(site: Site, group: str, port: int) -> None:
    for host in members(group):
        said = connect(host).check_output(f"ss --no-header -lnt sport = {port}")
        listening = {line.split()[3].rsplit(":", 1)[0] for line in said.splitlines()}
        assert site.addresses[host] in listening
        assert listening <= {site.addresses[host], "127.0.0.1", "[::1]"}


def test_postgres_is_17_and_asks_for_scram(site: Site) -> None:
    query = "runuser -u postgres -- psql -Atc %s"
    host = site.first("postgres")
    assert host.check_output(query, "show server_version").startswith("17.")
    stored = "select rolpassword like 'SCRAM-SHA-256$%%' from pg_authid where rolname = 'prefect'"
    assert host.check_output(query, stored) == "t"
    rules = (
        "select string_agg(distinct auth_method, ',') from pg_hba_file_rules where type <> 'local'"
    )
    assert host.check_output(query, rules) == "scram-sha-256"


def test_versions_on_the_worker_hosts(site: Site) -> None:
    script = "import sys, prefect; print(prefect.__version__, *sys.version_info[:2])"
    for name in members("prefect_worker"):
        assert site.python(connect(name), script) == "3.9.1 3 13"


def test_prefect_cli_works_for_root_and_explains_itself_to_others(site: Site) -> None:
    host = site.first("prefect_worker")
    assert "dhis2_ou/dhis2-ou" in host.check_output("COLUMNS=200 prefect-cli deployment ls")
    refused = host.run("setpriv --reuid=65534 --regid=65534 --clear-groups prefect-cli version")
    assert refused.rc == 1
    assert "use sudo" in refused.stderr


@pytest.mark.parametrize("host", [host.name for host in FLEET.hosts])
def test_prefects_command_line_is_on_every_host(site: Site, host: str) -> None:
    listed = connect(host).check_output("prefect-cli work-pool ls --output json")
    assert {pool["name"] for pool in json.loads(listed)} >= {"default", "projections-local"}


def test_flows_have_no_keys_of_the_manifests_bucket(site: Site) -> None:
    worker = site.first("prefect_worker")
    file = "/etc/prefect/manifests.json"
    assert worker.run(f"runuser -u prefect -- cat {file}").rc != 0
    assert site.secrets["fleet_rustfs_manifests_secret_key"] in worker.check_output(f"cat {file}")
