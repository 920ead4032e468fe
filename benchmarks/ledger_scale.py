"""What a month's ledger costs: bytes on disk, and seconds and memory of adding it all up again.

    python benchmarks/ledger_scale.py [--days 30] [--nodes 32] [--gpus-per-node 8] [--step-s 1] [--runs 3]
                                      [--json] [--save]

Writes a made-up run through the real row types and the real files (rotation and compression too), then opens
its books from the whole ledger, each time in a process of its own: `seconds`, `peak_bytes` (its high-water
mark, interpreter and imports included) and `bytes` are the medians. A quarter of the days is done as well, to
show how all three grow. The rival in the same runs: `json.loads` on every line and a dict of floats. Beside
them: decoding rows without adding them up, opening from the digest, and what appending a row costs who does.

The run: energy of every node each 10 s and wherever the use changes, some of it stale or unknown; steps in
blocks of 5 s; job time each 30 s; the cards' state each minute; observations each 30 s; a decision each half
hour; validations each 2000 s, checkpoints each hour, a change of setting each 6 hours, a rollback of 300
steps each day, one crash with a second session halfway. Figures are drawn at random to the digits that EADT
writes: constants would compress better than a real run's. `--days 1` takes about a minute.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from common import add_output_options, hardware, output, quantile, say, versions

from eadt.clock import SYSTEM_CLOCK
from eadt.record.ledger import LedgerWriter, iter_ledger, open_books
from eadt.record.ledger.output import LedgerOutput
from eadt.record.ledger.writer import ROTATE_BYTES, ROTATE_S
from eadt.record.rows import (
    AnyRow,
    ChangeRow,
    CheckpointRow,
    DecisionRow,
    DevicesRow,
    EnergyRow,
    FaultRow,
    GenerationRow,
    MeteredComponent,
    NodeRow,
    NoteRow,
    ObservationRow,
    RollbackRow,
    SessionRow,
    StepsRow,
    TimeRow,
    ValidationRow,
    encode,
)
from eadt.testing.clock import FakeClock

RESULT = Path(__file__).parent / "results" / "ledger_scale.json"
BATCH, SEQUENCE = 512, 2048
MEASURES = ("books", "rows", "digest", "rival")
LONGEST_CHUNK_S = 600.0
POWER_W = {"useful": 610.0, "validation": 560.0, "checkpoint": 210.0, "change": 190.0, "startup": 160.0}
BEGAN_UNIX_S = 1_760_000_000.0


class MadeUpRun:
    """Rows of a run that never was, in the order of time.

    Attributes:
        now: Seconds since its begin.
        energy_mj: All energy so far, in thousandths of a joule: what the books must come to.
    """

    def __init__(self, num_nodes: int, gpus_per_node: int, step_s: float) -> None:
        self.rng = np.random.default_rng(20260101)
        self.step_s = step_s
        self.nodes = [self.rng.bytes(28).hex() for _ in range(num_nodes)]
        self.boot_s = self.rng.uniform(1e5, 1e7, num_nodes).tolist()
        self.components = ["cpu", "dram", *(f"gpu{k}" for k in range(gpus_per_node))]
        gpu_w = self.rng.normal(1.0, 0.03, (num_nodes, gpus_per_node))
        self.relative = np.concatenate([np.tile([0.45, 0.07], (num_nodes, 1)), gpu_w], axis=1)
        self.last_cut = np.zeros(num_nodes)
        self.now = self.session_began = 0.0
        self.step = self.generation = self.setting = self.num_decisions = 0
        self.setpoint: dict[str, Any] = {}
        self.energy_mj = 0

    @property
    def at_s(self) -> float:
        return round(self.now - self.session_began, 6)

    def rows(self, seconds: float) -> Iterator[list[AnyRow]]:
        """Everything, in lists of some minutes each."""
        yield self.begin_session(0)
        yield from self.phase("startup", 180.0)
        yield self.begin_generation()
        every: dict[str, float] = {
            "validation": 2000.0, "checkpoint": 3600.0, "change": 21600.0, "rollback": 86400.0,
            "crash": seconds / 2,
        }  # fmt: skip
        due = dict(every)
        while self.now < seconds:
            event = min(due, key=due.__getitem__)
            yield from self.phase("useful", max(min(due[event], seconds) - self.now, self.step_s))
            due[event] = self.now + every[event] if event != "crash" else math.inf
            if self.now < seconds:
                yield from getattr(self, event)()

    # -- events ---------------------------------------------------------------------------------

    def begin_session(self, resumed_step: int) -> list[AnyRow]:
        self.session_began, self.step, self.generation, self.setting = self.now, resumed_step, 0, 0
        rows: list[AnyRow] = [
            SessionRow(
                run_id="ledger-scale", name="ledger-scale", resumed_step=resumed_step, train_batch_size=BATCH,
                sequence_length=SEQUENCE, max_steps=10_000_000,
                config={"training": {"max_steps": 10_000_000}},
            )
        ]  # fmt: skip
        for index, node in enumerate(self.nodes):
            metered = [
                MeteredComponent(
                    component=name,
                    source="nvml_energy_counter" if name.startswith("gpu") else "rapl",
                    quality="measured",
                    identity=f"{node[:12]}-{name}",
                    resolution_s=0.1,
                    relative_uncertainty=0.05,
                )
                for name in self.components
            ]
            rows.append(
                NodeRow(
                    node=node, hostname=f"node{index}", boot_id=f"boot-{index}", num_gpus=len(metered) - 2,
                    monotonic_s=round(self.boot_s[index] + self.now, 6), at_s=0.0, num_cores=96,
                    components=metered,
                )
            )  # fmt: skip
        self.last_cut[:] = self.now
        return self.timed(rows)

    def begin_generation(self) -> list[AnyRow]:
        self.generation += 1
        self.setting += 1
        self.setpoint = {
            "num_workers": len(self.nodes) * (len(self.components) - 2), "workers_per_gpu": 1,
            "mps_active_thread_percentage": 100, "power_limit_w": int(self.rng.integers(400, 700)),
            "precision": "bf16", "num_frozen_layers": 0, "paused": False,
        }  # fmt: skip
        started = GenerationRow(
            event="started", generation=self.generation, setting=self.setting, step=self.step,
            setpoint=self.setpoint, world_size=256, micro_batch=2, accumulation=1, at_s=self.at_s,
        )  # fmt: skip
        return self.timed([started])

    def validation(self) -> Iterator[list[AnyRow]]:
        yield from self.phase("validation", 20.0)
        loss = float(np.float32(self.rng.normal(2.6, 0.01)))
        yield self.timed(
            [ValidationRow(step=self.step, loss=loss, generation=self.generation, at_s=self.at_s)]
        )

    def checkpoint(self) -> Iterator[list[AnyRow]]:
        yield from self.phase("checkpoint", 30.0)
        path = f"checkpoints/step-{self.step}"
        yield self.timed(
            [CheckpointRow(step=self.step, path=path, kind="periodic", seconds=30.0, at_s=self.at_s)]
        )

    def change(self) -> Iterator[list[AnyRow]]:
        before, seconds = self.setpoint, float(self.rng.uniform(20, 60))
        yield from self.phase("change", seconds)
        yield self.begin_generation()
        change = ChangeRow(
            kind="group", from_workers=256, to_workers=256, seconds=seconds, ordinary_step_s=self.step_s,
            parts={"build_s": seconds / 2, "first_step_s": 2.0}, setpoint_before=before,
            setpoint_after=self.setpoint, decision_id=f"d{self.num_decisions}", at_s=self.at_s,
        )  # fmt: skip
        yield self.timed([change])

    def rollback(self) -> Iterator[list[AnyRow]]:
        self.step -= 300
        rows: list[AnyRow] = [
            FaultRow(kind="engine", node=self.nodes[-1], detail="died", at_s=self.at_s),
            RollbackRow(generation=self.generation, resumed_step=self.step, at_s=self.at_s),
        ]
        yield self.timed(rows)
        yield from self.change()

    def crash(self) -> Iterator[list[AnyRow]]:
        yield self.begin_session(self.step - 100)
        yield from self.phase("startup", 120.0)
        yield self.begin_generation()

    # -- what goes on meanwhile -----------------------------------------------------------------

    def phase(self, use: str, seconds: float) -> Iterator[list[AnyRow]]:
        """Time with one use; ``useful`` time consists of whole steps."""
        end = self.now + seconds
        while self.now < end - 1e-9:
            begun, length = self.now, min(LONGEST_CHUNK_S, end - self.now)
            labels = {"use": use, "generation": self.generation, "setting": self.setting}
            rows: list[tuple[float, AnyRow]] = []
            first_step = self.step
            if use == "useful":
                length = self.steps(rows, length)
            self.energy(rows, begun, length, first_step, labels)
            self.meanwhile(rows, begun, length, first_step, labels)
            self.now = begun + length
            rows.sort(key=lambda item: item[0])
            for at, row in rows:
                row.unix_s = round(BEGAN_UNIX_S + at + 0.05, 3)
            yield [row for _, row in rows]

    def steps(self, rows: list[tuple[float, AnyRow]], length: float) -> float:
        num = max(1, round(length / self.step_s))
        seconds = self.rng.lognormal(math.log(self.step_s), 0.02, num)
        ends = self.now + np.cumsum(seconds)
        begins = np.round(self.boot_s[0] + ends - seconds, 6).tolist()
        progress = np.arange(self.step, self.step + num)
        losses = (self.rng.normal(2.5, 0.02, num) + np.exp(-progress / 1e5)).astype(np.float32).tolist()
        rates = (1.5e-4 * (1 + np.cos(progress / 1e7))).tolist()
        waits = np.round(self.rng.exponential(0.01 * self.step_s, num), 6).tolist()
        lengths = np.round(seconds, 6).tolist()
        block = max(1, round(5.0 / self.step_s))
        for k in range(0, num, block):
            part = slice(k, k + block)
            steps = StepsRow(
                node=self.nodes[0], generation=self.generation, setting=self.setting,
                first_step=self.step + k + 1, t0=begins[part], seconds=lengths[part], loss=losses[part],
                learning_rate=rates[part], samples=BATCH, tokens=BATCH * SEQUENCE, world_size=256,
                input_s=waits[part],
            )  # fmt: skip
            rows.append((float(ends[min(k + block, num) - 1]), steps))
        self.step += num
        return float(ends[-1] - self.now)

    def energy(
        self,
        rows: list[tuple[float, AnyRow]],
        begun: float,
        length: float,
        first_step: int,
        labels: dict[str, Any],
    ) -> None:
        num_cuts = max(1, math.ceil(length / 10.0))
        cuts = begun + np.linspace(length / num_cuts, length, num_cuts)
        waited = np.round(self.rng.exponential(0.01, (len(self.nodes), num_cuts)).clip(0, 1), 6).tolist()
        for index, node in enumerate(self.nodes):
            edges = np.concatenate([[self.last_cut[index]], cuts + self.rng.uniform(0.0, 0.02, num_cuts)])
            self.last_cut[index] = edges[-1]
            seconds = np.diff(edges)
            watts = POWER_W[labels["use"]] * self.relative[index]
            noise = self.rng.normal(1.0, 0.02, (num_cuts, len(watts)))
            joules = np.round(watts * noise * seconds[:, None], 3).tolist()
            times = np.round(self.boot_s[index] + edges, 6).tolist()
            odd = self.rng.random(num_cuts)
            for k, values in enumerate(joules):
                step = first_step
                if labels["use"] == "useful":
                    step += round((self.step - first_step) * k / num_cuts)
                row = EnergyRow(
                    node=node, t0=times[k], t1=times[k + 1], joules=values, step=step,
                    shared={"input": waited[index][k]} if labels["use"] == "useful" else {}, **labels,
                )  # fmt: skip
                if odd[k] < 2e-3:
                    name = self.components[-1]
                    if odd[k] < 2e-4:
                        values[-1] = None
                        row.unknown_s[name] = round(float(seconds[k]), 6)
                        row.why_unknown[name] = "the reading did not come in time"
                    else:
                        row.qualities[name] = "stale"
                self.energy_mj += sum(round(value * 1000) for value in values if value is not None)
                rows.append((float(edges[k + 1]), row))

    def meanwhile(
        self,
        rows: list[tuple[float, AnyRow]],
        begun: float,
        length: float,
        first_step: int,
        labels: dict[str, Any],
    ) -> None:
        """Job time, observations, decisions, and how the cards do."""
        began_s = begun - self.session_began
        edges = [*np.arange(0.0, length, 30.0).tolist(), length]
        for t0, t1 in itertools.pairwise(edges):
            shared = {"input": round(float(self.rng.exponential(0.01)) % 1.0, 6)}
            rows.append(
                (
                    begun + t1,
                    TimeRow(
                        t0_s=began_s + t0, t1_s=began_s + t1, step=first_step,
                        shared=shared if labels["use"] == "useful" else {}, **labels,
                    ),
                )
            )  # fmt: skip
            if labels["use"] == "useful":
                power_w = float(self.rng.normal(256 * 610.0, 900.0))
                throughput = float(self.rng.normal(BATCH / self.step_s, 2.0))
                rows.append(
                    (
                        begun + t1,
                        ObservationRow(
                            at_s=began_s + t1, window_s=30.0, setpoint=self.setpoint, num_gpus=256,
                            samples_per_second=throughput, power_w=power_w, num_steps=round(30 / self.step_s),
                            power_per_gpu_w=power_w / 256, efficiency_samples_per_j=throughput / power_w,
                        ),
                    )
                )  # fmt: skip
        for at in range(math.ceil(begun / 1800.0) * 1800, math.floor(begun + length), 1800):
            self.num_decisions += 1
            decision = DecisionRow(
                decision_id=f"d{self.num_decisions}", action="hold", outcome="held",
                reason=f"{self.rng.normal(610, 5):.1f} W per GPU is within bounds",
                at_s=at - self.session_began,
            )  # fmt: skip
            rows.append((float(at), decision))
        num = len(self.components) - 2
        for minute in range(math.ceil(begun / 60.0), math.floor((begun + length) / 60.0)):
            for index, node in enumerate(self.nodes):
                end = self.boot_s[index] + 60.0 * minute
                row = DevicesRow(
                    node=node, t0=round(end - 60.0, 6), t1=round(end, 6), components=self.components[2:],
                    utilisation_fraction=np.round(self.rng.beta(50, 3, num), 4).tolist(),
                    memory_used_bytes=self.rng.integers(60 << 30, 70 << 30, num).tolist(),
                    memory_total_bytes=[80 << 30] * num,
                    temperature_c=self.rng.integers(55, 80, num).astype(float).tolist(),
                    sm_clock_mhz=np.round(self.rng.uniform(1500, 1900, num), 1).tolist(),
                    throttled=[{"power_cap": round(float(self.rng.beta(2, 8)), 4)} for _ in range(num)],
                    foreign_processes=[0] * num,
                )  # fmt: skip
                rows.append((60.0 * minute, row))

    def timed(self, rows: list[AnyRow]) -> list[AnyRow]:
        for row in rows:
            row.unix_s = round(BEGAN_UNIX_S + self.now + 0.05, 3)
        return rows


def generate(folder: Path, days: float, arguments: argparse.Namespace) -> dict[str, Any]:
    """Write a run's ledger, as its writer does but without waiting for a clock."""
    run = MadeUpRun(arguments.nodes, arguments.gpus_per_node, arguments.step_s)
    clock = FakeClock(unix_s=BEGAN_UNIX_S)
    files = LedgerOutput(folder, clock, rotate_bytes=ROTATE_BYTES, rotate_s=ROTATE_S)
    num_rows, begun_s = 0, time.perf_counter()
    for rows in run.rows(days * 86400.0):
        files.take([encode(row) for row in rows])
        files.drain()
        while files.compress_piece():
            pass
        clock.advance(BEGAN_UNIX_S + run.now - clock.unix_s())
        num_rows += len(rows)
    files.close()
    return {
        "days": days,
        "num_rows": num_rows,
        "energy_mj": run.energy_mj,
        "num_steps_ended_at": run.step,
        "generating_s": time.perf_counter() - begun_s,
    }


