"""What the role promises of the database, seen from other hosts."""

from __future__ import annotations

from conftest import Hosts

CONNECT = """
import psycopg2
try:
    connection = psycopg2.connect(**V, dbname="prefect", connect_timeout=10)
    with connection.cursor() as cursor:
        cursor.execute("select current_user")
        print(cursor.fetchone()[0])
except psycopg2.Error as error:
    print(type(error).__name__, error)
"""


def attempt(hosts: Hosts, host: str, /, **values: str) -> str:
    verified = {"sslmode": "verify-full", "sslrootcert": "/etc/prefect/ca.pem", **values}
    program = f"V = {verified!r}\n{CONNECT}"
    return hosts.output(host, "python3", "-", user="nobody", input=program)


def test_the_servers_host_gets_in_with_the_password(hosts: Hosts, secrets: dict[str, str]) -> None:
    right = secrets["fleet_database_password"]
    hosts.eventually("api1", "pg_isready", "--host", hosts.address("db1"), user="nobody")
    answer = attempt(hosts, "api1", host=hosts.address("db1"), user="prefect", password=right)
    assert answer == "prefect"
    for user, password in [("prefect", "x" * 20), ("postgres", right), ("nobody", right)]:
        answer = attempt(hosts, "api1", host=hosts.address("db1"), user=user, password=password)
        assert answer.startswith("OperationalError")


def test_another_host_and_a_connection_in_the_clear_are_turned_away(
    hosts: Hosts, secrets: dict[str, str]
) -> None:
    right = {
        "host": hosts.address("db1"),
        "user": "prefect",
        "password": secrets["fleet_database_password"],
    }
    answer = attempt(hosts, "other1", **right)
    assert "no pg_hba.conf entry" in answer
    answer = attempt(hosts, "api1", **right, sslmode="disable")
    assert "no pg_hba.conf entry" in answer


def test_a_client_that_does_not_know_the_authority_turns_away(
    hosts: Hosts, secrets: dict[str, str]
) -> None:
    answer = attempt(
        hosts,
        "api1",
        host=hosts.address("db1"),
        user="prefect",
        password=secrets["fleet_database_password"],
        sslrootcert="/etc/ssl/certs/ca-certificates.crt",
    )
    assert "certificate verify failed" in answer


def test_the_servers_role_owns_its_database_and_nothing_else(
    hosts: Hosts, secrets: dict[str, str]
) -> None:
    program = """
import psycopg2
connection = psycopg2.connect(**V, dbname="prefect", connect_timeout=10)
connection.autocommit = True
for statement in (
    "create table scenario (a int); drop table scenario",
    "create role another",
    "create database another",
    "select rolpassword from pg_authid",
    "copy (select 1) to program 'true'",
):
    try:
        connection.cursor().execute(statement)
        print("done")
    except psycopg2.Error as error:
        print(type(error).__name__)
"""
    values = {
        "host": hosts.address("db1"),
        "user": "prefect",
        "password": secrets["fleet_database_password"],
    }
    said = hosts.output(
        "api1", "python3", "-", user="nobody", input=f"V = {values!r}\n{program}"
    ).split()
    assert said == ["done"] + ["InsufficientPrivilege"] * 4


def test_a_stop_ends_the_sessions_and_leaves_nothing_to_recover(hosts: Hosts) -> None:
    unit = "postgresql@17-main.service"
    sleep = "runuser -u postgres -- psql --command 'select pg_sleep(300)' >/dev/null 2>&1 &"
    hosts.output("db1", "sh", "-c", sleep)
    try:
        # Without ending sessions it would wait for them, for an hour.
        hosts.output("db1", "timeout", "60", "systemctl", "stop", unit)
        said = hosts.output(
            "db1", "/usr/lib/postgresql/17/bin/pg_controldata", "/var/lib/postgresql/17/main"
        )
        assert "Database cluster state:               shut down\n" in said
        result = hosts.output("db1", "systemctl", "show", "--property=Result", unit)
        assert result == "Result=success"
    finally:
        hosts.output("db1", "systemctl", "start", unit)
