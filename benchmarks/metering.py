"""What metering costs: the share of one core at 1 and 10 readings per second, and the time that a cut takes.

    python benchmarks/metering.py [--json] [--save]

Takes about five minutes. Every source that this machine has is measured, and some that every machine has: the
CPU estimate, simulated GPUs, and the NVML source on a fake library of 8 GPUs, whose aim is 0.1 % of a core at
10 Hz at most. Rivals in the same runs: a sampler as it is usually written with psutil (utilisation per core,
memory and load, kept as one dict per sample), the same with `pynvml` on the same fake, codecarbon's where it
is installed, and `nvidia-smi` where there is one.

The fake library's own work is in the figures that use it. It is measured alone (``baseline: the fake
alone``), and so is a thread that wakes up and does nothing, which no sampler can do without; what is left
after the fake's part is printed too. What a real driver takes for a reading is in none of these figures.

Two measurements, each in interleaved runs. The share of a core: CPU time of the whole process while readings
go on at their real rate, with cold caches and wake-ups, without the threads' start and end. The cut: its
duration as its caller sees it and the CPU time that it costs; for rivals, those of one call.
"""

from __future__ import annotations

import argparse
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
from eadt.node.meter import Meter
from eadt.node.sensors import NvmlSource, PowerSource, SourceSelection, detect_sources
from eadt.testing.fake_nvml import FakeGpu, FakeNvml

RESULT = Path(__file__).parent / "results" / "metering.json"
NUM_RUNS = 5
NUM_CALLS = 400
NUM_GPUS = 8
SETTLING_S = 0.3
RATES_HZ = {1.0: 3.0, 10.0: 4.0}  # rate: seconds of each run
RIVAL = "rival: naive psutil"
ON_FAKE = f"eadt: {NUM_GPUS} GPUs, fake NVML"
BARE, FAKE_ALONE = "baseline: a wake-up", "baseline: the fake alone"


class Sampler(Protocol):
    def call(self) -> object: ...

    def begin(self, interval_s: float) -> Callable[[], object]: ...

    def close(self) -> None: ...


class EadtSampler:
    """A meter on sources; its call is a cut."""

    def __init__(self, sources: list[PowerSource], close: Callable[[], object]) -> None:
        self._sources = sources
        self._close = close
        self._meter: Meter | None = None
        self.components = [component.as_dict() for source in sources for component in source.components]

    @classmethod
    def of(cls, selection: SourceSelection) -> EadtSampler:
        return cls(selection.sources, selection.close)

    def call(self) -> object:
        if self._meter is None:
            # Readings on the grid would fall into the calls that are timed.
            self._meter = Meter(self._sources, SYSTEM_CLOCK, 3600.0)
            self._meter.start()
        return self._meter.cut()

    def begin(self, interval_s: float) -> Callable[[], object]:
        if self._meter is not None:
            self._meter.stop()
            self._meter = None
        meter = Meter(self._sources, SYSTEM_CLOCK, interval_s)
        meter.start()
        return meter.stop

    def close(self) -> None:
        if self._meter is not None:
            self._meter.stop()
        self._close()


class CallSampler:
    """Calls a function at a rate, in one thread."""

    def __init__(self, call: Callable[[], object]) -> None:
        self.call = call
        self.components: list[dict[str, Any]] = []

    def begin(self, interval_s: float) -> Callable[[], object]:
        ended = threading.Event()

        def body() -> None:
            while not ended.wait(interval_s):
                self.call()

        thread = threading.Thread(target=body, daemon=True)
        thread.start()

        def end() -> None:
            ended.set()
            thread.join()

        return end

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


def fake_library() -> FakeNvml:
    library = FakeNvml([FakeGpu(uuid=f"GPU-{index}") for index in range(NUM_GPUS)], SYSTEM_CLOCK)
    library.nvmlInit()
    return library