# -- measured in a process of its own -------------------------------------------------------------


def add_up(folder: Path, *, from_ledger: bool) -> dict[str, Any]:
    opened = open_books(folder, from_ledger=from_ledger)
    books = opened.books
    energy = books.energy()
    return {
        "num_rows": opened.damage.num_rows,
        "is_damaged": bool(opened.damage),
        "why_all": opened.why_all,
        "energy_j": None if energy is None else energy.value,
        "optimizer_steps": books.optimizer_steps,
        "lost_steps": books.lost_steps,
        "num_dropped": books.num_dropped,
        "num_unusable": books.num_unusable,
    }


def read_rows(folder: Path) -> dict[str, Any]:
    return {"num_rows": sum(1 for _ in iter_ledger(folder))}


def rival(folder: Path) -> dict[str, Any]:
    """Energy by use and component, without attribution, uncertainty, gaps, steps or time."""
    joules: dict[str, float] = {}
    columns: dict[str, list[str]] = {}
    num_rows = 0
    for path in sorted(folder.glob("events-*"), key=lambda path: int(path.name.split(".")[0][7:])):
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
            for line in lines:
                row = json.loads(line)
                num_rows += 1
                if row["type"] == "node":
                    columns[row["node"]] = [component["component"] for component in row["components"]]
                elif row["type"] == "energy":
                    for component, value in zip(columns[row["node"]], row["joules"], strict=True):
                        if value is not None:
                            key = f"{row['use']}/{component}"
                            joules[key] = joules.get(key, 0.0) + value
    return {"num_rows": num_rows, "energy_j": sum(joules.values())}


