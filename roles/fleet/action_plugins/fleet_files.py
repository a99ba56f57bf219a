"""Folders, links and files of a host in one task, for a round trip each adds up.

    - name: Configure the tool
      fleet_files:
        files:
          - {folders: [/etc/tool]}
          - {path: /etc/tool/tool.conf, template: tool.conf.j2, validate: tool check %s}
          - {path: /etc/tool/key, content: "{{ tool_key }}", mode: "0600", secret: true}
          - {path: /usr/local/bin/tool, source: "{{ tool_binary }}", mode: "0755"}
          - {path: /opt/tool/lib, sources: "{{ query('fileglob', tool_library ~ '/*.py') }}"}
          - {path: /opt/tool/current, link: /opt/tool/1.2}

An entry is `folders`, a `link` at a `path`, or a file at a `path`, with `content`, made of a
`template` of the role (with more variables in `vars`), or a copy of the control node's `source`;
`sources` are copied into the folder `path` by their names. Owner and group are root unless `owner`
and `group` say otherwise; `mode` is 0755 for folders and 0644 for files. `validate` is a command
that has to succeed before a file is replaced; %s is the new file. A `secret` file's content is in
no diff. Folders above those of `folders` are made, and belong to root.

The host is asked for everything at once, by checksums. Only where files differ do their contents go
there, in a second call, and each file is replaced as a whole.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase
from ansible.template import trust_as_template

_FILE_KINDS = ("content", "template", "source")
_KINDS = ("folders", "link", "sources", *_FILE_KINDS)
_MORE = ("path", "mode", "owner", "group", "validate", "secret", "vars")
_MANAGED = "Ansible managed"  # as the module `template` fills it in
_LARGE = 1 << 20  # bytes from which on a file is sent by itself
_SHOWN = 1 << 16  # bytes of a file that a diff shows at most


def check(entry: Any) -> str:
    """Which kind of entry this is.

    Raises:
        AnsibleActionFail: it is none, or has what no entry has.
    """
    kinds = [kind for kind in _KINDS if kind in entry] if isinstance(entry, Mapping) else []
    if len(kinds) != 1:
        raise AnsibleActionFail(f"Each entry of files is one of: {', '.join(_KINDS)}")
    if unknown := entry.keys() - {*kinds, *_MORE}:
        raise AnsibleActionFail(f"No entry of files has: {', '.join(sorted(unknown))}")
    if (kinds[0] == "folders") == ("path" in entry):
        raise AnsibleActionFail("Links and files have a path, folders have none.")
    return kinds[0]


def read_checksum(source: Path) -> str:
    """SHA-256 of a file's content."""
    with source.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class ActionModule(ActionBase):
    """The control node's half."""

    TRANSFERS_FILES = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict:
        """Compare, send what differs, and say what changed."""
        super().run(tmp, task_vars)
        self._variables = task_vars or {}
        _, arguments = self.validate_argument_spec(
            {"files": {"type": "list", "elements": "dict", "required": True}}
        )
        self._contents: dict[str, bytes] = {}
        self._sources: dict[str, Path] = {}
        entries = [entry for given in arguments["files"] for entry in self._entries(given)]
        result = self._ask(entries)
        before = result.pop("before", {})
        missing = result.pop("missing", ())
        if missing and not result.get("failed") and not self._task.check_mode:
            try:
                result = self._send(entries, missing)
            finally:
                self._remove_tmp_path(self._connection._shell.tmpdir)
            result.pop("before", None)
            result.pop("missing", None)
        if self._task.diff and not result.get("failed"):
            result["diff"] = self._diff(entries, result["changes"], before)
        return result

    def _entries(self, given: Mapping[str, Any]) -> list[dict[str, Any]]:
        """What the remote half takes for an entry; contents are kept here."""
        kind = check(given)
        rights = {
            "owner": given.get("owner", "root"),
            "group": given.get("group", "root"),
            "mode": str(given.get("mode", "0755" if kind == "folders" else "0644")),
        }
        if kind == "folders":
            return [{"path": path, "kind": "folder", **rights} for path in given["folders"]]
        if kind == "sources":
            rest = {name: value for name, value in given.items() if name != "sources"}
            files = [(str(Path(given["path"]) / Path(one).name), one) for one in given["sources"]]
            return [
                entry
                for path, source in files
                for entry in self._entries({**rest, "path": path, "source": source})
            ]
        path = given["path"]
        if kind == "link":
            return [{"path": path, "kind": "link", "target": given["link"]}]
        if kind == "source":
            source = self._sources[path] = Path(given["source"])
            if not source.is_file():
                raise AnsibleActionFail(f"{source} for {path} is no file of the control node.")
            checksum = read_checksum(source)
        else:
            text = given["content"] if kind == "content" else self._render(given)
            self._contents[path] = str(text).encode()
            checksum = hashlib.sha256(self._contents[path]).hexdigest()
        return [
            {
                "path": path,
                "kind": "file",
                **rights,
                "checksum": checksum,
                "validate": given.get("validate", ""),
                "before": self._task.diff and not given.get("secret", False),
            }
        ]

    def _render(self, given: Mapping[str, Any]) -> str:
        path = Path(self._find_needle("templates", given["template"]))
        variables = {
            "ansible_managed": _MANAGED,
            **self._variables,
            **given.get("vars", {}),
        }
        templar = self._templar.copy_with_new_env(
            searchpath=[str(path.parent)], available_variables=variables
        )
        text = trust_as_template(self._loader.get_text_file_contents(str(path)))
        return templar.template(text, escape_backslashes=False, overrides={"trim_blocks": True})

    def _ask(self, entries: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        result = self._execute_module(
            module_name="fleet_files",
            module_args={"entries": entries, **more},
            task_vars=self._variables,
        )
        result.pop("invocation", None)
        return result

    def _send(self, entries: list[dict[str, Any]], missing: list[str]) -> dict[str, Any]:
        """Have the missing contents, and all else that differs, brought to the host."""
        contents, staged = {}, {}
        self._make_tmp_path()
        shell = self._connection._shell
        for number, path in enumerate(missing):
            source = self._sources.get(path)
            if source is None or source.stat().st_size < _LARGE:
                data = self._contents[path] if source is None else source.read_bytes()
                contents[path] = base64.b64encode(data).decode()
            else:
                staged[path] = shell.join_path(shell.tmpdir, f"file{number}")
                self._transfer_file(str(source), staged[path])
        if staged:
            self._fixup_perms2([shell.tmpdir, *staged.values()])
        return self._ask(entries, contents=contents, staged=staged)

    def _diff(
        self, entries: list[dict[str, Any]], changes: Mapping[str, str], before: Mapping[str, str]
    ) -> list[dict[str, str]]:
        """What changed, as Ansible shows it."""
        shown = []
        for entry in entries:
            path, change = entry["path"], changes.get(entry["path"])
            if not change or (entry["kind"] == "file" and not entry["before"]):
                continue
            if change == "rights" or entry["kind"] == "folder":
                after = " ".join(entry[name] for name in ("owner", "group", "mode")) + "\n"
            elif entry["kind"] == "link":
                after = f"leads to {entry['target']}\n"
            else:
                data = self._contents.get(path, b"as on the control node\n")
                after = data[:_SHOWN].decode(errors="replace")
            text = before.get(path, "")
            shown.append(
                {"before_header": path, "after_header": path, "before": text, "after": after}
            )
        return shown
