"""The artifacts program against real files and a web server on loopback: no container needed."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import io
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from lab import artifacts, artifacts_build

ROOT = Path(__file__).parents[2]


def program(text: str, machine: int = 62) -> bytes:
    """Something with the ELF header of a program (62: x86-64, 183: aarch64)."""
    head = b"\x7fELF\x02\x01\x01" + bytes(9) + (2).to_bytes(2, "little")
    return head + machine.to_bytes(2, "little") + text.encode()


TOOL = program("tool")
TOOLD = program("toold")


def tar(
    members: dict[str, bytes],
    mode: str = "w:xz",
    link: tuple[str, str] | None = None,
    device: str = "",
) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        if link:
            info = tarfile.TarInfo(link[0])
            info.type, info.linkname = tarfile.SYMTYPE, link[1]
            archive.addfile(info)
        if device:
            info = tarfile.TarInfo(device)
            info.type = tarfile.CHRTYPE
            archive.addfile(info)
    return buffer.getvalue()


def zipped(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


GOOD = tar({"tool": TOOL, "toold": TOOLD})


@dataclass
class Upstream:
    """A release server: path to content; anything else is 404."""

    url: str
    files: dict[str, bytes] = field(default_factory=dict)
    redirects: dict[str, str] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    cut: str = ""
    """The path whose body breaks off in the middle."""


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            server.requests.append(self.path)
            if to := server.redirects.get(self.path):
                self.send_response(302)
                self.send_header("Location", to)
                self.end_headers()
                return
            content = server.files.get(self.path)
            self.send_response(404 if content is None else 200)
            content = content or b""
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2] if server.cut == self.path else content)

        def log_message(self, *_: Any) -> None:
            pass

    listener = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server = Upstream(f"http://127.0.0.1:{listener.server_port}")
    thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    listener.shutdown()
    listener.server_close()
    thread.join()


@dataclass
class Desk:
    """A person's machine: an own list, a mirror folder, a cache, and the command."""

    folder: Path
    capsys: pytest.CaptureFixture[str]
    entry: dict[str, Any]
    said: str = ""

    @property
    def mirror(self) -> Path:
        return self.folder / "mirror"

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    def fill_mirror(self, content: bytes = GOOD, listed: bytes | None = None) -> Path:
        archive = self.mirror / "tool-1.2-linux-amd64.tar.xz"
        archive.write_bytes(content)
        line = f"{digest(content if listed is None else listed)}  {archive.name}\n"
        (self.mirror / "SHA256SUMS").write_text(f"{'0' * 64}  other.tar.xz\n{line}")
        return archive

    def run(self, *arguments: str, code: int = 0) -> dict[str, Any]:
        """Run the command; its result for `tool` (empty on failure), and what it said."""
        file = self.folder / "list.json"
        file.write_text(json.dumps({"fleet_artifacts": {"tool": self.entry}}))
        done = artifacts.main(["--list", str(file), *arguments, "tool"])
        out, self.said = self.capsys.readouterr()
        assert done == code, self.said
        return json.loads(out.splitlines()[-1])["tool"] if code == 0 else {}

    def left_behind(self) -> list[str]:
        """What is in the cache, locks aside."""
        return sorted(path.name for path in self.cache.glob("*") if path.name != ".locks")


