"""What EADT costs while it trains: step time against plain Ray Train with DeepSpeed on the same work.

    python benchmarks/overhead.py [--full] [--runs N] [--json] [--save]

Each side is a whole program with a Ray cluster of its own: EADT with supervisor, meter and ledger (asked
ten times as often as by default), plain Ray Train with DeepSpeed, and the same once more, which gives the
machine's noise (A/A). They take turns of a few seconds: the processes of all others, Ray's included, are
stopped meanwhile (SIGSTOP), so each bears its own background work and no other's. Model, batch plan,
optimizer, clipping, threads, cores, priority and malloc's settings are equal (``benchmarks/stock``). A step's
time is from the end of the step before to its own end; the first moments of each turn are left out.

Three answers. The ratio of step times in a round, with its 95 % interval over all rounds (bootstrap): true to
the question, and as uncertain as the machine is noisy. The CPU time per step of the processes that train,
which the noise touches less: what the training loop itself does more. And the CPU time of all others: what
they take of the cores beyond the rival's is the most that they can cost, where no core is ever idle. An actor
that does nothing takes 0.008 of a core in Ray 2.60; EADT has five more of them than the rival.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from common import (
    RESULTS,
    WORKLOADS,
    add_output_options,
    bootstrap_ci,
    hardware,
    output,
    quantile,
    ray_cluster,
    run_config,
    say,
    versions,
)

from eadt.node.agent import CPU_ENGINE_ENV

RESULT = RESULTS / "overhead.json"
SIDES = ("plain", "plain again", "eadt")
SNAPSHOTS = "eadt, snapshots"
"""EADT with a copy of its state into shared memory every 50 steps, the default."""

_SETTLE_S = 0.7
_START_LIMIT_S = 300.0
_WARM_STEPS = 20
_NUM_WORKERS = 2


# -- one side, in a process of its own --------------------------------------------------------------


def run_side(side: str, size: str, stage: int, folder: Path) -> None:
    """Train until killed."""
    if side.startswith("plain"):
        # Ray lowers its workers' priority, EADT raises its engines' again: equal ones, lest another load on
        # the machine meets the sides unequally. Read by ray.init.
        os.environ["RAY_worker_niceness"] = "5"  # noqa: SIM112
        for name, value in CPU_ENGINE_ENV.items():
            os.environ.setdefault(name, value)
        with ray_cluster():
            _run_plain(size, stage, folder)
        return
    from eadt.trainer import EnergyAdaptiveTrainer

    config = run_config(
        WORKLOADS[size],
        folder,
        "run",
        zero_stage=stage,
        training={"energy_monitoring_interval": 6},
        supervisor={"enabled": True, "decision_interval": 30},
        policy={"type": "hold", "max_workers_per_gpu": _NUM_WORKERS},
        elastic={"lease_s": 600},
        checkpoint={"every_steps": None, "snapshot_every_steps": 50 if side == SNAPSHOTS else None},
    )
    with ray_cluster():
        EnergyAdaptiveTrainer(config, fresh=True).fit()


def _run_plain(size: str, stage: int, folder: Path) -> None:
    from stock import elastic

    from eadt.config import TrainingConfig
    from eadt.training.data import default_cache_dir, prepare_dataset

    training = WORKLOADS[size].training()
    data = prepare_dataset(TrainingConfig.model_validate(training), default_cache_dir(), 0, lambda _: None)
    elastic.run(
        folder / "run",
        "plain",
        {
            "training": training,
            "data_path": str(data.path),
            "vocab_size": data.vocab_size,
            "zero_stage": stage,
        },
        num_workers=_NUM_WORKERS,
        resizes={},
        max_steps=None,
    )


# -- turns --------------------------------------------------------------------------------------------


class Side:
    """A side's processes, stopped but for its turns."""

    def __init__(self, name: str, size: str, stage: int, folder: Path) -> None:
        self.name = name
        self.turns: list[dict[str, Any]] = []
        self._folder = folder / name.replace(" ", "-").replace(",", "")
        self._folder.mkdir()
        self._log = (self._folder / "output.log").open("wb")
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--side", name, "--size", size, "--stage", str(stage),
             "--folder", str(self._folder)],
            stdout=self._log, stderr=self._log, start_new_session=True,
        )  # fmt: skip
        self._stopped: list[psutil.Process] = []

    def wait_until_warm(self) -> None:
        """Block until it has trained for some steps."""
        deadline = time.perf_counter() + _START_LIMIT_S
        while len(self.step_ends()) < _WARM_STEPS:
            if self._process.poll() is not None or time.perf_counter() > deadline:
                tail = (self._folder / "output.log").read_text(errors="replace")[-3000:]
                raise RuntimeError(f"{self.name} does not train:\n{tail}")
            time.sleep(0.5)

    def stop(self) -> None:
        """SIGSTOP to every process of it."""
        self._stopped = []
        while found := [process for process in self._tree() if process not in self._stopped]:
            for process in found:  # again, for those that were forked meanwhile
                with contextlib.suppress(psutil.Error):
                    process.send_signal(signal.SIGSTOP)
                self._stopped.append(process)

    def turn(self, number: int, seconds: float) -> None:
        """Let it train for a while."""
        cpu_before = self._cpu_s()
        began_s = time.perf_counter()
        for process in self._stopped:
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGCONT)
        time.sleep(_SETTLE_S + seconds)
        ended_s = time.perf_counter()
        self.stop()
        stopped_s = time.perf_counter()
        cpu_after = self._cpu_s()
        cores: dict[str, float] = {}
        training_cpu_s = 0.0
        for process, (spent_s, name) in cpu_after.items():
            took_s = spent_s - cpu_before.get(process, (0.0, name))[0]
            if name is None:
                training_cpu_s += took_s
            else:
                cores[name] = cores.get(name, 0.0) + took_s / (stopped_s - began_s)
        self.turns.append(
            {
                "round": number,
                "began_s": began_s + _SETTLE_S,
                "ended_s": ended_s,
                "span_s": (began_s, stopped_s),
                "training_cpu_s": training_cpu_s,
                "background_cores": sum(cores.values()),
                "background_by_process": {name: value for name, value in cores.items() if value > 0},
            }
        )

    def evaluate(self) -> None:
        """Fill in the step times of each turn, from what the side wrote down."""
        ends = self.step_ends()
        for turn in self.turns:
            within = [end for end in ends if turn["began_s"] <= end <= turn["ended_s"]]
            turn["steps_s"] = [after - before for before, after in itertools.pairwise(within)]
            turn["mean_s"] = statistics.fmean(turn["steps_s"])
            turn["median_s"] = statistics.median(turn["steps_s"])
            begin_s, end_s = turn.pop("span_s")
            # A step that the turn's end cuts through goes on in the next turn, so that sums are right.
            turn["num_steps"] = sum(begin_s <= end <= end_s for end in ends)

    def step_ends(self) -> list[float]:
        """Ends of all steps so far, in monotonic s."""
        ends = []
        for path in [*self._folder.glob("run/steps.jsonl"), *self._folder.glob("run/ledger/*.jsonl")]:
            for line in path.read_bytes().splitlines():
                with contextlib.suppress(ValueError):  # a line that is being written
                    row = json.loads(line)
                    if row.get("type") == "steps":
                        ends += [t0 + s for t0, s in zip(row["t0"], row["seconds"], strict=True)]
                    elif row.get("event") == "step" and row.get("primary", True):
                        ends.append(float(row["t1"]))
        return sorted(ends)

    def close(self) -> None:
        """End all of its processes."""
        for process in reversed(self._tree()):
            with contextlib.suppress(psutil.Error):
                process.kill()
        self._process.wait()
        self._log.close()

    def _tree(self) -> list[psutil.Process]:
        try:
            root = psutil.Process(self._process.pid)
            return [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def _cpu_s(self) -> dict[psutil.Process, tuple[float, str | None]]:
        """CPU seconds of each process so far, and its name; ``None`` for one that trains."""
        found: dict[psutil.Process, tuple[float, str | None]] = {}
        for process in self._tree():
            with contextlib.suppress(psutil.Error):
                times, command = process.cpu_times(), " ".join(process.cmdline())
                trains = "eadt.training.fork_server" in command or (
                    self.name.startswith("plain") and "RayTrainWorker" in command
                )
                found[process] = (times.user + times.system, None if trains else _process_name(command))
        return found


def _process_name(command: str) -> str:
    if command.startswith("ray::"):
        return command[5:].split(".")[0].split("(")[0].strip()
    for name in ("overhead.py", "gcs_server", "raylet/raylet", "dashboard/agent", "log_monitor"):
        if name in command:
            return "driver" if name == "overhead.py" else name.rpartition("/")[2]
    return command.split(" ")[0].rpartition("/")[2]


def measure(
    names: list[str], size: str, stage: int, num_runs: int, num_rounds: int, turn_s: float
) -> dict[str, Any]:
    """Runs of rounds in which every side has its turn."""
    runs = []
    shuffle = random.Random(0)
    for number in range(num_runs):
        folder = Path(tempfile.mkdtemp(prefix="eadt-bench-"))
        sides: list[Side] = []
        try:
            for name in names:
                sides.append(Side(name, size, stage, folder))
                sides[-1].wait_until_warm()
                sides[-1].stop()
            for round_number in range(num_rounds):
                for side in shuffle.sample(sides, k=len(sides)):
                    side.turn(round_number, turn_s)
            for side in sides:
                side.evaluate()
            runs.append({side.name: side.turns for side in sides})
        finally:
            for side in sides:
                side.close()
            shutil.rmtree(folder, ignore_errors=True)
        medians = {
            name: statistics.median(turn["mean_s"] for turn in turns) for name, turns in runs[-1].items()
        }
        say(f"run {number + 1} of {num_runs}: "
            + ", ".join(f"{name} {value * 1000:.1f} ms" for name, value in medians.items()))  # fmt: skip
    return {"runs": runs}


# -- answers --------------------------------------------------------------------------------------------


def comparison(runs: list[dict[str, Any]], side: str, rivals: list[str], statistic: str) -> dict[str, Any]:
    """The ratio of step times within each round, less one."""
    per_run = []
    for run in runs:
        of_rivals = [[turn[statistic] for turn in run[rival]] for rival in rivals]
        base = [statistics.fmean(values) for values in zip(*of_rivals, strict=True)]
        per_run.append([turn[statistic] / plain - 1 for turn, plain in zip(run[side], base, strict=True)])
    ratios = [ratio for ratios in per_run for ratio in ratios]
    low, high = bootstrap_ci(ratios)
    return {
        "side": side,
        "against": rivals,
        "of": statistic,
        "n": len(ratios),
        "overhead_fraction": statistics.fmean(ratios),
        "median_fraction": statistics.median(ratios),
        "ci95_low": low,
        "ci95_high": high,
        "per_run": [statistics.fmean(run) for run in per_run],
    }


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows per side, and the comparisons."""
    names = list(runs[0])
    plains = [name for name in names if name.startswith("plain")]
    rows = []
    for name in names:
        turns = [turn for run in runs for turn in run[name]]
        steps = [step for turn in turns for step in turn["steps_s"]]
        rows.append(
            {
                "side": name,
                "num_steps": len(steps),
                "mean_s": statistics.fmean(steps),
                "p50_s": quantile(steps, 0.5),
                "p95_s": quantile(steps, 0.95),
                "mean_s_of_runs": [statistics.fmean(t["mean_s"] for t in run[name]) for run in runs],
                "training_cpu_s_per_step": _cpu_per_step(turns),
                "training_cpu_s_per_step_of_runs": [_cpu_per_step(run[name]) for run in runs],
                "background_cores": statistics.fmean(turn["background_cores"] for turn in turns),
                "background_by_process": {
                    process: statistics.fmean(
                        turn["background_by_process"].get(process, 0.0) for turn in turns
                    )
                    for process in sorted({name for turn in turns for name in turn["background_by_process"]})
                },
            }
        )
    comparisons = []
    for statistic in ("mean_s", "median_s"):
        if len(plains) > 1:
            comparisons.append(comparison(runs, plains[1], plains[:1], statistic))
        comparisons += [
            comparison(runs, name, plains, statistic) for name in names if not name.startswith("plain")
        ]
    return {"rows": rows, "comparisons": comparisons}


def _cpu_per_step(turns: list[dict[str, Any]]) -> float:
    return float(sum(turn["training_cpu_s"] for turn in turns) / sum(turn["num_steps"] for turn in turns))


def table(result: dict[str, Any]) -> str:
    """For people."""
    lines = [
        f"{'side':<18}{'steps':>7}{'mean ms':>10}{'p50 ms':>9}{'p95 ms':>9}{'CPU ms/step':>13}"
        f"{'background':>12}  means of runs"
    ]
    for row in result["rows"]:
        runs = ", ".join(f"{value * 1000:.1f}" for value in row["mean_s_of_runs"])
        lines.append(
            f"{row['side']:<18}{row['num_steps']:>7}{row['mean_s'] * 1000:>10.2f}{row['p50_s'] * 1000:>9.2f}"
            f"{row['p95_s'] * 1000:>9.2f}{row['training_cpu_s_per_step'] * 1000:>13.2f}"
            f"{row['background_cores']:>12.4f}  {runs}"
        )
    for found in result["comparisons"]:
        label = "noise (A/A)" if found["side"].startswith("plain") else "overhead"
        runs = ", ".join(f"{value * 100:+.2f}" for value in found["per_run"])
        lines.append(
            f"{label}, {found['side']} against plain, {found['of'].removesuffix('_s')} of a turn: "
            f"{found['overhead_fraction'] * 100:+.2f} % "
            f"(95 %: {found['ci95_low'] * 100:+.2f} to {found['ci95_high'] * 100:+.2f}; runs: {runs})"
        )
    for row in result["rows"]:
        largest = sorted(row["background_by_process"].items(), key=lambda item: -item[1])[:8]
        lines.append(f"{row['side']}: " + ", ".join(f"{name} {value:.4f}" for name, value in largest))
    lines.append("CPU ms/step: of the processes that train, over all turns.")
    lines.append("background: CPU time of all processes that do not train, Ray's own included, in cores.")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--full", action="store_true", help="snapshots every 50 steps too")
    parser.add_argument("--runs", type=int, default=3, help="fresh starts of all sides (default 3)")
    parser.add_argument("--rounds", type=int, default=12, help="rounds of turns in each run (default 12)")
    parser.add_argument("--turn-s", type=float, default=3.0, help="seconds of a turn (default 3)")
    parser.add_argument("--size", choices=WORKLOADS, default="3M", help="model (default 3M)")
    parser.add_argument("--stage", type=int, default=1, help="ZeRO stage (default 1)")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    add_output_options(parser, RESULT)
    arguments = parser.parse_args()
    if arguments.side:
        run_side(arguments.side, arguments.size, arguments.stage, arguments.folder)
        return
    names = [*SIDES, SNAPSHOTS] if arguments.full else [*SIDES]
    machine, begun_s = hardware(), time.perf_counter()
    found = measure(
        names, arguments.size, arguments.stage, arguments.runs, arguments.rounds, arguments.turn_s
    )
    result = {
        "benchmark": "overhead",
        "config": {
            "workload": vars(WORKLOADS[arguments.size]),
            "zero_stage": arguments.stage,
            "num_workers": _NUM_WORKERS,
            "runs": arguments.runs,
            "rounds": arguments.rounds,
            "turn_s": arguments.turn_s,
            "energy_monitoring_interval_s": 6,
            "decision_interval_s": 30,
            "sampling_interval_s": 1,
        },
        "hardware": machine,
        "versions": versions(),
        "seconds": time.perf_counter() - begun_s,
        **summarise(found["runs"]),
        "raw": [
            {
                name: [{**turn, "steps_s": [round(step, 5) for step in turn["steps_s"]]} for turn in turns]
                for name, turns in run.items()
            }
            for run in found["runs"]
        ],
    }
    output(result, table(result), arguments, RESULT)


if __name__ == "__main__":
    main()
