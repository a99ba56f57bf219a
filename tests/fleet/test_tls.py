"""What is said between hosts, and that each client makes sure whom it says it to."""

from __future__ import annotations

import pytest

from tests.fleet.conftest import Site, connect, members
from tests.fleet.programs import CONNECT

CA_FILE = "/etc/prefect/ca.pem"
# The authorities that everybody knows; the fleet's is none of them.
OTHER_AUTHORITIES = "/etc/ssl/certs/ca-certificates.crt"
# Prefect's own way to its database, with the settings that its unit has.
DATABASE = """
import asyncio
from sqlalchemy import text
from prefect.server.database import provide_database_interface
async def main():
    try:
        engine = await provide_database_interface().engine()
        async with engine.connect() as connection:
            print(await connection.scalar(text("select current_user")))
    except Exception as error:
        print(type(error).__name__, error)
asyncio.run(main())
"""
# The block by which a flow run keeps its results, with the settings that its worker has.
RESULTS = """
from prefect_aws import S3Bucket
try:
    S3Bucket.load("results").list_objects("none/of/this/name")
    print("done")
except Exception as error:
    print(type(error).__name__, error)
"""


# The firewall keeps its console from the other hosts.
@pytest.mark.parametrize(("port", "client"), [(9000, "prefect_worker"), (9001, "rustfs")])
def test_object_storage_speaks_tls_only_and_is_verified(site: Site, port: int, client: str) -> None:
    worker, address = site.first(client), site.address("rustfs")
    curl = "curl --silent --max-time 10 --output /dev/null --cacert %s %s://%s:%s/health/ready"
    assert worker.run(curl, CA_FILE, "https", address, str(port)).rc == 0
    assert worker.run(curl, OTHER_AUTHORITIES, "https", address, str(port)).rc == 60  # not trusted
    assert worker.run(curl, CA_FILE, "http", address, str(port)).rc != 0


def test_the_database_speaks_tls_only_and_is_verified(site: Site) -> None:
    server = site.first("prefect_server")
    right = {
        "host": site.address("postgres"),
        "user": "prefect",
        "password": site.secrets["fleet_database_password"],
    }
    assert site.python(server, CONNECT, **right, authority=CA_FILE) == "prefect"
    plain = site.python(server, CONNECT, **right, authority="")
    assert "no pg_hba.conf entry" in plain
    assert "no encryption" in plain
    other = site.python(server, CONNECT, **right, authority=OTHER_AUTHORITIES)
    assert "CERTIFICATE_VERIFY_FAILED" in other


def test_every_connection_of_the_server_to_its_database_is_encrypted(site: Site) -> None:
    query = (
        "select count(*), string_agg(distinct coalesce(version, 'plain'), ',') "
        "from pg_stat_ssl join pg_stat_activity using (pid) where usename = 'prefect'"
    )
    said = site.first("postgres").check_output("runuser -u postgres -- psql -Atc %s", query)
    count, versions = said.split("|")
    assert int(count) > 0
    assert versions == "TLSv1.3"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("", "prefect"),
        (f"_CONNECT_ARGS_TLS_CA_FILE={OTHER_AUTHORITIES}", "CERTIFICATE_VERIFY_FAILED"),
    ],
)
def test_the_server_verifies_its_database(site: Site, change: str, said: str) -> None:
    setting = f"PREFECT_SERVER_DATABASE_SQLALCHEMY{change}" if change else "UNCHANGED=1"
    answer = site.first("prefect_server").check_output(
        "systemd-run --quiet --pipe --wait --collect --uid=prefect-server "
        "--property=EnvironmentFile=/etc/prefect/server.env "
        "/usr/bin/env %s /opt/prefect/venv/bin/python -c %s",
        setting,
        DATABASE,
    )
    assert said in answer.splitlines()[-1] if not change else said in answer


@pytest.mark.parametrize(
    ("authorities", "said"),
    [(CA_FILE, "done"), (OTHER_AUTHORITIES, "CERTIFICATE_VERIFY_FAILED")],
)
def test_flows_verify_where_they_keep_their_results(
    site: Site, authorities: str, said: str
) -> None:
    """Through the block that flow runs load, on a worker host that trusts other authorities."""
    answer = site.first("prefect_worker").check_output(
        "systemd-run --quiet --pipe --wait --collect --uid=prefect "
        "--property=WorkingDirectory=/var/lib/prefect "
        "--property=EnvironmentFile=/etc/prefect/client.env "
        "--property=EnvironmentFile=/etc/prefect/workers/default.env "
        f"--property=BindReadOnlyPaths={authorities}:{CA_FILE} "
        # A wrong certificate is not asked again and again.
        "/usr/bin/env AWS_MAX_ATTEMPTS=1 /opt/prefect/venv/bin/python -c %s",
        RESULTS,
    )
    assert said in answer


@pytest.mark.parametrize(
    ("group", "key"),
    [
        ("postgres", "/etc/prefect/tls/postgres/key.pem"),
        ("rustfs", "/etc/prefect/tls/rustfs/rustfs_key.pem"),
    ],
)
def test_keys_are_their_services_alone(site: Site, group: str, key: str) -> None:
    for name in members(group):
        assert connect(name).run("runuser -u %s -- cat %s", group, key).rc == 0
        for other in ("nobody", "prefect"):
            assert connect(name).run("runuser -u %s -- cat %s", other, key).rc != 0


def certificate(site: Site, group: str, *options: str) -> str:
    """What `openssl x509` says of the certificate that a service shows to a host of its clients."""
    client, port, start = {
        "postgres": ("prefect_server", 5432, "-starttls postgres"),
        "rustfs": ("prefect_worker", 9000, ""),
    }[group]
    return site.first(client).check_output(
        f"openssl s_client -connect {site.address(group)}:{port} {start} -verify_return_error "
        f"-CAfile {CA_FILE} -verify_ip {site.address(group)} </dev/null 2>/dev/null "
        f"| openssl x509 -noout {' '.join(options)}"
    )


@pytest.mark.parametrize("group", ["postgres", "rustfs"])
def test_certificates_are_good_for_a_while(site: Site, group: str) -> None:
    """As the services show them, not as they lie on the disk."""
    assert "will not expire" in certificate(site, group, "-checkend", str(120 * 86400))