@pytest.fixture
def desk(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Desk:
    for key in list(os.environ):
        if key.lower().endswith("_proxy"):
            monkeypatch.delenv(key)
    entry = {
        "version": "1.2",
        "binaries": ["tool", "toold"],
        "mirror": "{name}-{version}-linux-{arch}.tar.xz",
    }
    desk = Desk(tmp_path, capsys, entry)
    desk.mirror.mkdir()
    monkeypatch.setenv("FLEET_ARTIFACT_CACHE", str(desk.cache))
    monkeypatch.setenv("FLEET_ARTIFACT_MIRROR", str(desk.mirror))
    monkeypatch.setattr(artifacts, "_lab_image", lambda: "image")  # no podman, whatever happens
    return desk


@pytest.fixture
def publish(desk: Desk, upstream: Upstream) -> Callable[..., None]:
    """Give the tool an upstream release, in the layout of one of the real three."""

    def publish(name: str, content: bytes, sums: str | None = None) -> None:
        desk.entry["upstream"] = {
            "url": f"{upstream.url}/v{{version}}/{name}",
            "checksums": f"{upstream.url}/v{{version}}/sums",
            "arch_names": {"amd64": "x86_64"},
        }
        file = name.format(version="1.2", arch="x86_64")
        upstream.files[f"/v1.2/{file}"] = content
        upstream.files["/v1.2/sums"] = (sums or f"{digest(content)}  {file}\n").encode()

    return publish


@pytest.fixture
def no_build(monkeypatch: pytest.MonkeyPatch) -> list[artifacts_build.Plan]:
    """Builds that leave the binaries at once; the plans they would have run."""
    plans = []

    def run(plan: artifacts_build.Plan, *_: Any) -> None:
        plans.append(plan)
        out = next(here for here, there, _ in plan.mounts if there == "/out")
        out.mkdir()
        (out / "tool").write_bytes(TOOL)
        (out / "toold").write_bytes(TOOLD)

    monkeypatch.setattr(artifacts_build, "run", run)
    return plans


GO = {"language": "go", "module": "example.org/tool", "packages": ["example.org/tool/cmd/tool"]}


# --- Mirror -----------------------------------------------------------------------------------


def test_mirror_gives_the_binaries_and_their_checksums(desk: Desk) -> None:
    archive = desk.fill_mirror()
    result = desk.run()
    entry = desk.cache / "tool-1.2-linux-amd64"
    assert result == {
        "version": "1.2",
        "arch": "amd64",
        "source": "mirror",
        "binaries": {"tool": str(entry / "tool"), "toold": str(entry / "toold")},
        "sha256": {"tool": digest(TOOL), "toold": digest(TOOLD)},
        "fetched": True,
    }
    assert (entry / "tool").read_bytes() == TOOL
    assert (entry / "tool").stat().st_mode & 0o777 == 0o755
    assert f"mirror: {archive}" in desk.said
    subprocess.run(["sha256sum", "--check", "--status", "SHA256SUMS"], cwd=entry, check=True)


def test_file_missing_from_the_mirror_is_named_and_the_next_source_asked(
    desk: Desk, no_build: list[artifacts_build.Plan]
) -> None:
    desk.entry["build"] = GO
    result = desk.run("--sources", "mirror,build")
    assert result["source"] == "build"
    assert f"{desk.mirror}/tool-1.2-linux-amd64.tar.xz is not there" in desk.said


def test_corrupt_mirror_file_is_an_error_though_other_sources_are_left(
    desk: Desk, no_build: list[artifacts_build.Plan]
) -> None:
    desk.entry["build"] = GO
    archive = desk.fill_mirror(listed=b"something else")
    desk.run(code=1)
    assert f"{archive} does not match" in desk.said
    assert "Copy the file anew" in desk.said
    assert no_build == []
    assert desk.left_behind() == []


@pytest.mark.parametrize("sums", [f"{'0' * 64}  other.tar.xz\n", None])
def test_unlisted_mirror_file_is_an_error(
    desk: Desk, sums: str | None, no_build: list[artifacts_build.Plan]
) -> None:
    desk.entry["build"] = GO
    archive = desk.fill_mirror()
    (desk.mirror / "SHA256SUMS").unlink()
    if sums:
        (desk.mirror / "SHA256SUMS").write_text(sums)
    desk.run(code=1)
    assert f"{archive} is not listed" in desk.said
    assert no_build == []


def test_mirror_folder_that_is_not_there_is_an_error(
    desk: Desk, no_build: list[artifacts_build.Plan]
) -> None:
    desk.entry["build"] = GO
    desk.run("--mirror", str(desk.folder / "unmounted"), code=1)
    assert "unmounted is not there; mount it" in desk.said


def test_program_for_another_architecture_is_refused(desk: Desk) -> None:
    desk.fill_mirror(tar({"tool": program("x", machine=183), "toold": TOOLD}))
    desk.run(code=1)
    assert "no Linux program for amd64" in desk.said
    assert desk.left_behind() == []


def test_archive_without_a_binary_is_refused(desk: Desk) -> None:
    desk.fill_mirror(tar({"tool": TOOL}))
    desk.run(code=1)
    assert "tool-1.2-linux-amd64.tar.xz lacks toold" in desk.said


def test_the_program_is_taken_not_a_deeper_file_of_its_name(desk: Desk) -> None:
    desk.fill_mirror(
        tar({"t/comp/bash/tool": b"a", "t/tool": TOOL, "t/c/tool": b"b", "toold": TOOLD})
    )
    assert desk.run()["sha256"]["tool"] == digest(TOOL)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (tar({"../tool": TOOL, "toold": TOOLD}), "land outside"),
        (tar({"/usr/bin/tool": TOOL, "toold": TOOLD}), "land outside"),
        (tar({"tool": TOOL, "toold": TOOLD}, link=("etc", "/etc")), "land outside"),
        (tar({"tool": TOOL, "toold": TOOLD}, link=("up", "../../x")), "land outside"),
        (tar({"tool": TOOL, "toold": TOOLD}, device="null"), "cannot be unpacked"),
        (GOOD[: len(GOOD) // 2], "cannot be unpacked"),
    ],
)
def test_unsafe_or_broken_archive_is_refused(desk: Desk, content: bytes, says: str) -> None:
    desk.fill_mirror(content)
    desk.run(code=1)
    assert says in desk.said
    assert desk.left_behind() == []
    assert sorted(path.name for path in desk.folder.iterdir()) == ["cache", "list.json", "mirror"]


def test_unsafe_zip_is_refused(desk: Desk) -> None:
    desk.entry["mirror"] = "tool.zip"
    content = zipped({"tool": TOOL, "../toold": TOOLD})
    (desk.mirror / "tool.zip").write_bytes(content)
    (desk.mirror / "SHA256SUMS").write_text(f"{digest(content)}  tool.zip\n")
    desk.run(code=1)
    assert "land outside" in desk.said
    assert desk.left_behind() == []


# --- Upstream ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "sums", "binaries"),
    [
        # As Tailscale: a folder in the archive, and a checksum without a name.
        (
            "tool_{version}_{arch}.tgz",
            tar({"tool_1.2_x86_64/tool": TOOL, "tool_1.2_x86_64/toold": TOOLD}, "w:gz"),
            "{digest}",
            ["tool", "toold"],
        ),
        # As headscale: the program itself, and a list of checksums.
        ("tool_{version}_linux_{arch}", TOOL, None, ["tool"]),
        # As RustFS: a zip, and a list of checksums.
        ("tool-linux-{arch}-musl-v{version}.zip", zipped({"tool": TOOL}), None, ["tool"]),
    ],
)
def test_upstream_release_in_each_layout(
    desk: Desk,
    publish: Callable[..., None],
    name: str,
    content: bytes,
    sums: str | None,
    binaries: list[str],
) -> None:
    desk.entry["binaries"] = binaries
    publish(name, content, sums and sums.format(digest=digest(content)))
    result = desk.run()
    assert result["source"] == "upstream"
    assert result["sha256"]["tool"] == digest(TOOL)
    assert set(result["binaries"]) == set(binaries)


