"""What one node's energy is booked as. Pretended: the meter, which draws constant watts, and the clock.

Marks are carried out by the booking's own thread in a run; here the test carries them out itself.
"""

from __future__ import annotations

import queue
from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import pairwise

import pytest

from eadt.coordination.metering import Metered
from eadt.node.booking import Doing, NodeBooking, NodeFacts
from eadt.node.meter import Point
from eadt.node.sensors import Component
from eadt.node.tenants import OwnFraction
from eadt.record.rows import AnyRow, DevicesRow, EnergyRow, NodeRow, NoteRow
from eadt.testing.clock import FakeClock
from eadt.units import Quality

CPU = Component("cpu", "cpu_estimate", Quality.ESTIMATED, "cpu", "m/cpu", resolution_s=0.1)
GPUS = [
    Component(f"gpu{n}", "nvml_energy_counter", Quality.MEASURED, f"gpu{n}", f"GPU-{n}", resolution_s=0.2)
    for n in range(2)
]
FACTS = NodeFacts("node", "host", "boot", 2, 4, ("AMD GPUs: none",))


class SteadyMeter:
    """Every component draws its watts; one may be made stale or unknown."""

    def __init__(self, clock: FakeClock, components: Sequence[Component]) -> None:
        self.clock, self.components = clock, list(components)
        self.watts = {component.name: 100.0 for component in components}
        self.watts["cpu"] = 20.0
        self.unknown: set[str] = set()
        self.untold_s: dict[str, float] = {}
        self.quality: dict[str, Quality] = {}
        self._points = {c.name: Point(clock.monotonic_s(), 0.0, 0.0, c.quality, "") for c in components}

    def cut(self) -> tuple[float, dict[str, Point]]:
        now_s = self.clock.monotonic_s()
        for name, point in self._points.items():
            passed_s = now_s - point.at_s
            if name in self.unknown:
                self.untold_s[name] = self.untold_s.get(name, 0.0) + passed_s
                self._points[name] = replace(point, at_s=now_s, why_unknown="it hangs")
            else:
                passed_s += self.untold_s.pop(name, 0.0)  # its counter went on
                self._points[name] = Point(
                    now_s, point.energy_j + self.watts[name] * passed_s, point.known_s + passed_s,
                    self.quality.get(name, Quality.MEASURED if name != "cpu" else Quality.ESTIMATED), "",
                )  # fmt: skip
        return now_s, dict(self._points)

    def mean_power_w(self, names: Sequence[str], window_s: float) -> tuple[float, Quality] | None:
        if self.unknown & set(names):
            return None
        return sum(self.watts[name] for name in names), Quality.MEASURED


class Shares:
    """Who else is on the machine, as the test says."""

    def __init__(self) -> None:
        self.answer = OwnFraction(None, (), 1.0, 0.0)
        self.spent: dict[int, float] = {}

    def own_fraction(self) -> OwnFraction:
        return self.answer

    def cpu_seconds_of(self, pids: Collection[int]) -> dict[int, float]:
        return {pid: self.spent[pid] for pid in pids if pid in self.spent}


