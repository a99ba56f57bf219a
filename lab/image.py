"""The hosts' image: a bare Debian 13 with systemd, sshd and Python, as a cloud's would be.

The image is made once per recipe: its tag is a digest of everything that goes into it, the
machine's own CA certificates and apt settings among it.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import tempfile
from pathlib import Path

from lab.podman import LABEL, as_root, podman, run_arguments

SUITE = "trixie"
PACKAGES = (
    "systemd,systemd-sysv,dbus,python3,openssh-server,sudo,iproute2,ca-certificates,procps,"
    "iputils-ping,curl"
)

_STOCK_CERTIFICATES = Path("/usr/share/ca-certificates/mozilla")

# What the stock image of a provider would not have, in the order in which it is done.
# - systemd-modules-load cannot work in a container, and would leave every host "degraded".
# - Each host makes its own machine id and ssh host keys at its first boot.
_CUSTOMIZE = r"""
set -eu
root="$1"
: > "$root/etc/machine-id"
rm -f "$root"/etc/ssh/ssh_host_* "$root"/var/lib/dbus/machine-id
ln -s /dev/null "$root/etc/systemd/system/systemd-modules-load.service"
mkdir -p "$root/etc/systemd/system/ssh.service.d"
printf '[Service]\nExecStartPre=\nExecStartPre=/usr/bin/ssh-keygen -A\nExecStartPre=/usr/sbin/sshd -t\n' \
    > "$root/etc/systemd/system/ssh.service.d/keys.conf"
cp "$LAB_EXTRAS"/*.crt "$root/usr/local/share/ca-certificates/" 2>/dev/null || true
cp "$LAB_EXTRAS/apt.conf" "$root/etc/apt/apt.conf.d/90machine"
chroot "$root" update-ca-certificates >/dev/null 2>&1
"""  # noqa: E501 - the script is part of the image's digest


def machine_certificates() -> list[str]:
    """PEM certificates that this machine trusts, from its OpenSSL-style bundle; sorted, unique.

    A company's TLS proxy signs with one of these, and a host that lacks it reaches nothing.
    """
    bundle = Path(os.environ.get("SSL_CERT_FILE", "/etc/ssl/certs/ca-certificates.crt"))
    if not bundle.is_file():
        return []
    pattern = r"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----"
    return sorted(set(re.findall(pattern, bundle.read_text(), re.DOTALL)))


def added_certificates() -> list[str]:
    """Those of `machine_certificates` that did not come with the distribution's own package."""
    stock = {_body(path.read_text()) for path in _STOCK_CERTIFICATES.glob("*.crt")}
    return [pem for pem in machine_certificates() if _body(pem) not in stock]


def _body(pem: str) -> str:
    """What is between the BEGIN and END of a certificate, however its lines are broken."""
    return "".join(word for word in pem.split() if "-----" not in word)


def apt_settings() -> str:
    """The machine's apt settings that matter for reaching its mirrors, as apt.conf text."""
    wanted = ("Acquire::http::Proxy", "Acquire::https::Proxy", "Acquire::Check-Valid-Until")
    dump = subprocess.run(["apt-config", "dump"], capture_output=True, text=True, check=False)
    lines = [line for line in dump.stdout.splitlines() if line.startswith(wanted)]
    return "\n".join(lines) + "\n"


def apt_sources() -> list[str]:
    """sources.list lines for SUITE from the mirrors that this machine itself uses, if it is Debian.

    Empty where it is not: mmdebstrap then takes its own default.
    """
    asked = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE)",
         "Created-By: Packages", "Origin: Debian", "Label: Debian"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    mirrors = {line.split()[0] for line in asked.stdout.splitlines() if len(line.split()) == 2}
    if len(mirrors) != 1:
        return []
    mirror = mirrors.pop()
    lines = [f"deb {mirror} {SUITE} main", f"deb {mirror} {SUITE}-updates main"]
    asked = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(REPO_URI)",
         "Created-By: Packages", "Label: Debian-Security"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    security = set(asked.stdout.split())
    return lines + [f"deb {uri} {SUITE}-security main" for uri in sorted(security)]


def ensure_image() -> str:
    """The tag of the hosts' image, which is made now if podman does not have it.

    Raises:
        LabError: podman refused.
        subprocess.CalledProcessError: mmdebstrap failed; it has said why.
    """
    certificates = added_certificates()
    recipe = [SUITE, PACKAGES, _CUSTOMIZE, apt_settings(), *apt_sources(), *certificates]
    digest = hashlib.sha256("\0".join(recipe).encode()).hexdigest()[:12]
    tag = f"localhost/{LABEL}-host:{digest}"
    if podman("image", "exists", tag, check=False).returncode == 0:
        return tag
    print(f"lab: making the hosts' image ({tag}), about a minute", flush=True)
    with tempfile.TemporaryDirectory(prefix="prefect-fleet-image-") as scratch:
        extras = Path(scratch) / "extras"
        extras.mkdir()
        Path(scratch).chmod(0o755)  # mmdebstrap may run as another user
        for number, pem in enumerate(certificates):
            (extras / f"machine-{number}.crt").write_text(pem + "\n")
        (extras / "apt.conf").write_text(apt_settings())
        customize = Path(scratch) / "customize.sh"
        customize.write_text(_CUSTOMIZE)
        customize.chmod(0o755)
        archive = Path(scratch) / "host.tar"
        argv = [
            "env", f"LAB_EXTRAS={extras}", "mmdebstrap", "--quiet", "--variant=minbase",
            f"--include={PACKAGES}", f"--aptopt={extras / 'apt.conf'}",
            f"--customize-hook=sh {customize} \"$1\"", SUITE, str(archive), *apt_sources(),
        ]  # fmt: skip
        subprocess.run(as_root(argv), check=True)
        podman("import", "--change", "CMD=/sbin/init", str(archive), tag)
    return tag


def ensure_cache_image(base: str) -> str:
    """The tag of the apt cache's image: the hosts' image plus Debian's apt-cacher-ng.

    Raises:
        LabError: podman refused.
    """
    return with_packages(base, base.replace("-host:", "-apt-cache:"), "apt-cacher-ng")


def with_packages(base: str, tag: str, *packages: str) -> str:
    """Make an image of another one and more of Debian's packages, once; gives back its tag.

    Raises:
        LabError: podman refused.
    """
    if podman("image", "exists", tag, check=False).returncode == 0:
        return tag
    print(f"lab: making {tag} with {' '.join(packages)}", flush=True)
    name = f"{LABEL}-build-{os.getpid()}"
    podman(
        "run", "--name", name, "--replace", "--label", f"{LABEL}=image", *run_arguments(), base,
        "sh", "-c",
        "apt-get update -q && DEBIAN_FRONTEND=noninteractive "
        f"apt-get install -qy --no-install-recommends {' '.join(packages)}",
    )  # fmt: skip
    try:
        podman("commit", "--quiet", "--change", "CMD=/sbin/init", name, tag)
    finally:
        podman("rm", "--force", name)
    return tag