def naive_nvml(library: FakeNvml) -> Callable[[], object]:
    """As in many scripts: power, utilisation and memory of each card, kept as one dict per sample."""
    handles = [library.nvmlDeviceGetHandleByIndex(index) for index in range(NUM_GPUS)]
    samples: list[dict[str, Any]] = []

    def sample() -> object:
        samples.append(
            {
                "power_w": [library.nvmlDeviceGetPowerUsage(handle) / 1000.0 for handle in handles],
                "utilisation": [library.nvmlDeviceGetUtilizationRates(handle).gpu for handle in handles],
                "memory": [library.nvmlDeviceGetMemoryInfo(handle).used for handle in handles],
                "time": time.perf_counter(),
            }
        )
        return samples[-1]

    return sample


def fake_alone(library: FakeNvml) -> Callable[[], object]:
    """The library's calls that a reading of all cards makes, and nothing else."""
    handles = [library.nvmlDeviceGetHandleByIndex(index) for index in range(NUM_GPUS)]

    def call() -> object:
        for handle in handles:
            library.nvmlDeviceGetTotalEnergyConsumption(handle)
        return None

    return call


def on_fake(library: FakeNvml) -> EadtSampler:
    nvml = Nvml(library)
    nvml.open()
    return EadtSampler([NvmlSource(nvml, nvml.gpus(), SYSTEM_CLOCK)], nvml.close)


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

    def selected(source: str, **options: Any) -> SourceSelection:
        return detect_sources(PowerConfig.model_validate({"source": source}), **options)

    found: dict[str, Any] = {
        BARE: CallSampler(lambda: None),
        FAKE_ALONE: CallSampler(fake_alone(fake_library())),
        ON_FAKE: on_fake(fake_library()),
        f"{ON_FAKE} + CPU": EadtSampler.of(selected("auto", nvml=Nvml(fake_library()))),
        "eadt: CPU estimate": EadtSampler.of(selected("estimate")),
        "eadt: 1 simulated GPU + CPU": EadtSampler.of(selected("simulated")),
    }
    absent: dict[str, str] = {}
    for source in ("rapl", "nvml"):
        try:
            found[f"eadt: {source}, real"] = EadtSampler.of(selected(source))
        except EadtError as error:
            absent[f"eadt: {source}, real"] = error.what
    found[RIVAL] = CallSampler(naive_psutil())
    found["rival: naive NVML, same fake"] = CallSampler(naive_nvml(fake_library()))
    if importlib.util.find_spec("codecarbon"):
        found["rival: codecarbon flush"] = CallSampler(codecarbon_cpu())
    else:
        absent["rival: codecarbon flush"] = "codecarbon is not installed"
    if shutil.which("nvidia-smi"):
        found["rival: nvidia-smi"] = CallSampler(nvidia_smi)
    else:
        absent["rival: nvidia-smi"] = "there is no nvidia-smi"
    return found, absent


def calls_us(sampler: Sampler, num_calls: int) -> tuple[list[float], float]:
    """Durations of calls one after the other, and the CPU time of one, in µs."""
    for _ in range(min(20, num_calls)):
        sampler.call()
    durations_us = []
    cpu_ns = time.process_time_ns()
    for _ in range(num_calls):
        start_ns = time.perf_counter_ns()
        sampler.call()
        durations_us.append((time.perf_counter_ns() - start_ns) / 1000)
    return durations_us, (time.process_time_ns() - cpu_ns) / 1000 / num_calls


def core_share(sampler: Sampler, rate_hz: float, seconds: float) -> float:
    """CPU seconds of this process per second while readings go on; the main thread sleeps."""
    end = sampler.begin(1.0 / rate_hz)
    try:
        time.sleep(SETTLING_S)
        start_cpu_s, start_s = time.process_time(), time.perf_counter()
        time.sleep(seconds)
        return (time.process_time() - start_cpu_s) / (time.perf_counter() - start_s)
    finally:
        end()


