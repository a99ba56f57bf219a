"""Hosts with a kernel of their own: user-mode Linux, a program, in the host's container.

A container shares the machine's cgroups, and where those have no controllers no limit of memory,
processors or processes holds in it. Such a kernel has all of them, on any machine. It is slow at
system calls, has one processor, and no nftables, so it is for what needs it.

The container's file system is copied to a disk when the host is made; from then on the kernel has
the disk and the container's address, and ssh is the way in.
"""

from __future__ import annotations

from lab.image import with_packages

READY = "/machine/ready"
"""File in the container without which the kernel is not started: the disk's content is complete."""

# - Of the container's root only that itself goes to the disk, without what is mounted on it.
# - Bridged to a TAP device, the container's interface is the guest's; its address is given up.
# - The memory is a file that is executed from, which /dev/shm of a container forbids.
# - Without gro=1 the guest drops packets that the machine's kernel has put together, and waits for
#   each of them to be sent again.
# - What is there of podman's would make systemd take the guest for a container.
BOOT = f"""
set -e
until [ -e {READY} ]; do sleep 0.1; done
if [ ! -e /machine/disk ]; then
    address=$(ip -4 -oneline address show eth0 | awk '{{print $4}}')
    gateway=$(ip route | awk '/^default/ {{print $3}}')
    cat > /etc/systemd/system/lab-network.service <<END
[Unit]
DefaultDependencies=no
Wants=network.target
Before=network.target

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=ip link set lo up
ExecStart=ip link set vec0 name eth0
ExecStart=ip address add $address dev eth0
ExecStart=ip link set eth0 up
ExecStart=ip route add default via $gateway

[Install]
WantedBy=sysinit.target
END
    systemctl --quiet enable lab-network.service
    mount --bind / /mnt
    rm -f /mnt/run/.containerenv
    hostname > /mnt/etc/hostname
    printf '127.0.0.1 localhost\\n%s %s\\n' "${{address%/*}}" "$(hostname)" > /mnt/etc/hosts
    truncate --size=8G /machine/disk.new
    mke2fs -q -t ext4 -d /mnt /machine/disk.new
    umount /mnt
    mv /machine/disk.new /machine/disk
fi
ip link add lab0 type bridge
ip tuntap add tap0 mode tap
for one in eth0 tap0; do ip link set $one master lab0; done
for one in eth0 tap0 lab0; do ip link set $one up; done
ip address flush dev eth0
exec env --ignore-environment PATH="$PATH" HOME=/root TMPDIR=/memory linux.uml mem=2G \\
    ubd0=/machine/disk root=/dev/ubda rw init=/sbin/init \\
    vec0:transport=tap,ifname=tap0,depth=128,gro=1 con=null con0=null,fd:1 quiet
"""


def arguments() -> list[str]:
    """What `podman run` needs for such a host beside what every host needs."""
    return ["--volume", "/machine", "--tmpfs", "/memory:exec,size=3g"]


def ensure_machine_image(base: str) -> str:
    """The tag of the image with the kernel on top of `base`, made now if podman does not have it.

    Raises:
        LabError: podman refused.
    """
    repository, _, tag = base.rpartition(":")
    return with_packages(base, f"{repository}-machine:{tag}", "e2fsprogs", "user-mode-linux")