def measure_here(what: str, folder: Path) -> dict[str, Any]:
    measures: dict[str, Callable[[Path], dict[str, Any]]] = {
        "books": lambda path: add_up(path, from_ledger=True),
        "digest": lambda path: add_up(path, from_ledger=False),
        "rows": read_rows,
        "rival": rival,
    }
    begun_s, begun_cpu_s = time.perf_counter(), time.process_time()
    found = measures[what](folder)
    seconds, cpu_seconds = time.perf_counter() - begun_s, time.process_time() - begun_cpu_s
    # Of this process alone; getrusage would have its parent's in it.
    status = Path("/proc/self/status").read_text()
    peak_kib = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_bytes": peak_kib * 1024, **found}


def measure(what: str, folder: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, "--measure", what, "--folder", str(folder)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result: dict[str, Any] = json.loads(done.stdout)
    say(
        f"  {what}: {result['seconds']:.1f} s, {result['cpu_seconds']:.1f} s of a core, "
        f"{result['peak_bytes'] / 2**20:.0f} MiB"
    )
    return result


# -- all of it ------------------------------------------------------------------------------------


def append_us(folder: Path, num_rows: int = 20_000) -> dict[str, float]:
    """What a row costs who appends it, in µs, while the thread writes, syncs and keeps the digest."""
    run = MadeUpRun(32, 8, 1.0)
    rows = [row for _, rows in zip(range(30), run.rows(86400.0), strict=False) for row in rows][:num_rows]
    taken_us = []
    with LedgerWriter(folder, SYSTEM_CLOCK, opened=open_books(folder)) as writer:
        for row in rows:
            begun_ns = time.perf_counter_ns()
            writer.append(row)
            taken_us.append((time.perf_counter_ns() - begun_ns) / 1000)
            if len(taken_us) % 100 == 0:
                time.sleep(0.002)
    return {
        "p50_us": quantile(taken_us, 0.5),
        "p99_us": quantile(taken_us, 0.99),
        "max_us": max(taken_us),
        "num_rows": len(taken_us),
    }


def size(days: float, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One size: write it, and measure it in interleaved runs."""
    say(f"writing {days:g} days of {arguments.nodes} nodes")
    written = generate(folder, days, arguments)
    num_bytes = sum(path.stat().st_size for path in folder.glob("events-*"))
    say(f"  {written['num_rows']} rows, {num_bytes / 2**20:.0f} MiB, in {written['generating_s']:.0f} s")
    # A next session opens the books, and its writer leaves a digest.
    with LedgerWriter(folder, SYSTEM_CLOCK, opened=open_books(folder)) as writer:
        writer.append(NoteRow(code="EADT-000", text="the end"))
    runs = [{what: measure(what, folder) for what in MEASURES} for _ in range(arguments.runs)]
    of_runs = {what: [run[what] for run in runs] for what in MEASURES}
    for found in of_runs["books"]:
        if found["energy_j"] != written["energy_mj"] / 1000:
            raise SystemExit(f"the books are wrong: {found['energy_j']} J, not {written['energy_mj'] / 1000}")
    measured = ("seconds", "cpu_seconds", "peak_bytes")
    median = {
        what: {
            "seconds": statistics.median(found["seconds"] for found in all_found),
            "seconds_of_runs": [found["seconds"] for found in all_found],
            "cpu_seconds_of_runs": [found["cpu_seconds"] for found in all_found],
            "peak_bytes": statistics.median(found["peak_bytes"] for found in all_found),
            "peak_bytes_of_runs": [found["peak_bytes"] for found in all_found],
            "found": {k: v for k, v in all_found[0].items() if k not in measured},
        }
        for what, all_found in of_runs.items()
    }
    digest_bytes = (folder / "digest.json").stat().st_size
    return {**written, "bytes": num_bytes, "digest_bytes": digest_bytes, **median}


def benchmark(arguments: argparse.Namespace) -> dict[str, Any]:
    config = {name: getattr(arguments, name) for name in ("days", "nodes", "gpus_per_node", "step_s", "runs")}
    machine = hardware()
    with tempfile.TemporaryDirectory(prefix="eadt-ledger-scale-") as folder:
        appending = append_us(Path(folder) / "appending")
        quarter = size(arguments.days / 4, arguments, Path(folder) / "quarter")
        whole = size(arguments.days, arguments, Path(folder) / "whole")
    growth = {name: whole["books"][name] / quarter["books"][name] for name in ("seconds", "peak_bytes")} | {
        name: whole[name] / quarter[name] for name in ("bytes", "num_rows")
    }
    return {
        "benchmark": "ledger_scale",
        "config": config,
        "hardware": machine,
        "versions": versions(),
        "bytes": whole["bytes"],
        "seconds": whole["books"]["seconds"],
        "peak_bytes": whole["books"]["peak_bytes"],
        "rival_seconds_over_this": whole["rival"]["seconds"] / whole["books"]["seconds"],
        "growth_at_4_times_the_days": growth,
        "append": appending,
        "sizes": [quarter, whole],
    }


def table(result: dict[str, Any]) -> str:
    lines = ["{:>8} {:>11} {:>9}  {:<8} {:>9} {:>15} {:>9}".format(
        "days", "rows", "MiB", "what", "seconds", "(runs)", "peak MiB"
    )]  # fmt: skip
    for one in result["sizes"]:
        for what in MEASURES:
            found = one[what]
            spread = f"{min(found['seconds_of_runs']):.1f}-{max(found['seconds_of_runs']):.1f}"
            lines.append(
                f"{one['days']:>8g} {one['num_rows']:>11} {one['bytes'] / 2**20:>9.1f}  {what:<8} "
                f"{found['seconds']:>9.2f} {spread:>15} {found['peak_bytes'] / 2**20:>9.0f}"
            )
    grown = result["growth_at_4_times_the_days"]
    growth = ", ".join(f"{name} × {value:.2f}" for name, value in grown.items())
    append = [f"{name[:-3]} {value:.1f}" for name, value in result["append"].items() if name.endswith("_us")]
    lines += [
        "books: all from the ledger; rows: decoded only; digest: opened from it; rival: json.loads, a dict",
        f"4 times the days: {growth}",
        f"appending a row, µs: {', '.join(append)}",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--days", type=float, default=30.0)
    parser.add_argument("--nodes", type=int, default=32)
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--step-s", type=float, default=1.0, help="length of a step in s")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--measure", choices=MEASURES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    add_output_options(parser, RESULT)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure_here(arguments.measure, arguments.folder)))
        return
    result = benchmark(arguments)
    output(result, table(result), arguments, RESULT)


if __name__ == "__main__":
    main()
