"""A run that a fork can't be right for, or that no zygote answers, is run by the stock command."""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from prefect_fleet.warm import client
from prefect_fleet.warm.zygote import identity
from tests.unit.warm import CLIENT, STOCK, Warm, children, wait_until, warm_folder

DO = "import os; print(os.getppid())"


@pytest.fixture
def cold(tmp_path: Path) -> Iterator[Warm]:
    """One whose zygote is not started."""
    with warm_folder(tmp_path) as made:
        yield made
        with contextlib.suppress(AttributeError):
            made.stop()


def with_module(warm: Warm, code: str) -> Warm:
    """Let a zygote import a module of this code."""
    (warm.folder / "code" / "listed.py").write_text(code)
    warm.settings.list.write_text("listed\n")
    return warm


def started(warm: Warm, core: tuple[str, ...] = ()) -> Warm:
    warm.start(core)
    warm.hear("ready")
    return warm


def test_without_a_zygote(cold: Warm) -> None:
    assert cold.run(DO, refused="No such file").stdout == f"{os.getpid()}\n"


def test_with_a_socket_that_nobody_listens_on(cold: Warm) -> None:
    started(cold).stop()
    assert cold.run(DO, refused="Connection refused").returncode == 0


def test_forks_what_agrees(cold: Warm) -> None:
    started(cold)
    assert cold.run(DO).stdout == f"{cold.zygote.pid}\n"


def test_variable_that_an_imported_module_asked_for(cold: Warm) -> None:
    started(with_module(cold, "import os\nfound = os.environ.get('ASKED', 'nothing')\n"))
    do = "import listed; print(listed.found)"
    assert cold.run(do, ASKED="this", refused="ASKED is another").stdout == "this\n"
    assert cold.run(do, UNASKED="this").stdout == "nothing\n"


@pytest.mark.parametrize("name", ["TZ", "LANG", "PYTHONHASHSEED", "LC_TIME"])
def test_variable_that_the_interpreter_looks_at(cold: Warm, name: str) -> None:
    started(cold)
    # LANG=C makes Python set LC_CTYPE as well. The hash seed is none, which the stock command says.
    cold.run("pass", refused=" is another than the zygote", **{name: "C"})


def test_other_command(cold: Warm) -> None:
    started(cold)
    command = [*CLIENT, str(cold.socket), sys.executable, "-c", "print('mine')"]
    done = subprocess.run(
        command, capture_output=True, text=True, env=cold.environment, check=False
    )
    assert done.stdout == "mine\n"
    assert "is not PYTHON -m stand_in_engine" in done.stderr


def test_other_limits(cold: Warm) -> None:
    started(cold)
    process = subprocess.Popen(
        [*CLIENT, str(cold.socket), *STOCK],
        cwd=cold.work,
        env=cold.environment | {"DO": "import resource; print(resource.getrlimit(7)[0])"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (99, 99)),
    )
    out, err = process.communicate(timeout=30)
    assert out == "99\n"
    assert "the client has other limits" in err


def test_working_directory_with_a_module_of_the_same_name(cold: Warm) -> None:
    started(cold)
    (cold.work / "json.py").write_text("mine = 'mine'\n")
    do = "import json; print(json.mine)"
    assert cold.run(do, refused="json in its working directory").stdout == "mine\n"


