"""Kills the converge that it is loaded into, as a lost laptop would: nothing waits for anything.

INTERRUPT_TASK says at which task (the first is 1), INTERRUPT_SECONDS how long after its start. The
hosts may be in the middle of the task then, and go on with it.
"""

from __future__ import annotations

import os
import signal
import threading

from ansible.plugins.callback import CallbackBase

DOCUMENTATION = """
name: interrupt
type: aggregate
short_description: Kills the converge at a task
description: Kills the whole process group of ansible-playbook when a given task has begun.
"""


class CallbackModule(CallbackBase):
    """Counts the tasks, and kills."""

    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "aggregate"
    CALLBACK_NAME = "interrupt"

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._begun = 0

    def v2_playbook_on_task_start(self, task, is_conditional) -> None:
        """Kill if this is the task."""
        self._begun += 1
        if self._begun == int(os.environ["INTERRUPT_TASK"]):
            seconds = float(os.environ["INTERRUPT_SECONDS"])
            threading.Timer(seconds, os.killpg, (os.getpgrp(), signal.SIGKILL)).start()
