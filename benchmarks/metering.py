"""What metering costs: time per sample, and the share of one core at 1 and 10 samples per second.

    python benchmarks/metering.py [--json] [--save]

Takes under a minute. Every source that this machine has is measured, and three that every machine has:
the CPU estimate, simulated GPUs, and the NVML adapter on a fake library of 8 GPUs (EADT's own cost, without
the driver's; the fake's bookkeeping is in it). The rival is a sampler as it is usually written with psutil:
utilisation per core, memory and load, kept as one dict per sample. codecarbon's is added where installed,
and `nvidia-smi` where there is one.

Two measurements, each in three interleaved runs: samples taken back to back (p50, p95), and the CPU time of
the process while the sampling thread runs at its real rate, which has the cold caches, the wake-ups and the
thread's start and end in it (a run is 1.5 to 2 s long, so at 1 Hz it overstates).
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import statistics
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import psutil

from eadt.adapters.nvml import Nvml
from eadt.clock import SYSTEM_CLOCK
from eadt.config import PowerConfig
from eadt.errors import EadtError
from eadt.node.meter import Meter, Row
from eadt.node.sensors import SourceSelection, detect_sources
from eadt.testing.fake_nvml import FakeGpu, FakeNvml

RESULT = Path(__file__).parent / "results" / "metering.json"
NUM_RUNS = 3
NUM_SAMPLES = 400
RATES_HZ = {1.0: 2.0, 10.0: 1.5}  # rate: seconds of each run
RIVAL = "rival: naive psutil"


class Sampler(Protocol):
    def sample(self) -> object: ...

    def run(self, interval_s: float, seconds: float) -> None: ...

    def close(self) -> None: ...


def discard(_rows: list[Row]) -> None:
    """A sink that costs nothing: the ledger's writing is the ledger's benchmark."""


class EadtSampler:
    def __init__(self, select: Callable[[], SourceSelection]) -> None:
        self._select = select
        self._selection = select()
        self._meter = self._new_meter(1.0)
        self.components = [component.as_dict() for component in self._selection.components]

    def _new_meter(self, interval_s: float) -> Meter:
        return Meter(self._selection.sources, SYSTEM_CLOCK, interval_s, sink=discard)

    def sample(self) -> object:
        return self._meter.sample()

    def run(self, interval_s: float, seconds: float) -> None:
        meter = self._new_meter(interval_s)
        meter.start()
        time.sleep(seconds)
        meter.stop()

    def close(self) -> None:
        self._selection.close()


class CallSampler:
    """Calls a function at a rate, in a thread like the meter's."""

    def __init__(self, call: Callable[[], object]) -> None:
        self._call = call
        self.components: list[dict[str, Any]] = []

    def sample(self) -> object:
        return self._call()

    def run(self, interval_s: float, seconds: float) -> None:
        stop = threading.Event()

        def body() -> None:
            self._call()
            while not stop.wait(interval_s):
                self._call()

        thread = threading.Thread(target=body, daemon=True)
        thread.start()
        time.sleep(seconds)
        stop.set()
        thread.join()

    def close(self) -> None:
        pass


def naive_psutil() -> Callable[[], object]:
    samples: list[dict[str, Any]] = []

    def sample() -> object:
        utilisation = psutil.cpu_percent(interval=None, percpu=True)
        samples.append(
            {
                "power_w": 15.0 + 12.0 * sum(utilisation) / 100.0,
                "memory": psutil.virtual_memory().percent,
                "load": psutil.getloadavg(),
            }
        )
        return samples[-1]

    return sample


def nvidia_smi() -> object:
    query = ["nvidia-smi", "--query-gpu=power.draw", "--format=csv,noheader,nounits"]
    return subprocess.run(query, capture_output=True, check=True, timeout=10).stdout


def codecarbon_cpu() -> Callable[[], object]:
    codecarbon: Any = importlib.import_module("codecarbon")
    tracker = codecarbon.OfflineEmissionsTracker(
        country_iso_code="DEU", save_to_file=False, log_level="error"
    )
    tracker.start()
    flush: Callable[[], object] = tracker.flush
    return flush


def samplers() -> tuple[dict[str, Any], dict[str, str]]:
    """What can be measured here, by name; and what cannot, with the reason."""

    def auto() -> SourceSelection:
        return detect_sources(PowerConfig())

    def simulated() -> SourceSelection:
        return detect_sources(PowerConfig.model_validate({"source": "simulated"}))

    def fake() -> SourceSelection:
        gpus = [FakeGpu(uuid=f"GPU-{index}") for index in range(8)]
        return detect_sources(PowerConfig(), nvml=Nvml(FakeNvml(gpus, SYSTEM_CLOCK)))

    found: dict[str, Any] = {
        "eadt: CPU estimate": EadtSampler(
            lambda: detect_sources(PowerConfig.model_validate({"source": "estimate"}))
        ),
        "eadt: 1 simulated GPU + CPU": EadtSampler(simulated),
        "eadt: 8 GPUs, fake NVML + CPU": EadtSampler(fake),
    }
    absent: dict[str, str] = {}
    for source in ("rapl", "nvml"):
        try:
            config = PowerConfig.model_validate({"source": source})
            found[f"eadt: {source}, real"] = EadtSampler(functools.partial(detect_sources, config))
        except EadtError as error:
            absent[f"eadt: {source}, real"] = error.what
    found[RIVAL] = CallSampler(naive_psutil())
    if importlib.util.find_spec("codecarbon"):
        found["rival: codecarbon flush"] = CallSampler(codecarbon_cpu())
    else:
        absent["rival: codecarbon flush"] = "codecarbon is not installed"
    if shutil.which("nvidia-smi"):
        found["rival: nvidia-smi"] = CallSampler(nvidia_smi)
    else:
        absent["rival: nvidia-smi"] = "there is no nvidia-smi"
    return found, absent


