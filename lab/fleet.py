"""One local fleet: its hosts as containers, their network, and the inventory that names them."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import yaml

from lab import machine
from lab.image import ensure_cache_image, ensure_image
from lab.podman import LABEL, LabError, podman, remove_namespace, run_arguments

PROJECT = Path(__file__).resolve().parent.parent
STANDIN_PORT = 8085
GROUPS = ("headscale", "postgres", "prefect_server", "prefect_worker", "rustfs")

_FIRST_HOST = 11  # .1 is the gateway, .2 the apt cache
_BOOT_SECONDS = 120
# Mounts must propagate as on a real machine, or systemd's credentials stay out of reach of the
# services that they are for. A container keeps its network's settings and firewall over a reboot; a
# real machine has to make them anew.
_BOOT = (
    "mount --make-rshared / && sysctl --quiet --write net.ipv4.ip_nonlocal_bind=0 "
    "&& if command -v nft >/dev/null; then nft flush ruleset; fi && exec /sbin/init"
)
_REMOVE = ("rm", "--force", "--volumes", "--time", "2")
_REMOVALS = 3
# Units that Debian's packages enable, by the group whose hosts need them.
_PACKAGED = {"postgres": "postgresql.service", "prefect_server": "haproxy.service"}
_PROXY_VARIABLES = ("http_proxy", "https_proxy", "no_proxy")


def state_directory(fleet: str) -> Path:
    """Where a fleet's ssh key and the like live; not in the checkout, for several may share it."""
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state"
    return Path(base) / "prefect-fleet" / fleet


def cache_directory() -> Path:
    """Where downloads are kept for the next time; safe to delete."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "prefect-fleet"


@dataclass(frozen=True)
class Host:
    """A host of a fleet: `address` is the one on the containers' network."""

    name: str
    address: IPv4Address
    groups: tuple[str, ...]
    machine: bool = False
    """Whether it has a kernel of its own, as lab/machine.py makes it."""


