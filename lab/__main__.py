"""`python -m lab`: boot, look at and remove the local hosts."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

from lab.fleet import Fleet
from lab.image import ensure_cache_image, ensure_image
from lab.podman import LabError, ensure_tools
from lab.prepared import ensure_prepared_image

_UI_PORT = 4200


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lab", description=__doc__)
    parser.add_argument(
        "--fleet",
        default=os.environ.get("LAB_FLEET", "lab"),
        help="which fleet of lab/fleets.toml (default: %(default)s; variable LAB_FLEET)",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("up", help="boot the hosts and write inventory/<fleet>")
    commands.add_parser("down", help="remove the hosts, their network and mounts")
    commands.add_parser("reset", help="down, then up: new hosts")
    commands.add_parser("status", help="one line a host")
    image = commands.add_parser("image", help="make the hosts' image, which `up` does as well")
    image.add_argument("--prepared", action="store_true", help="that of prepared hosts as well")
    reboot = commands.add_parser("reboot", help="reboot hosts, or all of them, and wait")
    reboot.add_argument("hosts", nargs="*", metavar="host")
    reboot.add_argument("--hard", action="store_true", help="as by a power cut: nothing is stopped")
    ssh = commands.add_parser("ssh", help="a shell, or one command, on a host")
    ssh.add_argument("host")
    ssh.add_argument("args", nargs=argparse.REMAINDER, metavar="command")
    ui = commands.add_parser("ui", help="forward the UI to this machine until Ctrl-C")
    ui.add_argument("--port", type=int, default=_UI_PORT, help="local port (default: %(default)s)")
    return parser


def _forward_ui(fleet: Fleet, port: int) -> int:
    servers = [host.name for host in fleet.hosts if "prefect_server" in host.groups]
    address = fleet.tailnet_address(servers[0])
    print(f"lab: the UI is at http://127.0.0.1:{port} until you press Ctrl-C", flush=True)
    forward = f"127.0.0.1:{port}:{address}:{_UI_PORT}"
    # Through a connection of its own, so that Ctrl-C ends the forward as well.
    argv = ["ssh", "-F", str(fleet.ssh_config), "-S", "none", "-N"]
    argv += ["-o", "ExitOnForwardFailure=yes", "-L", forward, servers[0]]
    try:
        return subprocess.run(argv, check=False).returncode
    except KeyboardInterrupt:
        return 0


def main() -> int:
    """Run one command; the exit status is 0, or 1 with one sentence on stderr."""
    arguments = _parser().parse_args()
    try:
        fleet = Fleet.load(arguments.fleet)
        if arguments.command in ("up", "down", "reset", "status", "image"):
            ensure_tools()
        match arguments.command:
            case "up":
                fleet.up()
            case "down":
                fleet.down()
            case "reset":
                fleet.down()
                fleet.up()
            case "reboot":
                fleet.reboot(arguments.hosts, hard=arguments.hard)
            case "image":
                base = ensure_image()
                ensure_cache_image(base)
                if arguments.prepared:
                    ensure_prepared_image(base)
            case "status":
                print(fleet.status())
            case "ssh":
                argv = ["ssh", "-F", str(fleet.ssh_config), arguments.host, *arguments.args]
                return subprocess.run(argv, check=False).returncode
            case "ui":
                return _forward_ui(fleet, arguments.port)
    except LabError as error:
        print(f"lab: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
