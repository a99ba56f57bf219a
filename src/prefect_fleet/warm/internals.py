"""Everything that relies on how Prefect 3.9 works inside.

Held by tests/unit/test_warm_prefect.py.

What Prefect makes once a process, when it is imported, is made anew in a child: settings and
logging. Its threads, event loops and clients are made when they are first used, and its own
`os.register_at_fork` hooks forget those of a parent; a zygote has none.
"""

import builtins
import contextlib
import importlib.abc
import importlib.util
import logging
import ssl
import sys
import types
from typing import TextIO

ENGINE = "prefect.engine"
# What prefect.engine imports. Not itself, for a child runs it as its main program.
CORE = (
    "prefect.main",
    "prefect._internal.control_listener",
    "prefect._internal.metrics",
    "prefect.flow_engine",
    "prefect.task_engine",
    "prefect.flow_runs",
    "prefect.logging.handlers",
    "prefect.events.worker",
    "prefect.task_runners",
)
# Modules whose look at the environment is repeated by `renew`.
RENEWED = (
    "pydantic_settings.",
    "prefect.settings.",
    "prefect.context",
    "prefect.logging.configuration",
)
# Modules that look through the whole environment for variables that begin like this.
PREFIXES = {
    "fsspec.config": "FSSPEC_",
    # For CGI programs.
    "wsgiref.handlers": "wsgi.",
    # To start `uname`, which is found by it.
    "platform": "PATH",
}
# Settings that `flow` and `task` read when they decorate a function.
DECORATING = ("flows", "results", "tasks")
# Files in a working directory that settings are read from.
CONFIGURED_BY = (".env", "prefect.toml", "pyproject.toml")


def unfit() -> str | None:
    """Return why nothing can be forked from this process, or None."""
    from prefect.settings import get_current_settings

    if get_current_settings().plugins.enabled:
        return "Prefect's plugins are on, and they start with the process"
    return None


def complete_models() -> None:
    """Build the validators of Prefect's models, which it does when each is first used."""
    from pydantic import BaseModel

    waiting = [BaseModel]
    while waiting:
        model = waiting.pop()
        waiting += model.__subclasses__()
        if model.__module__.startswith("prefect.") and not model.__pydantic_complete__:
            model.model_rebuild(raise_errors=False)


def prepare_tls() -> None:
    """Have OpenSSL find its algorithms, which it does once a process, for the first certificate."""
    ssl.create_default_context()


def may_see_all_variables(module: str) -> bool:
    """Return whether it is known what a module looks for that goes through the environment."""
    return module in PREFIXES or module.startswith(RENEWED)


def decorating() -> tuple[object, ...]:
    """Return the settings that flows and tasks are made with."""
    from prefect.settings import get_current_settings

    settings = get_current_settings()
    return tuple(getattr(settings, one) for one in DECORATING)


def renew(made_with: tuple[object, ...] | None, said: TextIO | None = None) -> str | None:
    """Take settings and logging from the environment and working directory of this process.

    Args:
        made_with: `decorating` when modules were imported beforehand that may define flows or
            tasks; None if none was.
        said: for what is written to standard error about the settings; None: to there.

    Returns:
        Why this process can't be what a new one would be, or None.
    """
    import prefect.context
    from prefect.settings import get_current_settings

    with contextlib.redirect_stderr(said) if said else contextlib.nullcontext():
        prefect.context.refresh_global_settings_context()
    if get_current_settings().plugins.enabled:
        return "Prefect's plugins are on"
    if made_with is not None and made_with != decorating():
        return "settings that flows and tasks are made with differ"
    _renew_logging()
    return None


def setting_files() -> list[str]:
    """Return the files outside of a working directory that settings and logging come from."""
    from prefect.settings import get_current_settings

    settings = get_current_settings()
    return [str(settings.profiles_path), str(settings.logging.config_path)]


def _renew_logging() -> None:
    from prefect.logging import configuration

    # What the zygote's configuration gave them, and nothing that a library gave its own.
    named = configuration.PROCESS_LOGGING_CONFIG.get("loggers", {}).keys()
    for logger in [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]:
        if not isinstance(logger, logging.Logger):
            continue
        for handler in list(logger.handlers):
            if type(handler).__module__.startswith("prefect."):
                logger.removeHandler(handler)
        if logger.name in named:
            logger.setLevel(logging.NOTSET)
            logger.propagate = True
    logging.getLogger().setLevel(logging.WARNING)
    configuration.PROCESS_LOGGING_CONFIG.clear()
    configuration.setup_logging()


def run_engine() -> None:
    """Run the engine as `python -m prefect.engine` does; it returns, or ends by SystemExit.

    `runpy` would warn that the module was imported before, which the engine's own imports do, and
    would take the main module away again while threads and exit functions may still look at it.
    """
    spec = importlib.util.find_spec(ENGINE)
    assert spec is not None, "Prefect has an engine"
    assert isinstance(spec.loader, importlib.abc.InspectLoader), "it is a file"
    code = spec.loader.get_code(ENGINE)
    assert code is not None, "it is written in Python"
    main = types.ModuleType("__main__")
    main.__dict__.update(
        __builtins__=builtins,
        __cached__=spec.cached,
        __file__=spec.origin,
        __loader__=spec.loader,
        __package__=spec.parent,
        __spec__=spec,
    )
    sys.modules["__main__"] = main
    sys.argv[0] = str(spec.origin)
    exec(code, main.__dict__)  # noqa: S102 Prefect's own
