#!/usr/bin/python
"""Which release of the code a host uses.

One call does what links, a listing and removals would take six tasks for on every deploy, and tells
which release was in use before, so that a deploy that fails can go back to it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: fleet_release
short_description: Switch a host to one of its unpacked releases
description:
  - Points C(current) at the release, and C(flows), C(src) and C(deployments) into C(current).
  - The switch is one rename, so a run that starts meanwhile finds the old release or the new one.
  - Removes the oldest releases, never the one in use or the one before it.
options:
  home: {description: "Folder with C(releases), as C(/opt/prefect).", type: path, required: true}
  id: {description: The release., type: str, required: true}
  keep: {description: "Releases that stay, the one in use among them.", type: int, default: 5}
author: [prefect-fleet]
"""

RETURN = r"""
previous:
  description: The release that was in use before; empty where none was.
  returned: always
  type: str
"""

LINKS = {"flows": "current/flows", "src": "current/src", "deployments": "current/deployments"}
COMPLETE = "complete"  # the last file of a release, as scripts/build_release.py packs it


def point(link: Path, target: str) -> None:
    """Make `link` lead to `target` by one rename, whatever it led to before."""
    partial = link.with_name(f".{link.name}.partial")
    partial.unlink(missing_ok=True)
    partial.symlink_to(target)
    partial.rename(link)


def leads_to(link: Path) -> str:
    """Where a link leads; empty where there is none."""
    return str(link.readlink()) if link.is_symlink() else ""


def outdated(releases: Path, wanted: str, previous: str, keep: int) -> list[Path]:
    """The releases that are to go, oldest first."""
    others = [
        folder
        for folder in releases.iterdir()
        if folder.is_dir() and folder.name not in (wanted, previous)
    ]
    others.sort(key=lambda folder: folder.stat().st_mtime)
    kept = keep - len({wanted, previous} - {""})
    return others[: len(others) - kept] if kept > 0 else others


def main() -> None:
    """Run as an Ansible module."""
    module = AnsibleModule(
        argument_spec={
            "home": {"type": "path", "required": True},
            "id": {"type": "str", "required": True},
            "keep": {"type": "int", "default": 5},
        },
        supports_check_mode=True,
    )
    home, wanted = Path(module.params["home"]), module.params["id"]
    releases = home / "releases"
    previous = leads_to(home / "current").removeprefix("releases/")
    links = {"current": f"releases/{wanted}"} | LINKS
    wrong = {name: target for name, target in links.items() if leads_to(home / name) != target}
    if not module.check_mode and wrong:
        if not (releases / wanted / COMPLETE).exists():
            module.fail_json(msg=f"{releases / wanted} is not there as a whole: unpack it first.")
        # What the others lead into comes last, when they are all there.
        for name in sorted(wrong, key=lambda name: name == "current"):
            point(home / name, wrong[name])
        for folder in outdated(releases, wanted, previous, module.params["keep"]):
            shutil.rmtree(folder)
    module.exit_json(changed=bool(wrong), previous=previous)


if __name__ == "__main__":
    main()
