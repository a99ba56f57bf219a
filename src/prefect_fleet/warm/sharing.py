"""Keep a zygote's memory shared with its children: pages that nobody writes stay one copy for all.

Two things make a child write to pages although it changes nothing that it inherited. Python counts
references within each object; and its allocator, as C's, hands out whatever is free between objects
that stay. So, once everything is imported,

- objects are made immortal: Python writes no count of one whose count has a certain value
  (PEP 683). Nothing of what was imported is ever freed by a run, which no run would notice but by
  finalizers and callbacks of weak references; what has these is left mortal;
- what is free between small objects is taken and never given back, so that children's new objects
  are side by side in pages of their own.

It relies on how CPython 3.12 and 3.13 keep counts (`Include/object.h`), and on how CPython reports
on its memory (`Objects/obmalloc.c`). Another Python's counts are left alone: pages are copied.
"""

import contextlib
import ctypes
import gc
import logging
import os
import platform
import re
import sys
import sysconfig
import types

# The 32 bits that Py_INCREF leaves as they are, and that are negative to Py_DECREF.
IMMORTAL = 0xFFFFFFFF
# Py_DECREF looks at this one only.
SIGN = 0x80000000
VERSIONS = ((3, 12), (3, 13))
# Of the table that the allocator prints: class, size, pools, blocks in use, blocks that are free.
SIZE_CLASS = re.compile(rb"^ +\d+ +(\d+) +\d+ +\d+ +(\d+)$", re.MULTILINE)


def unsupported() -> str | None:
    """Return why this Python's objects can't be made immortal, or None."""
    if platform.python_implementation() != "CPython" or sys.version_info[:2] not in VERSIONS:
        return "it is another Python than CPython 3.12 or 3.13"
    if sysconfig.get_config_var("Py_GIL_DISABLED") or hasattr(sys, "gettotalrefcount"):
        return "it is built without the lock of the interpreter, or for debugging"
    if sys.maxsize < 1 << 32 or sys.byteorder != "little":
        return "its counts have another size or order"
    new = object()
    if sys.getrefcount(None) != IMMORTAL or _count(new).value != sys.getrefcount(new) - 1:
        return "its counts are elsewhere, or have another value for what is immortal"
    return None


def share() -> str | None:
    """Make what this process holds fit to be shared; return why its counts are still written.

    To be called from the only thread, when everything is imported, before `gc.freeze`.
    """
    # Its lists of freed objects, too, are given back to the allocator, which is asked below.
    gc.collect()
    reason = unsupported()
    if reason is None:
        immortalise()
        fill_holes()
    return reason


def immortalise() -> int:
    """Make all objects that there are immortal, except those whose end matters; return how many.

    They are searched in this very process and held while their counts are written. A fork's objects
    would be others: what `os.register_at_fork` makes there is free memory here, in which the
    allocator keeps its own notes.
    """
    waiting = gc.get_objects()
    seen = {id(waiting)}
    ends: dict[int, bool] = {}
    made = 0
    while waiting:
        one = waiting.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        kind = type(one)
        if id(kind) not in ends:
            ends[id(kind)] = _ends(kind)
        count = _count(one)
        if not count.value & SIGN and not ends[id(kind)]:
            count.value = IMMORTAL
            made += 1
        waiting += gc.get_referents(one)
    return made


def _ends(kind: type) -> bool:
    """Return whether something happens when an object of this type ends.

    Types written in C have `__del__` as well if they have a finalizer: generators, files, sockets.
    Of a logging handler, which `internals.renew` removes, a list in `logging` is told by a weak
    reference; what is still there at the end of a process is written to.
    """
    if issubclass(kind, types.FrameType | logging.Handler):
        return True
    # Not by hasattr(), for which a metaclass may run code of its own.
    return any("__del__" in base.__dict__ for base in kind.__mro__)


def _count(one: object) -> ctypes.c_uint64:
    return ctypes.c_uint64.from_address(id(one))


def fill_holes() -> int:
    """Take what is free between small objects; return how many bytes.

    C's allocator gives whole pages that are free back to the kernel; what is left of it is little.
    """
    allocate = ctypes.pythonapi.PyObject_Malloc
    allocate.restype, allocate.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    taken = 0
    for size, number in _holes():
        for _ in range(number):
            allocate(size)
        taken += size * number
    with contextlib.suppress(AttributeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)
    return taken


def _holes() -> list[tuple[int, int]]:
    """Return sizes of small objects, and how many of each are free between those in use."""
    with open(os.memfd_create("allocator"), "w+b") as report:  # noqa: PTH123
        errors = os.dup(2)
        try:
            os.dup2(report.fileno(), 2)
            sys._debugmallocstats()
        finally:
            os.dup2(errors, 2)
            os.close(errors)
        report.seek(0)
        return [(int(size), int(free)) for size, free in SIZE_CLASS.findall(report.read())]
