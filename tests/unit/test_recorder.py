"""The run's record as the coordinator keeps it; the books are real, the ledger a list, the clock fake."""

from __future__ import annotations

from typing import Any

import pytest

from eadt.control.setpoint import Setpoint
from eadt.coordination.nodes import NodeTime
from eadt.coordination.recorder import Change, Recorder, StepRecord
from eadt.record.books import Books
from eadt.record.rows import AnyRow, ChangeRow, NoteRow, SessionRow, StepsRow, TimeRow
from eadt.testing.clock import FakeClock

ONE, TWO = Setpoint(1), Setpoint(2)


class Pages:
    """Takes rows."""

    def __init__(self) -> None:
        self.rows: list[AnyRow] = []

    def append(self, row: AnyRow) -> None:
        self.rows.append(row)


class Record:
    def __init__(self, *, begun: bool = True) -> None:
        self.clock = FakeClock()
        self.recorder = Recorder(self.clock)
        self.pages = Pages()
        self.recorder.begin(self.pages, Books())
        if begun:
            self.recorder.book(SessionRow(run_id="r", name="r", train_batch_size=8))

    def step(self, number: int, seconds: float = 1.0, *, node: str = "a", **values: Any) -> Any:
        """A step that ends now, told by a node whose clock is a thousand seconds ahead of the session's."""
        self.clock.advance(seconds)
        t1 = self.recorder.at_s + 1000.0
        record = StepRecord(
            step=number, node_id=node, t0=t1 - seconds, t1=t1, ended_at_s=self.recorder.at_s, samples=8,
            loss=2.0, generation=values.pop("generation", 1),
        )  # fmt: skip
        told = {"learning_rate": 1e-3, "tokens": 80, "world_size": 2, "input_s": 0.0, **values}
        return self.recorder.book_step(record, setting=1, values=told)

    def kept(self, kind: type[Any]) -> list[Any]:
        return [row for row in self.pages.rows if isinstance(row, kind)]


def test_rows_from_before_the_session_come_after_its_own_row() -> None:
    record = Record(begun=False)
    record.recorder.note("EADT-350", "a node is up already")
    assert record.pages.rows == []
    record.recorder.book(SessionRow(run_id="r", name="r"))
    assert [type(row) for row in record.pages.rows] == [SessionRow, NoteRow]
    assert [event["type"] for event in record.recorder.events_since(0)[0]] == ["session", "note"]


def test_steps_are_written_in_blocks_and_counted_at_once() -> None:
    record = Record()
    for number in range(1, 4):
        record.step(number)
    assert record.kept(StepsRow) == []
    assert record.recorder.books.step == 3
    record.clock.advance(3.0)
    record.recorder.tick(3)
    [block] = record.kept(StepsRow)
    assert (block.first_step, block.last_step, block.loss) == (1, 3, [2.0, 2.0, 2.0])
    assert block.seconds == pytest.approx([1.0, 1.0, 1.0])
    assert record.recorder.books.optimizer_steps == 3


def test_a_block_ends_where_steps_do_not_follow_each_other_or_are_of_another_kind() -> None:
    record = Record()
    record.step(1)
    record.step(2, input_s=0.5)
    record.step(3, input_s=0.5)
    record.step(3, generation=2, input_s=0.5)  # done again
    record.step(4, generation=2, world_size=1, input_s=0.5)
    record.recorder.close()
    assert [(row.first_step, row.last_step, row.input_s) for row in record.kept(StepsRow)] == [
        (1, 1, []), (2, 3, [0.5, 0.5]), (3, 3, [0.5]), (4, 4, [0.5]),
    ]  # fmt: skip


def test_other_rows_come_after_the_steps_before_them() -> None:
    record = Record()
    record.step(1)
    record.recorder.note("EADT-1", "after step 1")
    record.step(2)
    record.recorder.close()
    assert [type(row) for row in record.pages.rows] == [SessionRow, StepsRow, NoteRow, TimeRow, StepsRow]


def test_books_and_a_rebuild_from_the_ledger_agree() -> None:
    record = Record()
    for number in range(1, 8):
        record.step(number, 0.7, input_s=0.1 * (number % 2))
    record.recorder.become("useful", 1.0, 0, 1, 1)
    record.recorder.close()
    rebuilt = Books()
    for row in record.pages.rows:
        rebuilt.add(row)
    live = record.recorder.books
    assert (live.samples, live.tokens, live.step) == (56, 560, 7)
    assert (rebuilt.samples, rebuilt.tokens, rebuilt.step) == (56, 560, 7)
    assert live.seconds_by_use == rebuilt.seconds_by_use


