"""One generation: a set of engines that live and end together, and what they have said so far."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from eadt.control.batch import BatchPlan
from eadt.control.setpoint import Setpoint
from eadt.coordination.placement import Placement
from eadt.training.engine_spec import EngineSpec
from eadt.training.state import SavedState, StateLayout, StatePart, merge_spans


class Phase(StrEnum):
    """Where a generation is in its life."""

    BUILDING = "building"
    READY = "ready"
    LOADING = "loading"
    TRAINING = "training"
    STOPPING = "stopping"
    STOPPED = "stopped"
    FAILED = "failed"


@dataclass
class Generation:
    """The engines of one setting.

    Attributes:
        number: Counts up through the run, across resumes.
        setting: Number of the setting that it trains at.
        setpoint: What it was made for, with the number of workers that were really placed.
        placement: Where its ranks sit.
        batch: The split of the global batch.
        specs: Its engines by rank.
        reason: Why it was made.
        decision_id: The decision behind it; ``None`` for a start or a recovery.
        started_at_s: When its engines were asked for, session time in s.
    """

    number: int
    setting: int
    setpoint: Setpoint
    placement: Placement
    batch: BatchPlan
    specs: tuple[EngineSpec, ...]
    reason: str
    decision_id: str | None = None
    phase: Phase = Phase.BUILDING
    ready: dict[int, dict[str, Any]] = field(default_factory=dict)
    loaded: dict[int, dict[str, Any]] = field(default_factory=dict)
    saves: dict[int, dict[int, dict[str, Any]]] = field(default_factory=dict)
    ended: set[int] = field(default_factory=set)
    errors: dict[int, dict[str, Any]] = field(default_factory=dict)
    started_at_s: float = 0.0

    @property
    def engine_ids(self) -> list[str]:
        """All engines, by rank."""
        return [spec.engine_id for spec in self.specs]

    @property
    def is_alive(self) -> bool:
        """Whether its engines are at work or about to be."""
        return self.phase not in (Phase.STOPPED, Phase.FAILED)

    def rank_of(self, engine_id: str) -> int | None:
        """Rank of one of its engines."""
        return next((spec.rank for spec in self.specs if spec.engine_id == engine_id), None)

    def engines_by_node(self, ranks: set[int] | None = None) -> dict[str, list[str]]:
        """Engine ids by node, of some ranks or all."""
        found: dict[str, list[str]] = {}
        for spec in self.specs:
            if ranks is None or spec.rank in ranks:
                found.setdefault(spec.node_id, []).append(spec.engine_id)
        return found

    @property
    def layout(self) -> StateLayout:
        """Layout of the model's state; known once an engine is ready."""
        layout: StateLayout = next(iter(self.ready.values()))["layout"]
        return layout

    def saved_state(
        self,
        step: int,
        slot: int,
        slot_paths: dict[str, tuple[str, ...]],
        addresses: dict[str, tuple[str, int]],
    ) -> SavedState | None:
        """The state saved at ``step``, once every rank has said so."""
        saves = self.saves.get(step, {})
        if len(saves) < len(self.specs):
            return None
        parts = tuple(
            StatePart(
                node_id=node_id,
                path=slot_paths[node_id][slot],
                address=addresses[node_id],
                spans=tuple(
                    merge_spans(
                        span
                        for spec in self.specs
                        if spec.node_id == node_id
                        for span in self.ready[spec.rank]["spans"]
                    )
                ),
            )
            for node_id in self.placement.node_ids
        )
        return SavedState(step=step, meta=saves[0]["meta"], layout=self.layout, parts=parts)