class Node:
    def __init__(self, components: Sequence[Component] = (CPU,), *, on_cpu: bool = True, cards=None) -> None:
        self.clock = FakeClock()
        self.meter = SteadyMeter(self.clock, components)
        self.shares = Shares()
        self.rows: list[AnyRow] = []
        self.pids: dict[str, int] = {}
        self.booking = NodeBooking(
            FACTS, self.meter, self.rows.append, interval_s=10.0, on_cpu=on_cpu,  # type: ignore[arg-type]
            shares=self.shares, cards=cards, pid_of=self.pids.get, clock=self.clock,
        )  # fmt: skip
        self.booking._begin()

    def work(self) -> None:
        """Carry out what was told."""
        while True:
            try:
                mark = self.booking._marks.get_nowait()
            except queue.Empty:
                break
            assert mark is not None
            mark()
        self.booking.run_due()

    def after(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.work()

    def meter_all(self) -> None:
        self.booking.set_metered(Metered(tuple(c.name for c in self.meter.components)))
        self.work()

    def train(self, generation: int = 1, cards: Collection[str] = (), step: int = 0) -> None:
        doing = Doing("useful", step, generation, generation, frozenset(cards))
        self.booking.engine_loaded("engine", doing, self.clock.monotonic_s())
        self.work()

    def end(self) -> list[EnergyRow]:
        self.booking._cut()
        return self.energy

    @property
    def energy(self) -> list[EnergyRow]:
        return [row for row in self.rows if isinstance(row, EnergyRow)]

    @property
    def nodes(self) -> list[NodeRow]:
        return [row for row in self.rows if isinstance(row, NodeRow)]


def uses(rows: list[EnergyRow]) -> list[tuple[str, float]]:
    return [(row.use, round(row.t1 - row.t0, 3)) for row in rows]


def total(rows: list[EnergyRow], column: int = 0) -> float:
    return sum(row.joules[column] or 0.0 for row in rows)


def test_intervals_are_cut_where_the_use_changes_else_every_interval() -> None:
    node = Node()
    node.meter_all()
    node.after(3.0)
    node.train()
    node.after(10.0)
    node.after(6.0)
    node.booking.become("validation", step=40)
    node.after(0.0)
    node.after(2.0)
    node.booking.become("useful", step=40)
    node.after(0.0)
    node.after(1.0)
    rows = node.end()
    assert uses(rows) == [
        ("startup", 3.0), ("useful", 10.0), ("useful", 6.0), ("validation", 2.0), ("useful", 1.0),
    ]  # fmt: skip
    assert [row.step for row in rows] == [0, 0, 0, 40, 40]
    assert [row.generation for row in rows] == [0, 1, 1, 1, 1]
    assert total(rows) == pytest.approx(20.0 * 22.0)
    assert all(row.t1 == later.t0 for row, later in pairwise(rows))


def test_a_phase_that_the_sensors_cannot_resolve_is_shared_out() -> None:
    node = Node()
    node.meter_all()
    node.train()
    node.after(4.0)
    node.booking.become("checkpoint", step=100)
    node.after(0.0)
    node.after(0.04)
    node.booking.become("useful", step=100)
    node.after(0.0)
    node.after(5.96)
    rows = node.end()
    assert uses(rows) == [("useful", 4.0), ("useful", 6.0)]
    assert rows[0].shared == {}
    assert rows[1].shared == {"checkpoint": pytest.approx(0.04 / 6.0, rel=1e-3)}
    assert rows[1].step == 100, "what comes after the save is lost if the run goes back to it"


def test_a_save_is_always_a_boundary_since_what_comes_after_it_can_be_lost() -> None:
    """Right after another cut too: else ten seconds after the save would count as done before it."""
    node = Node()
    node.meter_all()
    node.train(step=4)
    node.after(0.02)
    node.booking.become("checkpoint", step=8)
    node.after(0.0)
    node.after(0.01)
    node.booking.become("useful", step=8)
    node.after(0.0)
    node.after(5.0)
    rows = node.end()
    assert [(row.step, row.use, round(row.t1 - row.t0, 3)) for row in rows] == [
        (4, "useful", 0.02), (8, "useful", 5.01),
    ]  # fmt: skip


def test_a_change_that_is_carried_out_late_is_put_where_it_belongs() -> None:
    node = Node()
    node.meter_all()
    node.train()
    node.booking.become("validation", at_s=node.clock.monotonic_s() + 3.0)
    node.after(4.0)  # the thread was kept waiting for a second
    node.after(2.0)
    rows = node.end()
    assert uses(rows) == [("useful", 4.0), ("validation", 2.0)]
    assert rows[0].shared == {"validation": 0.25}


def test_a_new_generation_is_always_cut_out() -> None:
    node = Node()
    node.meter_all()
    node.train(1)
    node.after(0.02)
    node.train(2)
    node.after(1.0)
    rows = node.end()
    assert [(row.generation, row.setting) for row in rows] == [(1, 1), (2, 2)]


def test_what_came_before_the_first_host_is_kept_for_the_cpu_and_not_for_cards() -> None:
    node = Node([CPU, *GPUS], on_cpu=False)
    node.after(10.0)
    node.after(5.0)
    node.booking.set_metered(Metered(own_pids=(7,)))  # the driver is here; hosts are to come
    node.after(0.0)
    assert node.rows == []
    node.booking.set_metered(Metered(("cpu", "gpu1")))
    node.after(0.0)
    assert [[c.component for c in row.components] for row in node.nodes] == [["cpu"], ["cpu", "gpu1"]]
    assert [row.joules for row in node.energy] == [[200.0], [100.0]]
    node.after(2.0)
    rows = node.end()
    assert rows[-1].joules == [40.0, 200.0]
    assert node.nodes[0].not_metered == ["AMD GPUs: none"]


def test_a_node_that_never_gets_a_host_books_nothing() -> None:
    node = Node()
    for _ in range(2000):
        node.after(10.0)
    assert len(node.booking._held or ()) <= 720
    node.booking.set_metered(Metered())
    node.after(10.0)
    assert node.energy == []


def test_a_node_that_gives_its_hardware_up_says_so_and_books_no_more() -> None:
    node = Node()
    node.meter_all()
    node.after(4.0)
    node.booking.set_metered(Metered())
    node.after(0.0)
    node.after(30.0)
    assert total(node.end()) == pytest.approx(80.0)
    assert node.nodes[-1].components == []


def test_an_unused_card_is_idle_while_its_neighbour_trains() -> None:
    node = Node([CPU, *GPUS], on_cpu=False)
    node.meter_all()
    node.after(1.0)
    node.train(cards=["gpu1"])
    node.after(5.0)
    node.booking.become("change")
    node.after(0.0)
    node.after(1.0)
    rows = node.end()
    assert [(row.use, row.uses) for row in rows] == [
        ("startup", {}), ("useful", {"gpu0": "idle"}), ("change", {}),
    ]  # fmt: skip


def test_a_card_that_no_sensor_knows_is_unknown_in_every_row() -> None:
    node = Node([CPU], on_cpu=False)
    node.booking.set_metered(Metered(("cpu",), ("0",)))
    node.work()
    node.train(cards=["gpu0"])
    node.after(5.0)
    [*_, row] = node.end()
    assert row.joules == [100.0, None]
    assert row.unknown_s == {"gpu0": 5.0}
    assert "no sensor" in row.why_unknown["gpu0"]
    assert node.nodes[-1].components[1].quality is None
    assert node.booking.reading(5.0).power_w is None, "never the CPU's watts"


def test_a_card_that_hangs_is_unknown_and_the_others_are_not() -> None:
    node = Node([CPU, *GPUS], on_cpu=False)
    node.meter_all()
    node.train(cards=["gpu0", "gpu1"])
    node.meter.unknown = {"gpu0"}
    node.after(10.0)
    node.meter.unknown = set()
    node.meter.quality = {"gpu0": Quality.STALE}
    node.after(10.0)
    first, second = node.energy
    assert first.joules == [200.0, None, 1000.0]
    assert (first.unknown_s, first.why_unknown) == ({"gpu0": 10.0}, {"gpu0": "it hangs"})
    assert second.joules[1] == 2000.0
    assert (first.recovered_s, second.recovered_s) == ({}, {"gpu0": 10.0})
    assert second.qualities == {"gpu0": "stale"}


def test_power_is_that_of_the_cards_that_train() -> None:
    """Four at 240 W beside four idle read as 240 W each, not as 310."""
    node = Node([CPU, *GPUS], on_cpu=False)
    node.meter_all()
    assert node.booking.reading(5.0).power_w == 0.0
    node.train(cards=["gpu1"])
    node.meter.watts |= {"gpu0": 70.0, "gpu1": 240.0}
    assert node.booking.reading(5.0).power_w == 240.0


def test_power_of_a_cpu_run_is_its_own_part_of_the_cpu() -> None:
    node = Node()
    assert node.booking.reading(5.0).power_w == 0.0, "nothing is its to book yet"
    node.meter_all()
    assert node.booking.reading(5.0).power_w == 20.0
    node.shares.answer = OwnFraction(0.25, ("run other",), 1.0, 0.0)
    node.after(10.0)
    assert node.booking.reading(5.0).power_w == 5.0


def test_a_shared_machine_is_split_and_said_once() -> None:
    node = Node([CPU, GPUS[0]], on_cpu=False)
    node.meter_all()
    node.train(cards=["gpu0"])
    node.shares.answer = OwnFraction(0.6, ("run other",), 6.0, 0.4)
    node.after(10.0)
    node.after(10.0)
    assert [(row.own_fraction, row.joules) for row in node.energy] == [(0.6, [120.0, 1000.0])] * 2
    notes = [row for row in node.rows if isinstance(row, NoteRow)]
    assert [row.code for row in notes] == ["EADT-353", "EADT-354"]
    assert "run other" in notes[0].text
    assert "40%" in notes[1].text


def test_waiting_for_data_is_shared_out_of_useful_work() -> None:
    node = Node()
    node.meter_all()
    node.train()
    node.after(4.0)
    for step in range(1, 5):
        node.booking.step_done(step, 0.5)
    node.after(4.0)
    node.booking.become("validation", step=4)
    node.after(0.0)
    node.booking.step_done(5, 0.5)
    node.after(1.0)
    rows = node.end()
    assert rows[0].shared == {"input": 0.25}
    assert rows[1].shared == {}
    assert rows[1].step == 4


def test_building_ahead_beside_training_is_a_change_by_its_cpu_time() -> None:
    node = Node()
    node.meter_all()
    node.train()
    node.after(1.0)
    node.pids, node.shares.spent = {}, {7: 0.0}
    node.pids["next"] = 7
    node.booking._pid_of = node.pids.get
    node.booking.engine_forked("next")
    node.shares.answer = OwnFraction(None, (), 20.0, 0.0)
    node.after(9.0)
    node.shares.spent = {7: 5.0}
    node.after(5.0)
    node.train(2)  # the node's own engine speaks; the one that was built joins it
    node.booking.engine_loaded("next", None, node.clock.monotonic_s())
    node.work()
    node.shares.spent = {7: 50.0}
    node.after(9.0)
    rows = node.end()
    assert [row.shared_cpu for row in rows] == [{}, {"change": 0.25}, {}]


def test_sums_stay_those_of_the_meter_to_the_millijoule() -> None:
    node = Node()
    node.meter_all()
    node.meter.watts["cpu"] = 1.0 / 3.0
    for number in range(300):
        node.booking.become(("useful", "validation")[number % 2])
        node.after(0.0)
        node.after(0.7)
    rows = node.end()
    assert len(rows) > 200
    assert total(rows) == pytest.approx(70.0, abs=0.0011)
    assert all(round(row.joules[0] or 0.0, 3) == row.joules[0] for row in rows)


def test_an_error_in_the_thread_is_logged_and_does_not_end_it(caplog: pytest.LogCaptureFixture) -> None:
    node = Node()
    node.meter_all()
    got = queue.SimpleQueue[AnyRow]()

    def on_row(row: AnyRow) -> None:
        got.put(row)
        if isinstance(row, EnergyRow) and row.use == "startup":
            raise ConnectionError("nobody takes it")

    node.booking._on_row = on_row
    node.booking.start()
    seen = []
    for use in ("useful", "validation", "idle"):
        node.clock.advance(1.0)
        node.booking.become(use)
        seen.append(got.get(timeout=20.0))
    node.booking.stop()
    assert [row.use for row in seen if isinstance(row, EnergyRow)] == ["startup", "useful", "validation"]
    assert "EADT-351" in caplog.text


class Cards:
    """States of cards, as the test says."""

    def __init__(self, foreign: int) -> None:
        self.foreign, self.names = foreign, []

    def set_cards(self, names: Collection[str]) -> None:
        self.names = list(names)

    def take(self, node: str) -> DevicesRow:
        return DevicesRow(
            node=node, t0=0.0, t1=60.0, components=["gpu0"], utilisation_fraction=[0.5],
            memory_used_bytes=[1], memory_total_bytes=[2], temperature_c=[50.0], sm_clock_mhz=[1000.0],
            throttled=[{}], foreign_processes=[self.foreign],
        )  # fmt: skip


def test_cards_are_told_of_each_minute_and_others_on_them_are_marked_and_said_once() -> None:
    cards = Cards(foreign=2)
    node = Node([CPU, GPUS[0]], on_cpu=False, cards=cards)
    node.meter_all()
    assert cards.names == ["gpu0"]
    node.train(cards=["gpu0"])
    for _ in range(13):
        node.after(10.0)
    told = [row for row in node.rows if isinstance(row, DevicesRow)]
    assert len(told) == 2
    assert node.energy[0].foreign == []
    assert node.energy[-1].foreign == ["gpu0"]
    assert [row.code for row in node.rows if isinstance(row, NoteRow)] == ["EADT-352"]
