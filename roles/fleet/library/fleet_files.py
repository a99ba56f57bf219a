#!/usr/bin/python
"""The remote half of `fleet_files`: compares all entries at once, then makes what differs.

The other half, the action plugin of the same name, says what it is for and how it is used. Contents
come here only where they differ, so a host that is as it should be costs one short call.
"""

from __future__ import annotations

import base64
import contextlib
import grp
import hashlib
import os
import pwd
import shlex
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: fleet_files
short_description: Folders, links and files of a host, compared and made in one call
description: What the action plugin of this name asks of a host. Tasks give it other arguments.
options:
  entries:
    description: The paths in their order, each with what it shall be.
    type: list
    elements: dict
    required: true
    suboptions:
      path: {description: Where., type: path, required: true}
      kind: {description: What., type: str, choices: [folder, link, file], required: true}
      target: {description: Where a link leads., type: str}
      checksum: {description: SHA-256 of a file's content., type: str}
      mode: {description: Its rights in octal; links have none., type: str}
      owner: {description: The user who owns it., type: str}
      group: {description: The group that owns it., type: str}
      validate: {description: Command that has to succeed first; %s is the new file., type: str}
      before: {description: Whether the content may be given back for a diff., type: bool}
  contents:
    description: Contents by path in base64, or nothing yet.
    type: dict
  staged:
    description: Files on this host by path, with contents too large for that.
    type: dict
    default: {}
author: [prefect-fleet]
"""

RETURN = r"""
missing:
  description: Paths whose contents are asked for; then nothing was changed.
  returned: always
  type: list
  elements: str
changes:
  description: By path what was done, or would be.
  returned: always
  type: dict
before:
  description: Contents by path, as they were and as far as they are text.
  returned: always
  type: dict
"""

_SHOWN = 1 << 16  # bytes of a file that a diff shows at most
_PARENT_MODE = 0o755


def checksum(path: str) -> str:
    """SHA-256 of a file's content."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_ids(entry: dict[str, Any]) -> tuple[int, int]:
    """Numbers of the entry's owner and group.

    Raises:
        KeyError: this host does not know one of them.
    """
    return pwd.getpwnam(entry["owner"]).pw_uid, grp.getgrnam(entry["group"]).gr_gid


def has_rights(entry: dict[str, Any], found: os.stat_result) -> bool:
    """Whether a file or folder has the wanted mode, owner and group."""
    try:
        wanted = find_ids(entry)
    except KeyError:  # of a user who is still to be created
        return False
    same_mode = stat.S_IMODE(found.st_mode) == int(entry["mode"], 8)
    return same_mode and (found.st_uid, found.st_gid) == wanted


def find_change(entry: dict[str, Any]) -> str:
    """What is to be done for an entry: "content", "rights", or nothing where it is as wanted.

    Raises:
        ValueError: there is something in its place that is not replaced.
    """
    path, kind = Path(entry["path"]), entry["kind"]
    try:
        # A folder may be somewhere else, behind a link.
        found = path.stat(follow_symlinks=kind == "folder")
    except OSError:
        return "content"
    if kind == "folder":
        if not stat.S_ISDIR(found.st_mode):
            raise ValueError(f"{path} is no folder: move it out of the way")
        return "" if has_rights(entry, found) else "rights"
    if stat.S_ISDIR(found.st_mode):
        raise ValueError(f"{path} is a folder: move it out of the way")
    if kind == "link":
        same = stat.S_ISLNK(found.st_mode) and str(path.readlink()) == entry["target"]
        return "" if same else "content"
    if not stat.S_ISREG(found.st_mode) or checksum(entry["path"]) != entry["checksum"]:
        return "content"
    return "" if has_rights(entry, found) else "rights"


def read_text(path: str) -> str:
    """A file's beginning for a diff; empty where it is not there or no text."""
    try:
        with Path(path).open("rb") as file:
            return file.read(_SHOWN).decode()
    except (OSError, UnicodeDecodeError):
        return ""


def set_rights(path: Path, entry: dict[str, Any]) -> None:
    """Give a path the entry's owner, group and mode."""
    os.chown(path, *find_ids(entry))
    path.chmod(int(entry["mode"], 8))


@contextlib.contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A new name beside a path, of the same suffix and hidden from what reads whole folders."""
    folder = Path(tempfile.mkdtemp(prefix=".", dir=path.parent))
    try:
        yield folder / path.name
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Maker:
    """Makes what differs, on this host."""

    def __init__(self, module: AnsibleModule) -> None:
        self._module = module
        self._contents = module.params["contents"] or {}
        self._staged = module.params["staged"]

    def make(self, entry: dict[str, Any], change: str) -> None:
        """Make one entry as it should be."""
        if change == "rights":
            set_rights(Path(entry["path"]), entry)
        else:
            getattr(self, f"_make_{entry['kind']}")(entry)

    def _make_folder(self, entry: dict[str, Any]) -> None:
        wanted = Path(entry["path"])
        for path in [folder for folder in (wanted, *wanted.parents) if not folder.exists()][::-1]:
            path.mkdir()
            path.chmod(_PARENT_MODE)
        set_rights(wanted, entry)

    def _make_link(self, entry: dict[str, Any]) -> None:
        path = Path(entry["path"])
        with beside(path) as new:
            new.symlink_to(entry["target"])
            new.replace(path)

    def _make_file(self, entry: dict[str, Any]) -> None:
        path = entry["path"]
        with beside(Path(path)) as new:
            descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                if path in self._staged:
                    with Path(self._staged[path]).open("rb") as staged:
                        shutil.copyfileobj(staged, file)
                else:
                    file.write(base64.b64decode(self._contents[path]))
            if checksum(str(new)) != entry["checksum"]:
                self._module.fail_json(msg=f"{path}: its content did not arrive as it was sent")
            # The program that checks it may run as another user.
            set_rights(new, entry)
            self._validate(entry, new)
            new.replace(path)

    def _validate(self, entry: dict[str, Any], new: Path) -> None:
        if not entry["validate"]:
            return
        command = [word.replace("%s", str(new)) for word in shlex.split(entry["validate"])]
        code, out, err = self._module.run_command(command)
        if code != 0:
            said = err.strip() or out.strip()
            self._module.fail_json(msg=f"{entry['path']} was left as it was: {said}")


def main() -> None:
    """Run as an Ansible module."""
    entry_spec = {
        "path": {"type": "path", "required": True},
        "kind": {"type": "str", "required": True, "choices": ["folder", "link", "file"]},
        "target": {"type": "str"},
        # Of a short secret it would tell enough to try what it is.
        "checksum": {"type": "str", "no_log": True},
        "mode": {"type": "str"},
        "owner": {"type": "str"},
        "group": {"type": "str"},
        "validate": {"type": "str"},
        "before": {"type": "bool"},
    }
    module = AnsibleModule(
        argument_spec={
            "entries": {
                "type": "list",
                "elements": "dict",
                "required": True,
                "options": entry_spec,
            },
            "contents": {"type": "dict", "no_log": True},
            "staged": {"type": "dict", "default": {}},
        },
        supports_check_mode=True,
    )
    entries = module.params["entries"]
    try:
        found = [(entry, change) for entry in entries if (change := find_change(entry))]
    except ValueError as error:
        module.fail_json(msg=str(error))
    changes = {entry["path"]: change for entry, change in found}
    before = {
        entry["path"]: read_text(entry["path"])
        for entry, change in found
        if entry["before"] and change == "content"
    }
    missing = [
        entry["path"] for entry, change in found if entry["kind"] == "file" and change == "content"
    ]
    if not module.check_mode and not (missing and module.params["contents"] is None):
        maker = Maker(module)
        missing = []
        for entry, change in found:
            try:
                maker.make(entry, change)
            except KeyError as error:
                module.fail_json(msg=f"{entry['path']}: {error.args[0]}")
            except OSError as error:
                module.fail_json(msg=f"{entry['path']}: {error}")
    module.exit_json(changed=bool(changes), changes=changes, before=before, missing=missing)


if __name__ == "__main__":
    main()
