"""Sensors: what a node draws, by component, each with its source and quality.

Owns: reading. Must not: integrate over time (the meter does), book, or decide.
"""

from __future__ import annotations

from eadt.telemetry.sources.base import Component, PowerSource, Reading, UnmeasuredSource
from eadt.telemetry.sources.detect import Host, SourceSelection, detect_sources
from eadt.telemetry.sources.estimate import CpuEstimateSource
from eadt.telemetry.sources.nvml import NvmlSource
from eadt.telemetry.sources.rapl import RaplSource
from eadt.telemetry.sources.simulated import SimulatedGpuSource

__all__ = [
    "Component",
    "CpuEstimateSource",
    "Host",
    "NvmlSource",
    "PowerSource",
    "RaplSource",
    "Reading",
    "SimulatedGpuSource",
    "SourceSelection",
    "UnmeasuredSource",
    "detect_sources",
]
