"""EADT on the card: changes of share and of workers in place, on one GPU that two engines share.

    python benchmarks/gpu_smoke.py [--stages 1,3] [--size 160M] [--json] [--save]

For each ZeRO stage a GPT-NeoX of 162 million parameters trains with two engines on one GPU (through gloo,
since NCCL before 2.30 refuses two ranks on a GPU) while its MPS share goes from 50 % to 40 %, its workers
from 2 to 1 and back; then the same run once more without a change. Reported: each pause with its parts; the
losses of the changed run against the unchanged one's; device memory and processes on the GPU while a host is
parked (it must have none); and, over 30 s of training, the energy counter against power integrated at 10 Hz.
An MPS daemon of the benchmark's own is started for its time, where the machine has one.

Without a GPU the same runs on the CPU with the `simulated` source and 3 million parameters: the share is
then one of the CPU's cores, and the result says so.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import itertools
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import ray
from common import (
    RESULTS,
    WORKLOADS,
    add_output_options,
    hardware,
    output,
    ray_cluster,
    run_config,
    say,
    versions,
)
from drive import Changes, even_setpoint

from eadt.actors import NAMESPACE, agent_prefix
from eadt.adapters.nvml import Nvml
from eadt.clock import SYSTEM_CLOCK
from eadt.config import PowerConfig, RunConfig
from eadt.errors import EadtError
from eadt.node.sensors import SourceSelection, detect_sources
from eadt.record.ledger import read_ledger
from eadt.record.rows import StepsRow
from eadt.trainer import EnergyAdaptiveTrainer

PLAN = [even_setpoint(2, 40), even_setpoint(1), even_setpoint(2)]
STAGES_OF_PLAN = ("2 workers, 50 %", "2 workers, 40 %", "1 worker, 100 %", "2 workers, 50 % again")
_POWER_INTERVAL_S = 0.1


class Card:
    """The GPU, or what stands for it on a machine without one."""

    def __init__(self) -> None:
        self._nvml: Nvml | None = Nvml()
        try:
            self._nvml.open()
            self.name = self._nvml.gpu(0).name
        except (EadtError, IndexError):
            self._nvml = None
            self.name = "none: CPU, with simulated power"

    @property
    def is_real(self) -> bool:
        return self._nvml is not None

    def occupation(self, run_id: str) -> dict[str, Any]:
        """Who holds device memory now; on a CPU: which engines there are."""
        agent_name = agent_prefix(run_id) + ray.get_runtime_context().get_node_id()
        agent = ray.get_actor(agent_name, namespace=NAMESPACE)
        engines: dict[str, int] = ray.get(agent.engine_pids.remote(), timeout=10)
        hosts = _host_pids()
        facts: dict[str, Any] = {"num_engines": len(engines), "num_hosts": len(hosts)}
        if self._nvml is None:
            return facts
        on_card = _pids_on_card()
        return {
            **facts,
            "device_bytes_used": self._nvml.gpu(0).memory().used_bytes,
            "num_processes_on_card": len(on_card),
            # Empty also where the container hides process numbers: then the two counts above tell.
            "engines_on_card": sorted(name for name, pid in engines.items() if pid in on_card),
            "hosts_on_card": sorted(pid for pid in hosts if pid in on_card),
        }

    def energy_check(self, seconds: float) -> dict[str, Any]:
        """The energy counter's difference against integrated power. Blocks for ``seconds``."""
        selection = None if self._nvml else _simulated()
        begun_s = time.perf_counter()
        samples = [(begun_s, self._power_w(selection))]
        counter_j = self._energy_j(selection)
        while time.perf_counter() - begun_s < seconds:
            time.sleep(_POWER_INTERVAL_S)
            samples.append((time.perf_counter(), self._power_w(selection)))
        counter_j = self._energy_j(selection) - counter_j
        pairs = itertools.pairwise(samples)
        integrated_j = sum((later - sooner) * (w0 + w1) / 2 for (sooner, w0), (later, w1) in pairs)
        if selection is not None:
            selection.close()
        return {
            "seconds": samples[-1][0] - begun_s,
            "num_power_samples": len(samples),
            "counter_j": counter_j,
            "integrated_power_j": integrated_j,
            "counter_over_integrated": counter_j / integrated_j,
            "source": "NVML" if self._nvml else "simulated: power is the counter's slope over 20 ms",
        }

    def _energy_j(self, selection: SourceSelection | None) -> float:
        if self._nvml is not None:
            return self._nvml.gpu(0).energy_j()
        assert selection is not None
        assert selection.simulated is not None
        energy_j = selection.simulated.read(selection.simulated.components[0]).energy_j
        assert energy_j is not None
        return energy_j

    def _power_w(self, selection: SourceSelection | None) -> float:
        if self._nvml is not None:
            return self._nvml.gpu(0).power_w()
        before_j, before_s = self._energy_j(selection), time.perf_counter()
        time.sleep(0.02)
        return (self._energy_j(selection) - before_j) / (time.perf_counter() - before_s)

    def close(self) -> None:
        if self._nvml is not None:
            self._nvml.close()


