"""Know without Prefect that a deploy has nothing to do, as its last plan had.

A plan takes seconds, nearly all of them for importing Prefect and the flows, and in most converges
it finds nothing to do. It depends on the files, the settings, the environment, the Python that
reads them, and what the server has. Where all of that is what it was when a plan had nothing to do,
there is nothing to do again.

What is kept is a digest of it and what was said. Weak passwords among the settings can't be guessed
from the digest, for the API's own, which is of the environment, is in it too.
"""

import contextlib
import hashlib
import json
import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from prefect_fleet.bare_api import PAGE, CannotTellError, bare_client, let_post

# What systemd tells a unit of itself, most of it anew for each start.
_OF_THIS_START = {
    "CACHE_DIRECTORY",
    "INVOCATION_ID",
    "JOURNAL_STREAM",
    "MEMORY_PRESSURE_WATCH",
    "MEMORY_PRESSURE_WRITE",
    "SYSTEMD_EXEC_PID",
}
# All that a plan reads of the server: what each of these routes shows.
_KINDS = (
    "automations",
    "block_documents",
    "block_schemas",
    "block_types",
    "deployments",
    "flows",
    "variables",
    "work_pools",
    "work_queues",
)
# Of things that workers ask for and runs use; no plan looks at it.
_RESTLESS = {"last_polled", "status", "updated"}


class LastPlan:
    """The last plan that had nothing to do.

    Args:
        folder: where it is kept.
        root: the folder with the files.
        given: everything else that a plan is made from; JSON can hold it.
    """

    def __init__(self, folder: Path, root: Path, given: Any) -> None:
        self._file = folder / "nothing-to-do.json"
        self._inputs = _inputs(root, given)
        self._digest: str | None = None

    def recall(self) -> str | None:
        """Return what it said, if this one would say the same; else None."""
        self._digest = self._take_digest()
        try:
            kept = json.loads(self._file.read_bytes())
            same = self._digest is not None and kept["digest"] == self._digest
            return str(kept["said"]) if same else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def keep(self, said: str) -> None:
        """Keep a plan that has nothing to do, made after `recall`, if all is as it was then."""
        if self._digest is None or self._take_digest() != self._digest:
            return
        part = self._file.with_suffix(".part")
        # Without it, the next deploy makes its plan.
        with contextlib.suppress(OSError):
            part.touch(mode=0o600)
            part.write_text(json.dumps({"digest": self._digest, "said": said}))
            part.replace(self._file)

    def _take_digest(self) -> str | None:
        digest = hashlib.sha256(self._inputs)
        try:
            with bare_client() as client:
                let_post(client)
                for kind in _KINDS:
                    for thing in _read(client, kind):
                        digest.update(f"{kind} {thing}\n".encode())
        except CannotTellError:
            return None
        return digest.hexdigest()


def _inputs(root: Path, given: Any) -> bytes:
    """Return a digest of everything that a plan is made from, but for the server."""
    digest = hashlib.sha256()
    environment = {name: os.environ[name] for name in os.environ.keys() - _OF_THIS_START}
    packages = Path(sysconfig.get_paths()["purelib"])
    # Installing and removing packages changes it.
    python = [sys.version, str(packages), packages.stat().st_mtime_ns, sorted(os.listdir(packages))]  # noqa: PTH208
    parts = [given, environment, python, str(root)]
    # YAML has dates, JSON has none.
    digest.update(json.dumps(parts, sort_keys=True, default=repr).encode())
    home = Path(os.environ.get("PREFECT_HOME", "~/.prefect")).expanduser()
    for path in (home / "profiles.toml", *_files(root)):
        content = path.read_bytes() if path.is_file() else b""
        digest.update(f"\n{path} {len(content)}\n".encode(errors="surrogateescape"))
        digest.update(content)
    return digest.digest()


def _files(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        # What Python keeps of the files beside them.
        folders[:] = sorted(set(folders) - {"__pycache__"})
        yield from (Path(folder, name) for name in sorted(names))


def _read(client: httpx.Client, kind: str) -> list[str]:
    """Return all things of a kind as texts, in an order that is the same each time."""
    found: list[str] = []
    body: dict[str, Any] = {"limit": PAGE}
    if kind == "block_documents":
        body["include_secrets"] = True
    while True:
        answer = client.post(f"/{kind}/filter", json=body | {"offset": len(found)})
        shown = answer.raise_for_status().json()
        if not isinstance(shown, list):
            raise CannotTellError(f"{kind} are no list")
        found += (json.dumps(_at_rest(thing), sort_keys=True) for thing in shown)
        if len(shown) < PAGE:
            return sorted(found)


def _at_rest(thing: dict[str, Any]) -> dict[str, Any]:
    """Return a thing without what changes while nobody changes it."""
    rest = {key: value for key, value in thing.items() if key not in _RESTLESS}
    if limit := rest.get("global_concurrency_limit"):
        rest["global_concurrency_limit"] = {key: limit[key] for key in ("id", "name", "limit")}
    return rest