@dataclass(frozen=True)
class Fleet:
    """A local fleet as `fleets.toml` describes it."""

    name: str
    subnet: IPv4Network
    hosts: tuple[Host, ...]
    far_end: str
    variables: dict[str, object] = field(default_factory=dict)
    prepared: bool = False
    """Whether hosts boot from the image of lab/prepared.py rather than from a bare Debian."""

    @classmethod
    def load(cls, name: str) -> Fleet:
        """Read one fleet's description.

        Raises:
            LabError: there is no fleet of that name, or it asks for an image or a machine that
                there is not.
        """
        known = tomllib.loads((PROJECT / "lab/fleets.toml").read_text())
        if name not in known:
            raise LabError(f"No fleet is called {name!r}; lab/fleets.toml has: {', '.join(known)}.")
        entry = known[name]
        subnet = IPv4Network(entry["subnet"])
        machines = entry.get("machines", ())
        if unknown := set(machines) - entry["hosts"].keys():
            raise LabError(f"lab/fleets.toml: {name!r} has no host {min(unknown)!r}, a machine.")
        hosts = tuple(
            Host(host, subnet[_FIRST_HOST + number], tuple(groups), host in machines)
            for number, (host, groups) in enumerate(entry["hosts"].items())
        )
        image = entry.get("image", "bare")
        if image not in ("bare", "prepared"):
            raise LabError(
                f"lab/fleets.toml: {name!r} has image = {image!r}; write bare or prepared."
            )
        far_end, variables = entry.get("far_end", ""), entry.get("vars", {})
        return cls(name, subnet, hosts, far_end, variables, image == "prepared")

    # Names in podman, on disk

    @property
    def network(self) -> str:
        return f"{LABEL}-{self.name}"

    @property
    def state(self) -> Path:
        return state_directory(self.name)

    @property
    def inventory(self) -> Path:
        return PROJECT / "inventory" / self.name

    @property
    def ssh_config(self) -> Path:
        return self.state / "ssh_config"

    def container(self, host: str) -> str:
        return f"{LABEL}-{self.name}-{host}"

    def host(self, name: str) -> Host:
        """The host of that name, or a LabError that lists those there are."""
        for host in self.hosts:
            if host.name == name:
                return host
        names = ", ".join(host.name for host in self.hosts)
        raise LabError(f"The fleet {self.name!r} has no host {name!r}; it has: {names}.")

    # The commands

    def up(self) -> None:
        """Boot whatever is not running and write the inventory; does nothing to what is well."""
        base = ensure_image()
        image = base
        if self.prepared:
            from lab.prepared import ensure_prepared_image  # it boots a fleet itself

            image = ensure_prepared_image(base)
        self._make_key()
        self._ensure_network()
        self._ensure_cache(ensure_cache_image(base))
        images = {False: image}
        if any(host.machine for host in self.hosts):
            images[True] = machine.ensure_machine_image(image)
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda host: self._ensure_host(host, images[host.machine]), self.hosts))
        self._write_ssh_config()
        self._write_inventory()
        if self.far_end:
            self._install_standin()
        print(f"lab: fleet {self.name!r} is up: {len(self.hosts)} hosts on {self.subnet}")

    def down(self) -> None:
        """Remove the fleet's containers, network and mounts; downloads stay in the cache."""
        label = f"label={LABEL}={self.name}"
        found = podman("ps", "--all", "--quiet", "--filter", label).stdout.split()
        for attempt in range(_REMOVALS):
            # Podman may lose a race against a container that stops by itself at that moment.
            last = attempt == _REMOVALS - 1
            if not found or podman(*_REMOVE, *found, check=last).returncode == 0:
                break
            found = podman("ps", "--all", "--quiet", "--filter", label).stdout.split()
        if podman("network", "exists", self.network, check=False).returncode == 0:
            podman("network", "rm", "--force", self.network)
        remove_namespace()
        shutil.rmtree(self.state, ignore_errors=True)
        (self.inventory / "hosts.yml").unlink(missing_ok=True)
        # The secrets belonged to hosts that are gone.
        shutil.rmtree(self.inventory / "group_vars", ignore_errors=True)
        if self.inventory.is_dir() and not any(self.inventory.iterdir()):
            self.inventory.rmdir()
        print(f"lab: fleet {self.name!r} is down, nothing of it is left")

    def reboot(self, names: list[str], *, hard: bool = False) -> None:
        """Reboot hosts, all of them at once if none is named, and wait until they are back.

        With `hard` nothing on them is stopped first, as by a power cut.
        """
        hosts = [self.host(name) for name in names] or list(self.hosts)
        before = {host.name: self._started(host) for host in hosts}
        for host in hosts:
            # Twice --force is reboot(2) at once.
            self.run(host.name, f"systemctl reboot {'--force --force' if hard else ''}")
        for host in hosts:
            self._wait_for_boot(host, before[host.name])
        print(f"lab: rebooted {', '.join(host.name for host in hosts)}")

    def _started(self, host: Host) -> str:
        """When the host's systemd was started, in microseconds of the machine's clock."""
        script = "systemctl show --value --property=UserspaceTimestampMonotonic"
        return self.run(host.name, script).stdout.strip()

    def status(self) -> str:
        """A table of the hosts: state of systemd, addresses, failed units, groups."""
        rows = [("HOST", "SYSTEMD", "ADDRESS", "TAILNET", "FAILED UNITS", "GROUPS")]
        for host in self.hosts:
            if not self._alive(host):
                rows.append((host.name, "down", str(host.address), "-", "-", ",".join(host.groups)))
                continue
            script = (
                "systemctl is-system-running; "
                "echo; ip -4 -brief address show tailscale0 2>/dev/null | awk '{print $3}'; "
                "echo; systemctl list-units --failed --plain --no-legend | awk '{print $1}'"
            )
            said = self.run(host.name, script).stdout.split("\n\n")
            state, tailnet, failed = (part.strip() for part in (*said, "", "")[:3])
            units = ",".join(failed.split()) or "-"
            tailnet = tailnet.split("/")[0] or "-"
            groups = ",".join(host.groups)
            rows.append((host.name, state, str(host.address), tailnet, units, groups))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        )

    def run(self, host: str, script: str, check: bool = False) -> subprocess.CompletedProcess[str]:
        """Run a shell script as root in a host, by podman where that is possible.

        Raises:
            LabError: it failed and `check` is set.
        """
        if not self.host(host).machine:
            return self._inside(host, script, check=check)
        # Nobody else is on that network, and the host may be too young to be known.
        argv = ["ssh", "-F", "none", "-i", str(self.state / "id_ed25519"), "-o", "BatchMode=yes"]
        argv += ["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"]
        argv += ["-o", "LogLevel=ERROR", "-o", "ConnectTimeout=5", "-o", "ServerAliveInterval=10"]
        argv += [f"root@{self.host(host).address}", "sh", "-s"]
        done = subprocess.run(argv, input=script, capture_output=True, text=True, check=False)
        if check and done.returncode != 0:
            raise LabError(f"{host}: a script failed ({done.returncode}): {done.stderr.strip()}")
        return done

    def _inside(
        self, host: str, script: str, check: bool = False
    ) -> subprocess.CompletedProcess[str]:
        """Run a shell script as root in a host's container."""
        return podman("exec", "-i", self.container(host), "sh", "-s", input=script, check=check)

    def tailnet_address(self, host: str) -> str:
        """The host's address on the interface that the fleet's services bind to.

        Raises:
            LabError: the host has none (yet).
        """
        interface = str(self.variables.get("fleet_interface", "tailscale0"))
        said = self.run(host, f"ip -4 -json address show {interface}").stdout
        for link in json.loads(said or "[]"):
            for address in link.get("addr_info", []):
                return str(address["local"])
        raise LabError(f"{host} has no address on {interface}: run ansible-playbook site.yml first")

    # Pieces of `up`

    def _make_key(self) -> None:
        self.state.mkdir(parents=True, exist_ok=True, mode=0o700)
        key = self.state / "id_ed25519"
        if not key.exists():
            argv = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", self.network, "-f", key]
            subprocess.run(argv, check=True)

    def _ensure_network(self) -> None:
        if podman("network", "exists", self.network, check=False).returncode == 0:
            return
        podman(
            "network", "create", "--driver", "bridge", "--subnet", str(self.subnet),
            "--label", f"{LABEL}={self.name}", self.network,
        )  # fmt: skip

    def _ensure_cache(self, image: str) -> None:
        """One apt cache per fleet network, all of them over the same folder of packages."""
        name = self.container("apt-cache")
        if self._running(name):
            return
        store = cache_directory() / "apt"
        store.mkdir(parents=True, exist_ok=True)
        store.chmod(0o777)  # apt-cacher-ng runs as a user of its own
        podman(
            "run", "--detach", "--replace", "--name", name, "--label", f"{LABEL}={self.name}",
            "--network", self.network, "--ip", str(self.subnet[2]), *run_arguments(),
            "--volume", f"{store}:/var/cache/apt-cacher-ng", image,
            "apt-cacher-ng", "-c", "/etc/apt-cacher-ng", "ForeGround=1",
        )  # fmt: skip

    def _ensure_host(self, host: Host, image: str) -> None:
        if self._alive(host):
            return
        name = self.container(host.name)
        if podman("container", "exists", name, check=False).returncode == 0:
            # Its processes were ended from outside, as when the machine was restarted.
            podman("stop", "--time", "2", name, check=False)
            if podman("start", name, check=False).returncode != 0:
                # Podman keeps "stopping" a container whose monitor was killed as well.
                print(f"lab: {host.name} cannot be started again and is made anew: converge again")
                podman("rm", "--force", "--volumes", name)
                self._create_host(host, image)
        else:
            self._create_host(host, image)
        self._wait_for_boot(host)
        if self.prepared:
            # As their packages leave them: to be started at the next boot.
            units = [_PACKAGED[group] for group in host.groups if group in _PACKAGED]
            script = f"systemctl --quiet enable {' '.join(units)}" if units else "true"
            self.run(host.name, script, check=True)

    def _create_host(self, host: Host, image: str) -> None:
        uv_cache = cache_directory() / "uv"
        uv_cache.mkdir(parents=True, exist_ok=True)
        podman(
            "run", "--detach", "--name", self.container(host.name), "--hostname", host.name,
            "--label", f"{LABEL}={self.name}", "--network", self.network,
            "--network-alias", host.name, "--ip", str(host.address),
            "--systemd=always", "--device", "/dev/net/tun", *run_arguments(),
            "--restart=always", "--volume", f"{uv_cache}:/var/cache/uv",
            *(machine.arguments() if host.machine else []),
            image, "sh", "-c", machine.BOOT if host.machine else _BOOT,
        )  # fmt: skip
        public_key = (self.state / "id_ed25519.pub").read_text()
        self._inside(host.name, self._first_boot(public_key), check=True)
        if host.machine:
            script = f"ssh-keygen -A && touch {machine.READY}"
            self._inside(host.name, script, check=True)

    def _first_boot(self, public_key: str) -> str:
        """The shell script that a new host runs once: the key, the caches, the proxy."""
        proxies = {
            name: value
            for name in _PROXY_VARIABLES
            if (value := os.environ.get(name) or os.environ.get(name.upper()))
        }
        environment = "".join(
            f"{key}={value}\n" for name, value in proxies.items() for key in (name, name.upper())
        )
        return f"""
            set -e
            install -d -m 0700 /root/.ssh
            cat > /root/.ssh/authorized_keys <<'END'
{public_key}
END
            cat >> /etc/environment <<'END'
{environment}
END
            echo 'Acquire::http::Proxy "http://{self.subnet[2]}:3142";' \\
                > /etc/apt/apt.conf.d/95lab-cache
            install -d /etc/uv
            printf 'cache-dir = "/var/cache/uv"\\nlink-mode = "copy"\\n' > /etc/uv/uv.toml
        """

    def _wait_for_boot(self, host: Host, not_started: str = "") -> None:
        """Wait for a systemd that was started at another time than `not_started`."""
        deadline = time.monotonic() + _BOOT_SECONDS
        state = ""
        while time.monotonic() < deadline:
            state = self.run(host.name, "systemctl is-system-running").stdout.strip()
            booted = state in ("running", "degraded") and self._started(host) != not_started
            if booted and self._answers(host):
                return
            time.sleep(0.5)
        raise LabError(f"{host.name} did not boot in {_BOOT_SECONDS} s (systemd says {state!r})")

    @staticmethod
    def _answers(host: Host) -> bool:
        try:
            with socket.create_connection((str(host.address), 22), timeout=2) as connection:
                return connection.recv(4).startswith(b"SSH-")
        except OSError:
            return False

    @staticmethod
    def _running(container: str) -> bool:
        """Whether a container's processes are really there.

        Podman's own word is not enough: it still says "running" of one whose processes, its
        monitor among them, were all ended from outside.
        """
        return podman("exec", container, "true", check=False).returncode == 0

    def _alive(self, host: Host) -> bool:
        return self._running(self.container(host.name))

    def _write_ssh_config(self) -> None:
        known = []
        for host in self.hosts:
            keys = self._inside(host.name, "cat /etc/ssh/ssh_host_*_key.pub", check=True).stdout
            known += [f"{host.address} {' '.join(key.split()[:2])}" for key in keys.splitlines()]
        (self.state / "known_hosts").write_text("\n".join(known) + "\n")
        # A socket's path is short, at most 108 bytes: no hash that makes it unique on the machine,
        # as it is in this fleet's own folder.
        entries = [
            f"""
Host {host.name} {host.address}
    HostName {host.address}
    User root
    IdentityFile {self.state}/id_ed25519
    IdentitiesOnly yes
    UserKnownHostsFile {self.state}/known_hosts
    StrictHostKeyChecking yes
    HostKeyAlias {host.address}
    ControlMaster auto
    ControlPath {self.state}/%h:%p
    ControlPersist 60
"""
            for host in self.hosts
        ]
        self.ssh_config.write_text("".join(entries))

    def _write_inventory(self) -> None:
        groups: dict[str, dict[str, object]] = {}
        for host in self.hosts:
            for group in host.groups or ("ungrouped",):
                members = groups.setdefault(group, {"hosts": {}})["hosts"]
                # By address, not by a name that other fleets have as well: Ansible shares its
                # ssh connections between runs by what they connect to.
                members[host.name] = {"ansible_host": str(host.address)}  # type: ignore[index]
                others = [str(other.address) for other in self.hosts if other != host]
                if host.name == self.far_end and others:
                    # The stand-in is no part of the fleet, but on one of its hosts.
                    let_in = [{"port": STANDIN_PORT, "from": others}]
                    members[host.name]["firewall_allow"] = let_in  # type: ignore[index]
        variables = {
            "ansible_user": "root",
            "ansible_ssh_common_args": f"-F {self.ssh_config}",
            # Nothing leaves this machine: to compress a file takes longer than to send it.
            "mitogen_ssh_compression": False,
            **self.variables,
        }
        if self.far_end:
            server = {
                # The name that the flow dhis2-ou reads by default.
                "name": "dhis2",
                "base_url": f"http://{self.host(self.far_end).address}:{STANDIN_PORT}",
                "username": "lab",
                "password": self._standin_password(),
            }
            variables["prefect_deploy_dhis2_servers"] = [server]
        inventory = {"all": {"children": groups, "vars": variables}}
        self.inventory.mkdir(parents=True, exist_ok=True)
        path = self.inventory / "hosts.yml"
        head = "# Written by `python -m lab up`: edit lab/fleets.toml instead.\n"
        path.touch()
        path.chmod(0o600)  # it holds a password, and may have been there with another mode
        path.write_text(head + yaml.safe_dump(inventory, sort_keys=False))

    def _standin_password(self) -> str:
        path = self.state / "standin_password"
        if not path.exists():
            path.touch(mode=0o600)
            path.write_text(secrets.token_urlsafe(24))
        return path.read_text()

    def _install_standin(self) -> None:
        """Put the stand-in for a DHIS2 server on the far end, as a service of that host."""
        program = (PROJECT / "lab/dhis2_standin.py").read_text()
        credentials = json.dumps({"username": "lab", "password": self._standin_password()})
        address = self.host(self.far_end).address
        script = f"""
            set -e
            install -d -m 0755 /opt/dhis2-standin
            umask 077
            cat > /opt/dhis2-standin/credentials.json <<'END'
{credentials}
END
            cat > /opt/dhis2-standin/dhis2_standin.py <<'END_OF_PROGRAM'
{program}
END_OF_PROGRAM
            chmod 0644 /opt/dhis2-standin/dhis2_standin.py
            umask 022
            cat > /etc/systemd/system/dhis2-standin.service <<'END'
[Unit]
Description=Stand-in for a DHIS2 server (the lab's far end, no part of the fleet)
After=network.target

[Service]
DynamicUser=yes
LoadCredential=credentials:/opt/dhis2-standin/credentials.json
ExecStart=/usr/bin/python3 /opt/dhis2-standin/dhis2_standin.py --host {address} \\
    --port {STANDIN_PORT} --credentials ${{CREDENTIALS_DIRECTORY}}/credentials
Restart=always

[Install]
WantedBy=multi-user.target
END
            systemctl daemon-reload
            systemctl enable --quiet dhis2-standin.service
            systemctl restart dhis2-standin.service
        """
        self.run(self.far_end, script, check=True)
