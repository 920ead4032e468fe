"""The setpoint: everything about a running job that EADT may change.

Owns the value type only. What brings the world to a setpoint are the coordinator and the actuators;
what chooses one is a policy.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Setpoint:
    """What a run is asked to be. Immutable; make changes with :meth:`with_`.

    Attributes:
        num_workers: Active workers (ranks) of the whole job.
        workers_per_gpu: Ranks that share one GPU; on a CPU node, ranks that share the node's cores.
        mps_active_thread_percentage: Each engine's share of its GPU's SMs, 1 to 100 %; on a CPU node
            its share of the node's training cores.
        power_limit_w: Power limit per GPU in W; ``None`` leaves the limit as it was found.
        precision: ``fp32``, ``bf16`` or ``fp16``.
        num_frozen_layers: Number of lowest layers that are frozen.
        paused: Whether training is halted with its state kept.
    """

    num_workers: int
    workers_per_gpu: int = 1
    mps_active_thread_percentage: int = 100
    power_limit_w: float | None = None
    precision: str = "fp32"
    num_frozen_layers: int = 0
    paused: bool = False

    def __post_init__(self) -> None:
        if self.num_workers < 1:
            raise ValueError(f"num_workers must be at least 1, not {self.num_workers}")
        if self.workers_per_gpu < 1:
            raise ValueError(f"workers_per_gpu must be at least 1, not {self.workers_per_gpu}")
        if not 1 <= self.mps_active_thread_percentage <= 100:
            raise ValueError(
                f"mps_active_thread_percentage must be 1 to 100, not {self.mps_active_thread_percentage}"
            )

    def with_(self, **changes: Any) -> Setpoint:
        """A copy with some fields changed."""
        return replace(self, **changes)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for the ledger and for JSON."""
        return asdict(self)

    def describe(self) -> str:
        """One short phrase for people, such as ``2 workers, 2 a device, 50 % share``."""
        workers = "1 worker" if self.num_workers == 1 else f"{self.num_workers} workers"
        text = f"{workers}, {self.workers_per_gpu} a device, {self.mps_active_thread_percentage} % share"
        if self.power_limit_w is not None:
            text += f", {self.power_limit_w:.0f} W limit"
        return text + (", paused" if self.paused else "")
