"""The local hosts, as far as they can be looked at without a container."""

import fcntl
import os
import tomllib
from contextlib import ExitStack
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from ansible.inventory.manager import InventoryManager
from ansible.parsing.dataloader import DataLoader
from ansible.vars.manager import VariableManager

from lab import fleet, image, podman
from lab.fleet import GROUPS, STANDIN_PORT, Fleet
from lab.podman import LabError
from tests.unit.shared import REPOSITORY

FLEETS = tomllib.loads((REPOSITORY / "lab/fleets.toml").read_text())


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project of its own, and nothing of the user's."""
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab/fleets.toml").write_text((REPOSITORY / "lab/fleets.toml").read_text())
    monkeypatch.setattr(fleet, "PROJECT", tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


# --- fleets.toml ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FLEETS)
def test_a_fleet_is_whole(name: str):
    loaded = Fleet.load(name)
    addresses = {host.address for host in loaded.hosts}
    # The gateway and the apt cache have the first two.
    reserved = {loaded.subnet[0], loaded.subnet[1], loaded.subnet[2], loaded.subnet[-1]}
    assert len(addresses) == len(loaded.hosts) > 0
    assert all(address in loaded.subnet for address in addresses)
    assert not addresses & reserved
    used = {group for host in loaded.hosts for group in host.groups}
    assert used <= set(GROUPS)
    # Without headscale a fleet needs an interface of its own.
    assert "headscale" in used or "fleet_interface" in loaded.variables
    assert not loaded.far_end or loaded.host(loaded.far_end)


@pytest.mark.parametrize("name", ["lab", "molecule", "single", "lan"])
def test_a_fleet_of_the_whole_site_has_every_group_and_a_far_end(name: str):
    loaded = Fleet.load(name)
    used = {group for host in loaded.hosts for group in host.groups}
    assert used >= set(GROUPS) - {"headscale"}
    assert loaded.far_end


def test_the_subnets_of_fleets_do_not_overlap():
    """They may run side by side."""
    fleets = [Fleet.load(name) for name in FLEETS]
    assert len(fleets) > 1
    assert not [
        (one.name, other.name)
        for one, other in combinations(fleets, 2)
        if one.subnet.overlaps(other.subnet)
    ]


def test_names_of_one_fleet_are_not_those_of_another():
    one, other = Fleet.load("lab"), Fleet.load("molecule")
    assert one.network != other.network
    assert one.container("db1") != other.container("db1")
    assert one.inventory != other.inventory
    assert one.state != other.state


def test_an_unknown_fleet_is_told_which_there_are():
    with pytest.raises(LabError, match=r"No fleet is called 'lob'; lab/fleets.toml has: lab, "):
        Fleet.load("lob")


def test_an_unknown_host_is_told_which_there_are():
    with pytest.raises(LabError, match="'lan' has no host 'db1'; it has: core1, worker1"):
        Fleet.load("lan").host("db1")


def test_a_machine_is_a_host_of_its_fleet(project: Path):
    toml = 'subnet = "10.0.0.0/24"\nmachines = ["{}"]\nhosts.one = []\nhosts.two = []\n'
    path = project / "lab/fleets.toml"
    path.write_text("[fleet]\n" + toml.format("two"))
    assert [host.machine for host in Fleet.load("fleet").hosts] == [False, True]
    path.write_text("[fleet]\n" + toml.format("tow"))
    with pytest.raises(LabError, match="'fleet' has no host 'tow', a machine"):
        Fleet.load("fleet")


def test_a_machine_is_reached_by_ssh_and_a_container_by_podman(
    project: Path, monkeypatch: pytest.MonkeyPatch
):
    called: list[list[str]] = []
    monkeypatch.setattr(fleet, "podman", lambda *argv, **_: called.append(["podman", *argv]))
    monkeypatch.setattr(
        fleet.subprocess, "run", lambda argv, **_: called.append(argv) or SimpleNamespace()
    )
    described = Fleet.load("limits")
    described.run("core1", "true")
    described.run("worker1", "true")
    assert [argv[0] for argv in called] == ["podman", "ssh"]
    assert called[1][-3:] == [f"root@{described.host('worker1').address}", "sh", "-s"]


# --- The inventory --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FLEETS)
def test_ansible_reads_the_inventory_that_is_written(project: Path, name: str):
    described = Fleet.load(name)
    described.state.mkdir(parents=True)
    described._write_inventory()
    path = project / "inventory" / name / "hosts.yml"
    assert path.stat().st_mode & 0o777 == 0o600, "it holds a password"
    loader = DataLoader()
    inventory = InventoryManager(loader, sources=[str(path)])
    groups = inventory.get_groups_dict()
    for group in GROUPS:
        expected = [host.name for host in described.hosts if group in host.groups]
        assert groups.get(group, []) == expected
    assert sorted(groups["all"]) == sorted(host.name for host in described.hosts)
    host = described.hosts[-1].name
    variables = VariableManager(loader, inventory).get_vars(host=inventory.get_host(host))
    assert variables["ansible_user"] == "root"
    assert variables["ansible_ssh_common_args"] == f"-F {described.ssh_config}"
    assert variables.get("fleet_interface") == described.variables.get("fleet_interface")
    if not described.far_end:
        assert "prefect_deploy_dhis2_servers" not in variables
        return
    (server,) = variables["prefect_deploy_dhis2_servers"]
    address = described.host(described.far_end).address
    assert server["base_url"] == f"http://{address}:{STANDIN_PORT}"
    password = described.state / "standin_password"
    assert server["password"] == password.read_text()
    assert len(server["password"]) >= 16
    assert password.stat().st_mode & 0o777 == 0o600


def test_writing_the_inventory_again_changes_nothing_but_closes_it(project: Path):
    described = Fleet.load("lab")
    described.state.mkdir(parents=True)
    described._write_inventory()
    path = project / "inventory/lab/hosts.yml"
    before = path.read_bytes()
    path.chmod(0o644)
    described._write_inventory()
    assert path.read_bytes() == before
    assert path.stat().st_mode & 0o777 == 0o600


def test_going_down_leaves_what_others_put_into_the_inventory(project: Path, monkeypatch):
    monkeypatch.setattr(
        fleet, "podman", lambda *_arguments, **_options: SimpleNamespace(stdout="", returncode=1)
    )
    monkeypatch.setattr(fleet, "remove_namespace", lambda: None)
    described = Fleet.load("lab")
    described.state.mkdir(parents=True)
    described._write_inventory()
    secrets = described.inventory / "group_vars/all/secrets.yml"
    secrets.parent.mkdir(parents=True)
    secrets.touch()
    (described.inventory / "notes.txt").touch()
    described.down()
    assert [path.name for path in described.inventory.iterdir()] == ["notes.txt"]
    assert not described.state.exists()
    (described.inventory / "notes.txt").unlink()
    described.down()
    assert not described.inventory.exists()


def test_the_first_boot_names_the_key_the_cache_and_the_proxy(project: Path, monkeypatch):
    for name in ("http_proxy", "https_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("HTTPS_PROXY", "http://192.0.2.9:3128")
    script = Fleet.load("lab")._first_boot("ssh-ed25519 AAAA lab")
    assert "\nssh-ed25519 AAAA lab\n" in script
    assert 'Acquire::http::Proxy "http://10.89.7.2:3142";' in script
    assert "\nhttps_proxy=http://192.0.2.9:3128\nHTTPS_PROXY=http://192.0.2.9:3128\n" in script
    assert "http_proxy" not in script


# --- The machine ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mounts", "unified"),
    [
        ("proc /proc proc rw 0 0\ncgroup2 /sys/fs/cgroup cgroup2 rw,nosuid 0 0\n", True),
        (
            "tmpfs /sys/fs/cgroup tmpfs ro 0 0\n"
            "cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n"
            "cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n",
            False,
        ),
        ("proc /proc proc rw 0 0\n", False),
        ("", False),
    ],
    ids=["v2", "hybrid", "none", "empty"],
)
def test_cgroup_v2_is_known_by_the_mounts(mounts: str, unified: bool):
    assert podman.unified_cgroups(mounts) is unified


@pytest.mark.parametrize(("user", "sudo"), [(0, []), (1000, ["sudo"])])
def test_podman_gets_its_namespace_only_where_it_needs_one(monkeypatch, user: int, sudo: list[str]):
    made: list[bool] = []
    monkeypatch.setattr(os, "geteuid", lambda: user)
    monkeypatch.setattr(podman, "_ensure_namespace", lambda: made.append(True))
    monkeypatch.setattr(podman, "unified_cgroups", lambda _mounts: True)
    assert podman.podman_command("ps", "--all") == [*sudo, "podman", "ps", "--all"]
    assert made == []
    monkeypatch.setattr(podman, "unified_cgroups", lambda _mounts: False)
    command = podman.podman_command("ps", "--all")
    assert command[: len(sudo) + 1] == [*sudo, "nsenter"]
    assert command[-4:] == ["--", "podman", "ps", "--all"]
    assert made == [True]


@pytest.mark.parametrize(
    ("busy", "containers", "removed"),
    [(False, "", True), (True, "", False), (False, "3f2a\n", False)],
    ids=["free", "another fleet comes up", "another fleet is up"],
)
def test_the_namespace_goes_when_nobody_uses_it(
    monkeypatch, tmp_path: Path, busy: bool, containers: str, removed: bool
):
    ran: list[list[str]] = []

    def run(argv: list[str], **_options: object) -> SimpleNamespace:
        ran.append(argv)
        return SimpleNamespace(stdout=containers)

    monkeypatch.setattr(podman, "_IN_USE", tmp_path / "in-use")
    monkeypatch.setattr(podman, "_is_mounted", lambda _path: True)
    monkeypatch.setattr(podman, "podman_command", lambda *words: ["podman", *words])
    monkeypatch.setattr(podman.subprocess, "run", run)
    with ExitStack() as others:
        if busy:
            others.enter_context(podman._locked(podman._IN_USE, fcntl.LOCK_SH))
        podman.remove_namespace()
    assert any("umount" in argv[-1] for argv in ran) is removed


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A machine with every tool; `lacks` names those to take away, `ran` what was started."""
    machine = SimpleNamespace(lacks=set(), ran=[], user=1000)

    def which(tool: str, path: str | None = None) -> str | None:
        return None if tool in machine.lacks else f"/usr/bin/{tool}"

    monkeypatch.setattr(podman.shutil, "which", which)
    monkeypatch.setattr(podman.Path, "exists", lambda path: path.name not in machine.lacks)
    monkeypatch.setattr(os, "geteuid", lambda: machine.user)
    monkeypatch.setattr(podman.subprocess, "run", lambda argv, **_options: machine.ran.append(argv))
    return machine


def test_nothing_is_installed_where_nothing_is_missing(machine: SimpleNamespace):
    assert podman.missing_packages() == []
    podman.ensure_tools()
    assert machine.ran == []


MISSING = {"ssh", "ssh-keygen", "ip", "netavark", "crun"}
PACKAGES = ["crun", "iproute2", "netavark", "openssh-client"]


def test_a_user_is_told_exactly_what_to_install(machine: SimpleNamespace):
    machine.lacks |= MISSING
    with pytest.raises(LabError) as raised:
        podman.ensure_tools()
    needs, command = str(raised.value).splitlines()
    assert needs.endswith(f"names): {' '.join(PACKAGES)}.")
    assert command.endswith(
        f"sudo apt-get install --yes --no-install-recommends {' '.join(PACKAGES)}"
    )
    assert machine.ran == []


def test_root_without_apt_is_told_the_same(machine: SimpleNamespace):
    machine.user = 0
    machine.lacks |= {"podman", "apt-get"}
    with pytest.raises(LabError, match=r"Debian and Ubuntu names\): podman\."):
        podman.ensure_tools()
    assert machine.ran == []


def test_root_gets_them_installed(machine: SimpleNamespace, capsys):
    machine.user = 0
    machine.lacks |= MISSING
    podman.ensure_tools()
    assert machine.ran == [
        ["apt-get", "update"],
        ["apt-get", "install", "--yes", "--no-install-recommends", *PACKAGES],
    ]
    assert " ".join(PACKAGES) in capsys.readouterr().out


@pytest.mark.parametrize(("hard", "processes"), [(100, 100), (2**62, 32768), (-1, 32768)])
def test_limits_are_named_at_what_can_be_had(monkeypatch, hard: int, processes: int):
    limits = {podman.resource.RLIMIT_NOFILE: 1024, podman.resource.RLIMIT_NPROC: hard}
    monkeypatch.setattr(podman.resource, "getrlimit", lambda which: (0, limits[which]))
    monkeypatch.setattr(podman.Path, "read_text", lambda _path: "32768\n")
    arguments = podman.run_arguments()
    assert "--ulimit=nofile=1024:1024" in arguments
    assert f"--ulimit=nproc={processes}:{processes}" in arguments


# --- Certificates ---------------------------------------------------------------------------------


def certificate(body: str, width: int = 8) -> str:
    lines = [body[start : start + width] for start in range(0, len(body), width)]
    return "\n".join(["-----BEGIN CERTIFICATE-----", *lines, "-----END CERTIFICATE-----"])


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What this machine trusts; the distribution's own certificates are stock-one and stock-two."""
    stock = tmp_path / "stock"
    stock.mkdir()
    for name in ("stock/one", "stock/two"):
        (tmp_path / f"{name}.crt").write_text(certificate(name.replace("/", "A") * 4) + "\n")
    monkeypatch.setattr(image, "_STOCK_CERTIFICATES", stock)
    path = tmp_path / "bundle.pem"
    monkeypatch.setenv("SSL_CERT_FILE", str(path))
    return path


def test_only_certificates_that_the_distribution_lacks_are_added(bundle: Path):
    added, other = certificate("companyProxy+/=" * 3), certificate("another" * 5)
    stock_one = certificate("stockAone" * 4, width=64)  # the same one with other line breaks
    stock_two = certificate("stockAtwo" * 4)
    text = f"# a comment\n{stock_one}\n{added}\n\n{stock_two}\n{other}\n{added}\n"
    bundle.write_text(text)
    assert image.added_certificates() == sorted([added, other])
    assert image.machine_certificates() == sorted([added, other, stock_one, stock_two])


@pytest.mark.parametrize("text", [None, ""])
def test_a_machine_without_a_bundle_adds_nothing(bundle: Path, text: str | None):
    if text is not None:
        bundle.write_text(text)
    assert image.added_certificates() == []


def test_the_order_of_the_bundle_does_not_make_another_image(bundle: Path):
    one, other = certificate("one" * 9), certificate("other" * 9)
    bundle.write_text(f"{one}\n{other}\n")
    before = image.added_certificates()
    bundle.write_text(f"{other}\n{one}\n")
    assert image.added_certificates() == before


def test_the_inventory_is_yaml_with_a_hint_for_who_would_edit_it(project: Path):
    described = Fleet.load("single")
    described.state.mkdir(parents=True)
    described._write_inventory()
    text = (described.inventory / "hosts.yml").read_text()
    assert "edit lab/fleets.toml instead" in text.splitlines()[0]
    # By address: a name that several fleets have would let their runs share an ssh connection.
    address = str(described.host("all1").address)
    hosts = yaml.safe_load(text)["all"]["children"]["rustfs"]["hosts"]
    assert hosts == {"all1": {"ansible_host": address}}
