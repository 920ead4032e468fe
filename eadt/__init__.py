"""EADT: Energy-Adaptive Distributed Training on Ray.

Importing this package is fast and needs no torch, GPU, network or cluster; the names below are
loaded on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from eadt.config import RunConfig
    from eadt.measurement import measure
    from eadt.trainer import EnergyAdaptiveTrainer, TrainingResult

__all__ = ["EnergyAdaptiveTrainer", "RunConfig", "TrainingResult", "__version__", "measure"]

_HOME = {
    "EnergyAdaptiveTrainer": "eadt.trainer",
    "TrainingResult": "eadt.trainer",
    "RunConfig": "eadt.config",
    "measure": "eadt.measurement",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        import importlib

        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'eadt' has no attribute {name!r}")
