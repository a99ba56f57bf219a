"""What every host has, whatever else it is for."""

from __future__ import annotations

from conftest import Hosts


def test_an_unprivileged_program_binds_to_an_address_that_is_not_there_yet(hosts: Hosts) -> None:
    program = "import socket; socket.socket().bind(('100.64.99.99', 4200))"
    hosts.output("host1", "python3", "-c", program, user="nobody")


def test_environments_can_be_made_and_access_lists_set(hosts: Hosts) -> None:
    made = hosts.output(
        "host1",
        "sh",
        "-c",
        "cd $(mktemp -d) && python3 -m venv v && v/bin/pip --version",
        user="nobody",
    )
    assert made.startswith("pip ")
    hosts.output(
        "host1", "sh", "-c", "f=$(mktemp) && setfacl -m u:root:r $f && getfacl -s $f", user="nobody"
    )
