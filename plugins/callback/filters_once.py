"""Loads the filters and tests of templates once a run, rather than once a task and host.

Ansible forks a process for each task and host. The first filter that such a process meets has it
load the files of all filters and of all tests that are in no collection, which are Ansible's own
and those of this project's roles, and that is forgotten when it ends. Loaded before a play begins,
they are there in each fork. A role that comes later, with filters of its own, has them loaded anew.

A tenth of a second of processor time each, measured with ansible-core 2.19. Where Ansible does so
itself, or its loaders have changed, this can go.
"""

from __future__ import annotations

from typing import Any

from ansible.plugins.callback import CallbackBase
from ansible.plugins.loader import filter_loader, test_loader

DOCUMENTATION = """
name: filters_once
type: aggregate
short_description: Load filters and tests before a play rather than in each task
description: Has Ansible's loaders read all filters and tests that are in no collection.
"""


class CallbackModule(CallbackBase):
    """Not about what happens in a run, but about when plugins are loaded."""

    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "aggregate"
    CALLBACK_NAME = "filters_once"

    def v2_playbook_on_play_start(self, play: Any) -> None:
        """Load what is not loaded yet; the loaders keep it."""
        for loader in (filter_loader, test_loader):
            list(loader.all())
