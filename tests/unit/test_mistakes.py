"""What the preflight says about an inventory."""

import secrets
import string
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
)

from tests.unit.certificates import Authority, make_secrets
from tests.unit.shared import load_by_path

mistakes = load_by_path("roles/fleet/filter_plugins/mistakes.py")

GOOD_SECRET = "kW8vB2nQ7xT4mZ1pR9cL"
AUTHORITY = make_secrets.make_authority()
SETTINGS = {
    "uses_tailscale": True,
    "interface": "tailscale0",
    "secrets": ["fleet_auth_password", "fleet_database_password"],
    "work_pools": [{"name": "default", "type": "process"}],
    "ports": {
        "postgres": {"fleet_postgres_port": 5432},
        "rustfs": {"fleet_rustfs_port": 9000, "fleet_rustfs_console_port": "9001"},
    },
}
HOSTS = ("net1", "db1", "api1", "store1", "worker1", "worker2")
GROUPS = {
    "all": list(HOSTS),
    "headscale": ["net1"],
    "postgres": ["db1"],
    "prefect_server": ["api1"],
    "rustfs": ["store1"],
    "prefect_worker": ["worker1", "worker2"],
}


def host(**changes: Any) -> dict[str, Any]:
    """The variables of a host that was reached."""
    facts = {"distribution": "Debian", "distribution_major_version": "13"}
    return {
        "__preflight_facts": {"changed": False, "failed": False, "ansible_facts": facts},
        "ansible_facts": facts,
        "fleet_auth_password": GOOD_SECRET,
        "fleet_database_password": GOOD_SECRET[::-1],
        **AUTHORITY,
        **changes,
    }


def look(
    hosts: dict[str, dict[str, Any]] | None = None,
    groups: dict[str, list[str]] | None = None,
    **settings: Any,
) -> list[str]:
    """The mistakes of a good inventory with these hosts, groups and settings changed."""
    return mistakes.fleet_mistakes(
        {name: host() for name in HOSTS} | (hosts or {}),
        deepcopy(GROUPS) | (groups or {}),
        SETTINGS | settings,
    )


def test_a_good_inventory_has_no_mistakes():
    assert look() == []


def test_one_host_in_every_group_is_a_good_inventory():
    groups = {name: ["all1"] for name in GROUPS}
    assert mistakes.fleet_mistakes({"all1": host()}, groups, SETTINGS) == []


def test_the_filter_has_the_name_that_the_playbook_calls():
    assert mistakes.FilterModule().filters() == {"fleet_mistakes": mistakes.fleet_mistakes}


@pytest.mark.parametrize("groups", [{}, {"all": [], "ungrouped": []}])
def test_an_empty_inventory_is_the_only_mistake_told(groups: dict[str, list[str]]):
    assert mistakes.fleet_mistakes({}, groups, SETTINGS) == [
        "The inventory names no host: give one with -i, or boot the local hosts first "
        "with: make lab"
    ]


@pytest.mark.parametrize("group", ["postgres", "prefect_server", "rustfs", "prefect_worker"])
@pytest.mark.parametrize("missing", [True, False])
def test_a_group_without_hosts_is_named(group: str, missing: bool):
    groups = {name: hosts for name, hosts in GROUPS.items() if name != group}
    groups |= {} if missing else {group: []}
    found = mistakes.fleet_mistakes({name: host() for name in HOSTS}, groups, SETTINGS)
    assert found == [f"The group {group!r} is empty: put a host into it in the inventory."]


@pytest.mark.parametrize("group", ["headscale", "postgres", "prefect_server", "rustfs"])
def test_several_hosts_in_a_group_for_one_are_a_mistake(group: str):
    (mistake,) = look(groups={group: ["db1", "api1"]})
    assert f"{group!r}" in mistake
    assert "leave one in it" in mistake


