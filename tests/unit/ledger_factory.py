"""SYNTHETIC ledgers for tests of the report: no run ever produced these numbers.

:class:`Rows` writes rows one by one with short calls; :func:`synthetic_run` is a whole pretended run
of two nodes with everything in it that a report shows.
"""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

from eadt.record.ledger import LedgerWriter
from eadt.testing.clock import FakeClock

START_UNIX_S = 1_750_000_000.0
NODE, OTHER = "synthetic-node-a", "synthetic-node-b"


class Rows:
    """Rows in a ledger's order; times ``t`` are node-monotonic seconds, wall time is ``t`` + start."""

    def __init__(self, *, origin_unix_s: float = START_UNIX_S) -> None:
        self.rows: list[dict[str, Any]] = []
        self.seq = 0
        self.origin_unix_s = origin_unix_s
        self.now_s = 0.0

    def new_file(self) -> None:
        """What follows is written by another writer."""
        self.seq = 0

    def add(self, row_type: str, now_s: float | None = None, /, **columns: Any) -> None:
        self.seq += 1
        self.now_s = max(self.now_s, self.now_s if now_s is None else now_s)
        unix_s = self.origin_unix_s + self.now_s
        self.rows.append({"type": row_type, "seq": self.seq, "unix_s": unix_s, **columns})

    def run(self, event: str = "started", status: str = "running", **columns: Any) -> None:
        self.add("run", event=event, status=status, run_id="synthetic", name="synthetic", **columns)

    def node(
        self, node: str = NODE, t: float = 0.0, *, origin_s: float = 0.0, components: str = "cpu"
    ) -> None:
        anchor = {"monotonic_s": t + origin_s, "unix_s": self.origin_unix_s + t}
        sources = [
            {"component": c, "source": "synthetic", "quality": "simulated"} for c in components.split()
        ]
        self.add("node", node=node, hostname=node, anchor=anchor, sources=sources, num_gpus=0, num_cores=2)

    def energy(
        self,
        t0: float,
        t1: float,
        energy_j: float | None,
        *,
        component: str = "cpu",
        node: str = NODE,
        quality: str = "simulated",
    ) -> None:
        self.add(
            "energy",
            t1,
            node=node,
            t0=t0,
            t1=t1,
            component=component,
            energy_j=energy_j,
            quality=quality,
            source="synthetic",
            gap=energy_j is None,
        )

    def phase(self, t: float, phase: str, node: str = NODE) -> None:
        self.add("phase", t, node=node, t=t, phase=phase)

    def step(
        self,
        step: int,
        t0: float,
        t1: float,
        *,
        generation: int = 0,
        node: str = NODE,
        primary: bool = True,
        samples: int | None = 8,
        loss: float | None = None,
    ) -> None:
        columns: dict[str, Any] = {"node": node, "generation": generation, "step": step, "t0": t0, "t1": t1}
        if primary:
            tokens = None if samples is None else samples * 16
            columns |= {"loss": loss, "samples": samples, "tokens": tokens, "world_size": 1}
        self.add("step", t1, primary=primary, **columns)

    def rollback(self, t: float, resumed_step: int, generation: int = 0) -> None:
        self.add("rollback", t, generation=generation, resumed_step=resumed_step, reason="synthetic fault")


def _setpoint(workers: int, share: int) -> dict[str, Any]:
    return {"num_workers": workers, "workers_per_gpu": 2, "mps_active_thread_percentage": share}


