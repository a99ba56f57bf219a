"""What a zygote holds is shared with its children, and ends in a child as it does anywhere.

The hosts' Python is another than the control node's, and what is shared depends on it: these tests
are done with each that is there.
"""

import json
import shutil
import subprocess
import sys

import pytest

from prefect_fleet.warm import sharing
from tests.unit.shared import REPOSITORY

# What the rest of a program does before and after: it makes objects, and a child uses them.
BEGIN = """
import gc, json, os, re, sys, weakref
from prefect_fleet.warm import sharing

class Made:
    def __init__(self, number):
        self.number, self.text, self.pair = number, f"object {number}", (number, [number])

made = [Made(10**6 + number) for number in range(20_000)]
in_dict = {one.text: one for one in made}

def private():
    with open("/proc/self/smaps_rollup") as lines:
        return int(re.findall(r"Private_Dirty: +(\\d+)", lines.read())[0])

def in_child(do):
    told, tell = os.pipe()
    if not (pid := os.fork()):
        try:
            os.write(tell, json.dumps(do()).encode())
        finally:
            os._exit(0)
    os.close(tell)
    with os.fdopen(told) as answer:
        text = answer.read()
    os.waitpid(pid, 0)
    return json.loads(text)
"""
USE = """
def use():
    before = private()
    for one in made:
        one, one.number, one.text, one.pair, one.pair[1]
    for name in in_dict:
        name
    return private() - before
"""


def pythons() -> list[str]:
    """Return this interpreter, and those of other versions that are there and that run."""
    found = [sys.executable]
    for minor in (12, 13, 14):
        other = shutil.which(f"python3.{minor}")
        if sys.version_info[1] != minor and other:
            runs = subprocess.run([other, "-c", ""], check=False, stderr=subprocess.DEVNULL)
            if not runs.returncode:
                found.append(other)
    return found


@pytest.fixture(params=pythons())
def python(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def run(python: str, *code: str) -> object:
    """Return what a program prints as JSON, its last line."""
    done = subprocess.run(
        [python, "-c", "\n".join(code)],
        check=True,
        timeout=120,
        stdout=subprocess.PIPE,
        text=True,
        env={"PYTHONPATH": str(REPOSITORY / "src")},
    )
    return json.loads(done.stdout.splitlines()[-1])


def needs_immortality(python: str) -> None:
    if reason := run(python, "import json\n" + BEGIN + "print(json.dumps(sharing.unsupported()))"):
        pytest.skip(str(reason))


def test_child_that_uses_objects_copies_no_page_of_theirs(python: str) -> None:
    needs_immortality(python)
    show = "print(json.dumps([in_child(use), sharing.share(), gc.freeze(), in_child(use)]))"
    before, reason, _, after = run(python, BEGIN, USE, show)  # type: ignore[misc]
    assert reason is None
    # Each object has five others, some MiB together.
    assert before > 4000
    assert after < before / 8, f"{after} KiB are the child's own, and {before} before"


def test_another_python_is_left_alone(python: str) -> None:
    code = "sys.version_info = (3, 99)\nbefore = sys.getrefcount(made)\n"
    code += "print(json.dumps([sharing.share(), sys.getrefcount(made) - before]))"
    reason, difference = run(python, BEGIN, code)  # type: ignore[misc]
    assert "another Python" in reason
    assert difference == 0


def test_what_is_free_is_left_to_the_allocator(python: str) -> None:
    # In a fork, these take memory that is free in the process itself.
    code = """
kept, gone = [], [[(number,), [number]] for number in range(3000)]
del gone
os.register_at_fork(after_in_child=lambda: kept.extend(((n,), [n, {}]) for n in range(3000)))
sharing.share(); gc.freeze()

def fill():
    rows = [[bytes(size), (size,), [size], {size: size}] for size in range(600) for _ in range(50)]
    return len(rows)
print(json.dumps([fill(), fill(), in_child(fill)]))
"""
    assert run(python, BEGIN, code) == [30_000] * 3


def test_holes_are_filled_once(python: str) -> None:
    code = "holes = [one for one in map(Made, range(20_000))]\ndel holes[::2]\ngc.collect()\n"
    code += "print(json.dumps([sharing.fill_holes(), sharing.fill_holes()]))"
    first, second = run(python, BEGIN, code)  # type: ignore[misc]
    # Half of the objects, of more than a hundred bytes each.
    assert first > 1_000_000
    # Pages that were begun for what the function itself makes.
    assert second < first / 4


def test_objects_of_a_child_end_as_they_do_anywhere(python: str) -> None:
    code = """
import contextlib, io, logging, tempfile
log = []
class Ends:
    def __del__(self): log.append("ended")
old = Ends()
handler = logging.StreamHandler(io.StringIO())
handlers = len(logging._handlerList)
def generator():
    try: yield 1
    finally: log.append("closed")
begun = generator(); next(begun)
table = {"list": [1], "old": old}
cache = weakref.WeakValueDictionary(of=made[0])

def ends():
    global old, begun, handler
    new = Ends(); del new
    one = Made(1); weakref.finalize(one, log.append, "finalized"); del one
    other = generator(); next(other); del other
    cycle = Made(2); cycle.self = cycle
    reference = weakref.ref(cycle, lambda _: log.append("cycle")); del cycle; gc.collect()
    try: raise ValueError("with objects of the parent", made[0], table)
    except ValueError as error: caught = error.args[1] is made[0]
    assert caught and "error" not in locals()
    # What was there before, too, if its end matters.
    table.clear(); old = None; begun = None; handler = None
    gc.collect(); gc.unfreeze(); gc.collect()
    text = made[0].text; text += " and more"
    made[0].pair[1].append(text); made[0].number += 1
    return [log, len(logging._handlerList) - handlers, dict(cache)["of"] is made[0],
            made[0].text, made[0].pair, made[0].number, sorted(in_dict)[0]]
"""
    show = "print(json.dumps([in_child(ends), [sharing.share(), gc.freeze()][0], in_child(ends)]))"
    before, _, after = run(python, BEGIN, code, show)  # type: ignore[misc]
    assert "cycle" in before[0]
    assert sorted(before[0]) == ["closed", "closed", "cycle", "ended", "ended", "finalized"]
    assert after == before


def test_this_python_says_whether_it_can(python: str) -> None:
    minor = int(str(run(python, "import sys; print(sys.version_info[1])")))
    free = run(
        python, "import sysconfig; print(int(sysconfig.get_config_var('Py_GIL_DISABLED') or 0))"
    )
    reason = run(python, BEGIN, "print(json.dumps(sharing.unsupported()))")
    assert (reason is None) == ((3, minor) in sharing.VERSIONS and not free)