# The results below are what `setup` with ignore_unreachable and failed_when: false registers
# (ansible-core 2.19).
@pytest.mark.parametrize(
    ("variables", "said", "command"),
    [
        (
            {
                "__preflight_facts": {
                    "changed": False,
                    "msg": "Task failed: Failed to connect to the host via ssh:\r\n refused",
                    "unreachable": True,
                },
                "ansible_facts": {},
                "ansible_host": "192.0.2.7",
                "ansible_user": "admin",
            },
            "Failed to connect to the host via ssh: refused. Try",
            "`ssh admin@192.0.2.7 sudo true`",
        ),
        (
            {
                "__preflight_facts": {
                    "changed": False,
                    "failed": False,
                    "failed_when_result": False,
                    "msg": "Missing sudo password",
                },
                "ansible_facts": {},
            },
            "Missing sudo password. Try",
            "`ssh db1 sudo true`",
        ),
        (
            {
                "__preflight_facts": {
                    "failed": False,
                    "failed_when_result": False,
                    "msg": "The module interpreter '/usr/bin/python3' was not found.",
                },
                "ansible_facts": {"discovered_interpreter_python": "/usr/bin/python3"},
            },
            "'/usr/bin/python3' was not found. Try",
            "`ssh db1 sudo true`",
        ),
    ],
    ids=["unreachable", "no sudo", "no python"],
)
def test_a_host_of_no_use_says_why_and_how_to_look(variables: dict, said: str, command: str):
    (mistake,) = look({"db1": host(**variables)})
    assert mistake.startswith("db1 cannot be used: ")
    assert said in mistake
    assert command in mistake


def test_facts_of_an_earlier_day_do_not_hide_an_unreachable_host():
    """Where the user has configured a cache for them."""
    (mistake,) = look({"db1": host(__preflight_facts={"unreachable": True, "msg": "no route"})})
    assert mistake.startswith("db1 cannot be used: no route. Try")


def test_a_host_that_the_limit_left_out_is_not_taken_for_another_system():
    left_out = host()
    del left_out["__preflight_facts"], left_out["ansible_facts"]
    (mistake,) = look({"db1": left_out})
    assert mistake.startswith("db1 was not looked at: run without --limit")


@pytest.mark.parametrize(
    ("distribution", "version"), [("Debian", "12"), ("Ubuntu", "24"), ("Ubuntu", "13")]
)
def test_another_system_is_refused(distribution: str, version: str):
    facts = {"distribution": distribution, "distribution_major_version": version}
    (mistake,) = look({"worker2": host(ansible_facts=facts)})
    assert mistake.startswith(f"worker2 runs {distribution} {version}: only Debian 13 is supported")


def with_facts(**facts: Any) -> dict[str, Any]:
    """The variables of a host with more facts."""
    variables = host()
    variables["ansible_facts"] = variables["ansible_facts"] | facts
    return variables


def test_two_names_of_one_machine_are_told():
    twins = {name: with_facts(machine_id="c0ffee") for name in ("db1", "api1")}
    assert [text for text in look(twins) if "db1 and api1 are one machine" in text]
    different = {name: with_facts(machine_id=name) for name in HOSTS}
    assert look(different) == []


def test_a_machine_without_binaries_is_told():
    told = look({name: with_facts(architecture="riscv64") for name in HOSTS})
    assert len(told) == 1
    assert "no binaries for riscv64" in told[0]


def test_a_fleet_of_two_architectures_is_told():
    mixed = {name: with_facts(architecture="x86_64") for name in HOSTS}
    assert look(mixed) == []
    told = look(mixed | {"worker2": with_facts(architecture="aarch64")})
    assert len(told) == 1
    assert "worker2: aarch64" in told[0]


def test_without_tailscale_every_host_needs_the_interface():
    hosts = {name: with_facts(interfaces=["lo", "eth0"]) for name in HOSTS}
    assert look(hosts, uses_tailscale=False, interface="eth0") == []
    hosts["db1"] = with_facts(interfaces=["lo", "enp1s0"])
    told = look(hosts, uses_tailscale=False, interface="eth0")
    assert len(told) == 1
    assert "db1 has no interface eth0: it has enp1s0, lo" in told[0]
    assert look(hosts) == []  # Tailscale makes its own