def back_to_back_us(sampler: Sampler, num_samples: int) -> list[float]:
    for _ in range(min(20, num_samples)):
        sampler.sample()
    durations_us = []
    for _ in range(num_samples):
        start_ns = time.perf_counter_ns()
        sampler.sample()
        durations_us.append((time.perf_counter_ns() - start_ns) / 1000)
    return durations_us


def core_share(sampler: Sampler, rate_hz: float, seconds: float) -> float:
    """CPU seconds of this process per second while the thread samples, idle main thread included."""
    start_cpu_s, start_s = time.process_time(), time.perf_counter()
    sampler.run(1.0 / rate_hz, seconds)
    return (time.process_time() - start_cpu_s) / (time.perf_counter() - start_s)


def measure() -> dict[str, Any]:
    found, absent = samplers()
    durations: dict[str, list[list[float]]] = {name: [] for name in found}
    shares: dict[str, dict[float, list[float]]] = {name: {rate: [] for rate in RATES_HZ} for name in found}
    for _ in range(NUM_RUNS):
        for name, sampler in found.items():
            # A subprocess takes 10 to 100 ms: fewer of them tell as much.
            durations[name].append(back_to_back_us(sampler, 10 if "nvidia-smi" in name else NUM_SAMPLES))
            for rate_hz, seconds in RATES_HZ.items():
                shares[name][rate_hz].append(core_share(sampler, rate_hz, seconds))
    rows = []
    for name, sampler in found.items():
        p50s = [statistics.median(run) for run in durations[name]]
        p95s = [statistics.quantiles(run, n=20)[-1] for run in durations[name]]
        row: dict[str, Any] = {
            "sampler": name,
            "num_runs": NUM_RUNS,
            "samples_per_run": len(durations[name][0]),
            "p50_us": statistics.median(p50s),
            "p50_us_of_runs": p50s,
            "p95_us": statistics.median(p95s),
            "p95_us_of_runs": p95s,
            "core_share_percentage": {
                f"{rate:g}_hz": statistics.median(values) * 100 for rate, values in shares[name].items()
            },
            "core_share_percentage_of_runs": {
                f"{rate:g}_hz": [value * 100 for value in values] for rate, values in shares[name].items()
            },
            "components": sampler.components,
            "raw_us": [[round(value, 1) for value in run] for run in durations[name]],
        }
        rows.append(row)
        sampler.close()
    rival_us = next(row["p50_us"] for row in rows if row["sampler"] == RIVAL)
    for row in rows:
        row["rival_p50_over_this"] = rival_us / row["p50_us"]
    return {
        "benchmark": "metering",
        "config": {"num_runs": NUM_RUNS, "samples_per_run": NUM_SAMPLES, "seconds_per_rate": RATES_HZ},
        "hardware": hardware(),
        "versions": versions(),
        "rows": rows,
        "absent": absent,
    }


def hardware() -> dict[str, Any]:
    model = platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {
        "cpu": model,
        "num_cores": os.cpu_count(),
        "load_before": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "memory_bytes": psutil.virtual_memory().total,
        "machine": platform.machine(),
        "kernel": platform.release(),
    }


def versions() -> dict[str, str]:
    packages = {name: importlib.metadata.version(name) for name in ("psutil", "nvidia-ml-py")}
    return {"python": platform.python_version(), **packages}


def table(result: dict[str, Any]) -> str:
    heads = ("p50 µs", "(runs)", "p95 µs", "1 Hz %", "10 Hz %", "× rival")
    lines = ["{:<32} {:>8} {:>15} {:>8} {:>8} {:>8} {:>8}".format("sampler", *heads)]
    for row in result["rows"]:
        spread = f"{min(row['p50_us_of_runs']):.1f}-{max(row['p50_us_of_runs']):.1f}"
        share = row["core_share_percentage"]
        lines.append(
            f"{row['sampler']:<32} {row['p50_us']:>8.1f} {spread:>15} {row['p95_us']:>8.1f} "
            f"{share['1_hz']:>8.3f} {share['10_hz']:>8.3f} {row['rival_p50_over_this']:>8.2f}"
        )
    lines.append(
        "1 and 10 Hz: percentage of one core. × rival: the naive psutil sampler's p50 over this one's."
    )
    lines += [f"not measured: {name}: {why}" for name, why in result["absent"].items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--save", action="store_true", help=f"write the JSON to {RESULT.name} in results/")
    arguments = parser.parse_args()
    result = measure()
    print(json.dumps(result) if arguments.json else table(result))
    if arguments.save:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
