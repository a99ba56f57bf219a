#!/usr/bin/python
"""A systemd service that is enabled, running, and running with what is on disk.

Handlers are forgotten when a converge is interrupted between a change and its restart: the next run
finds nothing to change and leaves the old process with the old settings for ever. So the restart
hangs on what can be seen on the host: a file that is newer than the process that read it.
"""

from __future__ import annotations

import http.client
import os
import ssl
import time
import urllib.request
from datetime import UTC, datetime
from typing import Any

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: fleet_service
short_description: Enable and start a systemd service, and restart it when it runs with old files
description:
  - Restarts when the unit file, one of its drop-ins or one of I(files) changed after the service
    was started, however long ago that was and whoever changed it.
  - Symbolic links count by their own time, so switching one counts as a change.
options:
  services:
    description: The services in their order, each well before the next is looked at.
    type: list
    elements: dict
    suboptions:
      name: {description: The unit with its suffix., type: str, required: true}
      files:
        description: Files that the service reads when it starts. Missing ones are passed over.
        type: list
        elements: path
        default: []
      reload_files:
        description:
          - Files that the service reads when it is reloaded as well. Where only these changed since
            it was started or reloaded, it is reloaded, which ends no connection.
        type: list
        elements: path
        default: []
      health_url:
        description:
          - Where the service says that it is well, with status 200. The module waits for that, and
            fails with the end of the unit's journal when it does not come or the service keeps
            ending.
        type: str
        default: ""
      health_ca:
        description: Certificate of the authority that signed the one of I(health_url).
        type: path
        default: ""
      health_seconds: {description: How long to wait for it., type: int, default: 180}
  look:
    description:
      - Change nothing and wait for nothing. C(why) says what there is to do, a service that does
        not answer among it.
    type: bool
    default: false
  name: {description: The only service; it has the options of an entry of I(services)., type: str}
  files: {description: See I(services)., type: list, elements: path, default: []}
  reload_files: {description: See I(services)., type: list, elements: path, default: []}
  health_url: {description: See I(services)., type: str, default: ""}
  health_ca: {description: See I(services)., type: path, default: ""}
  health_seconds: {description: See I(services)., type: int, default: 180}
author: [prefect-fleet]
"""

RETURN = r"""
why:
  description: What was done and for which reason; empty when nothing was.
  returned: always
  type: list
  elements: str
"""

_PROPERTIES = (
    "ActiveState",
    "UnitFileState",
    "NeedDaemonReload",
    "FragmentPath",
    "DropInPaths",
    "InactiveExitTimestamp",
    # Of the last start or the end of the last reload.
    "StateChangeTimestamp",
    "LoadState",
    "NRestarts",
)
_RESTARTS_TOLERATED = 5
_JOURNAL_LINES = 25


def parse_time(text: str) -> float:
    """Seconds since the epoch of `systemctl show --timestamp=us+utc`, 0 where there is none.

    >>> parse_time("Sun 2026-11-22 05:46:11.250000 UTC")
    1795326371.25
    """
    if not text or text == "n/a":
        return 0.0
    _, day, clock, _ = text.split()
    moment = datetime.strptime(f"{day} {clock}", "%Y-%m-%d %H:%M:%S.%f")
    return moment.replace(tzinfo=UTC).timestamp()


def newer_files(paths: list[str], started: float) -> list[str]:
    """Those of the paths that exist and changed after `started` (seconds since the epoch)."""
    return [path for path in paths if os.path.lexists(path) and os.lstat(path).st_mtime > started]


class Service:
    """One unit, as systemctl shows it."""

    def __init__(self, module: AnsibleModule, name: str) -> None:
        self._module = module
        self._name = name
        self.show()

    def systemctl(self, *args: str) -> str:
        """Run systemctl; ends the module with what it said when that fails."""
        code, out, err = self._module.run_command(["systemctl", *args])
        if code != 0:
            self._module.fail_json(msg=f"systemctl {' '.join(args)}: {err.strip() or out.strip()}")
        return out

    def show(self) -> None:
        """Read the unit's properties anew."""
        wanted = ",".join(_PROPERTIES)
        out = self.systemctl("show", "--timestamp=us+utc", f"--property={wanted}", self._name)
        self._properties = dict(line.partition("=")[::2] for line in out.splitlines())

    def __getitem__(self, name: str) -> str:
        return self._properties.get(name, "")

    def stale(self, files: list[str]) -> list[str]:
        """The files that the running service has not read in their present form."""
        units = [self["FragmentPath"], *self["DropInPaths"].split()]
        return newer_files([*units, *files], parse_time(self["InactiveExitTimestamp"]))

    def stale_for_reload(self, files: list[str]) -> list[str]:
        """The files that it has read in their present form neither at its start nor since."""
        return newer_files(files, parse_time(self["StateChangeTimestamp"]))


