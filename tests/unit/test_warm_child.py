"""A forked run is what a new process would have been: each is compared with the stock command."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.shared import REPOSITORY
from tests.unit.warm import Warm, alive, children, wait_until, warm_folder

FACTS = """
import json, os, random, signal, sys, threading
import numbers_of_ours  # what the zygote imports beforehand, in this test
main = sys.modules["__main__"]
print(json.dumps({
    "environment": dict(os.environ),
    "cwd": os.getcwd(),
    "argv": sys.argv,
    "orig_argv": sys.orig_argv,
    "path": sys.path,
    "main": [main.__name__, main.__file__, main.__spec__.name, main.__package__],
    "input": sys.stdin.read(),
    "umask": os.umask(0),
    "files": sorted(map(int, os.listdir("/proc/self/fd")))[:3],
    "signals": {int(s): str(signal.getsignal(s)).split(" at ")[0] for s in signal.valid_signals()},
    "mask": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
    "ids": [os.getuid(), os.getgid(), sorted(os.getgroups())],
    "threads": len(os.listdir("/proc/self/task")),
    "streams": [[s.encoding, s.errors, s.line_buffering, s.fileno()]
                for s in (sys.stdin, sys.stdout, sys.stderr)],
    "flags": str(sys.flags),
    "executable": sys.executable,
    "limits": open("/proc/self/limits").read(),
    "gc": __import__("gc").isenabled(),
    "group": os.getpgrp() == os.getpid() or "not its own",
}))
"""


@pytest.fixture
def warm(tmp_path: Path) -> Iterator[Warm]:
    with warm_folder(tmp_path) as made:
        (tmp_path / "code" / "numbers_of_ours.py").write_text(
            "import os\nasked = os.getenv('ASKED')\n"
        )
        made.settings.list.write_text("numbers_of_ours  # needed by most flows\n")
        made.start()
        made.hear("ready")
        yield made
        made.stop()


def test_forked_run_has_what_a_new_process_has(warm: Warm) -> None:
    def facts(stock: bool) -> dict[str, object]:
        done = warm.run(FACTS, "one", "zwei ü", stock=stock, given="typed", MINE="a=b\nc", EMPTY="")
        assert not done.stderr, done.stderr
        return json.loads(done.stdout)

    forked, started = facts(False), facts(True)
    # A session of its own keeps signals to the process group from other runs.
    assert (forked.pop("group"), started.pop("group")) == (True, "not its own")
    assert forked == started


def test_nothing_of_one_run_is_left_to_the_next(warm: Warm) -> None:
    leave = (
        "import os, sys, random\nos.environ['LEFT'] = '1'; os.chdir('/'); sys.path.append('x')\n"
    )
    leave += "os.umask(0o777); random.seed(1); import numbers_of_ours as n; n.left = 1"
    assert warm.run(leave).returncode == 0
    look = "import os, sys, numbers_of_ours as ours\nprint(os.environ.get('LEFT'), os.getcwd(),"
    look += "'x' in sys.path, os.umask(0), vars(ours).get('left'))"
    assert warm.run(look).stdout == warm.run(look, stock=True).stdout


ENDINGS = {
    "returns": "pass",
    "exits with a number": "raise SystemExit(3)",
    "exits with a text": "import sys; sys.exit('no way')",
    "exits with too much": "raise SystemExit(1025)",
    "raises": "raise ValueError('broken')",
    "is interrupted": "raise KeyboardInterrupt",
    "ends at once": "import os; os._exit(7)",
    "is terminated": "import os; os.kill(os.getpid(), 15)",
    "is killed": "import os; os.kill(os.getpid(), 9)",
    "aborts": "import os, resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0)); os.abort()",
    "has exit functions": "import atexit; atexit.register(print, 'at the end')",
    "has a proxy whose object has gone": "import sys, weakref\n"
    "class Gone: pass\nsys.kept = weakref.proxy(Gone())",
    "has a module that imports when it is looked at": "import sys\n"
    "class Lazy:\n"
    "    def __getattr__(self, name): sys.modules['its' + name] = sys; raise AttributeError\n"
    "sys.modules['lazy'] = Lazy()",
    "leaves a thread": "import threading, time\n"
    "threading.Thread(target=lambda: (time.sleep(.2), print('later'))).start()",
    "leaves a daemon": "import threading, time\n"
    "threading.Thread(target=time.sleep, args=[99], daemon=True).start()",
}


@pytest.mark.parametrize("do", ENDINGS.values(), ids=ENDINGS.keys())
def test_client_ends_as_the_stock_command_would(warm: Warm, do: str) -> None:
    forked, started = warm.run(do), warm.run(do, stock=True)
    assert (forked.returncode, forked.stdout) == (started.returncode, started.stdout)
    # Tracebacks have the frames of who called.
    assert forked.stderr.splitlines()[-1:] == started.stderr.splitlines()[-1:]
    assert "prefect-warm: " not in forked.stderr


def test_files_left_open_are_written(warm: Warm) -> None:
    do = "import sys\nsys.kept = open('text', 'w'); sys.kept.write('all of it')"
    assert warm.run(do).returncode == 0
    assert (warm.work / "text").read_text() == "all of it"


# Not one long sleep: of a signal that comes on the way into that, Python hears when it is over.
LINGER = "for _ in range(600): time.sleep(0.1)"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_signals_reach_the_run(warm: Warm, number: int) -> None:
    do = f"import signal, sys, time\nsignal.signal({number:d}, lambda *_: sys.exit(5))\n"
    do += f"print('ready', flush=True)\n{LINGER}"
    process = warm.begin(do)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert process.wait(30) == 5
    process.communicate()


def test_signal_ignored_by_whoever_starts_it_reaches_a_run_that_handles_it(warm: Warm) -> None:
    do = "import signal, sys, time\nbefore = signal.signal(1, lambda *_: sys.exit(5))\n"
    do += f"print(before == signal.SIG_IGN, flush=True)\n{LINGER}"
    usual = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        process = warm.begin(do)
    finally:
        signal.signal(signal.SIGHUP, usual)
    assert process.stdout is not None
    assert process.stdout.readline() == "True\n"
    process.send_signal(signal.SIGHUP)
    assert process.wait(30) == 5
    process.communicate()


# Between the interpreter's last look for signals and the system call that waits is no line of
# Python, so the signal is raised by what C does in one go: call each, return the first true result.
SIGNAL_INTO_WAIT = """
import ctypes, functools, itertools, operator, os, select, signal, socket, sys
from prefect_fleet.warm import client
connection, zygote = socket.socketpair()
told = client.ENDED + (5 << 8).to_bytes(4, "big")
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
run = os.fork()
if not run:
    signal.sigtimedwait([signal.SIGUSR1], 60) and zygote.send(told)
    os._exit(0)
