"""Get the programs that no package registry holds, once, into a cache on the control node.

    python -m lab.artifacts [--arch amd64] [tailscale] [headscale] [rustfs]

Roles copy the binaries to hosts from there, so hosts need no internet. Each program is looked for
in a mirror folder, then in upstream's release, then built from its language's registry; the choice
is said on stderr. The last line on stdout is JSON: version, source, paths and checksums by program.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import lzma
import os
import re
import shutil
import signal
import ssl
import sys
import tarfile
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

import httpx
import yaml

from lab import artifacts_build
from lab.podman import LabError

SOURCES = ("mirror", "upstream", "build")
"""Where programs are looked for, in this order."""

ARCHITECTURES = {"amd64": 62, "arm64": 183}
"""Debian's name of each architecture that we support, and its number in ELF headers (elf.h)."""

DEFAULT_LIST = Path(__file__).parents[1] / "roles/fleet/defaults/main/artifacts.yml"

MIRROR_VARIABLE = "FLEET_ARTIFACT_MIRROR"
CACHE_VARIABLE = "FLEET_ARTIFACT_CACHE"

_TIMEOUT = httpx.Timeout(60.0, connect=10.0)  # seconds; 60 without a byte ends a download
_PROGRESS_S = 15.0
_CHUNK = 1 << 20
_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+~-]*")
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
_BROKEN_ARCHIVE = (tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error, EOFError)


class ArtifactError(Exception):
    """Something that must not be passed over; its text names the file and says what to do."""


class Unavailable(Exception):
    """This source does not have the program; the next one is asked."""


@dataclass(frozen=True)
class Artifact:
    """One program for one architecture, as the list has it."""

    name: str
    version: str
    arch: str
    binaries: tuple[str, ...]
    mirror: str
    """Its file's name in a mirror folder."""
    upstream: Mapping[str, Any] | None
    build: Mapping[str, Any] | None

    @property
    def entry(self) -> str:
        """Its folder's name in the cache."""
        return f"{self.name}-{self.version}-linux-{self.arch}"

    @property
    def title(self) -> str:
        return f"{self.name} {self.version} ({self.arch})"


@dataclass(frozen=True)
class Options:
    """What the command line and the environment say."""

    cache: Path
    sources: tuple[str, ...]
    mirror: Path | None
    image: str | None


Fetch = Callable[[Artifact, Options, Path], str]
"""Puts the binaries into the folder and says where they are from.

Raises Unavailable (the next source is asked) or ArtifactError (it all ends).
"""


def say(text: str) -> None:
    """One line of progress, on stderr."""
    print(f"artifacts: {text}", file=sys.stderr, flush=True)


