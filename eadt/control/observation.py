"""What a policy sees: one window of measurements of the whole job."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from eadt.control.setpoint import Setpoint
from eadt.units import Quality


@dataclass(frozen=True)
class Observation:
    """Means over one window during which the setpoint did not change.

    Attributes:
        at_s: End of the window, seconds since the run began.
        window_s: Length of the window in s.
        setpoint: The setpoint that was in force throughout.
        num_gpus: GPUs in use; a CPU node counts as one device.
        samples_per_second: Whole-job throughput; ``None`` when no step ended in the window.
        power_w: Whole-job power of the training devices in W; ``None`` when unknown.
        num_steps: Optimizer steps that ended in the window.
        quality: The worst quality among the readings that went in.
    """

    at_s: float
    window_s: float
    setpoint: Setpoint
    num_gpus: int
    samples_per_second: float | None
    power_w: float | None
    num_steps: int = 0
    quality: Quality = Quality.MEASURED

    @property
    def power_per_gpu_w(self) -> float | None:
        """Mean power per GPU in W, the power in the policy's rules."""
        return None if self.power_w is None else self.power_w / self.num_gpus

    @property
    def efficiency(self) -> float | None:
        """Whole-job samples/s over whole-job power, that is samples per joule."""
        if self.samples_per_second is None or not self.power_w:
            return None
        return self.samples_per_second / self.power_w

    def as_dict(self) -> dict[str, Any]:
        """Plain values with the derived ones, for the ledger and for JSON."""
        return asdict(self) | {
            "quality": str(self.quality),
            "power_per_gpu_w": self.power_per_gpu_w,
            "efficiency_samples_per_j": self.efficiency,
        }
