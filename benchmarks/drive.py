"""Drives a run of EADT through changes of its setpoint, from the events that the trainer reports."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import ray

from eadt.actors import NAMESPACE, coordinator_name
from eadt.control.setpoint import Setpoint

SETTLE_STEPS = 6
"""Steps between a change that is booked and the next command."""

_STALL_S = 240.0


def even_setpoint(num_workers: int, share_percentage: int | None = None) -> Setpoint:
    """Workers on one device; an even split of it unless a share is given, in %."""
    return Setpoint(num_workers, num_workers, share_percentage or 100 // num_workers)


class Changes:
    """Makes the planned changes one after another, then ends the run. Pass it as ``on_event``.

    Args:
        plan: Setpoints to ask for, each once the change before it is booked.
        on_booked: Called with the number of changes done (0 when training begins) after each.
        may_end: Asked before the run is ended.

    Attributes:
        rows: The ``change`` events that changed the setting, in order.
        faults: The ``fault`` events.
        notes: Texts of the ``note`` events.
        num_params: The model's parameters, once the run has ended.
        run_id: The run's id, once it has started.
    """

    def __init__(
        self,
        plan: list[Setpoint],
        *,
        on_booked: Callable[[int], None] = lambda _: None,
        may_end: Callable[[], bool] = lambda: True,
    ) -> None:
        self.rows: list[dict[str, Any]] = []
        self.faults: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.num_params = 0
        self.run_id = ""
        self._plan = plan
        self._on_booked = on_booked
        self._may_end = may_end
        self._coordinator: Any = None
        self._num_asked = 0
        self._num_settled = -1
        self._due_step: int | None = None
        self._heard_s = time.perf_counter()
        self._is_ended = False

    def __call__(self, event: dict[str, Any]) -> None:
        """Take an event of the trainer."""
        kind = event["type"]
        if kind == "session":
            self.run_id = event["run_id"]
            self._coordinator = ray.get_actor(coordinator_name(self.run_id), namespace=NAMESPACE)
            self._heard_s = time.perf_counter()
        elif kind == "change" and not event["recovery"]:
            self._heard_s = time.perf_counter()
            self.rows.append(event)
            self._due_step = None
        elif kind == "fault":
            self.faults.append(event)
        elif kind == "note":
            self.notes.append(event["text"])
        elif kind == "progress":
            self._progress(event["status"].step)

    def _progress(self, step: int) -> None:
        if self._due_step is None:
            self._due_step = step + SETTLE_STEPS
        is_settled = len(self.rows) == self._num_asked and step >= self._due_step
        if is_settled and self._num_settled < len(self.rows):
            self._num_settled = len(self.rows)
            self._on_booked(self._num_settled)
        if is_settled and self._num_asked < len(self._plan):
            wanted = self._plan[self._num_asked]
            self._num_asked += 1
            self._heard_s = time.perf_counter()
            name = f"benchmark-{self._num_asked}"
            answer = ray.get(self._coordinator.apply.remote(wanted, "benchmark", name))
            assert answer["accepted"], answer["why"]
        elif (is_settled and self._may_end()) or time.perf_counter() - self._heard_s > _STALL_S:
            self._end()

    def _end(self) -> None:
        if not self._is_ended:
            self._is_ended = True
            self.num_params = ray.get(self._coordinator.snapshot.remote())["num_params"]
            self._coordinator.interrupt.remote("the benchmark has what it needs")
