#!/usr/bin/python
"""What a host runs and has, as one checksum: the same as long as nothing was started or changed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: fleet_state
short_description: A checksum of services' starts and files' changes
description:
  - It is another one as soon as one of I(units) was started, stopped or reloaded, or one of
    I(paths) was written, moved or given other rights, by whomever.
options:
  units:
    description: Services by patterns; those that are not loaded do not count.
    type: list
    elements: str
    required: true
  except_units:
    description: Those of them that do not count.
    type: list
    elements: str
    default: []
  paths:
    description: Files, folders and links by patterns.
    type: list
    elements: path
    required: true
  note: {description: A file whose content is given back., type: path}
author: [prefect-fleet]
"""

RETURN = r"""
state: {description: The checksum., returned: always, type: str}
note: {description: The content of that file; empty without one., returned: always, type: str}
"""

# The timestamp is of the last start, stop or reload, the invocation of a start alone.
_PROPERTIES = ("Id", "ActiveState", "StateChangeTimestamp", "InvocationID")


def starts(listing: str, passed_over: Iterable[str]) -> list[str]:
    """A line for each unit of what `systemctl show` said, but for those that do not count."""
    lines = []
    for block in listing.strip().split("\n\n"):
        found = dict(line.partition("=")[::2] for line in block.splitlines())
        if found.get("Id", "") not in passed_over:
            lines.append(" ".join(found.get(name, "") for name in _PROPERTIES))
    return sorted(lines)


def changes(patterns: Iterable[str]) -> list[str]:
    """A line for each path: when it was last changed in any way, and where it leads as a link."""
    lines = []
    root = Path("/")
    found_paths = {path for pattern in patterns for path in root.glob(pattern.lstrip("/"))}
    for path in sorted(found_paths):
        found = path.lstat()
        target = path.readlink() if path.is_symlink() else ""
        lines.append(f"{path} {found.st_ino} {found.st_ctime_ns} {target}")
    return lines


def read(path: str | None) -> str:
    """What a file holds; nothing where it is not there."""
    file = Path(path) if path else None
    return file.read_text() if file and file.exists() else ""


def main() -> None:
    """Run as an Ansible module."""
    module = AnsibleModule(
        argument_spec={
            "units": {"type": "list", "elements": "str", "required": True},
            "except_units": {"type": "list", "elements": "str", "default": []},
            "paths": {"type": "list", "elements": "path", "required": True},
            "note": {"type": "path"},
        },
        supports_check_mode=True,
    )
    params = module.params
    wanted = f"--property={','.join(_PROPERTIES)}"
    _, listing, _ = module.run_command(
        ["systemctl", "show", "--timestamp=us+utc", wanted, *params["units"]], check_rc=True
    )
    lines = starts(listing, params["except_units"]) + changes(params["paths"])
    state = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    module.exit_json(changed=False, state=state, note=read(params["note"]))


if __name__ == "__main__":
    main()
