"""Lets Ansible's own strategies work through mitogen where it is installed.

Mitogen keeps one Python a host and user for a whole run, instead of starting one for each task. It
is a part of this project's environment (requirements/control.in) and no need of it: without it, or
with FLEET_MITOGEN=0, nothing here does anything.

Mitogen has strategies of its own, `mitogen_linear` and others. There are three reasons to put what
they add into `linear`, `free` and `host_pinned` instead. Playbooks say what they mean, whether it
is there or not. Ansible takes a failed `run_once` for every host's only in a strategy of the name
`linear`. And from 2.19 it warns in each run of strategies that are not its own.

It is a callback, for those are loaded before the first play and only where plays are run.
"""

from __future__ import annotations

from typing import Any

from ansible.plugins.callback import CallbackBase
from ansible.plugins.loader import PluginLoader, strategy_loader
from ansible.utils.display import Display

DOCUMENTATION = """
name: mitogen_strategies
type: aggregate
short_description: Run plays through mitogen where it is installed
description: Extends the strategies linear, free and host_pinned by what mitogen's have.
options:
  enabled:
    description: Whether to use mitogen if it is there.
    type: bool
    default: true
    env: [{name: FLEET_MITOGEN}]
"""

STRATEGIES = {f"ansible.builtin.{name}" for name in ("linear", "free", "host_pinned")}


def find_mixin() -> type | None:
    """What mitogen adds to a strategy; None where it is not installed or does not fit."""
    try:
        from ansible_mitogen import affinity
        from ansible_mitogen.strategy import StrategyMixin
    except ModuleNotFoundError as error:
        if error.name != "ansible_mitogen":
            _warn(error)
        return None
    except Exception as error:
        # It reaches into Ansible, which may be too new for it.
        _warn(error)
        return None
    # Its own pins Ansible's processes to processors, and with them what they start here: with two
    # processors, all of it would share the second one, the lab's hosts for as long as they live.
    affinity.policy = affinity.Policy()
    return StrategyMixin


def extend_strategies(loader: PluginLoader, mixin: type) -> None:
    """Make the loader add the mixin to each strategy of `STRATEGIES` that a play asks for.

    Classes alone are given as they are: mitogen's own strategies are made of them.
    """
    stock = loader.get_with_context

    def get_with_context(name: str, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("class_only"):
            return stock(name, *args, **kwargs)
        found = stock(name, *args, **kwargs, class_only=True)
        if found.object is None:
            return found
        strategy = found.object
        if found.plugin_load_context.resolved_fqcn in STRATEGIES:
            strategy = type(strategy.__name__, (mixin, strategy), {})
        return found._replace(object=strategy(*args))

    loader.get_with_context = get_with_context


def _warn(error: Exception) -> None:
    Display().warning(f"mitogen cannot be used ({error!r}): going on without it, more slowly.")


class CallbackModule(CallbackBase):
    """Not about what happens in a run: it is loaded before one begins."""

    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "aggregate"
    CALLBACK_NAME = "mitogen_strategies"

    def set_options(self, task_keys=None, var_options=None, direct=None) -> None:
        """Read the setting, and do what it says."""
        super().set_options(task_keys=task_keys, var_options=var_options, direct=direct)
        if self.get_option("enabled"):
            mixin = find_mixin()
            if mixin:
                extend_strategies(strategy_loader, mixin)
