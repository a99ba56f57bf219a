"""A flow that shows that a worker host runs flows at all."""

import platform
import socket
import time

from dotenv import load_dotenv
from prefect import flow, get_run_logger

from prefect_fleet.manifests import with_manifest


@with_manifest
@flow(name="canary")
def canary(host: str = "", token: str = "", seconds: float = 0) -> dict[str, str]:
    """Say where this run runs.

    Args:
        host: Host that the run was aimed at. It is logged, not checked: the caller compares it
            with the hostname that comes back.
        token: Any text; it comes back, so that the caller knows that the result is this run's.
        seconds: How long to take, for trying what happens to a run meanwhile.

    Returns:
        token, hostname and python (version).
    """
    hostname = socket.gethostname()
    get_run_logger().info("Aimed at %s, running on %s.", host or "any host", hostname)
    time.sleep(seconds)
    return {"token": token, "hostname": hostname, "python": platform.python_version()}


if __name__ == "__main__":
    load_dotenv()
    print(canary())