# --- The list ---------------------------------------------------------------------------------


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid over `base`, mapping by mapping; any other value replaces the old one."""
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        result[key] = _merged(old, value) if both else value
    return result


def _read_list(text: str, where: str) -> dict[str, Any]:
    try:
        data = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ArtifactError(f"{where} is neither YAML nor JSON: {error}") from error
    # As an Ansible variables file has it, or the value of the variable alone.
    data = data.get("fleet_artifacts", data) if isinstance(data, Mapping) else data
    if not isinstance(data, Mapping) or not all(isinstance(v, Mapping) for v in data.values()):
        raise ArtifactError(f"{where}: expected a mapping of artifacts, each a mapping itself")
    return dict(data)


def load_list(override: str | None = None, stdin: IO[str] | None = None) -> dict[str, Any]:
    """The artifact list, with values from `override` laid over it.

    Args:
        override: path of a YAML or JSON file, "-" for standard input, or None.

    Raises:
        ArtifactError: a file cannot be read or has another shape.
    """
    artifacts = _read_list(DEFAULT_LIST.read_text(), str(DEFAULT_LIST))
    if override is None:
        return artifacts
    if override == "-":
        return _merged(artifacts, _read_list((stdin or sys.stdin).read(), "standard input"))
    try:
        text = Path(override).read_text()
    except OSError as error:
        raise ArtifactError(f"--list {override}: {error.strerror}") from error
    return _merged(artifacts, _read_list(text, override))


def _filled(template: str, **values: str) -> str:
    """The template with its placeholders filled in.

    Raises:
        ArtifactError: it has a placeholder that we don't know.
    """
    try:
        return template.format(**values)
    except (KeyError, IndexError, ValueError) as error:
        known = ", ".join(f"{{{key}}}" for key in values)
        raise ArtifactError(f"{template!r}: placeholders are {known} ({error})") from error


def select(artifacts: Mapping[str, Any], name: str, arch: str) -> Artifact:
    """One program out of the list, with its placeholders filled in.

    Raises:
        ArtifactError: it is not in the list, or its entry lacks or misspells something.
    """
    if name not in artifacts:
        raise ArtifactError(f"{name} is not in the list; it has {', '.join(sorted(artifacts))}")
    entry = artifacts[name]
    missing = [key for key in ("version", "binaries", "mirror") if not entry.get(key)]
    if missing:
        raise ArtifactError(f"fleet_artifacts.{name} lacks {', '.join(missing)}")
    version, binaries = str(entry["version"]), tuple(str(b) for b in entry["binaries"])
    # These become names of files and words in a build's script.
    for value in (name, version, *binaries):
        if not _SAFE_NAME.fullmatch(value):
            raise ArtifactError(f"fleet_artifacts.{name}: {value!r} is no name or version")
    mirror = _filled(entry["mirror"], name=name, version=version, arch=arch)
    if "/" in mirror:
        raise ArtifactError(f"fleet_artifacts.{name}.mirror: {mirror!r} is no file's name")
    return Artifact(
        name=name,
        version=version,
        arch=arch,
        binaries=binaries,
        mirror=mirror,
        upstream=entry.get("upstream"),
        build=entry.get("build"),
    )


# --- Checksums and archives -------------------------------------------------------------------


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def parse_sums(text: str) -> dict[str, str]:
    """Checksums by file name, from the output of sha256sum; a lone checksum has the name ""."""
    sums = {}
    for line in text.splitlines():
        digest, _, name = line.strip().partition(" ")
        if _SHA256.fullmatch(digest):
            sums[PurePosixPath(name.strip().lstrip("*")).name] = digest.lower()
    return sums


def _refuse_unsafe(archive: str, member: str) -> None:
    path = PurePosixPath(member.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts:
        raise ArtifactError(
            f"{archive} holds a file that would land outside its folder ({member}); "
            "nothing was unpacked. Get the archive anew from someone you trust."
        )


def _copy(source: IO[bytes], target: Path) -> None:
    with target.open("wb") as file:
        shutil.copyfileobj(source, file, _CHUNK)


def _unpack_tar(path: Path, wanted: tuple[str, ...], into: Path) -> None:
    depth: dict[str, int] = {}
    with tarfile.open(path) as archive:
        for member in archive:
            # Only regular files are written, but more than that is in nobody's release.
            # (tarfile's own filter is missing in the Python 3.11 of Debian 12.)
            _refuse_unsafe(path.name, member.name)
            _refuse_unsafe(path.name, member.linkname)
            if member.isdev():
                raise tarfile.TarError(f"{member.name} is a device")
            parts = PurePosixPath(member.name).parts
            name = parts[-1] if parts else ""
            # A completion script may have the program's name; the program lies less deep.
            if member.isfile() and name in wanted and len(parts) < depth.get(name, 1 << 16):
                depth[name] = len(parts)
                content = archive.extractfile(member)
                assert content is not None  # it is a file
                _copy(content, into / name)


def _unpack_zip(path: Path, wanted: tuple[str, ...], into: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            _refuse_unsafe(path.name, info.filename)
        for info in sorted(archive.infolist(), key=lambda info: -info.filename.count("/")):
            name = PurePosixPath(info.filename).name
            if not info.is_dir() and name in wanted:
                with archive.open(info) as content:
                    _copy(content, into / name)


def unpack(path: Path, artifact: Artifact, into: Path) -> None:
    """Take the artifact's binaries, and nothing else, out of an archive.

    A file that is no archive (by its name) is the binary itself.

    Raises:
        ArtifactError: the archive is damaged, unsafe, or lacks a binary.
    """
    try:
        if path.suffix == ".zip":
            _unpack_zip(path, artifact.binaries, into)
        elif path.suffix == ".tgz" or path.suffixes[-2:-1] == [".tar"]:
            _unpack_tar(path, artifact.binaries, into)
        else:
            shutil.copyfile(path, into / artifact.binaries[0])
    except _BROKEN_ARCHIVE as error:
        raise ArtifactError(
            f"{path.name} cannot be unpacked ({error}), though its checksum matches. "
            "Whoever made it must make it anew."
        ) from error
    missing = [name for name in artifact.binaries if not (into / name).is_file()]
    if missing:
        raise ArtifactError(
            f"{path.name} lacks {', '.join(missing)}; correct fleet_artifacts.{artifact.name}."
            "binaries, or use another archive"
        )


def _check_program(path: Path, artifact: Artifact, origin: str) -> None:
    """See that a file is a Linux program for the right architecture, by its ELF header."""
    with path.open("rb") as file:
        head = file.read(20)
    machine = int.from_bytes(head[18:20], "little")
    if head[:4] != b"\x7fELF" or machine != ARCHITECTURES[artifact.arch]:
        raise ArtifactError(
            f"{path.name} from {origin} is no Linux program for {artifact.arch}; "
            "get the right file, or ask for another --arch"
        )


# --- Sources ----------------------------------------------------------------------------------


def from_mirror(artifact: Artifact, options: Options, into: Path) -> str:
    """From a folder of archives with a SHA256SUMS: a company's mirror, or a disk in an air gap."""
    folder = options.mirror
    if folder is None:
        raise Unavailable(f"no folder is set (--mirror or {MIRROR_VARIABLE})")
    if not folder.is_dir():
        raise ArtifactError(
            f"the mirror folder {folder} is not there; mount it, or correct --mirror or "
            f"{MIRROR_VARIABLE}"
        )
    archive = folder / artifact.mirror
    if not archive.is_file():
        raise Unavailable(f"{archive} is not there")
    try:
        sums = parse_sums((folder / "SHA256SUMS").read_text())
    except FileNotFoundError:
        sums = {}
    if artifact.mirror not in sums:
        raise ArtifactError(
            f"{archive} is not listed in {folder / 'SHA256SUMS'}. If you trust the file, add it "
            f"there: (cd {folder} && sha256sum {artifact.mirror} >>SHA256SUMS). If not, delete it."
        )
    found = sha256_of(archive)
    if found != sums[artifact.mirror]:
        raise ArtifactError(
            f"{archive} does not match {folder / 'SHA256SUMS'}: it has {found}, listed is "
            f"{sums[artifact.mirror]}. Copy the file anew from where the mirror was filled."
        )
    unpack(archive, artifact, into)
    return str(archive)