def _simulated() -> SourceSelection:
    return detect_sources(PowerConfig.model_validate({"source": "simulated"}), SYSTEM_CLOCK)


def _pids_on_card() -> set[int]:
    """Process numbers with a context on GPU 0, MPS clients included."""
    pynvml: Any = importlib.import_module("pynvml")  # processes are no part of EADT's own adapter
    handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    found: set[int] = set()
    for function in ("nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetMPSComputeRunningProcesses"):
        with contextlib.suppress(pynvml.NVMLError, AttributeError):
            found |= {process.pid for process in getattr(pynvml, function)(handle)}
    return found


def _host_pids() -> list[int]:
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process.pid)
    return found


@contextlib.contextmanager
def mps_daemon(folder: Path, *, is_wanted: bool) -> Iterator[str | None]:
    """An MPS control daemon of our own; gives its pipe folder, or ``None`` where there is none."""
    control = shutil.which("nvidia-cuda-mps-control")
    if not is_wanted or control is None:
        yield None
        return
    pipes = folder / "mps"
    pipes.mkdir()
    env = {**os.environ, "CUDA_MPS_PIPE_DIRECTORY": str(pipes), "CUDA_MPS_LOG_DIRECTORY": str(pipes)}
    started = subprocess.run([control, "-d"], env=env, capture_output=True, text=True)
    if started.returncode != 0:
        say(f"MPS daemon did not start: {started.stderr.strip() or started.stdout.strip()}")
        yield None
        return
    try:
        yield str(pipes)
    finally:
        subprocess.run([control], env=env, input="quit\n", text=True, capture_output=True)


def losses(config: RunConfig) -> dict[int, float]:
    """Loss by step, from the run's ledger."""
    rows = read_ledger(config.run_folder / "ledger").of_type(StepsRow)
    steps = [pair for row in rows for pair in enumerate(row.loss, start=row.first_step)]
    return {step: loss for step, loss in steps if loss is not None}


def trial(
    card: Card, size: str, stage: int, folder: Path, precision: str, energy_s: float, pipes: str | None
) -> dict[str, Any]:
    """One stage: the changed run, then the unchanged one over the same steps."""
    sections: dict[str, Any] = {
        "resources": {"use_gpu": card.is_real},
        "checkpoint": {"every_steps": None, "snapshot_every_steps": None},
        "power": {"source": "auto" if card.is_real else "simulated"},
    }
    if pipes is not None:
        sections["mps"] = {"initial_thread_percentage": 50, "shared_resources": 2, "pipe_directory": pipes}

    def config(name: str, **training: Any) -> RunConfig:
        return run_config(
            WORKLOADS[size], folder, f"{name}-{stage}", zero_stage=stage,
            training={"precision": precision, **training}, elastic={"mode": "in_place"}, **sections,
        )  # fmt: skip

    occupation: dict[str, Any] = {}
    energy: dict[str, Any] = {}

    def on_booked(number: int) -> None:
        occupation[STAGES_OF_PLAN[number]] = card.occupation(changes.run_id)
        if number == len(PLAN):
            threading.Thread(target=lambda: energy.update(card.energy_check(energy_s)), daemon=True).start()

    changes = Changes(PLAN, on_booked=on_booked, may_end=lambda: bool(energy))
    changed = config("changed")
    result = EnergyAdaptiveTrainer(changed, on_event=changes, fresh=True).fit()
    if result.error is not None:
        raise result.error
    by_step = losses(changed)
    unchanged = config("unchanged", max_steps=max(by_step))
    result = EnergyAdaptiveTrainer(unchanged, fresh=True).fit()
    if result.error is not None:
        raise result.error
    reference = losses(unchanged)
    apart = {step: abs(by_step[step] - loss) / loss for step, loss in reference.items() if step in by_step}
    return {
        "zero_stage": stage,
        "model_parameters": changes.num_params,
        "changes": [
            {key: row[key] for key in ("from_workers", "to_workers", "kind", "seconds", "ordinary_step_s",
                                       "lost_steps", "parts", "setpoint_before", "setpoint_after")}
            for row in changes.rows
        ],
        "num_steps_compared": len(apart),
        "max_relative_loss_difference": max(apart.values()),
        "num_equal_losses": sum(difference == 0.0 for difference in apart.values()),
        "losses_changed": [by_step[step] for step in sorted(apart)],
        "losses_unchanged": [reference[step] for step in sorted(apart)],
        "occupation": occupation,
        "energy": energy,
        "troubles": [fault["detail"] for fault in changes.faults] + changes.notes,
    }  # fmt: skip


