"""One list of services: what firewalls let in, and what the tailnet's policy grants."""

from __future__ import annotations

import pytest

from tests.unit.shared import load_by_path

services = load_by_path("roles/fleet/filter_plugins/services.py")

SERVICES = {
    "postgres": [{"port": 5432, "for": ["prefect_server"]}],
    "prefect_server": [{"port": 4200, "for": ["all", "people"]}],
    "prefect_worker": [{"port": [8080, "8090-8092"], "for": ["people"]}],
}
GROUPS = {
    "all": ["api1", "db1", "worker1"],
    "postgres": ["db1"],
    "prefect_server": ["api1"],
    "prefect_worker": ["worker1"],
}
ADDRESSES = {"api1": "10.0.0.3", "db1": "10.0.0.2", "worker1": "10.0.0.4"}


@pytest.mark.parametrize(
    ("own", "in_tailnet", "let_in"),
    [
        (["postgres"], True, [{"port": ["5432"], "from": ["10.0.0.3"]}]),
        (["prefect_server"], True, [{"port": ["4200"]}]),
        (
            ["prefect_server"],
            False,
            [{"port": ["4200"], "from": ["10.0.0.2", "10.0.0.3", "10.0.0.4"]}],
        ),
        (["prefect_worker"], False, [{"port": ["8080", "8090-8092"], "from": []}]),
        (["mine"], True, []),
    ],
)
def test_a_host_lets_in_its_own_services_from_whom_they_are_for(own, in_tailnet, let_in):
    assert services.fleet_let_in(SERVICES, own, GROUPS, ADDRESSES, in_tailnet) == let_in


def test_a_group_without_hosts_asks_for_nothing():
    groups = {**GROUPS, "prefect_server": []}
    let_in = services.fleet_let_in(SERVICES, ["postgres"], groups, ADDRESSES, True)
    assert let_in == [{"port": ["5432"], "from": []}]


def test_the_policy_grants_the_same():
    assert services.fleet_grants(SERVICES) == [
        {"src": ["tag:prefect-server"], "dst": ["tag:postgres"], "ip": ["tcp:5432"]},
        {
            "src": ["tag:fleet", "autogroup:member"],
            "dst": ["tag:prefect-server"],
            "ip": ["tcp:4200"],
        },
        {
            "src": ["autogroup:member"],
            "dst": ["tag:prefect-worker"],
            "ip": ["tcp:8080", "tcp:8090-8092"],
        },
    ]


def test_a_hosts_tags_are_its_groups_that_the_fleet_knows():
    assert services.fleet_tags(["prefect_worker", "munich"], ["prefect_worker", "rustfs"]) == [
        "tag:fleet",
        "tag:prefect-worker",
    ]
