#!/usr/bin/env python3
"""Pack the code of a release into one file named after its content: `build_release.py CODE OUT`.

CODE is a folder with flows/, src/, deployments/ and prefect.yaml; OUT is where
`<id>.tar.gz` goes. The last line of stdout is `{"id": "<12 hex digits>", "path": "<file>"}`.
The same content always makes the same id. Exit status: 0 done, 1 CODE holds nothing to deploy,
2 wrong usage.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import sys
import tarfile
from pathlib import Path

CONTENTS = ("deployments", "flows", "prefect.yaml", "scripts/create_blocks.py", "src")
_SKIPPED = ("__pycache__", ".egg-info", ".pyc")


def release_files(code: Path) -> list[Path]:
    """The files of a release, relative to `code`, sorted; hidden and compiled ones left out."""
    found = []
    for name in CONTENTS:
        path = code / name
        candidates = [path] if path.is_file() else path.rglob("*")
        found += [item.relative_to(code) for item in candidates if item.is_file()]
    return sorted(
        path
        for path in found
        if not any(part.startswith(".") or part.endswith(_SKIPPED) for part in path.parts)
    )


def pack(code: Path, files: list[Path]) -> bytes:
    """A tar of the files, owned by root, with no times in it."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for path in files:
            data = (code / path).read_bytes()
            entry = tarfile.TarInfo(str(path))
            entry.size = len(data)
            # The umask of whoever checked the code out must not count.
            entry.mode = 0o755 if (code / path).stat().st_mode & 0o100 else 0o644
            archive.addfile(entry, io.BytesIO(data))
    return raw.getvalue()


def main(argv: list[str]) -> int:
    """Pack, and print where the release is."""
    if len(argv) != 2:
        print("usage: build_release.py CODE OUT", file=sys.stderr)
        return 2
    code, out = Path(argv[0]).resolve(), Path(argv[1])
    files = release_files(code)
    if not any(path.name == "prefect.yaml" for path in files):
        print(
            f"{code} has no prefect.yaml, neither itself nor below deployments/: "
            "set fleet_code to the folder of your flows",
            file=sys.stderr,
        )
        return 1
    data = pack(code, files)
    # Of what is in it: compressed bytes differ between one machine's zlib and another's.
    release = hashlib.sha256(data).hexdigest()[:12]
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{release}.tar.gz"
    if not path.exists():
        partial = path.with_suffix(".partial")
        partial.write_bytes(gzip.compress(data, mtime=0))
        partial.rename(path)
    print(json.dumps({"id": release, "path": str(path)}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
