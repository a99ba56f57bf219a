"""Settings and logging that most runs have, read once in the zygote instead of once a run.

To read them takes two thirds of the processor time of a short run, and nearly all runs of a pool
read the same. So the zygote reads them in the environment of its first run. A run in which all that
was looked at is the same takes them as they are; any other reads its own. Where two of these in
turn have the same, that is read instead.
"""

import contextlib
import io
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import TextIO

from prefect_fleet.warm import agreement, client, imports, internals

# All settings begin like this, in capitals or not.
PREFIX = b"PREFECT"
# What else begins like this, and is of one run alone.
OF_A_RUN = {b"PREFECT__FLOW_RUN_ID", client.GROUP, client.PEAK_FILE}


class Usual:
    """What the zygote has read, and in which environment.

    Args:
        renew: reads settings and logging anew, and what is said meanwhile goes to a file; returns
            why they can't go with what was imported beforehand, or None.
        identity: returns what is another when a file is, or None where there is none.
        say: writes a line for the journal.
    """

    def __init__(
        self,
        renew: Callable[[TextIO], str | None],
        identity: Callable[[str], tuple[int, ...] | None],
        say: Callable[[str], None],
    ) -> None:
        self._renew = renew
        self._identity = identity
        self._say = say
        # Variables that were asked for; all that begin with PREFIX count in any case.
        self._asked: set[bytes] = set()
        self._files: dict[str, tuple[int, ...] | None] = {}
        # What counted when it was read, of the last run that had something else, and of one for
        # which it can't be read here. None: there is none.
        self._read_for: dict[bytes, bytes] | None = None
        self._other: dict[bytes, bytes] | None = None
        self._unfit: dict[bytes, bytes] | None = None

    def fits(self, environment: Mapping[bytes, bytes]) -> bool:
        """Return whether a run with this environment may take what was read, maybe just now."""
        if any(self._identity(path) != before for path, before in self._files.items()):
            self._read_for = None
        counts = self._what_counts(environment)
        if counts == self._read_for:
            self._other = None
            return True
        worth_it = self._read_for is None or counts == self._other
        self._other = counts
        if not worth_it or counts == self._unfit:
            return False
        if reason := self._read(environment):
            self._unfit = counts
            self._say(f"runs with these settings read them for themselves: {reason}")
            return False
        self._read_for, self._other = self._what_counts(environment), None
        return True

    def _what_counts(self, environment: Mapping[bytes, bytes]) -> dict[bytes, bytes]:
        return {
            name: value
            for name, value in environment.items()
            if (name in self._asked or name.upper().startswith(PREFIX)) and name not in OF_A_RUN
        }

    def _read(self, environment: Mapping[bytes, bytes]) -> str | None:
        """Read settings and logging as a run would; return why runs can't take them from here.

        They can't if reading does more than that: says something, which belongs into each run's own
        output, opens a file, or goes through variables that nobody knows.
        """
        self._read_for = None
        if not has_only_environment():
            return "the zygote has a terminal, or a file of settings in its working directory"
        open_files, said = imports.open_files(), io.StringIO()
        with _environment(environment), warnings.catch_warnings(record=True) as warned:
            record, end = agreement.record_environment()
            try:
                reason = self._renew(said)
            except Exception as error:
                # The run meets it as well, and shows it.
                reason = f"{type(error).__name__}: {error}"
            finally:
                end()
        self._files = {path: self._identity(path) for path in internals.setting_files()}
        asked = {
            name
            for name, modules in record.items()
            if not all(map(internals.may_see_all_variables, modules))
        }
        if reason:
            return reason
        if told := said.getvalue().strip() or "; ".join(str(one.message) for one in warned):
            return told
        if "*" in asked:
            return "they depend on the whole environment"
        if imports.threads() != 1 or imports.open_files() != open_files:
            return "they start a thread or open a file"
        self._asked = set(map(os.fsencode, asked))
        return None


def has_only_environment() -> bool:
    """Return whether this process takes its settings from nothing else that others may not have.

    Files in its working directory count as well, and a terminal, for which messages get colours.
    """
    return not any(map(os.path.lexists, internals.CONFIGURED_BY)) and not any(
        map(os.isatty, range(3))
    )


@contextlib.contextmanager
def _environment(wanted: Mapping[bytes, bytes]) -> Iterator[None]:
    """Have another environment for a while."""
    own = dict(os.environb)
    try:
        os.environ.clear()
        os.environb.update(wanted)
        yield
    finally:
        os.environ.clear()
        os.environb.update(own)
