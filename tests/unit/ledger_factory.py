"""SYNTHETIC ledgers for tests of what reads a run's record: no run ever produced these numbers.

:class:`Rows` collects typed rows with short calls, and :meth:`Rows.write` puts them into a real ledger with
the real writer; :func:`synthetic_run` is a whole pretended run of two nodes with everything in it that a
report shows. One axis serves for all: seconds since the session began are node time and session time.
"""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

from eadt.record.ledger import LedgerWriter, open_books
from eadt.record.rows import (
    AnyRow,
    ChangeRow,
    CheckpointRow,
    DecisionRow,
    DevicesRow,
    EndRow,
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
)
from eadt.testing.clock import FakeClock

START_UNIX_S = 1_750_000_000.0
GAP_S = (84.0, 90.0)  # in which a card of the other node did not answer
NODE, OTHER = "synthetic-node-a", "synthetic-node-b"

SIMULATED = {"source": "simulated", "quality": "simulated", "resolution_s": 0.1, "relative_uncertainty": 0.05}
ESTIMATED = {
    "source": "cpu_estimate",
    "quality": "estimated",
    "detail": "a model of the CPU by its use",
    "resolution_s": 0.1,
    "relative_uncertainty": 0.3,
}


class Rows:
    """Rows in a ledger's order, each with the second at which it was written."""

    def __init__(self, began_unix_s: float = START_UNIX_S) -> None:
        self.files: list[list[tuple[float, AnyRow]]] = [[]]
        self.began_unix_s = began_unix_s
        self.now_s = 0.0

    def add(self, row: AnyRow, now_s: float | None = None) -> None:
        """Append a row, written at ``now_s`` since the session began; as late as the last one without."""
        self.now_s = max(self.now_s, self.now_s if now_s is None else now_s)
        self.files[-1].append((self.began_unix_s + self.now_s, row))

    def session(self, *, name: str = "synthetic", after_s: float = 0.0, **columns: Any) -> None:
        """A session begins; a later one ``after_s`` after the last row, in a file of its own."""
        if self.files[-1]:
            self.began_unix_s += self.now_s + after_s
            self.now_s = 0.0
            self.files.append([])
        self.add(SessionRow(run_id="synthetic-1", name=name, **columns))

    def end(self, at_s: float, status: str = "completed", reason: str = "", **columns: Any) -> None:
        self.add(EndRow(status=status, reason=reason, at_s=at_s, **columns), at_s)

    def node(self, node: str = NODE, at_s: float = 0.0, *, components: str = "cpu", **columns: Any) -> None:
        metered = [
            MeteredComponent(
                component=name, identity=f"{node}/{name}", **(ESTIMATED if name == "cpu" else SIMULATED)
            )
            for name in components.split()
        ]
        columns = {"boot_id": node, "num_gpus": 0, "num_cores": 2, **columns}
        row = NodeRow(node=node, hostname=node, monotonic_s=at_s, at_s=at_s, components=metered, **columns)
        self.add(row, at_s)

    def energy(
        self,
        t0: float,
        t1: float,
        *joules: float | None,
        use: str = "useful",
        node: str = NODE,
        **columns: Any,
    ) -> None:
        self.add(EnergyRow(node=node, t0=t0, t1=t1, use=use, joules=list(joules), **columns), t1)

    def time(self, t0: float, t1: float, use: str = "useful", **columns: Any) -> None:
        self.add(TimeRow(use=use, t0_s=t0, t1_s=t1, **columns), t1)

    def steps(
        self,
        first_step: int,
        t0: list[float],
        seconds: list[float],
        *,
        loss: list[float | None] | None = None,
        samples: int | None = 8,
        generation: int = 1,
        setting: int = 1,
        **columns: Any,
    ) -> None:
        row = StepsRow(
            node=NODE,
            generation=generation,
            setting=setting,
            first_step=first_step,
            t0=t0,
            seconds=seconds,
            loss=loss or [None] * len(t0),
            learning_rate=[1e-3] * len(t0),
            samples=samples,
            tokens=None if samples is None else samples * 16,
            world_size=1,
            **columns,
        )
        self.add(row, t0[-1] + seconds[-1])

    def generation(self, at_s: float, generation: int = 1, setting: int = 1, **columns: Any) -> None:
        row = GenerationRow(
            event=columns.pop("event", "started"),
            generation=generation,
            setting=setting,
            at_s=at_s,
            **columns,
        )
        self.add(row, at_s)

    def write(self, folder: Path) -> Path:
        """Write a ledger into ``folder``/ledger, a file for each session; returns ``folder``."""
        for rows in self.files:
            clock = FakeClock(unix_s=rows[0][0])
            writer = LedgerWriter(folder / "ledger", clock, opened=open_books(folder / "ledger"))
            writer.start()
            for unix_s, row in rows:
                clock.advance(max(0.0, unix_s - clock.unix_s()))
                writer.append(row)
            writer.close(timeout_s=30.0)
        return folder


