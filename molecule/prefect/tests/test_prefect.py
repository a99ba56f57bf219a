"""What users of a host have: the version of the lock, and settings for those who may read them."""

from __future__ import annotations

import re

from conftest import Hosts

from lab.fleet import PROJECT


def test_it_is_the_version_of_the_lock(hosts: Hosts) -> None:
    (locked,) = re.findall(
        r"^prefect==(\S+)", (PROJECT / "requirements/prefect.txt").read_text(), re.M
    )
    said = hosts.output("core1", "prefect-cli", "version")
    assert re.search(rf"Version:\s+{re.escape(locked)}$", said, re.M), said


def test_any_user_runs_its_python_and_none_changes_it(hosts: Hosts) -> None:
    hosts.output(
        "core1", "/opt/prefect/venv/bin/python", "-c", "import prefect, prefect_aws", user="nobody"
    )
    script = "find -L /opt/prefect -writable ! -type l | head -n 3"
    for user in ("nobody", "prefect"):
        assert hosts.output("core1", "sh", "-c", script, user=user) == ""


def test_settings_are_for_the_flows_user_alone(hosts: Hosts) -> None:
    refused = hosts.run("core1", "prefect-cli", "version", user="nobody")
    assert refused.returncode == 1
    assert "cannot read /etc/prefect/client.env" in refused.stderr
    hosts.output("core1", "cat", "/etc/prefect/client.env", user="prefect")