def test_upstream_may_redirect(
    desk: Desk, upstream: Upstream, publish: Callable[..., None]
) -> None:
    publish("tool.tgz", tar({"tool": TOOL, "toold": TOOLD}, "w:gz"))
    upstream.files["/store/8731"] = upstream.files.pop("/v1.2/tool.tgz")
    upstream.redirects["/v1.2/tool.tgz"] = f"{upstream.url}/store/8731"
    assert desk.run()["source"] == "upstream"


def test_bad_upstream_checksum_is_an_error(
    desk: Desk, publish: Callable[..., None], no_build: list[artifacts_build.Plan]
) -> None:
    desk.entry["build"] = GO
    publish("tool.tgz", GOOD, f"{digest(b'other')}  tool.tgz\n")
    desk.run(code=1)
    assert "/v1.2/tool.tgz does not match" in desk.said
    assert no_build == []
    assert desk.left_behind() == []


def test_checksum_in_the_list_is_taken_instead_of_the_published_one(
    desk: Desk, upstream: Upstream, publish: Callable[..., None]
) -> None:
    content = tar({"tool": TOOL, "toold": TOOLD}, "w:gz")
    publish("tool.tgz", content)
    desk.entry["upstream"]["sha256"] = {"amd64": digest(b"what was reviewed")}
    desk.run(code=1)
    assert "tool.tgz does not match the list" in desk.said
    desk.entry["upstream"]["sha256"] = {"amd64": digest(content)}
    assert desk.run()["source"] == "upstream"
    assert "/v1.2/sums" not in upstream.requests


