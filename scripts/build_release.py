#!/usr/bin/env python3
"""Pack the code of a release into one file named after its content: `build_release.py CODE OUT`.

CODE is a folder with flows/, src/, deployments/, prefect.yaml and warm-imports.txt; OUT is where
`<id>.tar.gz` goes, with one folder `<id>` in it. What every fleet needs (run manifests, the canary,
the programs of the roles) and CODE does not have comes from this project. The last line of stdout
is `{"id": "<12 hex digits>", "path": "<file>"}`. The same content always makes the same id.
Exit status: 0 done, 1 CODE holds nothing to deploy, 2 wrong usage.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import sys
import tarfile
from pathlib import Path

CONTENTS = (
    "deployments",
    "flows",
    "prefect.yaml",
    "scripts/create_blocks.py",
    "src",
    "warm-imports.txt",
)
# What this project gives to a release whose code does not have it.
GIVEN = ("scripts/create_blocks.py", "src/prefect_dhis2", "src/prefect_fleet")
PROJECT = Path(__file__).resolve().parent.parent
# The last file of a release: where it is, unpacking was not interrupted.
COMPLETE = "complete"
_SKIPPED = ("__pycache__", ".egg-info", ".pyc")


def files_below(folder: Path, names: tuple[str, ...]) -> list[Path]:
    """The files at and below the names, relative to `folder`, hidden and compiled ones left out."""
    found = []
    for name in names:
        path = folder / name
        candidates = [path] if path.is_file() else path.rglob("*")
        found += [item.relative_to(folder) for item in candidates if item.is_file()]
    return [
        path
        for path in found
        if not any(part.startswith(".") or part.endswith(_SKIPPED) for part in path.parts)
    ]


def release_files(code: Path) -> dict[str, Path]:
    """Where the files of a release are, by their place in it, sorted by that."""
    files = {str(path): code / path for path in files_below(code, CONTENTS)}
    given = tuple(name for name in GIVEN if not (code / name).exists())
    files |= {str(path): PROJECT / path for path in files_below(PROJECT, given)}
    return dict(sorted(files.items()))


def release_id(files: dict[str, tuple[int, bytes]]) -> str:
    """A name for what the files (mode and content by path) hold."""
    digest = hashlib.sha256()
    for path, (mode, data) in files.items():
        digest.update(f"{len(path)} {path} {mode} {len(data)} ".encode() + data)
    return digest.hexdigest()[:12]


def pack(release: str, files: dict[str, tuple[int, bytes]]) -> bytes:
    """A tar of the files (mode and content by path) in one folder, root's, with no times in it."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for path, (mode, data) in files.items():
            entry = tarfile.TarInfo(f"{release}/{path}")
            entry.size = len(data)
            entry.mode = mode
            archive.addfile(entry, io.BytesIO(data))
    return raw.getvalue()


def main(argv: list[str]) -> int:
    """Pack, and print where the release is."""
    if len(argv) != 2:
        print("usage: build_release.py CODE OUT", file=sys.stderr)
        return 2
    code, out = Path(argv[0]).resolve(), Path(argv[1])
    if not any(path.name == "prefect.yaml" for path in files_below(code, CONTENTS)):
        print(
            f"{code} has no prefect.yaml, neither itself nor below deployments/: "
            "set fleet_code to the folder of your flows",
            file=sys.stderr,
        )
        return 1
    # The umask of whoever checked the code out must not count.
    contents = {
        name: (0o755 if path.stat().st_mode & 0o100 else 0o644, path.read_bytes())
        for name, path in release_files(code).items()
    } | {COMPLETE: (0o644, b"")}
    release = release_id(contents)
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{release}.tar.gz"
    if not path.exists():
        partial = path.with_suffix(".partial")
        partial.write_bytes(gzip.compress(pack(release, contents), mtime=0))
        partial.rename(path)
    print(json.dumps({"id": release, "path": str(path)}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