def test_the_version_may_be_a_number():
    facts = {"distribution": "Debian", "distribution_major_version": 13}
    assert look({"db1": host(ansible_facts=facts)}) == []


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "is missing"),
        ("", "is missing"),
        ("changeme", "is a well-known default"),
        ("Password123", "is a well-known default"),
        ("rustfsadmin", "is a well-known default"),
        ("kW8vB2nQ7xT4mZ1", "is weak"),
        ("abababababababababab", "is weak"),
        ("abcdefghijklmnopqrst", "is weak"),
        ("12345678901234567890", "is weak"),
        ("password12345678", "is weak"),
        ("changeme-changeme-changeme", "is weak"),
        (f"{GOOD_SECRET} ", "has a space"),
        (f"{GOOD_SECRET}\n", "has a space"),
        (f"{GOOD_SECRET}'", "has a space, a quote"),
        (f'{GOOD_SECRET}"', "has a space, a quote"),
        (f"{GOOD_SECRET}`", "has a space, a quote"),
        (f"{GOOD_SECRET}\\", "a backslash"),
        (f"{GOOD_SECRET}ø", "outside ASCII"),
        (f"{GOOD_SECRET}\x07", "outside ASCII"),
    ],
)
def test_a_bad_secret_is_named_and_never_shown(value: str | None, said: str):
    variables = {name: host(fleet_database_password=value) for name in HOSTS}
    (mistake,) = look(variables)
    assert mistake.startswith("The secret fleet_database_password ")
    assert said in mistake
    assert not value or value.strip() not in mistake
    if "missing" in said or "default" in said or "weak" in said:
        assert "run: python scripts/make_secrets.py <your inventory>" in mistake
    else:
        assert "use letters, digits and other signs" in mistake


def test_a_secret_that_is_defined_nowhere_is_missing():
    variables = host()
    del variables["fleet_auth_password"]
    (mistake,) = look(dict.fromkeys(HOSTS, variables))
    assert "The secret fleet_auth_password is missing" in mistake


@pytest.mark.parametrize("value", [GOOD_SECRET, f"{GOOD_SECRET}$%#:/@!", 9182736450192837465])
def test_a_good_secret_is_taken(value: object):
    assert mistakes.secret_mistakes({"x": value}) == []


def test_random_secrets_are_taken():
    """No rule about patterns may refuse what make_secrets.py generates."""
    alphabet = string.ascii_letters + string.digits
    values = {
        str(number): "".join(secrets.choice(alphabet) for _ in range(40)) for number in range(500)
    }
    assert mistakes.secret_mistakes(values) == []


def told_of_authority(**changes: str | None) -> str:
    """The one mistake that is told where the authority has these changes."""
    (mistake,) = look({name: host(**changes) for name in HOSTS})
    assert "run: python scripts/make_secrets.py <your inventory>" in mistake
    assert not any(line in mistake for line in AUTHORITY["fleet_ca_key"].splitlines()[1:-1])
    return mistake


@pytest.mark.parametrize("name", ["fleet_ca_key", "fleet_ca_certificate"])
@pytest.mark.parametrize("value", [None, ""])
def test_a_missing_half_of_the_authority_is_told(name: str, value: str | None):
    assert told_of_authority(**{name: value}).startswith(f"The secret {name} is missing: run")


def test_a_key_that_is_no_key_is_told():
    no_key = "The secret fleet_ca_key is no private key in PEM without a password: restore it, or"
    for text in ("a key", AUTHORITY["fleet_ca_certificate"]):
        assert told_of_authority(fleet_ca_key=text).startswith(no_key)
    locked = ec.generate_private_key(ec.SECP256R1()).private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"password")
    )
    assert told_of_authority(fleet_ca_key=locked.decode()).startswith(no_key)


def test_a_certificate_that_is_no_authoritys_is_told(tmp_path: Path):
    said = "The secret fleet_ca_certificate is no certificate of an authority: restore it, or"
    of_a_service = Authority(tmp_path, AUTHORITY).issue().read_text()
    for text in ("a certificate", AUTHORITY["fleet_ca_key"], of_a_service):
        assert told_of_authority(fleet_ca_certificate=text).startswith(said)


def test_another_authoritys_key_is_told():
    other = make_secrets.make_authority()["fleet_ca_key"]
    said = "The secret fleet_ca_key does not belong to fleet_ca_certificate: restore it, or remove"
    assert told_of_authority(fleet_ca_key=other).startswith(said)


@pytest.mark.parametrize(("days", "said"), [(-1, "has ended"), (29.5, "ends in 29 days")])
def test_an_authority_at_its_end_is_told(monkeypatch: pytest.MonkeyPatch, days: float, said: str):
    monkeypatch.setattr(make_secrets, "_AUTHORITY_DAYS", days + 1)  # it began a day ago
    authority = make_secrets.make_authority()
    told = told_of_authority(**authority)
    assert told.startswith(f"The authority in fleet_ca_certificate {said}: remove fleet_ca_key and")


