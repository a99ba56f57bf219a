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


def attempt(hosts: Hosts, host: str, **values: str) -> str:
    program = f"V = {values!r}\n{CONNECT}"
    return hosts.output(host, "python3", "-", user="nobody", input=program)


def test_the_servers_host_gets_in_with_the_password(hosts: Hosts, secrets: dict[str, str]) -> None:
    right = secrets["fleet_database_password"]
    hosts.eventually("api1", "pg_isready", "--host", hosts.address("db1"), user="nobody")
    answer = attempt(hosts, "api1", host=hosts.address("db1"), user="prefect", password=right)
    assert answer == "prefect"
    for user, password in [("prefect", "x" * 20), ("postgres", right), ("nobody", right)]:
        answer = attempt(hosts, "api1", host=hosts.address("db1"), user=user, password=password)
        assert answer.startswith("OperationalError")
