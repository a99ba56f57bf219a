"""What the preflight says about the variables of an inventory."""

from typing import Any

import jinja2
import pytest
import yaml
from ansible.errors import AnsibleUndefinedVariable

from tests.unit.shared import REPOSITORY, load_by_path

variable_mistakes = load_by_path("roles/fleet/filter_plugins/variable_mistakes.py")

SECRET = "kW8vB2nQ7xT4mZ1pR9cL"
HOSTS = ("db1", "api1", "worker1")
BUCKET = {"name": "results", "access_key": SECRET, "secret_key": SECRET}


def look(everywhere: dict[str, Any], **on_hosts: dict[str, Any]) -> list[str]:
    """The mistakes of an inventory with these variables for all hosts, and these for some."""
    hosts = {name: {"ansible_host": "192.0.2.1", **everywhere} for name in HOSTS}
    for name, variables in on_hosts.items():
        hosts[name] |= variables
    return variable_mistakes.fleet_variable_mistakes(hosts, {"all": list(HOSTS)})


def test_the_filter_has_the_name_that_the_playbook_calls():
    assert variable_mistakes.FilterModule().filters() == {
        "fleet_variable_mistakes": variable_mistakes.fleet_variable_mistakes
    }


@pytest.mark.parametrize(
    "path", sorted(REPOSITORY.glob("inventory/example/*/group_vars/all/*.yml"))
)
def test_the_examples_have_no_mistakes(path: Any):
    assert look(yaml.safe_load(path.read_text()) or {}) == []


def test_good_variables_have_no_mistakes():
    everywhere = {
        "fleet_interface": "eth0",
        "fleet_auth_password": SECRET,
        "fleet_server_port": "4200",
        "fleet_work_pools": [{"name": "a", "type": "process", "limit": 2}],
        "prefect_compile": "yes",
        "rustfs_buckets": [BUCKET],
        "tailscale_auth_key": SECRET,
    }
    assert (
        look(everywhere, worker1={"prefect_worker_pools": [{"name": "a", "type": "process"}]}) == []
    )


def test_a_slip_of_the_pen_is_told():
    assert look({"postgres_max_conections": 200}) == [
        "No role reads postgres_max_conections: write postgres_max_connections, "
        "or name it otherwise if it is your own."
    ]
    (mistake,) = look({}, worker1={"prefect_worker_pool": []})
    assert "write prefect_worker_pools" in mistake


@pytest.mark.parametrize(
    "name", ["base_url", "postgres_backups", "my_fleet_interface", "prefect_api_key_of_mine"]
)
def test_a_variable_of_ones_own_is_taken(name: str):
    assert look({name: 1}) == []


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"postgres_port": "web"}, "postgres_port is not what its role takes: argument"),
        ({"prefect_compile": "perhaps"}, "prefect_compile is not what its role takes: argument"),
        ({"prefect_server_settings": ["A"]}, "prefect_server_settings is not what its role takes"),
        ({"rustfs_buckets": [{"name": "a"}]}, "missing required arguments: access_key, secret_key"),
        ({"rustfs_buckets": [BUCKET | {"acces": SECRET}]}, "rustfs_buckets.acces. Supported"),
        ({"rustfs_buckets": [SECRET]}, "unable to convert to dict"),
        ({"rustfs_buckets": {"results": BUCKET}}, "rustfs_buckets is not what its role takes"),
        (
            {"fleet_work_pools": [{"name": "a", "type": "process", "limits": 1}]},
            "limits. Supported",
        ),
    ],
)
def test_a_value_of_no_use_is_told_without_its_secrets(variables: dict[str, Any], said: str):
    (mistake,) = look(variables)
    assert said in mistake
    assert mistake.startswith(next(iter(variables)))
    assert SECRET not in mistake


def test_a_value_of_no_use_names_its_hosts_where_it_is_not_everybodys():
    (mistake,) = look({}, db1={"postgres_port": "a"}, api1={"postgres_port": "a"})
    assert mistake.startswith("db1, api1: postgres_port is not")


def test_each_host_is_told_of_its_own_value():
    (mistake,) = look({"postgres_port": 5432}, api1={"postgres_port": "a"})
    assert mistake.startswith("api1: postgres_port is not")


def test_what_is_found_out_later_is_left_to_the_role():
    """As Ansible gives it: some values fail when they are read, of others a part is missing."""

    class Later(dict):
        def __getitem__(self, name: str) -> Any:
            if name == "postgres_port":
                raise AnsibleUndefinedVariable("'fleet_address' is undefined")
            return super().__getitem__(name)

    missing = jinja2.StrictUndefined(name="fleet_address")
    variables = {
        "postgres_port": "",
        "postgres_user": missing,
        "postgres_clients": [missing],
        "fleet_work_pools": [missing],
        "postgres_memory": "much",
    }
    (mistake,) = variable_mistakes.fleet_variable_mistakes(
        {"db1": Later(variables), "db2": Later(variables)}, {"all": ["db1", "db2"]}
    )
    assert mistake.startswith("postgres_memory is not")


def test_variables_of_the_fleet_are_the_same_everywhere():
    assert look({"fleet_server_port": 4200}, db1={"fleet_server_port": 4201}) == [
        "fleet_server_port is not the same for all hosts: write it once, in group_vars/all."
    ]
    (mistake,) = look({}, db1={"fleet_auth_password": SECRET})
    assert mistake.startswith("fleet_auth_password is not the same")
    assert SECRET not in mistake
    assert look({}, db1={"fleet_address": "10.0.0.1"}, api1={"fleet_address": "10.0.0.2"}) == []