def test_the_authority_signs_services_and_no_further_authorities():
    certificate = x509.load_pem_x509_certificate(AUTHORITY["fleet_ca_certificate"].encode())
    constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.critical
    assert constraints.value == x509.BasicConstraints(ca=True, path_length=0)
    usage = certificate.extensions.get_extension_for_class(x509.KeyUsage).value
    assert (usage.key_cert_sign, usage.digital_signature) == (True, False)


def test_tailscale_needs_a_way_in():
    (mistake,) = look(groups={"headscale": []})
    assert "neither an auth key nor a headscale host" in mistake
    assert "tailscale_auth_key" in mistake
    assert "fleet_interface" in mistake


def test_an_auth_key_on_every_host_is_a_way_in():
    keyed = {name: host(tailscale_auth_key="key") for name in HOSTS}
    assert look(keyed, groups={"headscale": []}) == []
    one_without = keyed | {"worker2": host(tailscale_auth_key="")}
    assert len(look(one_without, groups={"headscale": []})) == 1


def test_without_tailscale_no_key_is_needed():
    assert look(groups={"headscale": []}, uses_tailscale=False) == []


@pytest.mark.parametrize(
    ("pools", "said"),
    [
        (None, "names no work pool"),
        ([], "names no work pool"),
        ("default", "names no work pool"),
        ({"name": "default", "type": "process"}, "names no work pool"),
        (["default"], "Entry 1 of fleet_work_pools has no name"),
        ([{"name": "a", "type": "process"}, {"type": "process"}], "Entry 2 of fleet_work_pools"),
        ([{"name": "a", "type": "docker"}], "'a' in fleet_work_pools has the type 'docker': write"),
        ([{"name": "a"}], "has the type None: write one of: process"),
        (
            [{"name": "a", "type": "process", "drain_then": "kill"}],
            "'a' in fleet_work_pools has drain_then 'kill': write one of: crash, cancel",
        ),
        (
            [{"name": "a", "type": "process", "drain_seconds": "5m"}],
            "'a' in fleet_work_pools has drain_seconds '5m': write a whole number",
        ),
        ([{"name": "a", "type": "process"}] * 2, "'a' stands twice in fleet_work_pools: remove"),
    ],
)
def test_a_work_pool_of_no_use_is_named(pools: object, said: str):
    (mistake,) = look(work_pools=pools)
    assert said in mistake


def test_two_services_on_a_port_of_one_host_are_told():
    ports = {"postgres": {"fleet_postgres_port": 9000}, "rustfs": {"fleet_rustfs_port": "9000"}}
    assert look(ports=ports) == []  # on hosts of their own
    (mistake,) = look(groups={"rustfs": ["db1"]}, ports=ports)
    assert mistake == (
        "fleet_postgres_port and fleet_rustfs_port are both 9000: write different ports."
    )


def test_all_mistakes_are_told_at_once_in_the_order_of_mending():
    facts = {"distribution": "Debian", "distribution_major_version": "12"}
    hosts: dict[str, dict[str, Any]] = {
        "net1": host(fleet_auth_password="changeme", fleet_database_password="", fleet_ca_key=""),
        "db1": host(__preflight_facts={"unreachable": True, "msg": "no route"}, ansible_facts={}),
        "api1": host(ansible_facts=facts),
    }
    found = look(
        hosts,
        groups={"headscale": [], "rustfs": [], "postgres": ["db1", "api1"]},
        work_pools=[{"name": "a", "type": "ecs"}],
    )
    expected = [
        "The group 'postgres' has 2 hosts (db1, api1)",
        "The group 'rustfs' is empty",
        "db1 cannot be used: no route",
        "api1 runs Debian 12",
        "The fleet uses Tailscale but",
        "The secret fleet_auth_password is a well-known default",
        "The secret fleet_database_password is missing",
        "The secret fleet_ca_key is missing",
        "The work pool 'a'",
    ]
    assert len(found) == len(expected)
    assert [text for text, start in zip(found, expected, strict=True) if start not in text] == []
