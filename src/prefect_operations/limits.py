"""Limits of one flow run: the job variables `memory_max`, `cpu_quota` and `tasks_max`.

A pool offers them in its base job template (`prefect_fleet.pools`), whose schema refuses most
mistakes at a deploy. What comes another way ends its run with the sentence of `WrongLimit`.
"""

import re
from dataclasses import dataclass
from typing import Any

from prefect.workers.process import ProcessJobConfiguration
from pydantic import PrivateAttr

# Less than a Python takes that has imported nothing but itself.
LEAST_MEMORY = 16 << 20
_UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}


class WrongLimit(ValueError):
    """A job variable has a value that is no limit; the message says what to write."""


@dataclass(frozen=True)
class Limits:
    """What one run may take; None for no limit but its pool's.

    Attributes:
        memory_max: bytes.
        cpu_quota: percent of one processor.
        tasks_max: processes and threads.
    """

    memory_max: int | None = None
    cpu_quota: float | None = None
    tasks_max: int | None = None

    @classmethod
    def parse(cls, memory_max: Any, cpu_quota: Any, tasks_max: Any) -> "Limits":
        """Return the limits that job variables ask for.

        Raises:
            WrongLimit: all that is wrong with them.
        """
        faults = []
        memory = _memory(memory_max)
        if memory is not None and memory < LEAST_MEMORY:
            faults.append(
                f"memory_max is {memory_max!r}: write a size from 16M on, such as 512M or 2G "
                "(K, M, G, T; without a letter it is bytes)"
            )
        quota = _quota(cpu_quota)
        if quota is not None and quota < 1:
            faults.append(
                f"cpu_quota is {cpu_quota!r}: write percent of one processor from 1% on, such as "
                "50%, or 150% for one and a half"
            )
        tasks = _number(tasks_max)
        if tasks is not None and tasks < 1:
            faults.append(
                f"tasks_max is {tasks_max!r}: write how many processes and threads, such as 100"
            )
        if faults:
            raise WrongLimit("; ".join(faults))
        return cls(memory, quota, tasks)


# What is no such value is 0, and less than the least.


def _memory(value: Any) -> int | None:
    if value is None:
        return None
    found = re.fullmatch(r"(\d+)([KMGT]?)", str(value).strip())
    return int(found[1]) << _UNITS[found[2]] if found else 0


def _quota(value: Any) -> float | None:
    if value is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)%", str(value).strip())
    return float(found[1]) if found else 0


def _number(value: Any) -> int | None:
    if value is None:
        return None
    return int(value) if re.fullmatch(r"\d+", str(value)) else 0


def size(number: int) -> str:
    """Return a number of bytes as one would write it for memory_max."""
    for unit, shift in reversed(_UNITS.items()):
        if number and number % (1 << shift) == 0:
            return f"{number >> shift}{unit}"
    return str(number)


class RunJobConfiguration(ProcessJobConfiguration):
    """Prefect's own, with limits.

    Any value is taken at first: an error of pydantic's would hide the sentence in ten lines.
    """

    memory_max: Any = None
    cpu_quota: Any = None
    tasks_max: Any = None

    _limits: Limits = PrivateAttr(default=Limits())

    @property
    def limits(self) -> Limits:
        """The limits of the run that this was prepared for."""
        return self._limits

    def prepare_for_flow_run(self, *args: Any, **settings: Any) -> None:
        """As Prefect does it.

        Raises:
            WrongLimit: the run ends with it.
        """
        self._limits = Limits.parse(self.memory_max, self.cpu_quota, self.tasks_max)
        super().prepare_for_flow_run(*args, **settings)
