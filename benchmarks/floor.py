"""What the same work costs without Ansible: the floor that `benchmarks/converge` compares with.

It is floor.sh, run on the hosts over ssh, on all of them at once. What it puts there is recorded
from a fleet that has been converged: files, names of packages, users. Hosts that are made anew get
the same by one tar, one call of apt-get and one environment each, start the same services, and run
the same programs (work pools, deployments, canary).

It has less to do than any tool that knows nothing yet, and is no way to run a fleet: nothing is
rendered, compared or checked but what has to be awaited. What a converge makes is brought along:
certificates, and, in the services' state, the nodes' keys and addresses in the tailnet and RustFS's
buckets and users.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from benchmarks.runs import PROJECT, BenchmarkError
from lab.fleet import Fleet, Host

_SCRIPT = Path(__file__).with_name("floor.sh")
_LOOK_SECONDS = 0.02
_TAIL = 1500  # characters


@dataclass(frozen=True)
class Call:
    """A call in floor.sh, with the files of this machine that it reads from and writes to."""

    text: str
    given: Path | None = None
    into: Path | None = None


class Floor:
    """The floor of one fleet; `folder` is where recordings lie, and holds secrets.

    Each method ends within `limit` seconds. Raises:
        BenchmarkError: a host failed, or did not end in time; the others' calls are ended as well.
    """

    def __init__(self, fleet: Fleet, folder: Path) -> None:
        self._fleet = fleet
        self._folder = folder
        self._notes: dict[Host, str] = {}
        self._workers = [host for host in fleet.hosts if "prefect_worker" in host.groups]

    def record(self, limit: float) -> None:
        """Record what a converge has put on the hosts."""
        for what in ("notes", "sums", "files", "workers"):
            hosts = self._workers if what == "workers" else self._fleet.hosts
            self._run({host: Call(what, into=self._file(host, what)) for host in hosts}, limit)
        self._notes = {host: self._file(host, "notes").read_text() for host in self._fleet.hosts}

    def record_state(self, limit: float) -> None:
        """Record, behind the files, what the services keep; they are stopped for good."""
        calls = {host: Call("state", into=self._file(host, "state")) for host in self._fleet.hosts}
        self._run(calls, limit)
        for host in self._fleet.hosts:
            state, files = self._file(host, "state"), self._file(host, "files")
            with state.open("rb") as source, files.open("ab") as target:
                shutil.copyfileobj(source, target)

    def bare(self, limit: float) -> None:
        """From new hosts to a Completed canary run on each worker host."""
        calls = {}
        for host in self._fleet.hosts:
            deploys = ["first"] if host == self._workers[0] else []
            text = shlex.join(["bare", *host.groups, *deploys])
            calls[host] = Call(text, given=self._file(host, "files"))
        self._run(calls, limit)

    def nothing(self, limit: float) -> None:
        """See that everything is there."""
        hosts = self._fleet.hosts
        self._run({host: Call("nothing", given=self._file(host, "sums")) for host in hosts}, limit)

    def variable(self, limit: float) -> None:
        """Write the workers' settings and restart them, one host after another."""
        end = time.monotonic() + limit
        for host in self._workers:
            call = Call("variable", given=self._file(host, "workers"))
            self._run({host: call}, end - time.monotonic())

    def deploy(self, limit: float) -> None:
        """Pack this project's code, release it on the worker hosts, and write its deployments."""
        end = time.monotonic() + limit
        packing = [sys.executable, PROJECT / "scripts/build_release.py", PROJECT, self._folder]
        packed = subprocess.run(packing, check=True, capture_output=True, text=True)
        release = json.loads(packed.stdout.splitlines()[-1])
        call = Call(shlex.join(["release", release["id"]]), given=Path(release["path"]))
        self._run(dict.fromkeys(self._workers, call), end - time.monotonic())
        self._run({self._workers[0]: Call("write_deployments deploy")}, end - time.monotonic())

    def _file(self, host: Host, what: str) -> Path:
        return self._folder / f"{host.name}.{what}"

    def _command(self, host: Host, call: Call) -> list[str]:
        script = "\n".join((_SCRIPT.read_text(), self._notes.get(host, ""), call.text))
        return ["ssh", "-F", str(self._fleet.ssh_config), host.name, script]

    def _run(self, calls: Mapping[Host, Call], limit: float) -> None:
        """Run the calls on their hosts at once."""
        commands = {host.name: (self._command(host, call), call) for host, call in calls.items()}
        run_at_once(commands, limit, self._folder)


def run_at_once(commands: Mapping[str, tuple[list[str], Call]], limit: float, folder: Path) -> None:
    """Run commands side by side, by the names of their hosts; what they say goes into `folder`.

    Raises:
        BenchmarkError: one failed or did not end within `limit` seconds; the others are ended.
    """
    end = time.monotonic() + limit
    running: dict[str, subprocess.Popen[bytes]] = {}
    with ExitStack() as stack:
        for name, (argv, call) in commands.items():
            log = stack.enter_context((folder / f"{name}.log").open("wb"))
            given = stack.enter_context((call.given or Path("/dev/null")).open("rb"))
            into = stack.enter_context(call.into.open("wb")) if call.into else log
            process = subprocess.Popen(argv, stdin=given, stdout=into, stderr=log)
            stack.callback(process.wait)
            stack.callback(process.kill)
            running[name] = process
        while running:
            for name, process in list(running.items()):
                status = process.poll()
                if status is None:
                    continue
                del running[name]
                if status != 0:
                    said = (folder / f"{name}.log").read_text(errors="replace")[-_TAIL:]
                    raise BenchmarkError(
                        f"The floor failed on {name} with status {status}:\n{said}"
                    )
            if running and time.monotonic() > end:
                raise BenchmarkError(f"The floor did not end in time on {', '.join(running)}.")
            time.sleep(_LOOK_SECONDS)