def test_upstream_file_that_its_checksums_do_not_list_is_not_fetched(
    desk: Desk, upstream: Upstream, publish: Callable[..., None]
) -> None:
    publish("tool.tgz", GOOD, f"{digest(GOOD)}  another.tgz\n")
    desk.run(code=1)
    assert "tool.tgz is not listed in" in desk.said
    assert upstream.requests == ["/v1.2/sums"]


@pytest.mark.parametrize("gone", ["/v1.2/sums", "/v1.2/tool.tgz"])
def test_upstream_without_the_file_is_named_and_the_build_taken(
    desk: Desk,
    upstream: Upstream,
    publish: Callable[..., None],
    no_build: list[artifacts_build.Plan],
    gone: str,
) -> None:
    desk.entry["build"] = GO
    publish("tool.tgz", GOOD)
    del upstream.files[gone]
    assert desk.run()["source"] == "build"
    assert f"upstream: {upstream.url}{gone}: it answered 404" in desk.said


def test_download_that_breaks_off_leaves_nothing(
    desk: Desk, upstream: Upstream, publish: Callable[..., None]
) -> None:
    publish("tool.tgz", tar({"tool": TOOL, "toold": TOOLD}, "w:gz"))
    upstream.cut = "/v1.2/tool.tgz"
    desk.run("--no-build", code=1)
    assert f"upstream: {upstream.url}/v1.2/tool.tgz: peer closed connection" in desk.said
    assert desk.left_behind() == []


