"""The pause of a resize: EADT in place, by group and by restart, against stock Ray Train's restart.

    python benchmarks/resize.py [--quick] [--count N] [--stages 1,2,3] [--json] [--save]   (15 minutes)

The pause is the time from the end of the last step at the old size to the end of the first step at the
new size, less an ordinary step at the new size (median of the four after the first). Each way trains the
same GPT-NeoX of 3.3 million parameters on the same Ray cluster, 2 workers to 1 and back; the ways take
turns in rounds. The rival is a ``TorchTrainer`` with a plain DeepSpeed loop (``benchmarks/stock``) that
Ray Train restarts at the new size by its own ``ResizeDecision``, with the checkpoint taken just in time.

A second table: in place for 1, 10 and 100 million parameters, with the memory that the hand-over takes
(the node's slot files in shared memory, against 12 bytes a parameter) and that engines built ahead take.
"""

from __future__ import annotations

import argparse
import glob
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import psutil
import ray
from common import (
    RESULTS,
    WORKLOADS,
    Workload,
    add_output_options,
    hardware,
    output,
    quantile,
    ray_cluster,
    run_config,
    say,
    versions,
)
from drive import SETTLE_STEPS, Changes, even_setpoint
from ray.exceptions import RayError

from eadt.actors import NAMESPACE, agent_prefix
from eadt.config import TrainingConfig
from eadt.trainer import EnergyAdaptiveTrainer
from eadt.training.data import default_cache_dir, prepare_dataset

RESULT = RESULTS / "resize.json"
WAYS = ("in_place", "group", "restart", "stock")
STATE_BYTES_PER_PARAMETER = 12
"""fp32 weight and two Adam moments."""


class MemoryWatch:
    """Samples what a run's slots and engines take; start it beside the run.

    Engines: private memory, which for those built ahead is what the next generation costs.
    """

    def __init__(self, changes: Changes) -> None:
        self._changes = changes
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.slot_peak_bytes = 0
        self.engine_bytes: list[int] = []

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        agent: Any = None
        while not self._over.wait(0.05):
            run_id = self._changes.run_id
            if not run_id:
                continue
            sizes = [_allocated_bytes(path) for path in glob.glob(f"/dev/shm/eadt-{run_id}-*/slot-*")]
            self.slot_peak_bytes = max(self.slot_peak_bytes, sum(sizes))
            try:
                if agent is None:
                    name = agent_prefix(run_id) + ray.get_runtime_context().get_node_id()
                    agent = ray.get_actor(name, namespace=NAMESPACE)
                pids = ray.get(agent.engine_pids.remote(), timeout=5)
            except (ValueError, RayError):
                continue
            self.engine_bytes.append(sum(map(_private_bytes, pids.values())))


def _allocated_bytes(path: str) -> int:
    try:
        return os.stat(path).st_blocks * 512
    except FileNotFoundError:
        return 0


def _private_bytes(pid: int) -> int:
    try:
        info = psutil.Process(pid).memory_info()
    except psutil.Error:
        return 0
    return int(info.rss - info.shared)