def training(num_steps: int = 10, *, step_s: float = 1.0, watts: float = 30.0) -> Rows:
    """A run of one node that did steps of 8 samples and has not ended: 5 s of startup, then useful work."""
    rows = Rows()
    rows.session(train_batch_size=8, max_steps=num_steps, config={"run": {"name": "synthetic"}})
    rows.node()
    rows.energy(0.0, 5.0, 5.0 * watts, use="startup")
    rows.time(0.0, 5.0, "startup")
    rows.generation(5.0, setpoint=setpoint(1, 100), world_size=1, num_devices=1)
    if not num_steps:
        return rows
    end_s = 5.0 + num_steps * step_s
    rows.energy(5.0, end_s, num_steps * step_s * watts, generation=1, setting=1)
    rows.steps(
        1,
        [5.0 + step_s * place for place in range(num_steps)],
        [step_s] * num_steps,
        loss=[4.0 - 2.0 * place / num_steps for place in range(num_steps)],
    )
    rows.time(5.0, end_s, generation=1, setting=1)
    return rows


def setpoint(workers: int, share: int) -> dict[str, Any]:
    return {"num_workers": workers, "workers_per_gpu": 2, "mps_active_thread_percentage": share}


class _Pretended:
    """Makes the rows of :func:`synthetic_run`: what the two nodes drew, second by second, and what for."""

    PLAN = (  # from s, workers, share, step length s, power of a node's gpu in W
        (9.0, 4, 50, 0.9, 262.0),
        (60.0, 2, 50, 1.5, 168.0),
        (110.0, 2, 80, 1.2, 204.0),
        (150.0, 4, 80, 0.7, 238.0),
        (190.0, 4, 70, 0.75, 221.0),
    )
    END_S = 231.0

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.rows = Rows()
        self.step = 0
        self.generation = 0
        self.t = 0.0

    def book(self, until_s: float, use: str, number: int, **columns: Any) -> None:
        """Energy and time up to ``until_s``, in intervals of at most 5 s."""
        gpu_w = self.PLAN[number - 1][4] if number else 70.0
        if use in ("change", "checkpoint", "idle"):
            gpu_w = 90.0
        place = {"generation": self.generation, "setting": number, "step": self.step}
        self.rows.time(self.t, until_s, use, shared=columns.get("shared", {}), **place)
        while self.t < until_s - 1e-9:
            t1 = min([until_s, self.t + 5.0, *(at_s for at_s in GAP_S if at_s > self.t)])
            length_s = t1 - self.t
            for node in (NODE, OTHER):
                cpu_j = length_s * 34.0 * self.rng.uniform(0.9, 1.1)
                gpu_j: float | None = length_s * gpu_w * self.rng.uniform(0.96, 1.04)
                extra = dict(columns)
                if node == OTHER:
                    extra["own_fraction"] = 0.5
                    if GAP_S[0] <= self.t < GAP_S[1]:
                        gpu_j = None
                        extra |= {
                            "unknown_s": {"gpu0": length_s},
                            "why_unknown": {"gpu0": "the card did not answer"},
                        }
                    if 150.0 <= self.t < 190.0:
                        extra["foreign"] = ["gpu0"]
                joules = [round(cpu_j, 3), None if gpu_j is None else round(gpu_j, 3)]
                self.rows.energy(self.t, t1, *joules, use=use, node=node, **place, **extra)
            self.t = t1

    def train(self, until_s: float, number: int, num_steps: int = 1000) -> None:
        """Steps up to ``until_s``, or ``num_steps`` of them, booked four by four."""
        step_s = self.PLAN[number - 1][3]
        ahead = {"shared_cpu": {"change": 0.2}} if number == 1 else {}
        while num_steps and self.t < until_s - step_s:
            begun, lengths, losses = [], [], []
            t = self.t
            while len(begun) < min(4, num_steps) and t < until_s - step_s:
                length_s = round(step_s * self.rng.uniform(0.95, 1.08), 4)
                step = self.step + len(begun) + 1
                losses.append(1.4 + 4.2 * math.exp(-step / 70) + self.rng.uniform(-0.08, 0.08))
                begun.append(round(t, 4))
                lengths.append(length_s)
                t += length_s
            self.rows.steps(
                self.step + 1, begun, lengths, loss=losses, samples=16, generation=self.generation,
                setting=number, input_s=[0.02 * length_s for length_s in lengths],
            )  # fmt: skip
            self.book(t, "useful", number, shared={"input": 0.02}, **ahead)
            self.step += len(begun)
            num_steps -= len(begun)

    def begin_generation(self, number: int) -> None:
        """Of a setting, the first or, after a fault, the next."""
        self.generation += 1
        workers, share = self.PLAN[number - 1][1:3]
        self.rows.generation(
            self.t, self.generation, number, setpoint=setpoint(workers, share), world_size=workers,
            micro_batch=4, accumulation=4 // workers, step=self.step, num_devices=2,
        )  # fmt: skip

    def decide(self, number: int) -> None:
        before, after = self.PLAN[number - 2], self.PLAN[number - 1]
        self.rows.add(
            DecisionRow(
                decision_id=f"d{number - 1}",
                at_s=self.t,
                action="decrease" if after[2] < before[2] else "increase",
                reason=f"efficiency {0.02 * number:.2f} samples/J <b>synthetic</b>",
                setpoint_before=setpoint(before[1], before[2]),
                setpoint_after=setpoint(after[1], after[2]),
                expected={"power": "down" if after[2] < before[2] else "up"},
            ),
            self.t,
        )

    def change(self, number: int) -> None:
        """From one generation to the next: 0.4 s."""
        before, after = self.PLAN[number - 2], self.PLAN[number - 1]
        self.rows.generation(self.t, self.generation, number - 1, event="ended", step=self.step)
        began_s = self.t
        self.book(self.t + 0.4, "change", number - 1)
        self.rows.add(
            ChangeRow(
                at_s=began_s, from_workers=before[1], to_workers=after[1], kind="in_place",
                reason=f"decision d{number - 1}", seconds=0.4, lost_steps=0,
                parts={"save_s": 0.1, "start_s": 0.2, "load_s": 0.1},
                setpoint_before=setpoint(before[1], before[2]), setpoint_after=setpoint(after[1], after[2]),
                decision_id=f"d{number - 1}",
            )
        )  # fmt: skip

    def judge(self, number: int) -> None:
        """What came of the decision that led to this generation."""
        _, workers, share, step_s, gpu_w = self.PLAN[number - 1]
        measured = {"power_w": 2 * gpu_w, "samples_per_second": 16 / step_s}
        self.rows.add(
            DecisionRow(
                decision_id=f"d{number - 1}",
                measured=measured,
                outcome="reverted" if number == 3 else "kept",
                setpoint_after=setpoint(workers, share),
            )
        )
        self.rows.add(
            ObservationRow(
                at_s=self.t, window_s=20.0, setpoint=setpoint(workers, share), num_gpus=2, num_steps=20,
                power_per_gpu_w=gpu_w, quality="simulated", efficiency_samples_per_j=0.03, **measured,
            )
        )  # fmt: skip

    def save(self, kind: str, seconds: float, number: int) -> None:
        self.book(self.t + seconds, "checkpoint", number)
        self.rows.add(
            CheckpointRow(
                step=self.step, path=f"checkpoints/step-{self.step}", kind=kind, seconds=seconds,
                num_bytes=148_000_000, at_s=self.t,
            )
        )  # fmt: skip

    def validate(self, loss: float, number: int) -> None:
        self.book(self.t + 1.1, "validation", number)
        self.rows.add(ValidationRow(step=self.step, loss=loss, generation=self.generation, at_s=self.t))

    def fail(self, number: int) -> None:
        """An engine dies, four steps are undone, and the same setting goes on."""
        self.rows.add(
            FaultRow(kind="engine", node=NODE, detail="synthetic SIGKILL of rank 1", at_s=self.t), self.t
        )
        self.step -= 4
        self.rows.add(
            RollbackRow(
                generation=self.generation, resumed_step=self.step, at_s=self.t, reason="synthetic fault"
            )
        )
        self.book(self.t + 3.0, "change", number)
        same = setpoint(*self.PLAN[number - 1][1:3])
        self.rows.add(
            ChangeRow(
                at_s=self.t, from_workers=same["num_workers"], to_workers=same["num_workers"], kind="group",
                recovery=True, seconds=3.0, lost_steps=4, setpoint_before=same, setpoint_after=same,
                reason="an engine died",
            )
        )  # fmt: skip
        self.begin_generation(number)

    def watch_cards(self) -> None:
        for minute in range(3):
            for node in (NODE, OTHER):
                self.rows.add(
                    DevicesRow(
                        node=node, t0=60.0 * minute, t1=60.0 * (minute + 1), components=["gpu0"],
                        utilisation_fraction=[0.93], memory_used_bytes=[61 << 30],
                        memory_total_bytes=[80 << 30], temperature_c=[88.0 if node == NODE else 61.0],
                        sm_clock_mhz=[1410.0 if node == NODE else 1755.0],
                        throttled=[{"heat": 0.62} if node == NODE else {}],
                        foreign_processes=[0 if node == NODE else 1],
                    )
                )  # fmt: skip


