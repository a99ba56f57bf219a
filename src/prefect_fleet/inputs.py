"""Read the YAML or JSON files that the programs of this package are given."""

import argparse
import stat
import sys
from pathlib import Path
from typing import Any

import yaml


class InputError(ValueError):
    """A file or an entry that can't be used; the message says what to write instead."""


def read_file(path: Path, *, secret: bool = False) -> Any:
    """Return the content of a YAML file; JSON is YAML, so it may be either.

    Args:
        path: the file; `-` is standard input.
        secret: it holds secrets, so it must not be open to every user of the host.

    Raises:
        InputError: can't be read, is no YAML, or is a secret that every user may read.
    """
    try:
        if str(path) == "-":
            return yaml.safe_load(sys.stdin)
        with path.open(encoding="utf-8") as file:
            mode = stat.S_IMODE(path.stat().st_mode)
            if secret and mode & 0o007:
                raise InputError(
                    f"{path}: holds secrets and is open to every user (mode {mode:04o}); "
                    f"run chmod 600 {path}"
                )
            return yaml.safe_load(file)
    except OSError as error:
        raise InputError(f"{path}: can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8: {error.reason}") from error
    except yaml.YAMLError as error:
        # Only the place: PyYAML's own message can quote a piece of the value, such as *alias.
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark else ""
        raise InputError(f"{path}{place}: is not YAML") from error


def file_argument(
    program: str, description: str | None, content: str, arguments: list[str] | None
) -> Path:
    """Return the one argument of a program that reads a file; wrong usage ends it with status 2.

    Args:
        program: how the program is called.
        description: its module's text.
        content: what the file holds.
        arguments: its command line; None for the real one.
    """
    parser = argparse.ArgumentParser(prog=program, description=description)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("file", type=Path, help=f"{content}; - is standard input")
    path: Path = parser.parse_args(arguments).file
    return path


def require_mapping(
    entry: Any, *, required: dict[str, type], optional: dict[str, type | tuple[type, ...]]
) -> dict[str, Any]:
    """Return `entry` when it is a mapping with these keys and types.

    Required strings must not be empty.

    Raises:
        InputError: all faults of the entry in one message, which never quotes a value.
    """
    known = required | optional
    if not isinstance(entry, dict):
        raise InputError(f"is a {type(entry).__name__}; write a mapping with {', '.join(required)}")
    faults = [f"{key} is missing" for key in required if entry.get(key) in (None, "")]
    faults += [f"{key} is not known (known: {', '.join(known)})" for key in entry.keys() - known]
    for key, kind in known.items():
        value = entry.get(key)
        # bool is an int to isinstance; a limit of `true` is still a mistake.
        is_stray_bool = isinstance(value, bool) and kind is not bool
        if value not in (None, "") and (is_stray_bool or not isinstance(value, kind)):
            faults.append(f"{key} is a {type(value).__name__}, not a {_names(kind)}")
    if faults:
        raise InputError("; ".join(faults))
    return entry


def _names(kind: type | tuple[type, ...]) -> str:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    return " or ".join(one.__name__ for one in kinds)
