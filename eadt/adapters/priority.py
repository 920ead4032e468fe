"""Scheduling priority of this process: Ray lowers that of all its workers."""

from __future__ import annotations

import contextlib
import os

_RAY_NICENESS = int(os.environ.get("RAY_worker_niceness", "15"))  # noqa: SIM112
"""Ray 2.60's default."""

_TAKEN_BACK = 10
"""Of it; a weight of nine to one. With all of it, hosts that start beside training starve."""


def rise_above_workers() -> None:
    """Take back most of the niceness that Ray gives to its workers, where this process may. Idempotent.

    For what the training's pace depends on: engines inherit it, and would else share the cores evenly
    with the imports of a worker group that is being restarted beside them. Without the privilege
    nothing changes. Call it first of all: Linux keeps niceness by thread.
    """
    if not os.path.isdir("/proc/self/task"):
        return
    for thread in map(int, os.listdir("/proc/self/task")):
        with contextlib.suppress(OSError):  # no privilege, or the thread has just ended
            present = os.getpriority(os.PRIO_PROCESS, thread)
            if present >= _RAY_NICENESS:
                os.setpriority(os.PRIO_PROCESS, thread, present - min(_TAKEN_BACK, _RAY_NICENESS))