def _reason(error: httpx.HTTPError) -> str:
    if isinstance(error, httpx.HTTPStatusError):
        return f"it answered {error.response.status_code}"
    if isinstance(error, httpx.ConnectTimeout):
        return f"no connection within {_TIMEOUT.connect:.0f} s"
    return str(error) or type(error).__name__


def _check_still_encrypted(url: str, response: httpx.Response) -> None:
    """Refuse to be led from https to http: the checksum comes along the same way."""
    hops = [*response.history, response]
    if url.startswith("https:") and any(hop.url.scheme != "https" for hop in hops):
        raise ArtifactError(f"{url} led to an address without encryption ({response.url})")


def _download(client: httpx.Client, url: str, target: Path, title: str) -> None:
    """Stream a file to disk, with a line of progress now and then."""
    told = time.monotonic()
    with client.stream("GET", url) as response, target.open("wb") as file:
        _check_still_encrypted(url, response)
        response.raise_for_status()
        size = int(response.headers.get("Content-Length", 0))
        for chunk in response.iter_bytes(_CHUNK):
            file.write(chunk)
            if time.monotonic() - told > _PROGRESS_S:
                told = time.monotonic()
                of = f" of {size / 1e6:.0f}" if size else ""
                say(f"{title}: {file.tell() / 1e6:.0f}{of} MB")


