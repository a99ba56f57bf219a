"""Podman, so called that containers see cgroup v2 whatever the machine mounts.

systemd in a Debian 13 host needs the unified cgroup hierarchy. Where the machine still mounts the
hybrid one (cgroup v1 plus a v2 tree), every podman call goes through a mount namespace of our own
in which /sys/fs/cgroup is cgroup v2. Machines with cgroup v2 need none of it.
"""

from __future__ import annotations

import fcntl
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

LABEL = "prefect-fleet"
"""Label key on everything the lab makes in podman; its value is the fleet's name."""

_NAMESPACE_DIR = Path("/run/prefect-fleet-lab")
_NAMESPACE = _NAMESPACE_DIR / "mnt"
# Fleets come and go side by side: whoever calls podman shares the first lock, whoever takes the
# namespace away has it alone; the second is for making it.
_IN_USE = Path(f"/run/lock/prefect-fleet-lab-{os.geteuid()}")
_MAKING = Path(f"/run/lock/prefect-fleet-lab-making-{os.geteuid()}")

# What the lab calls, and the Debian and Ubuntu package that brings it.
_TOOLS = {
    "podman": "podman",
    "crun": "crun",
    "mmdebstrap": "mmdebstrap",
    "nsenter": "util-linux",
    "ip": "iproute2",
    "iptables": "iptables",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
}
_HELPERS = {
    "netavark": ("/usr/lib/podman/netavark", "/usr/libexec/podman/netavark"),
    "aardvark-dns": ("/usr/lib/podman/aardvark-dns", "/usr/libexec/podman/aardvark-dns"),
}


class LabError(Exception):
    """Something the person at the keyboard can mend; its text says how."""


def as_root(argv: Sequence[str]) -> list[str]:
    """The command line with sudo in front where we are not root."""
    return list(argv) if os.geteuid() == 0 else ["sudo", *argv]


def missing_packages() -> list[str]:
    """Debian packages for the tools that the machine lacks, in a stable order."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    missing = {package for tool, package in _TOOLS.items() if not shutil.which(tool, path=path)}
    missing |= {
        package
        for package, places in _HELPERS.items()
        if not any(Path(place).exists() for place in places)
    }
    return sorted(missing)


def ensure_tools() -> None:
    """Install what the lab lacks, or say exactly what to install (see `install_packages`)."""
    missing = missing_packages()
    if missing:
        install_packages(missing)


def install_packages(packages: list[str]) -> None:
    """Install Debian packages, as root on Debian or Ubuntu.

    Raises:
        LabError: this is not root on a Debian-like system; the text says what to install.
    """
    install = ["apt-get", "install", "--yes", "--no-install-recommends", *packages]
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise LabError(
            f"These packages are needed (Debian and Ubuntu names): {' '.join(packages)}.\n"
            f"Install them, for example:  sudo {' '.join(install)}"
        )
    print(f"lab: installing {' '.join(packages)}", flush=True)
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    quiet = subprocess.DEVNULL
    subprocess.run(["apt-get", "update"], check=True, env=environment, stdout=quiet)
    subprocess.run(install, check=True, env=environment, stdout=quiet)


def unified_cgroups(mounts: str) -> bool:
    """Whether /sys/fs/cgroup is itself cgroup v2, by the text of /proc/self/mounts (cgroups(7))."""
    lines = mounts.splitlines()
    return any(line.split()[1:3] == ["/sys/fs/cgroup", "cgroup2"] for line in lines)


def _is_mounted(path: Path) -> bool:
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    return any(line.split()[4] == str(path) for line in mounts)


@contextmanager
def _locked(path: Path, how: int) -> Iterator[None]:
    """Hold a lock (flock(2)); BlockingIOError where `how` says not to wait and another has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, how)
        yield


def _ensure_namespace() -> None:
    if _is_mounted(_NAMESPACE):
        return
    with _locked(_MAKING, fcntl.LOCK_EX):
        if not _is_mounted(_NAMESPACE):
            _make_namespace()


def _make_namespace() -> None:
    script = f"""
        set -e
        mkdir -p {_NAMESPACE_DIR}
        mountpoint -q {_NAMESPACE_DIR} || mount --bind {_NAMESPACE_DIR} {_NAMESPACE_DIR}
        mount --make-private {_NAMESPACE_DIR}
        touch {_NAMESPACE}
        unshare --mount={_NAMESPACE} sh -c \
            'umount -R -l /sys/fs/cgroup && mount -t cgroup2 cgroup2 /sys/fs/cgroup'
    """
    subprocess.run(as_root(["sh", "-c", script]), check=True)


def podman_command(*args: str) -> list[str]:
    """The argv that runs `podman ARGS` here; makes the namespace where one is needed.

    Paths in the arguments must be absolute: entering the namespace changes the working directory.
    """
    if unified_cgroups(Path("/proc/self/mounts").read_text()):
        return as_root(["podman", *args])
    _ensure_namespace()
    return as_root(["nsenter", f"--mount={_NAMESPACE}", "--", "podman", *args])


def podman(
    *args: str, check: bool = True, capture: bool = True, input: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Run podman and give back its result.

    Raises:
        LabError: podman failed and `check` is set; the text holds what it said.
    """
    with _locked(_IN_USE, fcntl.LOCK_SH):
        done = subprocess.run(podman_command(*args), capture_output=capture, text=True, input=input)
    if check and done.returncode != 0:
        said = (done.stderr or "").strip()
        raise LabError(f"podman {' '.join(args[:2])} failed ({done.returncode}): {said}")
    return done


def run_arguments() -> list[str]:
    """What every `podman run` of the lab needs to work on a machine that is itself confined.

    - Podman asks for higher limits than a caller without CAP_SYS_RESOURCE may set, and itself
      lowers its own process limit to pid_max; so both limits are named, at what can be had.
    - In a namespace with cgroup v2 on a machine of v1 there are no controllers, hence no pids
      limit, and no device filter (which crun leaves out of privileged containers).
    """
    pid_max = int(Path("/proc/sys/kernel/pid_max").read_text())
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    processes = resource.getrlimit(resource.RLIMIT_NPROC)[1]
    limits = {"nofile": files, "nproc": min(processes, pid_max) if processes > 0 else pid_max}
    ulimits = [f"--ulimit={name}={limit}:{limit}" for name, limit in limits.items() if limit > 0]
    return ["--privileged", "--pids-limit=0", *ulimits]


def remove_namespace() -> None:
    """Take the mount namespace away once no container of ours needs it any more.

    Where podman is being called at that moment, as for another fleet that is coming up, it stays.
    """
    if not _is_mounted(_NAMESPACE):
        return
    containers = podman_command("ps", "--all", "--quiet", "--filter", f"label={LABEL}")
    script = f"umount {_NAMESPACE}; umount {_NAMESPACE_DIR}; rm -r {_NAMESPACE_DIR}"
    try:
        with _locked(_IN_USE, fcntl.LOCK_EX | fcntl.LOCK_NB):
            # Not checked: an earlier version of this program knows nothing of the lock.
            if not subprocess.run(containers, capture_output=True, check=True).stdout.strip():
                subprocess.run(as_root(["sh", "-c", script]), check=True)
    except BlockingIOError:
        return
