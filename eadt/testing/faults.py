"""Faults that happen in real engine processes at chosen moments, and that record that they fired.

A :class:`FaultPlan` is a folder: the test writes into it what is to go wrong, engines read it, and
before a fault acts it leaves a file there, so that a test can assert that it was tested at all.
Importable without torch.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

_PLAN = "faults.json"


class FaultKind(StrEnum):
    """What happens to the engine."""

    KILL = "kill"
    """SIGKILL: nothing is said, nothing is cleaned up."""
    ERROR = "error"
    """An exception in the training function."""
    OUT_OF_MEMORY = "out_of_memory"
    """What an allocation that fails raises."""


class Moment(StrEnum):
    """When it happens."""

    PREPARE = "prepare"
    """Before the model is built; for engines built ahead, while the others train."""
    STEP = "step"
    """In the optimizer step, before its first micro-batch."""
    SAVE = "save"
    """In the middle of writing the state after the step: half of it is garbage by then."""


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong.

    Attributes:
        kind: What happens.
        moment: When.
        rank: Rank that it happens to.
        step: Optimizer step (1-based) that it happens in or after; ``None`` for any.
        world_size: Ranks of the generation that it happens in; ``None`` for any.
        times: How often it may happen in the run.
    """

    kind: FaultKind
    moment: Moment
    rank: int
    step: int | None = None
    world_size: int | None = None
    times: int = 1

    def is_due(self, moment: Moment, rank: int, step: int, world_size: int) -> bool:
        """Whether it happens here and now, if it has not happened often enough."""
        return (
            self.moment is moment
            and self.rank == rank
            and self.step in (None, step)
            and self.world_size in (None, world_size)
        )


class FaultPlan:
    """The faults of one run, shared with its engines through a folder of its own.

    Args:
        folder: Made if missing. A plan that lies there already is taken up.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / _PLAN
        values = json.loads(path.read_text()) if path.exists() else []
        self._faults = [
            Fault(**{**value, "kind": FaultKind(value["kind"]), "moment": Moment(value["moment"])})
            for value in values
        ]

    def fail_at(
        self,
        rank: int,
        step: int | None = None,
        kind: FaultKind = FaultKind.KILL,
        moment: Moment = Moment.STEP,
        *,
        world_size: int | None = None,
        times: int = 1,
    ) -> Fault:
        """Plan a fault; see :class:`Fault`. Engines that start from now on know of it."""
        fault = Fault(kind, moment, rank, step, world_size, times)
        self._faults.append(fault)
        (self.folder / _PLAN).write_text(json.dumps([asdict(planned) for planned in self._faults]))
        return fault

    def fired(self, fault: Fault) -> list[dict[str, Any]]:
        """Where a fault happened: ``pid``, ``rank``, ``step`` and ``generation``, in order."""
        paths = (self._mark(fault, number) for number in range(fault.times))
        return [json.loads(path.read_text()) for path in paths if path.exists()]

    # -- in the engine ----------------------------------------------------------------------------

    def due(self, moment: Moment, rank: int, step: int, world_size: int, generation: int) -> Iterator[Fault]:
        """The faults that happen here and now, each marked as fired before it is given out."""
        for fault in self._faults:
            if fault.is_due(moment, rank, step, world_size) and self._claim(fault, rank, step, generation):
                yield fault

    def _claim(self, fault: Fault, rank: int, step: int, generation: int) -> bool:
        text = json.dumps({"pid": os.getpid(), "rank": rank, "step": step, "generation": generation})
        for number in range(fault.times):
            try:
                with self._mark(fault, number).open("x") as mark:
                    mark.write(text)
            except FileExistsError:
                continue
            return True
        return False

    def _mark(self, fault: Fault, number: int) -> Path:
        return self.folder / f"fired-{self._faults.index(fault)}-{number}.json"


def strike(fault: Fault) -> None:
    """Let the fault happen to this process.

    Raises:
        RuntimeError: For :attr:`FaultKind.ERROR`.
        MemoryError: For :attr:`FaultKind.OUT_OF_MEMORY`.
    """
    if fault.kind is FaultKind.KILL:
        os.kill(os.getpid(), signal.SIGKILL)
    if fault.kind is FaultKind.OUT_OF_MEMORY:
        raise MemoryError("planned fault: out of memory")
    raise RuntimeError(f"planned fault: {fault.kind} in rank {fault.rank}")
