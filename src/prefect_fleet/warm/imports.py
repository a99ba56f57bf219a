"""What a zygote imports beforehand, one module after another, and what proves unfit for it.

Modules of packages that the engine itself imports stay where they are. All others are set aside:
a child finds them only when it imports them, and only if the search that Python would do comes to
the same file. So a flow sees no module that it did not import, and its own `utils.py` is not
mistaken for another.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType

from prefect_fleet.warm import agreement, internals


def read_list(path: Path) -> list[str]:
    """Return the modules that a file lists, one a line; none if it is not there."""
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        return []
    names = (line.partition("#")[0].strip() for line in lines)
    return [name for name in dict.fromkeys(names) if name]


def package(name: str) -> str:
    """Return the outermost package of a module."""
    return name.partition(".")[0]


def is_left_out(name: str, unfit: Iterable[str], core: set[str]) -> bool:
    """Return whether a module, or another one of its package, has proved unfit.

    Args:
        name: the module.
        unfit: those that have.
        core: packages that the engine imports, which are not left out as a whole.
    """
    return name in unfit or package(name) in {package(one) for one in unfit} - core


class Unfit(Exception):
    """This process can't be forked from after this import; another must leave it out."""


class Preloader:
    """Imports modules into this process.

    Attributes:
        failed: modules that could not be imported, and why.
        loaded: modules that were, of those asked for.
    """

    def __init__(self) -> None:
        self.failed: dict[str, str] = {}
        self.loaded: list[str] = []
        self._record, self._end = agreement.record_environment()

    def core(self) -> None:
        """Import what the engine imports. What goes wrong is raised."""
        for name in internals.CORE:
            importlib.import_module(name)
        if reason := self._side_effect():
            raise Unfit(reason)

    def load(self, name: str) -> None:
        """Import a module.

        Raises:
            Unfit: it started a thread, left a file open or depends on the whole environment.
        """
        files = open_files()
        environment = dict(os.environ._data)  # the recorder is not asked
        hooks = finding()
        try:
            importlib.import_module(name)
        # Whatever a module raises, SystemExit too, it is only left out.
        except BaseException as error:
            self.failed[name] = f"{type(error).__name__}: {error}"
            return
        if opened := open_files() - files:
            raise Unfit(f"leaves {', '.join(sorted(opened))} open")
        if dict(os.environ._data) != environment:
            raise Unfit("changes the environment")
        if hooks != finding():
            raise Unfit("changes how modules are found, or the working directory")
        if reason := self._side_effect():
            raise Unfit(reason)
        self.loaded.append(name)

    def _side_effect(self) -> str | None:
        if threads() != 1:
            return "starts a thread"
        for module in self._record.get("*", set()):
            if not internals.may_see_all_variables(module):
                return f"depends on the whole environment ({module} reads it)"
        return None

    def finish(self) -> set[bytes]:
        """Record no longer; return the variables that were asked for."""
        self._end()
        # Those of internals.PREFIXES went through all names, and what counts is told by its prefix.
        return {
            os.fsencode(name)
            for name, modules in self._record.items()
            if not all(map(internals.may_see_all_variables, modules))
        }


def threads() -> int:
    """Return how many threads this process has, those of libraries written in C included."""
    return len(os.listdir("/proc/self/task"))  # noqa: PTH208


def finding() -> tuple[list[object], ...]:
    """Return what decides which file an import finds.

    The finder of `six` is left out: it knows its own `six.moves` only, and boto3 comes with it.
    """
    finders = [one for one in sys.meta_path if type(one).__name__ != "_SixMetaPathImporter"]
    return finders, list(sys.path), list(sys.path_hooks), [Path.cwd()]


def open_files() -> set[str]:
    """Return what this process has open, by the kernel's names."""
    found = set()
    for number in os.listdir("/proc/self/fd"):  # noqa: PTH208
        try:
            name = os.readlink(f"/proc/self/fd/{number}")  # noqa: PTH115
        except OSError:
            continue  # the listing's own
        found.add(f"{number} ({name})")
    return found


def own_paths() -> tuple[str, ...]:
    """Return the folders of installed packages and of Python itself."""
    paths = sysconfig.get_paths()
    return tuple({paths[key] + os.sep for key in ("stdlib", "platstdlib", "purelib", "platlib")})


def origin(module: ModuleType) -> str | None:
    """Return the file of a module."""
    spec = getattr(module, "__spec__", None)
    return spec.origin if spec is not None and spec.has_location else None


class Shelf(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Modules that were imported and set aside, until something imports them."""

    def __init__(self) -> None:
        self._modules: dict[str, tuple[ModuleType, importlib.machinery.ModuleSpec]] = {}

    def take(self, before: Iterable[str]) -> None:
        """Set aside what was imported, except packages of which something was there before."""
        packages = {name.partition(".")[0] for name in before}
        for name, module in list(sys.modules.items()):
            spec = getattr(module, "__spec__", None)
            if name.partition(".")[0] in packages or spec is None:
                continue
            # What has another name than it goes by can't be found again by that name.
            if spec.name == name:
                self._modules[name] = (module, spec)
                del sys.modules[name]
        sys.meta_path.insert(0, self)

    def names(self) -> list[str]:
        """Return the names of what is set aside."""
        return list(self._modules)

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return the spec of a module on the shelf, if it is what Python's search finds."""
        kept = self._modules.get(name)
        if kept is None:
            return None
        found = _search(name, path, target, self)
        original = kept[1]
        if found is None or _place(found) != _place(original):
            return None  # the search goes on, and finds the other one
        spec = importlib.machinery.ModuleSpec(name, self, origin=original.origin)
        spec.submodule_search_locations = original.submodule_search_locations
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        """Return the module that was imported before."""
        return self._modules[spec.name][0]

    def exec_module(self, module: ModuleType) -> None:
        """Give it back its own spec: its code has run."""
        spec = module.__spec__
        assert spec is not None, "the import system has just set it"
        module.__spec__ = self._modules[spec.name][1]


def _place(spec: importlib.machinery.ModuleSpec) -> tuple[str | None, list[str]]:
    return spec.origin, list(spec.submodule_search_locations or ())


def _search(
    name: str, path: Sequence[str] | None, target: ModuleType | None, shelf: Shelf
) -> importlib.machinery.ModuleSpec | None:
    for finder in sys.meta_path:
        if finder is shelf:
            continue
        if (spec := finder.find_spec(name, path, target)) is not None:
            return spec
    return None
