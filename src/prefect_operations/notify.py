"""A word to systemd about what a service does, as `systemctl status` shows it."""

import os
import socket


def tell_systemd(*assignments: str) -> None:
    """Send assignments such as `STATUS=…`; nothing happens where systemd does not listen."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):  # the kernel's abstract namespace
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as out:
        try:
            out.sendto("\n".join(assignments).encode(), address)
        except OSError:
            return  # what is told is of use to people only


def say(text: str) -> None:
    """Tell the journal and `systemctl status`."""
    print(text, flush=True)
    tell_systemd(f"STATUS={text}")