def test_throughput_is_of_durations_whatever_wall_clocks_say() -> None:
    """A step of 120 s of the wall clock, or a machine that is 120 s off, changes nothing."""
    record = Record()
    for number in range(1, 11):
        record.step(number, 0.5)
        record.clock.step_unix_s(120.0 if number == 5 else 0.0)
    rate, count = record.recorder.throughput(4.0, since_s=0.0)
    assert rate == pytest.approx(16.0)
    assert count == 8
    assert record.recorder.throughput(4.0, since_s=record.recorder.at_s) == (None, 0)


def test_throughput_counts_the_part_of_the_first_step_that_lies_in_the_window() -> None:
    record = Record()
    record.step(1, 4.0)
    record.step(2, 1.0)
    rate, count = record.recorder.throughput(3.0, since_s=0.0)
    assert count == 2
    assert rate == pytest.approx((0.5 * 8 + 8) / 3.0)


def test_a_pause_is_by_one_machines_clock_where_one_told_both_ends() -> None:
    record = Record()
    record.step(1)
    record.step(2)
    last = record.recorder.steps[-1]
    record.recorder.open_change(
        Change("in_place", "a test", TWO, ONE, 2, last, resumed_step=2, decision_id="d1")
    )
    record.step(3, 1.25, generation=2)
    assert record.recorder.change is not None
    for number in (4, 5, 6):
        assert record.step(number, generation=2) is None
    done = record.step(7, generation=2)
    assert done is not None
    assert done.gap_s == pytest.approx(1.25)
    [row] = record.kept(ChangeRow)
    assert row.seconds == pytest.approx(0.25)
    assert row.ordinary_step_s == pytest.approx(1.0)
    assert (row.from_workers, row.to_workers, row.recovery, row.decision_id) == (2, 1, False, "d1")
    assert row.at_s == pytest.approx(3.25)


def test_between_two_machines_a_pause_is_by_session_time() -> None:
    record = Record()
    record.step(1, node="a")
    last = record.recorder.steps[-1]
    record.recorder.open_change(Change("group", "", TWO, TWO, 2, last, resumed_step=1))
    record.clock.advance(3.0)
    record.step(2, 1.0, node="b", generation=2)
    assert record.recorder.change is not None
    assert record.recorder.change.gap_s == pytest.approx(4.0)
    record.recorder.close()
    [row] = record.kept(ChangeRow)
    assert row.recovery is True


def test_steps_that_are_done_again_do_not_end_a_recovery() -> None:
    """What the killed generation had told before is no first step of the next."""
    record = Record()
    record.step(5)
    last = record.recorder.steps[-1]
    record.recorder.open_change(Change("in_place", "", TWO, TWO, 2, last, resumed_step=4, lost_steps=1))
    record.step(4)
    assert record.recorder.change is not None
    assert record.recorder.change.first_step is None
    record.step(5, generation=2)
    assert record.recorder.change.first_step is not None


def test_a_change_of_which_no_step_was_seen_is_not_booked() -> None:
    record = Record()
    record.recorder.open_change(Change("in_place", "", TWO, ONE, 2, None, resumed_step=0))
    record.recorder.open_change(Change("in_place", "", ONE, TWO, 1, None, resumed_step=0))
    record.step(1)
    record.recorder.close()
    [row] = record.kept(ChangeRow)
    assert (row.from_workers, row.to_workers, row.seconds) == (1, 2, None)


def test_job_time_is_written_down_while_it_goes_on() -> None:
    record = Record()
    record.clock.advance(2.0)
    record.recorder.become("useful", record.recorder.at_s, 0, 1, 1)
    record.clock.advance(31.0)
    record.recorder.tick(20)
    record.clock.advance(5.0)
    record.recorder.close()
    assert [(row.use, row.t0_s, row.t1_s, row.step) for row in record.kept(TimeRow)] == [
        ("startup", 0.0, 2.0, 0), ("useful", 2.0, 33.0, 0), ("useful", 33.0, 38.0, 20),
    ]  # fmt: skip
    assert record.recorder.books.seconds_by_use["useful"] == pytest.approx(36.0)


def test_node_time_is_placed_by_the_shortest_way_and_by_no_wall_clock() -> None:
    time = NodeTime()
    assert time.session_s(5.0) == 5.0
    time.heard(sent_s=100.0, received_s=3.5)
    assert time.session_s(100.0) == pytest.approx(3.5)
    time.heard(sent_s=101.0, received_s=4.002)  # 2 ms on the way instead of 500
    assert time.session_s(101.0) == pytest.approx(4.002)
    time.heard(sent_s=102.0, received_s=9.0)
    assert time.session_s(102.0) == pytest.approx(5.002)