def _published_sum(client: httpx.Client, url: str, file: str) -> str:
    """What upstream publishes as the checksum of `file`."""
    response = client.get(url)
    _check_still_encrypted(url, response)
    response.raise_for_status()
    sums = parse_sums(response.text)
    listed = sums.get(file) or (sums.get("") if len(sums) == 1 else None)
    if not listed:
        raise ArtifactError(
            f"{file} is not listed in {url}, so it cannot be checked and was not fetched. Correct "
            "the artifact's upstream.checksums, or use --sources mirror,build"
        )
    return listed


def from_upstream(artifact: Artifact, options: Options, into: Path) -> str:
    """Upstream's release, checked by the checksum in the list or else upstream's own. One try."""
    upstream = artifact.upstream
    if not upstream:
        raise Unavailable("the list gives no upstream for it")
    arch = upstream.get("arch_names", {}).get(artifact.arch, artifact.arch)
    values = {"name": artifact.name, "version": artifact.version, "arch": arch}
    url = _filled(upstream["url"], **values)
    checksums = _filled(upstream["checksums"], **values)
    pinned = upstream.get("sha256", {}).get(artifact.arch)
    with tempfile.TemporaryDirectory(dir=into.parent) as folder:
        archive = Path(folder) / PurePosixPath(httpx.URL(url).path).name
        try:
            # The machine's own certificates (OpenSSL's folder, SSL_CERT_FILE, SSL_CERT_DIR):
            # httpx on its own would bring certifi's, which know no company's authority.
            with httpx.Client(
                timeout=_TIMEOUT, follow_redirects=True, verify=ssl.create_default_context()
            ) as client:
                listed = pinned or _published_sum(client, checksums, archive.name)
                _download(client, url, archive, artifact.title)
                found = sha256_of(archive)
        except httpx.HTTPError as error:
            raise Unavailable(f"{error.request.url}: {_reason(error)}") from error
        if found != listed:
            raise ArtifactError(
                f"{url} does not match {'the list' if pinned else checksums}: it has {found}, "
                f"expected is {listed}. Try again; if it stays so, ask upstream before you use it."
            )
        unpack(archive, artifact, into)
    return url


def from_build(artifact: Artifact, options: Options, into: Path) -> str:
    """A build from the language's registry, in a container."""
    build = artifact.build
    if not build:
        raise Unavailable("the list says nothing of how to build it")
    title = f"{artifact.title}: build"
    if build.get("note"):
        say(f"{title}: takes {build['note']}")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    if memory < build.get("memory_gib", 0):
        say(f"{title}: this machine has only {memory:.0f} GiB of memory, it may not be enough")
    built = into.parent / "built"
    plan = artifacts_build.make_plan(
        name=artifact.name,
        version=artifact.version,
        arch=artifact.arch,
        binaries=artifact.binaries,
        build=build,
        cache=options.cache,
        out=built,
        environment=os.environ,
    )
    log = options.cache / "logs" / f"{artifact.entry}-{time.strftime('%Y%m%dT%H%M%S')}.log"
    artifacts_build.run(
        plan, options.image or _lab_image(), log, into.parent, lambda text: say(f"{title}: {text}")
    )
    # The container's root made them; copies are ours, whoever we are.
    for name in artifact.binaries:
        if (built / name).is_file():
            shutil.copyfile(built / name, into / name)
    return f"full output in {log}"


def _lab_image() -> str:
    # Only a build needs an image, and making one takes a while.
    from lab.image import ensure_image

    return ensure_image()


FETCHERS: dict[str, Fetch] = {
    "mirror": from_mirror,
    "upstream": from_upstream,
    "build": from_build,
}


# --- The cache --------------------------------------------------------------------------------
#
# An entry is a folder of binaries with SHA256SUMS (sha256sum -c reads it), origin.json (where they
# are from), and seen.json: each file's size and times when its checksum was last computed. While
# those are unchanged the checksum is not computed again (RustFS is 350 MB, and every converge
# asks). The change time is among them, which no program can set back.


