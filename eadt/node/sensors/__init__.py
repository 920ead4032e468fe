"""Sensors: what a node draws, by component, each with its source and quality.

Owns: reading. Must not: integrate over time (the meter does), book, or decide.
"""

from __future__ import annotations

from eadt.node.sensors.base import Component, PowerSource, Reading, UnmeasuredSource, unknown_gpu
from eadt.node.sensors.detect import NVML_DEADLINE_S, Host, SourceSelection, detect_sources
from eadt.node.sensors.estimate import CpuEstimateSource
from eadt.node.sensors.nvml import NvmlSource
from eadt.node.sensors.rapl import RaplSource
from eadt.node.sensors.simulated import SimulatedGpuSource

__all__ = [
    "Component",
    "CpuEstimateSource",
    "Host",
    "NVML_DEADLINE_S",
    "NvmlSource",
    "PowerSource",
    "RaplSource",
    "Reading",
    "SimulatedGpuSource",
    "SourceSelection",
    "UnmeasuredSource",
    "detect_sources",
    "unknown_gpu",
]