def table(result: dict[str, Any]) -> str:
    """For people."""
    lines = [f"Card: {result['card']}; MPS: {result['mps']}; precision {result['config']['precision']}"]
    for row in result["trials"]:
        lines.append(f"ZeRO {row['zero_stage']}, {row['model_parameters'] / 1e6:.1f} million parameters")
        for change in row["changes"]:
            parts = ", ".join(f"{name[:-2]} {value:.2f}" for name, value in change["parts"].items())
            before, after = (
                f"{setpoint['num_workers']} x {setpoint['mps_active_thread_percentage']} %"
                for setpoint in (change["setpoint_before"], change["setpoint_after"])
            )
            lines.append(f"  {before} -> {after}: pause {change['seconds']:.3f} s ({parts}), "
                         f"an ordinary step {change['ordinary_step_s']:.3f} s")  # fmt: skip
        lines.append(
            f"  loss against the unchanged run: {row['max_relative_loss_difference']:.1e} apart at most over "
            f"{row['num_steps_compared']} steps, {row['num_equal_losses']} of them equal"
        )
        for name, facts in row["occupation"].items():
            lines.append(f"  {name}: " + ", ".join(f"{key} {value}" for key, value in facts.items()))
        energy = row["energy"]
        lines.append(
            f"  energy over {energy['seconds']:.0f} s: counter {energy['counter_j']:.1f} J, integrated power "
            f"{energy['integrated_power_j']:.1f} J, ratio {energy['counter_over_integrated']:.3f} "
            f"({energy['source']})"
        )
        lines += [f"  note: {text}" for text in dict.fromkeys(row["troubles"])]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--stages", default="1,3", help="ZeRO stages, comma-separated (default 1,3)")
    parser.add_argument("--size", choices=WORKLOADS, help="model (default 160M on a GPU, 3M without)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument(
        "--energy-s", type=float, default=30.0, help="s of the energy comparison (default 30)"
    )
    parser.add_argument("--no-mps", action="store_true", help="do not start an MPS daemon")
    result_name = "gpu_smoke.json"
    add_output_options(parser, RESULTS / result_name)
    arguments = parser.parse_args()
    card = Card()
    size = arguments.size or ("160M" if card.is_real else "3M")
    folder = Path(tempfile.mkdtemp(prefix="eadt-bench-"))
    machine = hardware()
    try:
        with (
            mps_daemon(folder, is_wanted=card.is_real and not arguments.no_mps) as pipes,
            ray_cluster(num_gpus=1 if card.is_real else 0),
        ):
            trials = []
            for stage in map(int, arguments.stages.split(",")):
                say(f"ZeRO {stage}: a run with changes, then one without")
                trials.append(
                    trial(card, size, stage, folder, arguments.precision, arguments.energy_s, pipes)
                )
    finally:
        card.close()
        shutil.rmtree(folder, ignore_errors=True)
    result = {
        "benchmark": "gpu_smoke",
        "card": card.name,
        "mps": "a daemon of the benchmark's own" if pipes else "none started",
        "config": {
            "workload": vars(WORKLOADS[size]),
            "precision": arguments.precision,
            "energy_s": arguments.energy_s,
        },
        "hardware": machine,
        "versions": versions(),
        "trials": trials,
    }
    name = result_name if card.is_real else "gpu_smoke_cpu.json"
    output(result, table(result), arguments, RESULTS / name)


if __name__ == "__main__":
    main()
