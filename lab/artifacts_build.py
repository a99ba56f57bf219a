"""Build a program from its language's registry, in a throw-away Debian 13 container.

The last resort of `lab.artifacts`: neither a mirror nor upstream's release could be had. Compilers
come from Debian, sources from the Go module proxy or the crate registry; which mirrors of them is
the machine's and the image's own configuration. What a build downloads and compiles is kept until
it succeeds, so that one that was broken off goes on where it stood.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

from lab.podman import LABEL, podman_command, run_arguments

HEARTBEAT_S = 15.0
"""Seconds between progress lines when nobody watches on a terminal."""

_TAIL_LINES = 15
_END_S = 30.0  # seconds that podman may take to end once its container is gone
_CACHE = "/cache"
_OUT = "/out"

# What of the machine's own configuration says where the registries are and how to reach them.
_ENVIRONMENT = (
    *("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY"),
    *("http_proxy", "https_proxy", "no_proxy", "all_proxy"),
    *("GOPROXY", "GOFLAGS", "GONOSUMDB", "GOSUMDB", "GOPRIVATE", "GONOPROXY", "GOINSECURE"),
)
_ENVIRONMENT_PREFIXES = (
    *("CARGO_REGISTRIES_", "CARGO_REGISTRY_", "CARGO_SOURCE_", "CARGO_HTTP_", "CARGO_NET_"),
)
# A crate's build script runs code that nobody here has read: it gets no tokens. The CA file is a
# path on the machine, the image has the certificates where programs look for them.
_ENVIRONMENT_WITHHELD = re.compile(r"TOKEN|CREDENTIAL|CAINFO")

_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_CARGO_PROGRESS = re.compile(r"Building \[[=> ]*\]\s*(\d+)/(\d+)(?::\s*(.*))?")

# apt's own answer to "where does this image's Debian come from" names the place for the further
# suites too, so no mirror's name stands here. Mirrors can lag: those suites' dates are not checked.
# Everything in them gets priority 1: a package comes from there only if it is pinned, or if nothing
# else offers it.
_APT = r"""
export DEBIAN_FRONTEND=noninteractive
apt-get -q -o Acquire::Languages=none update
codename=$(. /etc/os-release && echo "$VERSION_CODENAME")
targets() {
    apt-get indextargets --format "$1" 'Created-By: Packages' "Codename: $codename" | awk 'NR == 1'
}
uri=$(targets '$(REPO_URI)')
key=$(targets '$(SIGNED_BY)')
[ -n "$uri" ] || { echo "apt has no source for $codename in this image" >&2; exit 1; }
for suite in $suites; do
    printf 'Types: deb\nURIs: %s\nSuites: %s\nComponents: main\nCheck-Valid-Until: no\n' \
        "$uri" "$suite"
    case $key in /*) printf 'Signed-By: %s\n' "$key" ;; esac
    printf '\n'
done >/etc/apt/sources.list.d/toolchain.sources
for suite in $suites; do
    # Suites go by archive name (unstable) or by code name (trixie-backports); say both.
    for by in a n; do
        printf 'Package: *\nPin: release %s=%s\nPin-Priority: 1\n\n' "$by" "$suite"
        [ -z "$pinned" ] ||
            printf 'Package: %s\nPin: release %s=%s\nPin-Priority: 990\n\n' \
                "$pinned" "$by" "$suite"
    done
done >/etc/apt/preferences.d/toolchain
apt-get -q -o Acquire::Languages=none update
set -f
apt-get -q install --yes --no-install-recommends $packages
set +f
"""

# Gigabytes that only a broken-off build would need again; here, because they are the container's
# root's. The folder itself is the mount and stays.
_TIDY = f"find {_CACHE} -mindepth 1 -delete\n"


class BuildError(Exception):
    """The build could not be run or did not succeed; the text names the log."""


@dataclass(frozen=True)
class Plan:
    """One build as data: what runs in the container, with which environment and folders."""

    title: str
    container: str
    script: str
    environment: dict[str, str]
    mounts: tuple[tuple[Path, str, str], ...]
    """Folders: (on the machine, in the container, "rw" or "ro")."""

    def arguments(self, image: str, environment_file: Path) -> list[str]:
        """Arguments for `podman` that run the build in `image`."""
        volumes = [f"--volume={here}:{there}:{mode}" for here, there, mode in self.mounts]
        return [
            *("run", "--rm", "--name", self.container, "--label", f"{LABEL}=artifacts"),
            # No cgroup of its own: a build needs none, and without the right to raise memlock
            # (inside another container, say) the runtime could not set one up.
            *("--cgroups=disabled", "--security-opt=label=disable"),
            # The machine's network, so that a proxy on its loopback address works as well.
            *("--network=host", *_ulimits()),
            *("--env-file", str(environment_file), *volumes),
            *(image, "bash", "-euo", "pipefail", "-c", self.script),
        ]


def _ulimits() -> list[str]:
    """The lab's limits for containers, without the privileges that its hosts have and need."""
    return [word for word in run_arguments() if word.startswith("--ulimit=")]


def passed_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The part of the machine's environment that says how registries are reached; no tokens."""
    return {
        key: value
        for key, value in environment.items()
        if (key in _ENVIRONMENT or key.startswith(_ENVIRONMENT_PREFIXES))
        and not _ENVIRONMENT_WITHHELD.search(key)
        and "\n" not in value
    }


def _configuration_mounts(environment: Mapping[str, str]) -> list[tuple[Path, str, str]]:
    """The machine's cargo and Go configuration files, where it has them (they name mirrors)."""
    home = Path(environment.get("HOME", "/root"))
    cargo = Path(environment.get("CARGO_HOME") or home / ".cargo")
    go = Path(environment.get("GOENV") or home / ".config/go/env")
    # cargo reads /.cargo as a parent folder of its home, Go reads what GOENV names.
    candidates = [(cargo / "config.toml", "/.cargo/config.toml"), (go, "/go.env")]
    return [(path, there, "ro") for path, there in candidates if path.is_file()]


def _words(values: list[str]) -> str:
    return shlex.quote(" ".join(values))


def _toolchain_script(toolchain: Mapping[str, Any]) -> str:
    values = {key: list(toolchain.get(key, [])) for key in ("suites", "pinned", "packages")}
    variables = "\n".join(f"{key}={_words(value)}" for key, value in values.items())
    path = toolchain.get("path")
    extend = f'export PATH={shlex.quote(path)}:"$PATH"\n' if path else ""
    return f"{variables}\n{_APT}\n{extend}"


def _go_script(version: str, build: Mapping[str, Any]) -> str:
    """A module of two lines that requires the program's module, and builds its packages.

    `go install package@version` would be shorter, but asks the proxy for listings that some do not
    serve (seen with headscale), and refuses GOBIN for another architecture.
    """
    require = shlex.quote(f"{build['module']}@v{version}")
    packages = shlex.join(build["packages"])
    ldflags = shlex.quote(" ".join(build.get("ldflags", "").format(version=version).split()))
    return f"""
go version
mkdir /module && cd /module
go mod init build
go mod edit -require={require}
go build -mod=mod -trimpath -v -ldflags {ldflags} -o {_OUT}/ {packages}
"""


def _rust_script(version: str, build: Mapping[str, Any], binaries: tuple[str, ...]) -> str:
    crate = shlex.quote(build["crate"])
    arguments = shlex.join(build.get("arguments", []))
    built = shlex.join(f"/built/bin/{name}" for name in binaries)
    return f"""
cargo --version
rustc --version
cargo install {crate} --version {shlex.quote("=" + version)} --locked --no-track \\
    --root /built {arguments}
cp {built} {_OUT}/
"""


def machine_arch() -> str:
    """This machine's architecture by Debian's name (uname's where Debian has no other)."""
    machine = os.uname().machine
    return {"x86_64": "amd64", "aarch64": "arm64"}.get(machine, machine)


def make_plan(
    *,
    name: str,
    version: str,
    arch: str,
    binaries: tuple[str, ...],
    build: Mapping[str, Any],
    cache: Path,
    out: Path,
    environment: Mapping[str, str],
) -> Plan:
    """What to run to build one program.

    Args:
        build: the `build` part of its entry in the artifact list.
        cache: the artifact cache; what is half built is kept in its `build` folder.
        out: a folder for the binaries; made if it is not there.
        environment: the machine's environment.

    Raises:
        BuildError: the language is unknown, or cannot be built for `arch` here.
    """
    kept = cache / "build" / f"{name}-{version}-linux-{arch}"
    settings = passed_environment(environment)
    mounts = [(out, _OUT, "rw"), (kept, _CACHE, "rw"), *_configuration_mounts(environment)]
    language = build["language"]
    if language == "go":
        script = _go_script(version, build)
        settings |= {
            "CGO_ENABLED": "0",  # static, and so for any architecture
            "GOARCH": arch,
            "GOOS": "linux",
            "GOTOOLCHAIN": "auto",  # a module that wants a newer Go gets it as a module
            "GOMODCACHE": f"{_CACHE}/go/mod",
            "GOCACHE": f"{_CACHE}/go/build",
        }
        if any(there == "/go.env" for _, there, _ in mounts):
            settings["GOENV"] = "/go.env"
    elif language == "rust":
        if arch != machine_arch():
            raise BuildError(
                f"{name} can be built only on a machine of its own architecture ({arch}), "
                f"this one is {machine_arch()}"
            )
        script = _rust_script(version, build, binaries)
        settings |= {
            "CARGO_HOME": f"{_CACHE}/cargo",
            "CARGO_TARGET_DIR": f"{_CACHE}/target",
            "CARGO_INCREMENTAL": "0",
            "CARGO_TERM_COLOR": "never",
            # The counter of its progress bar is the only place where cargo says how much is left.
            "CARGO_TERM_PROGRESS_WHEN": "always",
            "CARGO_TERM_PROGRESS_WIDTH": "160",
        }
    else:
        raise BuildError(f"{name}: build.language is {language!r}; write go or rust")
    # Two caches must not get into one another's way; one cache's builds are kept apart by its lock.
    mark = sha256(str(cache).encode()).hexdigest()[:8]
    return Plan(
        title=f"{name} {version} ({arch})",
        container=f"prefect-fleet-build-{name}-{version}-{arch}-{mark}",
        script=_toolchain_script(build.get("toolchain", {})) + script + _TIDY,
        environment=settings,
        mounts=tuple(mounts),
    )


class Progress:
    """Takes a build's output, writes the log, and knows in one line how far it is."""

    def __init__(self, log: Any, clock: Callable[[], float] = time.monotonic) -> None:
        self._log = log
        self._clock = clock
        self._began = clock()
        self._rest = ""
        self._doing = "starting"
        self._count = ""
        self.tail: list[str] = []

    def feed(self, text: str) -> None:
        """Take output as it comes. What ends in a return is a progress bar, and not for the log."""
        *parts, self._rest = re.split(r"(\r?\n|\r(?=[^\n]))", self._rest + text)
        for line, end in zip(parts[::2], parts[1::2], strict=True):
            self._line(_ANSI.sub("", line).rstrip(), passing=end == "\r")

    def _line(self, line: str, passing: bool) -> None:
        if bar := _CARGO_PROGRESS.search(line):
            self._count = f"{bar[1]} of {bar[2]}, "
            self._doing = bar[3] or self._doing
        elif line:
            self._doing = line.strip()
            if not passing:
                self._log.write(line + "\n")
                self.tail = [*self.tail, line][-_TAIL_LINES:]

    def state(self) -> str:
        """Elapsed time, how many of how many where that is known, and what is being done."""
        minutes, seconds = divmod(int(self._clock() - self._began), 60)
        hours, minutes = divmod(minutes, 60)
        elapsed = f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s"
        return f"{elapsed}, {self._count}{self._doing[:90]}"


@contextmanager
def _environment_file(environment: Mapping[str, str], folder: Path) -> Iterator[Path]:
    """The environment in a file that only we read: a proxy's password is on no command line."""
    path = folder / "environment"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.writelines(f"{key}={value}\n" for key, value in environment.items())
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def _remove_container(name: str) -> None:
    argv = podman_command("rm", "--force", "--ignore", "--time", "0", name)
    subprocess.run(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)


def _read_into(stream: IO[bytes], progress: Progress) -> None:
    while chunk := os.read(stream.fileno(), 65536):
        progress.feed(chunk.decode(errors="replace"))


def _wait(process: subprocess.Popen[bytes], progress: Progress, say: Callable[[str], None]) -> int:
    """Wait until the process ends, saying now and then how far it is; its exit code."""
    terminal = sys.stderr.isatty()
    while True:
        try:
            return process.wait(timeout=1.0 if terminal else HEARTBEAT_S)
        except subprocess.TimeoutExpired:
            if terminal:
                print(f"\r\x1b[K  {progress.state()}", end="", file=sys.stderr, flush=True)
            else:
                say(progress.state())
        finally:
            if terminal and process.poll() is not None:
                print("\r\x1b[K", end="", file=sys.stderr, flush=True)


@contextmanager
def _held_back() -> Iterator[Callable[[], None]]:
    """Hold interrupts back until the block's end; gives what a child calls to get them again."""
    interrupts = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, interrupts)

    def let_go() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

    try:
        yield let_go
    finally:
        let_go()


@contextmanager
def _container(
    plan: Plan, argv: list[str], progress: Progress
) -> Iterator[subprocess.Popen[bytes]]:
    """The running build; on the way out the container and all that reads from it is gone."""
    process = None
    try:
        # An interrupt between podman's start and our knowing of it would leave it running.
        with _held_back() as let_go:
            process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                preexec_fn=let_go,
            )
            reader = threading.Thread(
                target=_read_into, args=(process.stdout, progress), daemon=True
            )
            reader.start()
        yield process
    finally:
        with _held_back():  # a second Ctrl-C does not keep the container alive either
            # Podman's --rm does it after a normal end; after an interrupt only this does.
            _remove_container(plan.container)
            if process is not None:
                try:
                    process.wait(timeout=_END_S)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                reader.join()
                if process.stdout:
                    process.stdout.close()


def run(plan: Plan, image: str, log: Path, work: Path, say: Callable[[str], None]) -> None:
    """Run a build to its end; whatever happens, the container is gone afterwards.

    Args:
        log: file for the full output.
        work: a folder of ours for the file with the environment.
        say: takes a progress line.

    Raises:
        BuildError: it failed; the text has the end of the output and the log's path.
    """
    for here, _, mode in plan.mounts:
        if mode == "rw":
            here.mkdir(parents=True, exist_ok=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    # One that a killed run left behind; the caller holds the lock, so nobody is using it.
    _remove_container(plan.container)
    say(f"building in a container; full output in {log}")
    with (
        _environment_file(plan.environment, work) as environment,
        log.open("w", buffering=1) as file,
    ):
        progress = Progress(file)
        argv = podman_command(*plan.arguments(image, environment))
        with _container(plan, argv, progress) as process:
            try:
                code = _wait(process, progress, say)
            except KeyboardInterrupt:
                say("stopping; removing the build's container (what it has built so far is kept)")
                raise
        if code != 0:
            end = "\n".join(f"    {line}" for line in progress.tail)
            raise BuildError(f"the build ended with code {code}:\n{end}\n  Full output: {log}")
        for here, there, _ in plan.mounts:
            if there == _CACHE:
                with suppress(OSError):  # not empty only if the build did not tidy up
                    here.rmdir()
        say(f"built: {progress.state().split(',')[0]}")