def run_changed(warm: Warm, change: str) -> "subprocess.CompletedProcess[str]":
    """Run what notes each beginning, by a client with this change."""
    changed = (
        f"import sys; sys.path.insert(0, {str(Path(client.__file__).parent)!r}); import client;"
        f"client.{change}; client.main(sys.argv[1:])"
    )
    return subprocess.run(
        [sys.executable, "-I", "-S", "-c", changed, str(warm.socket), *STOCK],
        cwd=warm.work,
        env=warm.environment | {"DO": "import os; open('began', 'a').write('x')"},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_hung_zygote_neither_holds_nor_doubles_a_run(cold: Warm) -> None:
    started(cold)
    cold.zygote.send_signal(signal.SIGSTOP)
    done = run_changed(cold, "PATIENCE = 0.3")
    assert done.returncode == 0
    assert "timed out" in done.stderr
    cold.zygote.send_signal(signal.SIGCONT)
    # The next one is served, so the one before has been looked at.
    assert cold.run(DO).stdout == f"{cold.zygote.pid}\n"
    assert (cold.work / "began").read_text() == "x"


def test_child_whose_client_turns_away_does_not_begin(cold: Warm) -> None:
    started(cold)
    done = run_changed(cold, "READY = b'?'")
    assert "the answer is of another release" in done.stderr
    wait_until(lambda: not children(cold.zygote.pid), "the child's end")
    assert (cold.work / "began").read_text() == "x"


def test_file_of_the_release_changes(cold: Warm) -> None:
    started(with_module(cold, "value = 1\n"))
    (cold.folder / "code" / "listed.py").write_text("value = 2, 2\n")
    do = "import listed; print(listed.value)"
    done = cold.run(do, refused="")
    assert done.stdout == "(2, 2)\n"
    assert "listed.py has changed" in cold.hear("draining")["draining"]
    assert cold.zygote.wait(30) == 0


def test_release_that_comes_during_the_imports(cold: Warm) -> None:
    # The second one changes the first, as another release changes all of them.
    code = "import listed\nopen(listed.__file__, 'a').write('# changed')\n"
    (cold.folder / "code" / "second.py").write_text(code)
    with_module(cold, "value = 1\n")
    cold.settings.list.write_text("listed\nsecond\n")
    cold.start()
    assert "listed.py has changed" in cold.hear("draining")["draining"]
    assert cold.zygote.wait(30) == 0


def test_list_that_comes_during_the_imports(cold: Warm) -> None:
    path = str(cold.settings.list)
    with_module(cold, f"open({path!r}, 'a').write('json\\n')\n").start()
    assert "list has changed" in cold.hear("draining")["draining"]
    assert cold.zygote.wait(30) == 0


def test_run_in_flight_keeps_its_zygote(cold: Warm) -> None:
    started(with_module(cold, "value = 1\n"))
    process = cold.begin(
        "import sys, listed; print('ready', flush=True); sys.stdin.read(); print(listed.value)"
    )
    assert process.stdout is not None
    process.stdout.readline()
    cold.line.close()  # as the parent does when another zygote is ready
    wait_until(lambda: cold.socket.exists() and refuses(cold), "its end of listening")
    assert process.communicate("go on", timeout=30)[0] == "1\n"
    assert process.returncode == 0
    assert cold.zygote.wait(30) == 0


def refuses(warm: Warm) -> bool:
    process = warm.begin("pass")
    return "prefect-warm" in process.communicate(timeout=30)[1]


UNFIT = {
    "import threading, time; threading.Thread(target=time.sleep, args=[99], daemon=True).start()": (
        "starts a thread"
    ),
    "kept = open('/dev/zero')": "open",
    "import os; os.environ['NEW'] = '1'": "changes the environment",
    "import os; all = dict(os.environ)": "depends on the whole environment",
    "import sys; sys.path.append('/x')": "changes how modules are found",
}


@pytest.mark.parametrize(("code", "reason"), UNFIT.items(), ids=UNFIT.values())
def test_module_that_can_not_be_forked(cold: Warm, code: str, reason: str) -> None:
    with_module(cold, code).start()
    said = cold.hear("unfit")
    assert said["unfit"] == "listed"
    assert reason in said["reason"]
    assert cold.zygote.wait(30) != 0
    # The next one is told.
    cold.start(unfit={"listed": said["reason"]})
    cold.hear("ready")
    assert cold.run(DO).stdout == f"{cold.zygote.pid}\n"
    assert json.loads(cold.settings.state.read_text())["left_out"] == {"listed": said["reason"]}


def test_module_that_can_not_be_imported(cold: Warm) -> None:
    started(with_module(cold, "raise SystemExit('never')"))
    assert cold.run(DO).returncode == 0
    assert json.loads(cold.settings.state.read_text())["left_out"] == {
        "listed": "SystemExit: never"
    }


# From Python 3.12 on a child imports it to forget where modules were; Prefect's engine has it.
FORGETS = ("importlib.metadata",)


def test_what_runs_import_is_learned(cold: Warm) -> None:
    started(cold, core=FORGETS)
    assert cold.run("import colorsys").returncode == 0
    cold.hear("more")
    assert json.loads(cold.settings.learned.read_text()) == ["colorsys"]
    cold.stop()
    started(cold, core=FORGETS)
    assert json.loads(cold.settings.state.read_text())["loaded"] == ["colorsys"]
    # Not imported for a run that does not import it.
    assert cold.run("import sys; print('colorsys' in sys.modules)").stdout == "False\n"


def test_first_zygote_leaves_what_was_learned_to_the_next(cold: Warm) -> None:
    cold.settings.learned.write_text('["colorsys"]')
    cold.start(core=FORGETS, soon=True)
    cold.hear("ready")
    assert json.loads(cold.settings.state.read_text())["loaded"] == []
    assert cold.run(DO).stdout == f"{cold.zygote.pid}\n"
    # Once only: what it has asked for it does not ask for again.
    assert cold.hear("more")["more"] == 1
    assert cold.run("import colorsys").returncode == 0
    assert cold.run("import this").returncode == 0
    cold.hear("more")
    assert json.loads(cold.settings.learned.read_text()) == ["colorsys", "this"]


def test_package_of_an_unfit_module_is_left_out_and_not_learned(cold: Warm) -> None:
    cold.settings.learned.write_text('["email.mime.text", "colorsys"]')
    cold.start(unfit={"email.mime": "starts a thread"})
    cold.hear("ready")
    assert json.loads(cold.settings.state.read_text())["loaded"] == ["colorsys"]
    assert cold.run("import email.mime.audio, this").returncode == 0
    cold.hear("more")
    learned = json.loads(cold.settings.learned.read_text())
    assert [name for name in learned[2:] if name.startswith("email")] == []
    assert "this" in learned


def test_a_folder_of_packages_changes_by_what_is_installed(tmp_path: Path) -> None:
    metadata = tmp_path / "package-1.dist-info"
    metadata.mkdir()
    before = identity(str(tmp_path))
    # What Python makes where it compiles a package of one file for the first time.
    (tmp_path / "__pycache__").mkdir()
    assert identity(str(tmp_path)) == before
    # The same version again.
    os.utime(metadata, ns=(1, 1))
    again = identity(str(tmp_path))
    assert again != before
    metadata.rename(tmp_path / "package-2.dist-info")
    assert identity(str(tmp_path)) != again
