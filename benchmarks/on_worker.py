"""Run a benchmark on a worker host of a local fleet, with the Python that flow runs have there."""

from __future__ import annotations

import io
import shlex
import subprocess
import tarfile
from pathlib import Path

from benchmarks.servers import PROJECT
from lab.fleet import Fleet

_FOLDER = "/run/prefect-benchmark"
_UNIT = "prefect-benchmark.service"
# It ends by itself, should nobody be there to end it.
_LIMIT_SECONDS = 1800
# Of the settings of clients, those that nobody needs in order to reach the server: results would be
# written to object storage, by both sides.
_WITHOUT = ("PREFECT_RESULTS_DEFAULT_STORAGE_BLOCK", "PREFECT_RESULTS_PERSIST_BY_DEFAULT")


def run_on_worker(name: str, benchmark: str, arguments: list[str], results: Path) -> int:
    """Run a benchmark as the user of flow runs, against the fleet's server; return its exit status.

    Args:
        name: of the fleet, which has to be converged.
        benchmark: its name in this folder.
        arguments: for it. `--ca-file` and `--results` are added.
        results: folder for the JSON that it writes.

    Raises:
        LabError: there is no such fleet.
        SystemExit: its hosts are not there.
    """
    fleet = Fleet.load(name)
    host = next(host.name for host in fleet.hosts if "prefect_worker" in host.groups)
    ssh = ["ssh", "-F", str(fleet.ssh_config), host]
    program = [
        "/opt/prefect/venv/bin/python", f"{_FOLDER}/benchmarks/{benchmark}", *arguments,
        "--ca-file", "/etc/prefect/ca.pem", "--results", f"{_FOLDER}/results",
    ]  # fmt: skip
    unit = [
        "systemd-run", "--quiet", "--pipe", "--wait", "--collect", f"--unit={_UNIT}",
        "--uid=prefect", "--property=EnvironmentFile=/etc/prefect/client.env",
        f"--property=UnsetEnvironment={' '.join(_WITHOUT)}",
        "--property=PrivateTmp=yes", f"--property=RuntimeMaxSec={_LIMIT_SECONDS}",
        "--setenv=PYTHONUNBUFFERED=1",
    ]  # fmt: skip
    remove = f"systemctl stop {_UNIT} 2>/dev/null; rm -rf {_FOLDER}"
    make = f"{remove}; install -d -o prefect {_FOLDER} && tar -x -C {_FOLDER}"
    try:
        if subprocess.run([*ssh, make], input=_packed(benchmark)).returncode != 0:
            raise SystemExit(f"{host} of the fleet {name} is not ready: boot and converge it")
        status = subprocess.run([*ssh, shlex.join([*unit, *program])]).returncode
        if status == 0:
            written = subprocess.run(
                [*ssh, f"tar -c -C {_FOLDER}/results ."], check=True, stdout=subprocess.PIPE
            ).stdout
            with tarfile.open(fileobj=io.BytesIO(written)) as archive:
                _keep(archive, results)
        return status
    finally:
        fleet.run(host, remove)


def _packed(benchmark: str) -> bytes:
    """Return a tar of the benchmark, and of the project's code that it runs."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for path in ("src", f"benchmarks/{benchmark}", *_modules()):
            archive.add(PROJECT / path, path)
    return packed.getvalue()


def _modules() -> list[str]:
    return [f"benchmarks/{path.name}" for path in (PROJECT / "benchmarks").glob("*.py")]


def _keep(archive: tarfile.TarFile, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for member in archive:
        if file := archive.extractfile(member):
            (folder / Path(member.name).name).write_bytes(file.read())