def test_unreachable_upstream_is_said_after_one_try_and_the_build_taken(
    desk: Desk, no_build: list[artifacts_build.Plan]
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    desk.entry["build"] = GO
    desk.entry["upstream"] = {"url": f"{url}/tool.tgz", "checksums": f"{url}/sums"}
    assert desk.run()["source"] == "build"
    assert desk.said.count(f"upstream: {url}/sums: ") == 1
    assert artifacts._TIMEOUT.connect == 10.0


@pytest.mark.parametrize("final", ["http://other.test/f", "https://other.test/f"])
def test_no_way_from_https_to_http(final: str) -> None:
    request = artifacts.httpx.Request("GET", final)
    response = artifacts.httpx.Response(200, request=request)
    expectation = (
        pytest.raises(artifacts.ArtifactError, match="without encryption")
        if final.startswith("http:")
        else contextlib.nullcontext()
    )
    with expectation:
        artifacts._check_still_encrypted("https://release.test/f", response)


# --- Cache ------------------------------------------------------------------------------------


def test_second_run_takes_the_cache_and_asks_nobody(desk: Desk) -> None:
    archive = desk.fill_mirror()
    first = desk.run()
    archive.unlink()
    assert desk.run() == {**first, "fetched": False}
    assert "in the cache (first from mirror)" in desk.said


def test_unchanged_file_is_not_hashed_again(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.fill_mirror()
    desk.run()
    monkeypatch.setattr(artifacts, "sha256_of", lambda path: pytest.fail(f"hashed {path}"))
    desk.run()


def test_changed_cache_file_is_said_and_got_again(desk: Desk) -> None:
    desk.fill_mirror()
    path = Path(desk.run()["binaries"]["tool"])
    before = path.stat()
    path.write_bytes(TOOL[:-1] + b"?")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # same size, same time
    assert desk.run()["fetched"] is True
    assert "is damaged (tool does not match its checksum); getting it again" in desk.said
    assert path.read_bytes() == TOOL
    assert desk.left_behind() == ["tool-1.2-linux-amd64"]


@pytest.mark.parametrize("lost", ["toold", "SHA256SUMS"])
def test_incomplete_cache_entry_is_said_and_got_again(desk: Desk, lost: str) -> None:
    desk.fill_mirror()
    desk.run()
    (desk.cache / "tool-1.2-linux-amd64" / lost).unlink()
    assert desk.run()["fetched"] is True
    assert "is damaged" in desk.said


def test_copied_cache_is_hashed_once_and_kept(desk: Desk) -> None:
    desk.fill_mirror()
    path = Path(desk.run()["binaries"]["tool"])
    path.unlink()
    path.write_bytes(TOOL)  # the same bytes with new times, as after a restore
    assert desk.run()["fetched"] is False


def test_each_version_has_its_own_entry(desk: Desk) -> None:
    desk.fill_mirror()
    desk.run()
    desk.entry["version"] = "1.3"
    desk.run("--sources", "mirror", code=1)
    assert "tool-1.3-linux-amd64.tar.xz is not there" in desk.said
    assert desk.left_behind() == ["tool-1.2-linux-amd64"]


def test_interrupted_fetch_leaves_nothing(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.fill_mirror()

    def half_done(path: Path, artifact: Any, into: Path) -> None:
        (into / "tool").write_bytes(TOOL[:5])
        os.kill(os.getpid(), artifacts.signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(artifacts, "unpack", half_done)
        desk.run(code=130)
    assert "interrupted" in desk.said
    assert desk.left_behind() == []
    assert desk.run()["fetched"] is True


def test_what_a_killed_run_left_is_removed(desk: Desk) -> None:
    desk.fill_mirror()
    left = desk.cache / ".tool-1.2-linux-amd64.abc" / "new"
    left.mkdir(parents=True)
    (left / "tool").write_bytes(TOOL[:5])
    desk.run()
    assert desk.left_behind() == ["tool-1.2-linux-amd64"]


def _hold(cache: Path, held: Any, release: Any) -> None:
    artifact = artifacts.select(
        {"tool": {"version": "1.2", "binaries": ["tool"], "mirror": "m"}}, "tool", "amd64"
    )
    with artifacts._locked(artifact, cache):
        held.set()
        release.wait(10)


def test_second_call_waits_for_the_first(desk: Desk) -> None:
    desk.fill_mirror()
    context = multiprocessing.get_context("fork")
    held, release = context.Event(), context.Event()
    holder = context.Process(target=_hold, args=(desk.cache, held, release))
    holder.start()
    assert held.wait(10)
    seen = []
    timer = threading.Timer(0.3, lambda: (seen.extend(desk.left_behind()), release.set()))
    timer.start()
    desk.run()
    holder.join()
    timer.join()
    assert "another call is getting it; waiting" in desk.said
    assert seen == []


# --- Order, restrictions, the list ------------------------------------------------------------


def test_order_is_mirror_upstream_build_whatever_is_written(
    desk: Desk, publish: Callable[..., None], no_build: list[artifacts_build.Plan]
) -> None:
    desk.entry["build"] = GO
    publish("tool.tgz", tar({"tool": TOOL, "toold": TOOLD}, "w:gz"))
    archive = desk.fill_mirror()
    assert desk.run("--sources", "build,upstream,mirror")["source"] == "mirror"
    for entry in desk.cache.glob("tool-*"):
        artifacts.shutil.rmtree(entry)
    archive.unlink()
    assert desk.run("--sources", "build,upstream")["source"] == "upstream"
    assert no_build == []


def test_air_gap_asks_only_the_mirror(
    desk: Desk,
    upstream: Upstream,
    publish: Callable[..., None],
    no_build: list[artifacts_build.Plan],
) -> None:
    desk.entry["build"] = GO
    publish("tool.tgz", GOOD)
    desk.run("--sources", "mirror", code=1)
    assert upstream.requests == []
    assert no_build == []
    assert "Put tool-1.2-linux-amd64.tar.xz, with its line in a SHA256SUMS" in desk.said


def test_no_build(desk: Desk, no_build: list[artifacts_build.Plan]) -> None:
    desk.entry["build"] = GO
    desk.run("--no-build", code=1)
    assert no_build == []


def test_unknown_source_is_refused(desk: Desk) -> None:
    with pytest.raises(SystemExit):
        artifacts.main(["--sources", "mirror,web", "tool"])
    assert "web is no source" in desk.capsys.readouterr().err


def test_override_changes_one_value_and_keeps_the_rest(tmp_path: Path) -> None:
    text = json.dumps({"fleet_artifacts": {"tailscale": {"version": "9.9"}}})
    merged = artifacts.load_list("-", io.StringIO(text))
    stock = artifacts.load_list()
    assert merged["tailscale"] == {**stock["tailscale"], "version": "9.9"}
    assert merged["rustfs"] == stock["rustfs"]
    chosen = artifacts.select(merged, "tailscale", "arm64")
    assert chosen.mirror == "tailscale-9.9-linux-arm64.tar.xz"


@pytest.mark.parametrize("text", ["[1]", "tailscale: 1.2", "{"])
def test_misshapen_override_is_an_error(text: str) -> None:
    with pytest.raises(artifacts.ArtifactError, match="standard input"):
        artifacts.load_list("-", io.StringIO(text))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"version": "1.2; reboot"}, "is no name or version"),
        ({"binaries": ["../tool"]}, "is no name or version"),
        ({"mirror": "../{name}"}, "is no file's name"),
        ({"mirror": "{name}-{vresion}"}, "placeholders are"),
        ({"version": ""}, "lacks version"),
    ],
)
def test_wrong_values_in_the_list_are_named(desk: Desk, change: dict[str, Any], says: str) -> None:
    desk.entry |= change
    desk.run(code=1)
    assert says in desk.said


