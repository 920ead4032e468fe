"""A training function around another one, for tests: it holds at gates, fails as planned, keeps notes.

Runs in real engine processes. What it wraps does not notice: the session's own methods are replaced
by ones that do the same and a little more.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from eadt.clock import SYSTEM_CLOCK, monotonic_s
from eadt.testing.faults import FaultPlan, Moment, strike
from eadt.training.engine import load_train_function
from eadt.training.session import TrainingSession
from eadt.training.state import StateSlot

_GATE_TIMEOUT_S = 120.0
_GATE_LOOK_S = 0.005


class Gates:
    """Files by which a test holds engines at the end of chosen steps.

    Args:
        folder: Shared by the test and its engines.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)

    def close(self, step: int) -> None:
        """Hold engines that have computed optimizer step ``step``, before they end it."""
        (self._folder / f"gate-{step}").touch()

    def open(self, step: int, stopping: int | None = None) -> None:
        """Let them go on.

        Args:
            step: Where they wait.
            stopping: Generation that was told to stop meanwhile: its first rank goes on when it has
                heard of it.
        """
        path = self._folder / f"opening-{step}"
        path.write_text("" if stopping is None else str(stopping))
        path.rename(self._folder / f"open-{step}")

    def is_reached(self, step: int) -> bool:
        """Whether an engine waits there, or has."""
        return (self._folder / f"reached-{step}").exists()

    def wait(self, step: int, session: TrainingSession) -> None:
        """In the engine: wait where the test wants it."""
        if not (self._folder / f"gate-{step}").exists():
            return
        (self._folder / f"reached-{step}").touch()
        opened = self._folder / f"open-{step}"
        _wait_until(opened.exists, f"nobody opened the gate at step {step}")
        if session.rank == 0 and opened.read_text() == str(session.spec.generation):
            _wait_until(lambda: _is_told_to_stop(session), "the command to stop did not arrive")


def _wait_until(condition: Callable[[], bool], otherwise: str) -> None:
    deadline_s = monotonic_s() + _GATE_TIMEOUT_S
    while not condition():
        if monotonic_s() > deadline_s:
            raise TimeoutError(otherwise)
        SYSTEM_CLOCK.sleep(_GATE_LOOK_S)


def _is_told_to_stop(session: TrainingSession) -> bool:
    return session._stop_asked or any(heard[0] == "stop" for heard in tuple(session._channel._commands))


def train(session: TrainingSession, folder: str, inner: str | None, inner_args: dict[str, Any]) -> None:
    """Run ``inner`` (``None``: EADT's own training function) under gates and faults.

    Args:
        session: As every training function gets it.
        folder: Folder of the test's :class:`~eadt.testing.faults.FaultPlan`, gates and notes.
        inner: The training function, as ``module:function``.
        inner_args: Its arguments.
    """
    _Wrapped(session, Path(folder))
    load_train_function(inner)(session, **inner_args)


class _Wrapped:
    """Replaces the methods of one session."""

    def __init__(self, session: TrainingSession, folder: Path) -> None:
        self._session = session
        self._plan = FaultPlan(folder)
        self._gates = Gates(folder)
        self._notes = folder / f"samples-{session.spec.generation}-{session.rank}.jsonl"
        self._prepare, self._steps = session.prepare, session.steps
        self._micro_batches = session.micro_batches
        replaced: Any = session
        replaced.prepare, replaced.steps = self.prepare, self.steps
        replaced.micro_batches = self.micro_batches

    def prepare(self, *arguments: Any, **keywords: Any) -> Any:
        self._strike(Moment.PREPARE, self._session.step)
        engine = self._prepare(*arguments, **keywords)
        state: Any = self._session._state
        save = state.save

        def save_or_die(slot: StateSlot) -> None:
            faults = list(self._due(Moment.SAVE, self._session.step))
            if faults:
                for name in slot.layout.rows:
                    slot.row(name)[: slot.layout.num_elements // 2] = np.nan
            for fault in faults:
                strike(fault)
            save(slot)

        state.save = save_or_die
        return engine

    def steps(self) -> Iterator[int]:
        for step in self._steps():
            self._strike(Moment.STEP, step + 1)
            yield step
            self._gates.wait(step + 1, self._session)

    def micro_batches(self, num_samples: int) -> Iterator[npt.NDArray[np.int64]]:
        with self._notes.open("a", buffering=1) as notes:
            for rows in self._micro_batches(num_samples):
                notes.write(json.dumps([self._session.step + 1, rows.tolist()]) + "\n")
                yield rows

    def _due(self, moment: Moment, step: int) -> Iterator[Any]:
        session = self._session
        return self._plan.due(moment, session.rank, step, session.world_size, session.spec.generation)

    def _strike(self, moment: Moment, step: int) -> None:
        for fault in self._due(moment, step):
            strike(fault)