def default_cache(environment: Mapping[str, str]) -> Path:
    """The cache folder: FLEET_ARTIFACT_CACHE, else below XDG_CACHE_HOME, else below ~/.cache."""
    if own := environment.get(CACHE_VARIABLE):
        return Path(own).expanduser().absolute()
    base = environment.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base).absolute() / "prefect-fleet" / "artifacts"


def _stamp(path: Path, digest: str) -> list[Any]:
    state = path.stat()
    return [digest, state.st_size, state.st_mtime_ns, state.st_ctime_ns]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def _damage(folder: Path, sums: Mapping[str, str], binaries: tuple[str, ...]) -> str | None:
    """What is wrong with a cache entry, or None."""
    seen = _read_json(folder / "seen.json")
    fresh = {}
    for name in binaries:
        path = folder / name
        if name not in sums or not path.is_file():
            return f"{name} is missing"
        stamp = _stamp(path, sums[name])
        if seen.get(name) != stamp and sha256_of(path) != sums[name]:
            return f"{name} does not match its checksum"
        fresh[name] = stamp
    if fresh != seen:
        (folder / "seen.json").write_text(json.dumps(fresh))
    return None


def cached(artifact: Artifact, cache: Path) -> dict[str, Any] | None:
    """The result for an artifact that the cache holds whole, else None (damage is said)."""
    folder = cache / artifact.entry
    if not folder.is_dir():
        return None
    try:
        sums = parse_sums((folder / "SHA256SUMS").read_text())
    except OSError:
        sums = {}
    if damage := _damage(folder, sums, artifact.binaries):
        say(f"{artifact.title}: the cache entry {folder} is damaged ({damage}); getting it again")
        return None
    return {
        "version": artifact.version,
        "arch": artifact.arch,
        "source": _read_json(folder / "origin.json").get("source", "unknown"),
        "binaries": {name: str(folder / name) for name in artifact.binaries},
        "sha256": {name: sums[name] for name in artifact.binaries},
        "fetched": False,
    }


@contextmanager
def _locked(artifact: Artifact, cache: Path) -> Iterator[None]:
    """Keep other calls off this entry; ends with the process, however that ends."""
    folder = cache / ".locks"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / artifact.entry).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"{artifact.title}: another call is getting it; waiting for that one")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _store(artifact: Artifact, new: Path, source: str, origin: str, cache: Path) -> None:
    """Check what a source gave and put it into the cache, whole or not at all."""
    sums = {}
    for name in artifact.binaries:
        path = new / name
        if not path.is_file():
            raise ArtifactError(f"{artifact.title}: {origin} gave no {name}")
        _check_program(path, artifact, origin)
        path.chmod(0o755)
        sums[name] = sha256_of(path)
        with path.open("rb") as file:
            os.fsync(file.fileno())
    (new / "SHA256SUMS").write_text("".join(f"{sums[name]}  {name}\n" for name in sums))
    (new / "origin.json").write_text(json.dumps({"source": source, "origin": origin}) + "\n")
    entry = cache / artifact.entry
    if entry.exists():  # a damaged one; it goes with the working folder
        entry.rename(new.parent / "old")
    new.rename(entry)


def _fetch(artifact: Artifact, options: Options) -> None:
    """Ask the sources in turn; the first that has it fills the cache entry.

    Raises:
        ArtifactError: a source has something wrong, or none has it.
    """
    for left in options.cache.glob(f".{artifact.entry}.*"):  # of a run that was killed
        shutil.rmtree(left, ignore_errors=True)
    reasons = []
    for source in options.sources:
        with tempfile.TemporaryDirectory(
            prefix=f".{artifact.entry}.", dir=options.cache, ignore_cleanup_errors=True
        ) as work:
            new = Path(work) / "new"
            new.mkdir(mode=0o755)
            try:
                origin = FETCHERS[source](artifact, options, new)
            except Unavailable as reason:
                say(f"{artifact.title}: {source}: {reason}")
                reasons.append(f"  {source}: {reason}")
                continue
            except artifacts_build.BuildError as error:
                raise ArtifactError(f"{artifact.title}: {error}") from error
            _store(artifact, new, source, origin, options.cache)
            say(f"{artifact.title}: {source}: {origin}")
            return
    raise ArtifactError(
        "\n".join(
            [
                f"{artifact.title} could not be had:",
                *reasons,
                f"Put {artifact.mirror}, with its line in a SHA256SUMS beside it, into a folder "
                f"and name that in {MIRROR_VARIABLE}, or allow another source (--sources).",
            ]
        )
    )


