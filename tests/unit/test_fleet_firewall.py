"""The parts of the module that need no kernel; molecule/firewall has the rest."""

from __future__ import annotations

from tests.unit.shared import load_by_path

fleet_firewall = load_by_path("roles/firewall/library/fleet_firewall.py")


def test_taking_back_replaces_the_table_or_leaves_none():
    gone = "add table inet prefect_fleet\ndelete table inet prefect_fleet\n"
    assert fleet_firewall.restoring("") == gone
    table = "table inet prefect_fleet {\n}\n"
    assert fleet_firewall.restoring(table) == gone + table
