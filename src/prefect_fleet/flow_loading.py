"""Import the flow that an entrypoint names, as a run would, and leave no trace of it."""

import contextlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from prefect.exceptions import MissingFlowError, ScriptError
from prefect.flows import Flow, load_flow_from_entrypoint

ENTRYPOINT = re.compile(r".+\.py:[\w.]+|[\w.]+[:.]\w+")


def load_flow(entrypoint: Any, folder: Path) -> tuple[Flow[..., Any] | None, str]:
    """Return the flow that the entrypoint names, or None and what is wrong with it.

    Args:
        entrypoint: what the file says, whatever it is.
        folder: the file's folder, against which Prefect resolves it.
    """
    example = "write for example flow.py:my_flow"
    if not isinstance(entrypoint, str) or not entrypoint:
        return None, f"is missing; {example}"
    if entrypoint.endswith(".py") or not ENTRYPOINT.fullmatch(entrypoint):
        return None, f"{entrypoint!r} names no function of a file; {example}"
    file_name, _, _ = entrypoint.rpartition(":")
    function = re.split("[:.]", entrypoint)[-1]
    if file_name.endswith(".py") and not (folder / file_name).is_file():
        return None, f"{entrypoint!r}: there is no file {file_name} in the folder of this file"
    try:
        with _standing_in(folder):
            return load_flow_from_entrypoint(entrypoint, use_placeholder_flow=False), ""
    except MissingFlowError:
        text = f"there is no flow {function}; write the name of a function that has @flow"
        return None, f"{entrypoint!r}: {text}"
    except ScriptError as error:
        cause: BaseException = error.user_exc
    except (Exception, SystemExit) as error:
        cause = error
    reason = f"{type(cause).__name__}: {cause}".splitlines()[0]
    return None, f"{entrypoint!r}: the file can't be imported ({reason})"


@contextlib.contextmanager
def _standing_in(folder: Path) -> Iterator[None]:
    """Import as a run in `folder` would, which has a process of its own.

    Prefect puts the flow's folder on `sys.path` for good. Without the clean-up a `helper.py` next
    to one flow would be imported by the next flow too, be it of the same file. Modules from the
    places that Python looked in before stay: to import them once is enough. What flows print
    goes to stderr.
    """
    path, modules = list(sys.path), set(sys.modules)
    # Where this program was started from a folder around the flow's, that place is the flow's own.
    lasting = [
        place
        for place in (Path(entry).resolve() for entry in path)
        if not folder.resolve().is_relative_to(place)
    ]
    try:
        with contextlib.chdir(folder), contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        sys.path[:] = path
        for name in set(sys.modules) - modules:
            places = _places(sys.modules[name])
            if places and not any(
                place.is_relative_to(kept) for place in places for kept in lasting
            ):
                del sys.modules[name]


def _places(module: ModuleType) -> list[Path]:
    """Return where a module comes from; a namespace package has folders only."""
    file = getattr(module, "__file__", None)
    if file:
        return [Path(file).resolve()]
    try:
        return [Path(entry).resolve() for entry in getattr(module, "__path__", ())]
    except TypeError:
        return []