def answers(url: str, authority: str = "") -> bool:
    """Whether the URL answers 200 within five seconds; no proxy is asked.

    `authority` is the file with the certificate by which the answering one's is verified.
    """
    try:
        context = ssl.create_default_context(cafile=authority or None)
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
        )
        with opener.open(url, timeout=5) as response:
            return response.status == 200
    except (OSError, http.client.HTTPException):  # a URLError is an OSError
        return False


def wait_for_health(module: AnsibleModule, service: Service, wanted: dict[str, Any]) -> None:
    """Return when the URL answers; ends the module with the unit's journal if it does not."""
    url, authority, seconds = (
        wanted[name] for name in ("health_url", "health_ca", "health_seconds")
    )
    service.show()
    restarts = int(service["NRestarts"] or 0)
    deadline = time.monotonic() + seconds
    while not answers(url, authority):
        service.show()
        ended = int(service["NRestarts"] or 0) - restarts
        if ended > _RESTARTS_TOLERATED or time.monotonic() > deadline:
            name = wanted["name"]
            happened = f"ended {ended} times" if ended else f"did not answer within {seconds} s"
            lines = f"--lines={_JOURNAL_LINES}"
            _, journal, _ = module.run_command(
                ["journalctl", "--unit", name, lines, "--no-pager", "--output=cat"]
            )
            module.fail_json(
                msg=f"{name} {happened} while {url} was asked. The end of its journal:\n{journal}"
            )
        time.sleep(0.5)


def ensure(module: AnsibleModule, wanted: dict[str, Any], only_look: bool) -> list[str]:
    """Make one service run as wanted; gives back what was done, or would be, and why."""
    name = wanted["name"]
    service = Service(module, name)
    why: list[str] = []
    steps: list[tuple[str, ...]] = []
    unread = service["NeedDaemonReload"] == "yes" or service["LoadState"] == "not-found"
    if unread and not module.check_mode:
        # No change by itself: it only makes systemd read what is there.
        service.systemctl("daemon-reload")
        service.show()
    if service["LoadState"] == "not-found" and not module.check_mode:
        module.fail_json(msg=f"There is no unit {name} on this host.")
    if service["UnitFileState"] not in ("enabled", "enabled-runtime", "static"):
        why.append("enabled: it was not")
        steps.append(("enable", name))
    stale = service.stale(wanted["files"])
    if service["ActiveState"] not in ("active", "activating", "reloading"):
        why.append(f"started: it was {service['ActiveState']}")
        steps.append(("start", name))
    elif stale:
        why.append(f"restarted: changed since it was started: {', '.join(stale)}")
        steps.append(("restart", name))
    elif unread_files := service.stale_for_reload(wanted["reload_files"]):
        # One that is just starting, again and again perhaps, cannot be reloaded.
        step = "reload" if service["ActiveState"] == "active" else "restart"
        why.append(f"{step}ed: changed since it was started or reloaded: {', '.join(unread_files)}")
        steps.append((step, name))
    url = wanted["health_url"]
    if only_look:
        if url and not why and not answers(url, wanted["health_ca"]):
            why.append(f"not well: {url} does not answer")
    elif not module.check_mode:
        for step in steps:
            service.systemctl(*step)
        if url:
            wait_for_health(module, service, wanted)
    return why


def main() -> None:
    """Run as an Ansible module."""
    more = {
        "files": {"type": "list", "elements": "path", "default": []},
        "reload_files": {"type": "list", "elements": "path", "default": []},
        "health_url": {"type": "str", "default": ""},
        "health_ca": {"type": "path", "default": ""},
        "health_seconds": {"type": "int", "default": 180},
    }
    module = AnsibleModule(
        argument_spec={
            "services": {
                "type": "list",
                "elements": "dict",
                "options": {"name": {"type": "str", "required": True}, **more},
            },
            "name": {"type": "str"},
            "look": {"type": "bool", "default": False},
            **more,
        },
        mutually_exclusive=[("name", "services")],
        required_one_of=[("name", "services")],
        supports_check_mode=True,
    )
    look = module.params["look"]
    services = module.params["services"] or [module.params]
    why = [reason for wanted in services for reason in ensure(module, wanted, look)]
    module.exit_json(changed=bool(why) and not look, why=why)


if __name__ == "__main__":
    main()