class Bench:
    """The ways, on one Ray cluster."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._number = 0
        self.num_params: dict[str, int] = {}
        self.troubles: list[str] = []

    def eadt(
        self, size: str, mode: str, stage: int, num_resizes: int, **sections: Any
    ) -> list[dict[str, Any]]:
        """Resizes of one run of EADT."""
        return self._eadt(size, mode, stage, num_resizes, sections)[0]

    def eadt_memory(
        self, size: str, num_resizes: int, ahead: str
    ) -> tuple[list[dict[str, Any]], MemoryWatch]:
        """Resizes in place with one slot and no saving between, and the memory that they took."""
        sections = {
            "elastic": {"prepare_ahead": ahead},
            "checkpoint": {"every_steps": None, "snapshot_every_steps": None},
        }
        return self._eadt(size, "in_place", 1, num_resizes, sections)

    def _eadt(
        self, size: str, mode: str, stage: int, num_resizes: int, sections: dict[str, Any]
    ) -> tuple[list[dict[str, Any]], MemoryWatch]:
        elastic = {"mode": mode, **sections.pop("elastic", {})}
        config = run_config(
            WORKLOADS[size],
            self._folder,
            self._name(mode, stage),
            zero_stage=stage,
            elastic=elastic,
            **sections,
        )
        changes = Changes([even_setpoint(1 + index % 2) for index in range(num_resizes)])
        with MemoryWatch(changes) as memory:
            result = EnergyAdaptiveTrainer(config, on_event=changes, fresh=True).fit()
        shutil.rmtree(result.run_folder, ignore_errors=True)
        self.num_params[size] = changes.num_params
        self.troubles += [
            f"{mode}, stage {stage}: {fault['kind']}: {fault['detail']}" for fault in changes.faults
        ]
        self.troubles += [f"{mode}, stage {stage}: {note}" for note in changes.notes]
        if result.error is not None:
            self.troubles.append(f"{mode}, stage {stage}: the run failed: {result.error}")
        elif len(changes.rows) < num_resizes:
            self.troubles.append(f"{mode}, stage {stage}: {len(changes.rows)} of {num_resizes} resizes came")
        return [row for row in changes.rows if row["kind"] == mode], memory

    def stock(self, size: str, stage: int, num_resizes: int) -> list[dict[str, Any]]:
        """Resizes of one run of stock Ray Train."""
        from stock import elastic

        workload = WORKLOADS[size]
        every = SETTLE_STEPS + elastic.STEPS_JUDGED
        plan = {every * (index + 1): 1 + index % 2 for index in range(num_resizes)}
        folder = self._folder / self._name("stock", stage)
        rows = elastic.run(
            folder,
            folder.name,
            {**_data(workload), "zero_stage": stage},
            num_workers=2,
            resizes=plan,
            max_steps=every * (num_resizes + 1),
        )
        shutil.rmtree(folder, ignore_errors=True)
        return elastic.pauses(rows)

    def _name(self, way: str, stage: int) -> str:
        self._number += 1
        return f"bench-{way.replace('_', '-')}-{stage}-{self._number}"


def _data(workload: Workload) -> dict[str, Any]:
    training = workload.training()
    prepared = prepare_dataset(
        TrainingConfig.model_validate(training), default_cache_dir(), 0, lambda _: None
    )
    return {"training": training, "data_path": str(prepared.path), "vocab_size": prepared.vocab_size}


def measure_ways(
    bench: Bench, ways: list[tuple[str, int]], count: int, num_rounds: int
) -> list[dict[str, Any]]:
    """Rows of the first table; each way resizes ``count`` times down and up, over all rounds."""
    found: dict[tuple[str, int], list[dict[str, Any]]] = {way: [] for way in ways}
    for number in range(num_rounds):
        share = count // num_rounds + int(number < count % num_rounds)
        # In turn forward and backward: a drift of the machine then meets every way alike.
        for way, stage in ways if number % 2 == 0 else reversed(ways):
            if not share:
                continue
            begun_s = time.perf_counter()
            if way == "stock":
                rows = bench.stock("3M", stage, 2 * share)
            else:
                rows = bench.eadt("3M", way, stage, 2 * share)
            found[way, stage] += [{**row, "round": number} for row in rows]
            seconds = ", ".join(f"{row['seconds']:.2f}" for row in rows)
            say(f"round {number + 1} of {num_rounds}, {way}, ZeRO {stage}: pauses {seconds} s "
                f"({time.perf_counter() - begun_s:.0f} s)")  # fmt: skip
    return [
        _row(samples, way=way, zero_stage=stage, direction=direction)
        for (way, stage), rows in found.items()
        for direction, samples in _by_direction(rows).items()
        if samples
    ]


def measure_sizes(
    bench: Bench, sizes: Iterable[str], aheads: Iterable[str], count: int
) -> list[dict[str, Any]]:
    """Rows of the second table."""
    table = []
    for size in sizes:
        for ahead in aheads:
            samples, memory = bench.eadt_memory(size, 2 * count, ahead)
            if not samples:
                continue
            state_bytes = bench.num_params[size] * STATE_BYTES_PER_PARAMETER
            row = _row(samples, way="in_place", zero_stage=1, direction="both", size=size)
            engine = memory.engine_bytes
            table.append(
                {
                    **row,
                    "model_parameters": bench.num_params[size],
                    "prepare_ahead": ahead,
                    "state_bytes": state_bytes,
                    "slot_peak_bytes": memory.slot_peak_bytes,
                    "slot_over_state": memory.slot_peak_bytes / state_bytes,
                    "engines_median_bytes": int(statistics.median(engine)),
                    "engines_peak_bytes": max(engine),
                }
            )
            over = table[-1]["slot_over_state"]
            say(f"{size}, built ahead {ahead}: p50 {row['p50_s']:.2f} s, slots {over:.2f} of the state")
    return table


def _by_direction(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    return {
        "down": [row for row in rows if row["to_workers"] < row["from_workers"]],
        "up": [row for row in rows if row["to_workers"] > row["from_workers"]],
    }


def _row(samples: list[dict[str, Any]], **facts: Any) -> dict[str, Any]:
    seconds = [sample["seconds"] for sample in samples]
    names = dict.fromkeys(name for sample in samples for name in sample["parts"])
    keys = ("seconds", "ordinary_step_s", "lost_steps", "parts", "round", "from_workers", "to_workers")
    return {
        **facts,
        "n": len(samples),
        "p50_s": quantile(seconds, 0.5),
        "p95_s": quantile(seconds, 0.95),
        "min_s": min(seconds),
        "max_s": max(seconds),
        "parts_p50_s": {
            name: statistics.median(s["parts"][name] for s in samples if name in s["parts"]) for name in names
        },
        "lost_steps": sum(sample["lost_steps"] for sample in samples),
        "samples": [{key: sample[key] for key in keys if key in sample} for sample in samples],
    }


def add_ratios(rows: list[dict[str, Any]]) -> None:
    """How many times shorter than stock, at the same stage where stock was measured at it."""
    stock = {(row["zero_stage"], row["direction"]): row for row in rows if row["way"] == "stock"}
    for row in rows:
        rival = stock.get((row["zero_stage"], row["direction"])) or next(
            (other for (_, direction), other in stock.items() if direction == row["direction"]), None
        )
        if rival is not None:
            row["stock_p50_over_this"] = rival["p50_s"] / row["p50_s"] if row["p50_s"] else None
            row["stock_p95_over_this"] = rival["p95_s"] / row["p95_s"] if row["p95_s"] else None
            row["stock_zero_stage"] = rival["zero_stage"]


def table(result: dict[str, Any]) -> str:
    """Both tables, for people."""
    lines = [
        f"Pause of a resize, {result['model_parameters'] / 1e6:.1f} million parameters",
        f"{'way':<10}{'ZeRO':>5}{'':>6}{'n':>4}{'p50 s':>8}{'p95 s':>8}{'stock/this':>12}  parts (p50, s)",
    ]
    for row in result["rows"]:
        ratio = row.get("stock_p50_over_this")
        parts = ", ".join(f"{name[:-2]} {value:.2f}" for name, value in row["parts_p50_s"].items())
        lines.append(
            f"{row['way']:<10}{row['zero_stage']:>5}{row['direction']:>6}{row['n']:>4}{row['p50_s']:>8.3f}"
            f"{row['p95_s']:>8.3f}{'-' if ratio is None else f'{ratio:.1f}':>12}  {parts}"
        )
    lines.append("prepare: from the fork of the next engines; it overlaps with training, but for restart.")
    if result["sizes"]:
        lines += [
            "",
            "In place by size, one slot (checkpoints and snapshots off), ZeRO 1",
            f"{'parameters':>12}{'ahead':>7}{'n':>4}{'p50 s':>8}{'p95 s':>8}{'slots/state':>13}"
            f"{'slots MB':>10}{'engines MB':>12}{'peak MB':>9}",
        ]
        for row in result["sizes"]:
            lines.append(
                f"{row['model_parameters'] / 1e6:>11.1f}M{row['prepare_ahead']:>7}{row['n']:>4}"
                f"{row['p50_s']:>8.3f}{row['p95_s']:>8.3f}{row['slot_over_state']:>13.2f}"
                f"{row['slot_peak_bytes'] / 1e6:>10.1f}{row['engines_median_bytes'] / 1e6:>12.0f}"
                f"{row['engines_peak_bytes'] / 1e6:>9.0f}"
            )
        lines.append(
            "engines: private memory of all, while one generation trains; peak: with the next one beside."
        )
    lines += [f"note: {text}" for text in dict.fromkeys(result["troubles"])]
    return "\n".join(lines)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def _names(allowed: Iterable[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = [part for part in text.split(",") if part]
        unknown = set(names) - set(allowed)
        if unknown:
            raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: not one of {', '.join(allowed)}")
        return names

    return parse


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--count", type=int, help="resizes down, and as many up, of each way (default 10)")
    parser.add_argument("--rounds", type=int, default=2, help="rounds in which ways take turns (default 2)")
    parser.add_argument("--quick", action="store_true", help="one of each, ZeRO 1 only, no second table")
    parser.add_argument("--ways", type=_names(WAYS), default=list(WAYS), help="comma-separated")
    parser.add_argument("--stages", type=_numbers, help="ZeRO stages in place (default 1,2,3)")
    parser.add_argument("--other-stages", type=_numbers, default=[1], help="ZeRO stages of the other ways")
    parser.add_argument(
        "--sizes", type=_names(WORKLOADS), help="models of the second table (default 1M,10M,100M)"
    )
    parser.add_argument("--size-count", type=int, default=5, help="of the second table (default 5)")
    parser.add_argument(
        "--aheads",
        type=_names(("auto", "never")),
        default=["auto"],
        help="second table: auto (engines built ahead), never, or both",
    )
    add_output_options(parser, RESULT)
    arguments = parser.parse_args()
    count = arguments.count or (1 if arguments.quick else 10)
    stages = arguments.stages or ([1] if arguments.quick else [1, 2, 3])
    sizes = arguments.sizes
    if sizes is None:
        sizes = [] if arguments.quick else ["1M", "10M", "100M"]
    ways = [(way, stage) for way in arguments.ways
            for stage in (stages if way == "in_place" else arguments.other_stages)]  # fmt: skip
    # Ray Train's controller then looks at its workers every 0.5 s, not 2 s: to stock's advantage.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    begun_s = time.perf_counter()
    machine = hardware()
    folder = Path(tempfile.mkdtemp(prefix="eadt-bench-"))
    try:
        with ray_cluster():
            bench = Bench(folder)
            rows = measure_ways(bench, ways, count, arguments.rounds)
            by_size = measure_sizes(bench, sizes, arguments.aheads, arguments.size_count)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    add_ratios(rows)
    result = {
        "benchmark": "resize",
        "model_parameters": bench.num_params.get("3M", 0),
        "config": {
            "count": count,
            "rounds": arguments.rounds,
            "size_count": arguments.size_count,
            "workloads": {name: vars(WORKLOADS[name]) for name in ("3M", *sizes)},
            "train_health_check_interval_s": 0.5,
        },
        "hardware": machine,
        "versions": versions(),
        "seconds": time.perf_counter() - begun_s,
        "rows": rows,
        "sizes": by_size,
        "troubles": bench.troubles,
    }
    output(result, table(result), arguments, RESULT)


if __name__ == "__main__":
    main()