def synthetic_run(*, ended: bool = True, seed: int = 7) -> list[dict[str, Any]]:
    """A pretended run: 2 nodes, 4 → 2 → 4 workers, a share change, a fault with lost steps, a gap."""
    rng = random.Random(seed)
    rows = Rows()
    config = {"run": {"name": "synthetic"}, "training": {"energy_monitoring_interval": 5.0}}
    rows.run(
        num_params=12_345_678,
        train_batch_size=16,
        sequence_length=128,
        versions={"eadt": "synthetic", "torch": "synthetic"},
        config=config,
    )
    for node in (NODE, OTHER):
        rows.node(node, components="cpu gpu0")
        rows.phase(0.0, "restart", node)
    rows.add("note", code="EADT-000", text="SYNTHETIC ledger made by tests/unit/ledger_factory.py.")

    plan = [  # from s, workers, share, step length s, power of a node's gpu in W
        (9.0, 4, 50, 0.9, 262.0),
        (60.0, 2, 50, 1.5, 168.0),
        (110.0, 2, 80, 1.2, 204.0),
        (150.0, 4, 80, 0.7, 238.0),
        (190.0, 4, 70, 0.75, 221.0),
    ]
    step, end_s = 0, 231.0
    for generation, (begin_s, workers, share, step_s, _) in enumerate(plan):
        until_s = plan[generation + 1][0] if generation + 1 < len(plan) else end_s - 3.0
        before = plan[generation - 1] if generation else None
        t = begin_s
        if before:
            if before[1] != workers or before[2] != share:
                rows.add(
                    "decision",
                    t,
                    decision_id=f"d{generation}",
                    at_s=t,
                    action="decrease" if share < before[2] else "increase",
                    reason=f"efficiency {0.02 * generation:.2f} samples/J <b>synthetic</b>",
                    setpoint_before=_setpoint(before[1], before[2]),
                    setpoint_after=_setpoint(workers, share),
                    expected={"power": "down" if share < before[2] else "up"},
                    measured=None,
                    outcome="pending",
                )
            for node in (NODE, OTHER):
                rows.phase(t, "restart", node)
            t += 0.4
            rows.add(
                "resize",
                t,
                at_s=begin_s,
                from_workers=before[1],
                to_workers=workers,
                kind="in_place",
                reason=f"decision d{generation}",
                seconds=0.4,
                lost_steps=0,
                parts={"save": 0.1, "start": 0.2, "load": 0.1},
                setpoint_before=_setpoint(before[1], before[2]),
                setpoint_after=_setpoint(workers, share),
            )
        rows.add(
            "generation",
            t,
            generation=generation,
            event="started",
            setpoint=_setpoint(workers, share),
            world_size=workers,
            micro_batch=4,
            accumulation=4 // workers,
            reason="decision" if generation else "start",
        )
        for node in (NODE, OTHER):
            rows.phase(t, "train", node)
        if generation == 0:
            rows.add("validation", t, step=0, loss=5.61)
        has_failed = False
        while t < until_s - step_s:
            length_s = step_s * rng.uniform(0.95, 1.08)
            step += 1
            loss = 1.4 + 4.2 * math.exp(-step / 70) + rng.uniform(-0.08, 0.08)
            rows.step(step, t, t + length_s, generation=generation, samples=16, loss=loss)
            rows.step(step, t, t + length_s, generation=generation, node=OTHER, primary=False)
            t += length_s + 0.002
            if step == 50:
                for node in (NODE, OTHER):
                    rows.phase(t, "checkpoint", node)
                    rows.phase(t + 1.3, "train", node)
                t += 1.3
                rows.add(
                    "checkpoint",
                    t,
                    step=step,
                    path="checkpoints/step-50",
                    seconds=1.3,
                    num_bytes=148_000_000,
                    kind="periodic",
                )
                rows.add("validation", t, step=step, loss=3.2)
            if generation == 2 and step > 115 and not has_failed:
                has_failed = True
                for node in (NODE, OTHER):
                    rows.phase(t + 0.5, "restart", node)
                rows.add("fault", t + 0.5, kind="engine", node=NODE, detail="synthetic SIGKILL of rank 1")
                rows.rollback(t + 0.6, resumed_step=step - 4, generation=generation)
                step -= 4
                t += 3.0
                for node in (NODE, OTHER):
                    rows.phase(t, "train", node)
        if before:
            rows.add(
                "decision",
                t,
                decision_id=f"d{generation}",
                at_s=begin_s,
                measured={"power_w": 2 * plan[generation][4], "samples_per_second": 16 / step_s},
                outcome="reverted" if generation == 2 else "kept",
            )
        rows.add("generation", t, generation=generation, event="ended", world_size=workers, reason="resize")
    for node in (NODE, OTHER):
        rows.phase(end_s - 3.0, "checkpoint", node)
        rows.phase(end_s - 1.0, "idle", node)
    rows.add("validation", end_s - 1.0, step=step, loss=1.52)
    for second in range(int(end_s)):
        now = second + 0.5
        generation = max((index for index, item in enumerate(plan) if now >= item[0]), default=-1)
        gpu_w = plan[generation][4] if generation >= 0 else 70.0
        for node in (NODE, OTHER):
            is_gap = node == OTHER and 84 <= second < 90
            gpu_j = None if is_gap else gpu_w * rng.uniform(0.96, 1.04)
            rows.energy(second, second + 1.0, gpu_j, component="gpu0", node=node)
            rows.energy(second, second + 1.0, 34.0 * rng.uniform(0.9, 1.1), node=node, quality="estimated")
    if ended:
        rows.add("run", end_s, event="ended", status="completed", run_id="synthetic", name="synthetic")
    return rows.rows


def write_run(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows into ``folder``/ledger, a new file wherever ``seq`` begins again; returns ``folder``."""
    writer: LedgerWriter | None = None
    previous_seq = 0
    for row in rows:
        if writer is None or row["seq"] <= previous_seq:
            if writer is not None:
                writer.close()
            writer = LedgerWriter(folder / "ledger", FakeClock())
        previous_seq = row["seq"]
        writer.append({key: value for key, value in row.items() if key != "seq"})
    if writer is not None:
        writer.close()
    return folder