def test_name_that_is_not_in_the_list(desk: Desk) -> None:
    assert artifacts.main(["talescale"]) == 1
    said = desk.capsys.readouterr().err
    assert "talescale is not in the list; it has headscale, rustfs, tailscale" in said


def test_called_as_ansible_calls_it(desk: Desk) -> None:
    desk.fill_mirror()
    done = subprocess.run(
        [sys.executable, "-m", "lab.artifacts", "--list", "-", "tool"],
        input=json.dumps({"fleet_artifacts": {"tool": desk.entry}}),
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    assert json.loads(done.stdout.splitlines()[-1])["tool"]["source"] == "mirror"


@pytest.mark.parametrize("arch", artifacts.ARCHITECTURES)
def test_stock_list_has_all_that_each_source_needs(arch: str) -> None:
    stock = artifacts.load_list()
    assert set(stock) == {"tailscale", "headscale", "rustfs"}
    for name in stock:
        artifact = artifacts.select(stock, name, arch)
        assert artifact.mirror == f"{name}-{artifact.version}-linux-{arch}.tar.xz"
        assert artifact.upstream is not None
        assert arch in artifact.upstream["arch_names"]
        for key in ("url", "checksums"):
            assert artifact.upstream[key].startswith("https://")
            filled = artifacts._filled(
                artifact.upstream[key], name=name, version=artifact.version, arch=arch
            )
            assert artifact.version in filled
            assert "latest" not in filled
        assert artifact.build is not None


def test_list_is_plain_to_ansible() -> None:
    """No value may look like a template to Ansible, nor be another type than is written."""
    text = artifacts.DEFAULT_LIST.read_text()
    assert not any(mark in text for mark in ("{{", "{%", "{#"))
    assert all(
        isinstance(a["version"], str) for a in yaml.safe_load(text)["fleet_artifacts"].values()
    )


# --- The build, as data -----------------------------------------------------------------------


def plan(name: str, arch: str = "amd64", environment: dict[str, str] | None = None) -> Any:
    artifact = artifacts.select(artifacts.load_list(), name, arch)
    return artifacts_build.make_plan(
        name=name,
        version=artifact.version,
        arch=arch,
        binaries=artifact.binaries,
        build=artifact.build or {},
        cache=Path("/c"),
        out=Path("/c/new"),
        environment=environment or {},
    )


def test_go_build_cross_compiles_and_stamps_the_version() -> None:
    build = plan("tailscale", "arm64")
    assert build.environment["GOARCH"] == "arm64"
    assert build.environment["CGO_ENABLED"] == "0"
    assert "-require=tailscale.com@v1.102.5" in build.script
    assert "-X tailscale.com/version.longStamp=1.102.5 " in build.script
    assert (Path("/c/build/tailscale-1.102.5-linux-arm64"), "/cache", "rw") in build.mounts


def test_rust_build_is_locked_and_only_for_its_own_architecture(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(artifacts_build, "machine_arch", lambda: "amd64")
    build = plan("rustfs")
    assert "cargo install rustfs --version =1.0.1 --locked" in build.script
    assert "pinned='rustc cargo libstd-rust*'" in build.script
    with pytest.raises(artifacts_build.BuildError, match="own architecture"):
        plan("rustfs", "arm64")


def test_script_is_valid_shell() -> None:
    for name in artifacts.load_list():
        script = plan(name, artifacts_build.machine_arch()).script
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_registries_and_proxies_are_passed_but_no_tokens(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("")
    build = plan(
        "rustfs",
        artifacts_build.machine_arch(),
        {
            "HTTPS_PROXY": "http://user:secret@proxy.test",
            "GOPROXY": "https://go.test",
            "CARGO_REGISTRIES_CRATES_IO_PROTOCOL": "sparse",
            "CARGO_REGISTRY_TOKEN": "t",
            "CARGO_REGISTRIES_OURS_TOKEN": "t",
            "CARGO_HTTP_CAINFO": "/machine/path",
            "CARGO_HOME": str(tmp_path),
            "AWS_SECRET_ACCESS_KEY": "t",
        },
    )
    given = set(build.environment)
    assert {"HTTPS_PROXY", "GOPROXY", "CARGO_REGISTRIES_CRATES_IO_PROTOCOL"} <= given
    assert not {k for k in given if "TOKEN" in k or "SECRET" in k or "CAINFO" in k}
    assert build.environment["CARGO_HOME"] == "/cache/cargo"
    assert (tmp_path / "config.toml", "/.cargo/config.toml", "ro") in build.mounts
    command_line = " ".join(build.arguments("image", Path("/c/environment")))
    assert "secret" not in command_line
    assert "--privileged" not in command_line


def test_two_caches_do_not_share_a_container() -> None:
    other = artifacts.select(artifacts.load_list(), "headscale", "amd64")
    names = {
        artifacts_build.make_plan(
            name=other.name,
            version=other.version,
            arch="amd64",
            binaries=other.binaries,
            build=other.build or {},
            cache=Path(cache),
            out=Path("/o"),
            environment={},
        ).container
        for cache in ("/a", "/b")
    }
    assert len(names) == 2


def test_failed_build_is_an_error_that_names_the_log(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.entry["build"] = GO
    calls = []

    def command(*arguments: str) -> list[str]:
        calls.append(arguments[0])
        return ["sh", "-c", "echo compiling; echo no such thing >&2; exit 3"]

    monkeypatch.setattr(artifacts_build, "podman_command", command)
    desk.run("--sources", "build", code=1)
    assert "the build ended with code 3" in desk.said
    assert "    no such thing" in desk.said
    (log,) = (desk.cache / "logs").iterdir()
    assert str(log) in desk.said
    assert log.read_text() == "compiling\nno such thing\n"
    assert calls == ["rm", "run", "rm"]


@pytest.mark.parametrize("moment", ["starting", "running"])
def test_interrupted_build_removes_the_container(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    desk.entry["build"] = GO
    calls, started = [], []
    stop = desk.folder / "stop"
    start = subprocess.Popen

    def command(*arguments: str) -> list[str]:
        calls.append((arguments[0], arguments[-1]))
        # The stand-in for the container runs until the last `rm`.
        if arguments[0] == "run":
            kill = f"sleep .2; kill -TERM {os.getpid()};" if moment == "running" else ""
            return ["sh", "-c", f"{kill} until [ -e {stop} ]; do sleep .02; done"]
        return ["touch", str(stop)] if len(calls) > 1 else ["true"]

    def popen(argv: list[str], **options: Any) -> subprocess.Popen[bytes]:
        process = start(argv, **options)
        if argv[0] == "sh":
            started.append(process)
            if moment == "starting":  # podman runs, and its caller does not know it yet
                # To this thread, as the program itself has no other: any other thread here, such
                # as one that Prefect left behind, would take a signal to the process at once.
                signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
        return process

    monkeypatch.setattr(artifacts_build, "podman_command", command)
    monkeypatch.setattr(artifacts_build.subprocess, "Popen", popen)
    desk.run("--sources", "build", code=130)
    assert [call[0] for call in calls] == ["rm", "run", "rm"]
    assert calls[-1][1].startswith("prefect-fleet-build-tool-1.2-amd64-")
    assert [process.returncode for process in started] == [0]
    assert desk.left_behind() == ["build", "logs"]


def test_progress_keeps_bars_out_of_the_log() -> None:
    log = io.StringIO()
    progress = artifacts_build.Progress(log)
    progress.feed("Unpacking a\r\nReading 5%\rReading 10%\r")
    progress.feed("\nUnpacking b\n")
    assert log.getvalue() == "Unpacking a\nReading 10%\nUnpacking b\n"
    assert progress.tail[-1] == "Unpacking b"


def test_progress_counts_what_cargo_counts() -> None:
    log = io.StringIO()
    now = [0.0]
    progress = artifacts_build.Progress(log, clock=lambda: now[0])
    progress.feed("   Compiling serde v1.0\n    Building [===>    ] 12/90: serde, to")
    progress.feed("kio\r")
    progress.feed("\x1b[K")
    now[0] = 3725
    assert progress.state() == "1 h 02 min, 12 of 90, serde, tokio"
    assert log.getvalue() == "   Compiling serde v1.0\n"