def synthetic_run(*, ended: bool = True, seed: int = 7) -> Rows:
    """A pretended run: 2 nodes, 4 → 2 → 4 workers, changes of share, a fault with lost steps, a gap."""
    run = _Pretended(seed)
    rows = run.rows
    rows.session(
        train_batch_size=16,
        sequence_length=128,
        max_steps=240,
        versions={"eadt": "synthetic", "torch": "synthetic"},
        config={"run": {"name": "synthetic"}, "training": {"train_batch_size": 16}},
    )
    for node in (NODE, OTHER):
        refused = ["rapl: /sys/class/powercap may not be read; run as root, or give the group read access"]
        rows.node(node, components="cpu gpu0", num_gpus=1, not_metered=refused)
    rows.add(
        NoteRow(code="EADT-000", text="SYNTHETIC ledger made by tests/unit/ledger_factory.py.", at_s=0.0)
    )
    run.book(9.0, "startup", 0)
    run.begin_generation(1)
    run.validate(5.61, 1)
    for number, (_, _, _, _, _) in enumerate(run.PLAN, start=1):
        until_s = run.PLAN[number][0] if number < len(run.PLAN) else run.END_S - 3.0
        if number == 1:
            run.train(until_s, number, num_steps=40)
            run.save("periodic", 1.3, number)
            run.validate(3.2, number)
        if number == 3:
            run.train(until_s, number, num_steps=20)
            run.fail(number)
        run.train(until_s, number)
        if number > 1:
            run.judge(number)
        if number < len(run.PLAN):
            run.decide(number + 1)
            run.change(number + 1)
            run.begin_generation(number + 1)
    run.watch_cards()
    run.validate(1.52, len(run.PLAN))
    run.save("final", run.END_S - 1.0 - run.t, len(run.PLAN))
    run.book(run.END_S, "idle", len(run.PLAN))
    if ended:
        rows.end(run.END_S, num_params=12_345_678)
    return rows
