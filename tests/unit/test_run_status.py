"""What a run says of itself: from its books alone, and with what the live run knows."""

from __future__ import annotations

import json
import math

import pytest

from eadt.record.books import Books
from eadt.record.rows import DecisionRow, ObservationRow
from eadt.record.status import HEARD_WITHIN_S, LiveFacts, run_status
from eadt.units import Quantity
from tests.unit.books_factory import START_UNIX_S, RowList, a_run, books_of, setpoint

HEARD_UNIX_S = START_UNIX_S + 100.0
"""When the pretended run was last heard of."""


def running() -> Books:
    return books_of(a_run(ended=False))


def test_a_run_of_which_nothing_was_booked_is_unknown() -> None:
    status = run_status(Books(), None, now_unix_s=5.0)
    assert (status.source, status.status, status.run, status.session) == ("ledger", "unknown", None, 0)
    assert (status.heard_unix_s, status.age_s, status.energy_j, status.power_w) == (None, None, None, None)
    assert (status.step, status.generation, status.waiting_for) == (0, 0, "")


def test_a_run_that_was_heard_of_lately_is_running() -> None:
    status = run_status(running(), None, now_unix_s=HEARD_UNIX_S + HEARD_WITHIN_S)
    assert (status.status, status.source, status.heard_unix_s) == ("running", "ledger", HEARD_UNIX_S)
    assert status.age_s == HEARD_WITHIN_S
    assert (status.run, status.run_id, status.session, status.num_sessions) == (
        "synthetic",
        "synthetic-1",
        1,
        1,
    )
    assert (status.step, status.max_steps, status.loss, status.world_size) == (70, 100, 2.6, 2)
    assert (status.generation, status.setpoint, status.at_s) == (3, setpoint(2), 100.0)
    assert status.samples_per_second == pytest.approx(8.0)
    assert status.power_w is not None
    assert status.power_w.value == pytest.approx(2 * (30.0 + 150.0))
    assert status.seconds_to_go == pytest.approx(30.0)
    assert status.energy_to_go_j is not None
    assert status.energy_to_go_j.value == pytest.approx(30.0 * 360.0)
    assert status.is_training is None


def test_figures_are_those_of_the_books() -> None:
    books = running()
    status = run_status(books, None, now_unix_s=HEARD_UNIX_S)
    assert status.energy_j == books.energy()
    assert status.joules_per_sample == books.joules_per_sample()
    assert status.energy_by_use == books.energy_by("use")
    assert status.learning_rate == books.learning_rate


def test_a_run_without_an_end_that_was_not_heard_of_has_crashed() -> None:
    status = run_status(running(), None, now_unix_s=HEARD_UNIX_S + HEARD_WITHIN_S + 0.1)
    assert status.status == "crashed"
    assert (status.samples_per_second, status.power_w) == (None, None)
    assert (status.seconds_to_go, status.energy_to_go_j) == (None, None)
    assert status.energy_j is not None
    # A clock that is behind says nothing about age.
    assert run_status(running(), None, now_unix_s=HEARD_UNIX_S - 50.0).age_s == 0.0


def test_a_run_that_ended_is_what_its_end_says() -> None:
    status = run_status(books_of(a_run()), None, now_unix_s=HEARD_UNIX_S + 1e6)
    assert (status.status, status.power_w, status.seconds_to_go) == ("completed", None, None)
    rows = RowList()
    rows.rows = a_run()
    rows.session(70)
    status = run_status(books_of(rows), None, now_unix_s=rows.unix_s + 1.0)
    assert (status.status, status.session, status.num_sessions, status.generation) == ("running", 2, 2, 0)


def test_the_generation_of_the_ledger_is_the_one_that_trains() -> None:
    rows = RowList()
    rows.session()
    rows.generation("started", 1, 1.0, setpoint=setpoint(4))
    assert run_status(books_of(rows), None, now_unix_s=rows.unix_s).generation == 1
    rows.generation("ended", 1, 2.0)
    assert run_status(books_of(rows), None, now_unix_s=rows.unix_s).generation == 0


def test_the_live_run_knows_more() -> None:
    live = LiveFacts(
        status="paused",
        at_s=130.0,
        desired=setpoint(1),
        waiting_for="a GPU",
        is_training=False,
        generation=4,
        num_devices=2,
        policy="threshold",
        supervisor_phase="observing",
        supervisor_answers=False,
        best_efficiency=0.5,
    )
    status = run_status(running(), live, now_unix_s=HEARD_UNIX_S + 1e6)
    assert (status.source, status.status, status.at_s) == ("supervisor", "paused", 130.0)
    assert (status.desired, status.waiting_for, status.generation) == (setpoint(1), "a GPU", 4)
    assert (status.policy, status.phase, status.supervisor_answers) == ("threshold", "observing", False)
    assert (status.num_devices, status.best_efficiency, status.is_training) == (2, 0.5, False)
    assert status.samples_per_second is None
    assert status.power_w is not None
    training = LiveFacts(is_training=True, at_s=20.0)
    status = run_status(running(), training, now_unix_s=HEARD_UNIX_S)
    assert (status.samples_per_second, status.at_s) == (pytest.approx(8.0), 100.0)
    over = LiveFacts(status="completed", is_training=True)
    assert run_status(running(), over, now_unix_s=HEARD_UNIX_S).power_w is None


def test_live_time_is_on_the_run_s_axis() -> None:
    rows = RowList()
    rows.rows = a_run()
    rows.session(70)
    status = run_status(books_of(rows), LiveFacts(at_s=7.0), now_unix_s=rows.unix_s)
    assert status.at_s == 107.0


def test_only_the_newest_rows_are_in_it() -> None:
    rows = RowList()
    rows.session()
    for number in range(30):
        rows.add(DecisionRow(decision_id=f"d{number}", action="hold", at_s=float(number)))
        rows.add(ObservationRow(at_s=float(number), window_s=1.0, setpoint=None))
        rows.note(f"note {number}", at_s=float(number))
    status = run_status(books_of(rows), None, now_unix_s=rows.unix_s)
    assert [row["decision_id"] for row in status.decisions] == [f"d{number}" for number in range(10, 30)]
    assert [row["at_s"] for row in status.observations] == [float(number) for number in range(10, 30)]
    assert [row["text"] for row in status.notes] == [f"note {number}" for number in range(25, 30)]
    assert status.notes[0] == {"code": "EADT-000", "text": "note 25", "at_s": 25.0}
    assert "seq" not in status.decisions[0]
    assert status.decisions[0]["outcome"] == "pending"


def test_it_is_plain_json() -> None:
    rows = RowList()
    rows.rows = a_run(ended=False)
    rows.steps(71, 100.0, math.nan, generation=3, setting=2)
    live = LiveFacts(is_training=True, best_efficiency=math.inf)
    status = run_status(books_of(rows), live, now_unix_s=HEARD_UNIX_S)
    values = status.as_dict()
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    assert (values["loss"], values["best_efficiency"]) == (None, None)
    assert isinstance(status.energy_j, Quantity)
    assert values["energy_j"] == {
        "value": status.energy_j.value,
        "uncertainty": status.energy_j.uncertainty,
        "at_least": status.energy_j.at_least,
        "qualities": list(status.energy_j.qualities),
    }
    assert set(values) == {name for name in type(status).__slots__}