def measure() -> dict[str, Any]:
    machine = hardware()
    found, absent = samplers()
    durations: dict[str, list[list[float]]] = {name: [] for name in found}
    costs_us: dict[str, list[float]] = {name: [] for name in found}
    shares: dict[str, dict[float, list[float]]] = {name: {rate: [] for rate in RATES_HZ} for name in found}
    for _ in range(NUM_RUNS):
        for name, sampler in found.items():
            # A subprocess takes 10 to 100 ms: fewer of them tell as much.
            run_us, cost_us = calls_us(sampler, 10 if "nvidia-smi" in name else NUM_CALLS)
            durations[name].append(run_us)
            costs_us[name].append(cost_us)
            for rate_hz, seconds in RATES_HZ.items():
                shares[name][rate_hz].append(core_share(sampler, rate_hz, seconds))
    rows = []
    for name, sampler in found.items():
        p50s = [statistics.median(run) for run in durations[name]]
        p95s = [statistics.quantiles(run, n=20)[-1] for run in durations[name]]
        rows.append(
            {
                "sampler": name,
                "num_runs": NUM_RUNS,
                "calls_per_run": len(durations[name][0]),
                "p50_us": statistics.median(p50s),
                "p50_us_of_runs": p50s,
                "p95_us": statistics.median(p95s),
                "p95_us_of_runs": p95s,
                "cpu_us": statistics.median(costs_us[name]),
                "cpu_us_of_runs": costs_us[name],
                "core_share_percentage": {
                    f"{rate:g}_hz": statistics.median(values) * 100 for rate, values in shares[name].items()
                },
                "core_share_percentage_of_runs": {
                    f"{rate:g}_hz": [value * 100 for value in values] for rate, values in shares[name].items()
                },
                "components": sampler.components,
                "raw_us": [[round(value, 1) for value in run] for run in durations[name]],
            }
        )
        sampler.close()
    by_name = {row["sampler"]: row for row in rows}
    return {
        "benchmark": "metering",
        "config": {"num_runs": NUM_RUNS, "calls_per_run": NUM_CALLS, "seconds_per_rate": RATES_HZ},
        "hardware": machine,
        "versions": versions(),
        "without_the_fake": without_the_fake(by_name),
        "rows": rows,
        "absent": absent,
    }


def without_the_fake(by_name: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The share of the 8 GPUs at 10 Hz less what the fake takes for it, run by run."""
    runs = {
        name: by_name[name]["core_share_percentage_of_runs"]["10_hz"] for name in (ON_FAKE, FAKE_ALONE, BARE)
    }
    own = [
        whole - (fake - bare)
        for whole, fake, bare in zip(runs[ON_FAKE], runs[FAKE_ALONE], runs[BARE], strict=True)
    ]
    return {
        "sampler": ON_FAKE,
        "core_share_percentage": {"10_hz": statistics.median(own)},
        "core_share_percentage_of_runs": {"10_hz": own},
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
    heads = ("1 Hz %", "10 Hz %", "(runs)", "call p50 µs", "p95 µs", "CPU µs")
    lines = ["{:<32} {:>8} {:>8} {:>13} {:>12} {:>9} {:>9}".format("sampler", *heads)]
    for row in result["rows"]:
        share = row["core_share_percentage"]
        runs = row["core_share_percentage_of_runs"]["10_hz"]
        lines.append(
            f"{row['sampler']:<32} {share['1_hz']:>8.3f} {share['10_hz']:>8.3f} "
            f"{min(runs):>6.3f}-{max(runs):<6.3f} {row['p50_us']:>12.1f} {row['p95_us']:>9.1f} "
            f"{row['cpu_us']:>9.1f}"
        )
    own = result["without_the_fake"]
    runs = own["core_share_percentage_of_runs"]["10_hz"]
    lines.append(
        f"{own['sampler']} at 10 Hz without the fake's own part: "
        f"{own['core_share_percentage']['10_hz']:.3f} % ({min(runs):.3f} to {max(runs):.3f}), wake-up and all"
    )
    lines.append(
        "1 and 10 Hz: percentage of one core. Call: a cut of EADT's meter, or one sample of a rival."
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
