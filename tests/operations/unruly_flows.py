"""Flows that go wrong on purpose, each bounded; copied to a worker host by test_unruly_flows.py."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.runtime import flow_run
from prefect.task_runners import ProcessPoolTaskRunner

MIB = 1 << 20
# No limit stops them later than this.
MOST_PROCESSES = 1000
MOST_MIB = 2048
LONGEST_SECONDS = 600
NOT_WRITABLE = [
    "/",
    "/dev",
    "/etc",
    "/etc/prefect",
    "/home",
    "/opt/prefect",
    "/proc/sys/kernel",
    "/root",
    "/run",
    "/run/lock",
    "/sys",
    "/usr",
    "/var",
    "/var/lib",
    "/var/log",
]


def tell(said: Any) -> None:
    """Leave what a run has to say where the test finds it."""
    folder = Path(os.environ["PREFECT_FLEET_DATA"]) / "unruly"
    folder.mkdir(exist_ok=True)
    (folder / f"{flow_run.id}.json").write_text(json.dumps(said))


@flow
def steady(until: str) -> None:
    """Do what runs do all the time, processes, threads, files, until there is such a file."""
    rounds = 0
    end = time.monotonic() + LONGEST_SECONDS
    while not (finished := Path(until).exists()) and time.monotonic() < end:
        subprocess.run([sys.executable, "-S", "-c", "pass"], check=True)
        thread = threading.Thread(target=time.sleep, args=(0.01,))
        thread.start()
        thread.join()
        with tempfile.TemporaryFile() as file:
            file.write(b"x" * MIB)
        bytearray(16 * MIB)
        rounds += 1
        time.sleep(0.5)
    tell({"finished": finished, "rounds": rounds})


@flow
def fork_bomb(seconds: float) -> None:
    """Fork until that is refused, and stay so for a while. Children end by themselves."""
    refusal = None
    for _ in range(MOST_PROCESSES):
        try:
            child = os.fork()
        except OSError as error:
            refusal = error
            break
        if child == 0:
            time.sleep(seconds)
            os._exit(0)
    time.sleep(seconds)
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)
    if refusal:
        raise refusal


@flow
def memory_hog(seconds: float) -> None:
    """Take memory until that is refused, and keep nearly all of it for a while."""
    held = []
    try:
        for _ in range(MOST_MIB // 16):
            held.append(b"x" * (16 * MIB))
    except MemoryError:
        # With nothing left, Python may wait for ever for a thread that could not even begin.
        del held[-4:]
        time.sleep(seconds)
        raise


@flow
def disk_filler(folder: str, file_mib: int, seconds: float) -> None:
    """Write files until that is refused, leave what is there for a while, then remove it."""
    with tempfile.TemporaryDirectory(dir=folder) as own:
        try:
            for number in range(MOST_MIB // file_mib):
                with (Path(own) / str(number)).open("wb") as file:
                    for _ in range(file_mib):
                        file.write(b"x" * MIB)
        except OSError:
            time.sleep(seconds)
            raise


@task
def double(number: int) -> int:
    """Run in a process of a pool."""
    return 2 * number


@flow(task_runner=ProcessPoolTaskRunner(max_workers=2))
def many_kinds_of_work() -> None:
    """Do what data flows do, as far as a sandbox could be in the way."""
    import ctypes
    import mmap
    import smtplib

    import pyarrow
    import pyarrow.parquet
    from prefect_aws import S3Bucket

    done: dict[str, Any] = {}
    done["task processes"] = [future.result() for future in double.map([1, 2])]
    with ProcessPoolExecutor(2) as pool:
        done["processes"] = sum(pool.map(abs, [-1, -2]))
    shell = subprocess.run(["/bin/sh", "-c", "echo $((6 * 7))"], capture_output=True, check=True)
    done["subprocess"] = shell.stdout.decode().strip()
    # What compilers at run time do, such as numba's and torch's.
    code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    code.write(b"\xc3" * 16)
    code.close()
    compare = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)(lambda number: number + 1)
    done["callback"] = compare(1)
    os.sched_setaffinity(0, os.sched_getaffinity(0))
    os.nice(1)
    done["memory"] = "MemTotal" in Path("/proc/meminfo").read_text()
    table = pyarrow.table({"x": list(range(100_000))})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.parquet"
        pyarrow.parquet.write_table(table, path)
        done["rows"] = pyarrow.parquet.read_table(path, memory_map=True).num_rows
        # Unix sockets, and a server and a client on this host.
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(Path(folder) / "socket"))
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        answer = threading.Thread(target=lambda: server.accept()[0].sendall(b"220 here\r\n"))
        answer.start()
        with contextlib.suppress(smtplib.SMTPServerDisconnected, OSError):
            mail = smtplib.SMTP(timeout=10)
            done["mail"] = mail.connect("127.0.0.1", port)[0]
        answer.join()
    done["interfaces"] = "lo" in [name for _, name in socket.if_nameindex()]
    bucket = S3Bucket.load("results")
    bucket.write_path("unruly", b"a result")
    done["stored"] = bucket.read_path("unruly").decode()
    tell(done)


@flow
def look_around() -> None:
    """Try what a flow must not be able to do, and say what came of it."""

    def attempt(call: Any, *arguments: Any) -> str:
        try:
            call(*arguments)
            return "done"
        except OSError as error:
            return os.strerror(error.errno) if error.errno else str(error)

    writable = []
    for folder in NOT_WRITABLE:
        with contextlib.suppress(OSError):
            tempfile.TemporaryFile(dir=folder).close()
            writable.append(folder)
    owners = set()
    for process in Path("/proc").glob("[0-9]*"):
        # Those of other runs may end meanwhile.
        with contextlib.suppress(FileNotFoundError):
            owners.add(process.stat().st_uid)
    devices = {path.name for path in Path("/dev").glob("[sv]d*")} | {
        path.name for path in Path("/dev").glob("loop*")
    }
    tell(
        {
            "writable": writable,
            "processes of others": sorted(owners - {os.getuid()}),
            "devices": sorted(devices),
            "a network of its own": attempt(os.unshare, os.CLONE_NEWNET),
            "mounts of its own": attempt(os.unshare, os.CLONE_NEWNS),
            "host name": attempt(socket.sethostname, socket.gethostname()),
            "packets of all": attempt(socket.socket, socket.AF_PACKET, socket.SOCK_RAW),
            "kernel's log": attempt(os.open, "/dev/kmsg", os.O_RDONLY),
            "server's settings": attempt(Path("/etc/prefect/server.env").read_text),
            "object storage's keys": attempt(Path("/etc/rustfs/secret_key").read_text),
        }
    )