class Poll:
    def __init__(self):
        self.real = real_poll()
        self.register = self.real.register
        first = functools.partial(raise_signal, signal.SIGUSR1)
        steps = itertools.chain([first], itertools.repeat(self.real.poll))
        self.poll = functools.partial(next, filter(None, map(operator.call, steps)))
raise_signal, real_poll = ctypes.PyDLL(None)["raise"], select.poll
select.poll = Poll
sys.exit(client.follow(connection, connection, os.pidfd_open(run)) >> 8)
"""


def test_no_signal_is_lost_on_the_way_into_a_wait() -> None:
    command = [sys.executable, "-c", SIGNAL_INTO_WAIT]
    environment = {"PYTHONPATH": str(REPOSITORY / "src")}
    assert subprocess.run(command, env=environment, timeout=30).returncode == 5


def test_unhandled_signal_ends_the_client_by_that_signal(warm: Warm) -> None:
    process = warm.begin("import time; print('ready', flush=True); time.sleep(60)")
    assert process.stdout is not None
    process.stdout.readline()
    process.terminate()
    assert process.wait(30) == -signal.SIGTERM
    process.communicate()


def test_random_numbers_differ_from_run_to_run(warm: Warm) -> None:
    (warm.folder / "code" / "numbers_of_ours.py").write_text(
        "import random\nours = random.Random(1)\n"
    )
    # Its file has changed: another zygote, with the new one.
    warm.hear("draining")
    warm.stop()
    warm.start()
    warm.hear("ready")
    do = "import numbers_of_ours, random, uuid, os, ssl\n"
    do += "print(os.getppid(), random.random(), numbers_of_ours.ours.random(), uuid.uuid4(),"
    do += " ssl.RAND_bytes(8).hex())"
    (parent, *first), (other, *second) = (warm.run(do).stdout.split() for _ in range(2))
    assert parent == other == str(warm.zygote.pid)
    assert not set(first) & set(second)


def test_run_ends_with_a_killed_client(warm: Warm) -> None:
    process = warm.begin("import time, os; print(os.getpid(), flush=True); time.sleep(60)")
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    process.kill()
    wait_until(lambda: not alive(pid), "the run's end")
    process.communicate()


def test_run_survives_a_killed_zygote_and_its_status_is_known(warm: Warm) -> None:
    process = warm.begin("import sys; print('ready', flush=True); sys.stdin.read(); sys.exit(6)")
    assert process.stdout is not None
    process.stdout.readline()
    warm.zygote.kill()
    warm.zygote.wait()
    process.communicate("go on", timeout=30)
    assert process.returncode == 6


def test_run_killed_after_its_zygote_is_no_success(warm: Warm) -> None:
    process = warm.begin("import os, time; print(os.getpid(), flush=True); time.sleep(60)")
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    warm.zygote.kill()
    warm.zygote.wait()
    os.kill(pid, signal.SIGKILL)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "without a word" in err


def test_run_ends_with_its_client_after_the_zygote(warm: Warm) -> None:
    process = warm.begin("import os, time; print(os.getpid(), flush=True); time.sleep(60)")
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    warm.zygote.kill()
    warm.zygote.wait()
    process.kill()
    wait_until(lambda: not alive(pid), "the run's end")
    process.communicate()


def test_modules_are_found_only_where_python_would_find_them(warm: Warm) -> None:
    do = "import sys\nprint('numbers_of_ours' in sys.modules); import numbers_of_ours as n\n"
    do += "print(n.__file__, n.__spec__.loader.__class__.__name__, hasattr(n, 'theirs'))"
    assert warm.run(do).stdout == warm.run(do, stock=True).stdout
    other = warm.folder / "other"
    other.mkdir()
    (other / "numbers_of_ours.py").write_text("theirs = 1\n")
    do = f"import sys\nsys.path.insert(0, {str(other)!r})\n{do}"
    assert warm.run(do).stdout == warm.run(do, stock=True).stdout
    assert warm.run(do).stdout.endswith("True\n")


def test_nothing_grows_in_the_zygote(warm: Warm) -> None:
    def held() -> tuple[int, int]:
        files = len(list(Path(f"/proc/{warm.zygote.pid}/fd").iterdir()))
        status = Path(f"/proc/{warm.zygote.pid}/status").read_text()
        return files, int(re.findall(r"VmRSS:\s+(\d+)", status)[0])

    def some(count: int) -> None:
        for _ in range(count):
            assert warm.run("pass").returncode == 0
        wait_until(lambda: not children(warm.zygote.pid), "the last one's end")

    # A run's connection is closed a moment after its process has been waited for.
    files, _ = held()
    some(20)
    wait_until(lambda: held()[0] <= files, f"{files} open files after some runs")
    _, memory = held()
    some(int(os.environ.get("WARM_RUNS", "100")))
    wait_until(lambda: held()[0] <= files, f"{files} open files again")
    # Pages of 4 KiB; a leak of a request's kilobyte a run would be 100 of them.
    assert held()[1] - memory <= 64