def get(artifact: Artifact, options: Options) -> dict[str, Any]:
    """One artifact's result, from the cache or else fetched into it.

    Raises:
        ArtifactError: it cannot be had, or something about it is wrong.
        LabError: there is no image to build it in.
    """
    options.cache.mkdir(parents=True, exist_ok=True)
    with _locked(artifact, options.cache):
        if result := cached(artifact, options.cache):
            say(f"{artifact.title}: in the cache (first from {result['source']})")
            return result
        _fetch(artifact, options)
        result = cached(artifact, options.cache)
        if result is None:
            raise ArtifactError(f"{artifact.title}: the disk gave back other bytes than written")
        return {**result, "fetched": True}


# --- The command ------------------------------------------------------------------------------


def _sources(text: str) -> tuple[str, ...]:
    given = {word.strip() for word in text.split(",")}
    if unknown := given - set(SOURCES):
        raise argparse.ArgumentTypeError(
            f"{', '.join(sorted(unknown))} is no source; write some of {','.join(SOURCES)}"
        )
    return tuple(source for source in SOURCES if source in given)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m lab.artifacts", description="Get binaries into the artifact cache."
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="which (default: all in the list)")
    parser.add_argument("--arch", choices=sorted(ARCHITECTURES), default="amd64")
    parser.add_argument(
        "--list",
        metavar="FILE",
        help="YAML or JSON laid over the list in roles/fleet/defaults; - reads standard input",
    )
    parser.add_argument("--mirror", metavar="DIR", help=f"mirror folder (or {MIRROR_VARIABLE})")
    parser.add_argument(
        "--sources",
        type=_sources,
        default=SOURCES,
        metavar="A,B",
        help="only these of mirror,upstream,build (air gap: mirror)",
    )
    parser.add_argument("--no-build", action="store_true", help="never build")
    parser.add_argument("--image", help="container image to build in (default: the lab's)")
    return parser.parse_args(argv)


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end us as Ctrl-C does: with what we began being put away."""

    def interrupt(number: int, _frame: Any) -> None:
        raise KeyboardInterrupt(number)

    old = {}
    try:
        for which in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(which) is not signal.SIG_IGN:
                old[which] = signal.signal(which, interrupt)
    except ValueError:  # not in the main thread: signals are someone else's there
        pass
    try:
        yield
    finally:
        for which, handler in old.items():
            signal.signal(which, handler)


def main(argv: list[str] | None = None) -> int:
    """Run the command; see the module's text. 0: all there, 1: an error, 130: interrupted."""
    arguments = _arguments(argv)
    mirror = arguments.mirror or os.environ.get(MIRROR_VARIABLE)
    options = Options(
        cache=default_cache(os.environ),
        sources=tuple(s for s in arguments.sources if not (arguments.no_build and s == "build")),
        mirror=Path(mirror).expanduser().absolute() if mirror else None,
        image=arguments.image,
    )
    try:
        with _ended_by_signals():
            artifacts = load_list(arguments.list)
            names = dict.fromkeys(arguments.names or artifacts)
            wanted = [select(artifacts, name, arguments.arch) for name in names]
            results = {artifact.name: get(artifact, options) for artifact in wanted}
    except (ArtifactError, LabError) as error:
        say(str(error))
        return 1
    except KeyboardInterrupt:
        say("interrupted; what was half done is put away")
        return 130
    print(json.dumps(results), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
