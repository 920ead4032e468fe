"""Books: hand-computed examples of each rule, and any ledger against the plain reference."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eadt.record.books import Books
from eadt.record.books import books as books_module
from eadt.record.books import job_time as job_time_module
from eadt.record.books.books import Books as SameBooks
from eadt.record.books.curves import MAX_BINS
from eadt.record.books.undo import Limits, Page, Undoable
from eadt.record.rows import (
    AnyRow,
    CheckpointRow,
    DecisionRow,
    DevicesRow,
    EndRow,
    EnergyRow,
    GenerationRow,
    LedgerRow,
    MeteredComponent,
    NodeRow,
    ObservationRow,
    SessionRow,
    StepsRow,
    decode,
    encode,
)
from eadt.units import Quantity
from tests.unit.books_factory import (
    NODE,
    ORIGIN_S,
    OTHER,
    START_UNIX_S,
    RowList,
    a_run,
    any_ledger,
    books_of,
    component,
    setpoint,
)
from tests.unit.books_reference import Reference

_PROPERTIES = """
    run sessions at_s num_rows num_dropped num_unusable unusable step loss learning_rate world_size setpoint
    optimizer_steps lost_steps num_rollbacks samples tokens lost_samples seconds_by_use not_measured
    shared_out_j foreign_j shared_machine_s decisions observations generation_rows changes checkpoints faults
    notes validations row_counts
""".split()  # noqa: SIM905
_METHODS = """
    energy energy_cells joules_per_sample joules_per_token useful_joules_per_sample mean_power_w
    recent_power_w recent_samples_per_second energy_to_go_j seconds_to_go settings generations nodes devices
    series
""".split()  # noqa: SIM905
ATTRIBUTES = ("use", "component", "quality", "node")


def figures(books: Books) -> dict[str, Any]:
    """All that books answer."""
    answers = {name: getattr(books, name) for name in _PROPERTIES}
    answers |= {name: getattr(books, name)() for name in _METHODS}
    answers |= {f"by {attribute}": books.energy_by(attribute) for attribute in ATTRIBUTES}
    return answers


def plain(value: Any) -> Any:
    """Figures as nested lists and dictionaries."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, msgspec.Struct):
        return plain(msgspec.structs.asdict(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    return value


def assert_same(one: Any, other: Any, where: str = "") -> None:
    """Equal, but for the last digits of floats (sums in another order)."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for place, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{where}/{place}")
    elif isinstance(one, float) and isinstance(other, float):
        assert one == pytest.approx(other, rel=1e-9, abs=1e-9), where
    else:
        assert one == other, where


def by_use(books: Books) -> dict[str, float]:
    """J by use, without the zero ones."""
    return {use: quantity.value for use, quantity in books.energy_by("use").items() if quantity.value}


def begun(components: Any = "cpu", **columns: Any) -> RowList:
    rows = RowList()
    rows.session(**columns)
    rows.node(components)
    return rows


def test_the_property_lists_name_all_that_books_answer() -> None:
    public = {name for name in vars(SameBooks) if not name.startswith("_")}
    assert public == {*_PROPERTIES, *_METHODS, "energy_by", "add", "to_state", "from_state"}


# -- any ledger -------------------------------------------------------------------------------------------


@settings(max_examples=300)
@given(rows=any_ledger())
def test_any_ledger_gives_the_figures_of_the_plain_reference(rows: list[AnyRow]) -> None:
    books, reference = books_of(rows), Reference(rows)
    wanted = reference.energy()
    total = books.energy()
    assert (total is None) == (wanted["total"] is None)
    if total is not None:
        assert_same(plain(total), plain(wanted["total"]))
        assert total.value == wanted["total"]["value"]
    for attribute in ATTRIBUTES:
        parts = books.energy_by(attribute)
        assert_same(plain(parts), plain(wanted["by"][attribute]), attribute)
        assert {name: part.value for name, part in parts.items()} == {
            name: part["value"] for name, part in wanted["by"][attribute].items()
        }
    assert books.energy_cells() == wanted["cells"]
    assert books.shared_out_j == wanted["shared_out_j"]
    assert books.foreign_j == {name: mj / 1000 for name, mj in wanted["foreign_j"].items()}
    assert books.shared_machine_s == wanted["shared_machine_s"]
    missing = books.not_measured
    assert missing.component_seconds == pytest.approx(wanted["not_measured_s"], abs=1e-4)
    assert missing.fraction == pytest.approx(wanted["not_measured_fraction"], abs=1e-6)
    assert missing.num_gaps == len(wanted["gaps"])
    seen = [
        (round(gap.seconds * 1e6), gap.at_s, gap.node, gap.component, gap.reason) for gap in missing.longest
    ]
    assert_same(sorted(plain(seen)), sorted(plain(wanted["gaps"])))

    seconds, time_parts = reference.seconds_by_use()
    assert books.seconds_by_use == seconds
    for kind, tallies in (("setting", books.settings()), ("generation", books.generations())):
        for tally in tallies:
            key = (kind, tally.session, tally.number)
            energy_mj, useful_mj, is_measured = wanted["parts"].get(key, (0, 0, False))
            assert tally.energy_j == (energy_mj / 1000 if is_measured else None)
            assert tally.useful_j == (useful_mj / 1000 if is_measured else None)
            assert tally.seconds == time_parts[key] / 1e6
            steps = [
                step
                for step in reference.counted.values()
                if (step.session, getattr(step, kind)) == (tally.session, tally.number)
            ]
            assert tally.num_steps == len(steps)
            each = [reference.batch if step.filled else step.samples for step in steps]
            assert tally.samples == sum(samples or 0 for samples in each)
        assert sum(round((tally.energy_j or 0) * 1000) for tally in tallies) == (
            round(total.value * 1000) if total else 0
        )

    assert books.step == reference.position
    assert books.optimizer_steps == len(reference.counted)
    assert books.lost_steps == len(reference.lost)
    assert books.num_rollbacks == reference.num_rollbacks
    of_tokens = reference.batch * reference.length if reference.batch and reference.length else None
    counted = list(reference.counted.values())
    lost = [step for _, step in reference.lost]
    for value, steps, name, each_filled in (
        (books.samples, counted, "samples", reference.batch),
        (books.tokens, counted, "tokens", of_tokens),
        (books.lost_samples, lost, "samples", reference.batch),
    ):
        each = [each_filled if step.filled else getattr(step, name) for step in steps]
        assert value == (None if None in each else sum(each))
    assert books.num_dropped == reference.num_dropped
    assert books.num_unusable == reference.num_unusable
    assert [session.seconds for session in books.sessions] == (
        pytest.approx(reference.seconds) if reference.has_row or reference.has_content else []
    )
    assert books.at_s == pytest.approx(reference.offset_s(reference.session) + reference.seconds[-1])
    valid = {}
    for row, session in reference.validations:
        if row.step <= reference.limit(session, row.generation):
            valid[row.step] = row
    assert [row.step for _, row in books.validations] == sorted(valid)


@settings(max_examples=150)
@given(rows=any_ledger())
def test_every_split_adds_up_to_the_last_digit(rows: list[AnyRow]) -> None:
    books = books_of(rows)
    total = books.energy()
    total_mj = 0 if total is None else round(total.value * 1000)
    for attribute in ATTRIBUTES:
        assert sum(round(part.value * 1000) for part in books.energy_by(attribute).values()) == total_mj
    assert sum(round(joules * 1000) for joules in books.energy_cells().values()) == total_mj
    assert all(joules >= 0 for joules in books.energy_cells().values())


@settings(max_examples=150)
@given(rows=any_ledger(), data=st.data())
def test_asking_between_rows_and_keeping_the_state_changes_no_figure(
    rows: list[AnyRow], data: st.DataObject
) -> None:
    wanted = plain(figures(books_of(rows)))
    cut = data.draw(st.integers(0, len(rows)))
    books = books_of(rows[:cut])
    figures(books)
    state = books.to_state()
    books = Books.from_state(state)
    assert books.to_state() == state
    for row in rows[cut:]:
        books.add(decode(encode(row)))  # as a reader of the file gets it
        figures(books)
    assert_same(plain(figures(books)), wanted)


def test_state_of_another_version_is_refused() -> None:
    state = msgspec.msgpack.decode(Books().to_state())
    state["version"] = "0-of-another-make"
    with pytest.raises(ValueError, match="version"):
        Books.from_state(msgspec.msgpack.encode(state))
    for bad in (b"", b"junk", msgspec.msgpack.encode({"version": 1, "energy": 5})):
        with pytest.raises(ValueError, match="no state of books"):
            Books.from_state(bad)


# -- energy -----------------------------------------------------------------------------------------------


def test_nothing_measured_is_unknown_and_not_zero() -> None:
    books = Books()
    assert books.energy() is None
    assert books.joules_per_sample() is None
    rows = begun([component("cpu", None)])
    rows.energy(0.0, 10.0, "useful", None)
    rows.steps(1, 0.0, 2.0)
    books = books_of(rows)
    assert (books.energy(), books.mean_power_w(), books.recent_power_w()) == (None, None, None)
    assert books.energy_by("use") == {}
    assert [tally.energy_j for tally in books.settings()] == [None]
    assert books.nodes()[0].energy is None
    rows = begun()
    rows.energy(0.0, 10.0, "idle", 0.0)
    assert books_of(rows).energy_by("use")["idle"].value == 0.0


def test_a_component_can_be_for_something_else_than_its_node() -> None:
    rows = begun("cpu gpu0 gpu1")
    rows.energy(0.0, 10.0, "useful", 100.0, 2000.0, 300.0, uses={"gpu1": "idle"})
    books = books_of(rows)
    assert by_use(books) == {"useful": 2100.0, "idle": 300.0}
    assert books.energy_cells()["idle", "gpu1", "simulated", NODE] == 300.0


def test_shared_fractions_move_joules_and_are_told_as_a_model_s() -> None:
    rows = begun("cpu gpu0 gpu1")
    rows.energy(
        0.0, 10.0, "useful", 100.0, 2000.0, 300.0,
        uses={"gpu1": "idle"}, shared={"input": 0.1}, shared_cpu={"change": 0.25},
    )  # fmt: skip
    books = books_of(rows)
    assert by_use(books) == {"useful": 65.0 + 1800.0, "idle": 300.0, "input": 210.0, "change": 25.0}
    assert books.shared_out_j == {"input": 210.0, "change": 25.0}


def test_shares_never_exceed_the_whole_and_never_lose_a_thousandth() -> None:
    rows = begun("cpu")
    rows.energy(
        0.0, 1.0, "useful", 0.005, shared={"input": 0.5, "checkpoint": 0.5}, shared_cpu={"change": 0.9}
    )
    books = books_of(rows)
    # Halves of 5 are 2 (to even) each; 0.9 of 5 would be 4, of which 1 is left.
    assert by_use(books) == {"input": 0.002, "checkpoint": 0.002, "change": 0.001}


def test_a_rollback_makes_what_it_undid_lost_also_what_arrives_later() -> None:
    rows = begun("cpu gpu0")
    rows.energy(0.0, 10.0, "useful", 1.0, 10.0, step=0)
    rows.energy(10.0, 20.0, "useful", 1.0, 20.0, step=10)
    rows.energy(20.0, 22.0, "checkpoint", 1.0, 5.0, step=20)
    rows.energy(22.0, 30.0, "useful", 1.0, 30.0, step=20, uses={"gpu0": "validation"})
    rows.rollback(1, 10)
    rows.energy(30.0, 40.0, "useful", 1.0, 40.0, step=30)  # late: booked of generation 1
    rows.energy(40.0, 45.0, "change", 1.0, 7.0, step=30, generation=2)
    rows.energy(45.0, 50.0, "useful", 1.0, 50.0, step=10, generation=2)
    assert by_use(books_of(rows)) == {
        "useful": 11.0 + 51.0,
        "lost": 21 + 31 + 41.0,
        "checkpoint": 6.0,
        "change": 8.0,
    }


def test_a_rollback_reaches_only_its_generations_and_earlier_sessions() -> None:
    rows = begun()
    rows.energy(0.0, 10.0, "useful", 1.0, step=5, generation=2)
    rows.energy(10.0, 20.0, "useful", 10.0, step=5, generation=3)
    rows.rollback(2, 5)
    assert by_use(books_of(rows)) == {"useful": 10.0, "lost": 1.0}
    rows.session(6)
    rows.node()
    rows.energy(0.0, 10.0, "useful", 100.0, step=6)
    assert by_use(books_of(rows)) == {"useful": 110.0, "lost": 1.0}
    rows.rollback(1, 5)
    assert by_use(books_of(rows)) == {"lost": 111.0}


def test_a_session_that_goes_on_from_a_step_loses_what_was_beyond_it() -> None:
    rows = begun()
    rows.steps(1, 0.0, 5.0, 4.0, 3.0)
    rows.energy(0.0, 2.0, "useful", 20.0, step=0)
    rows.energy(2.0, 3.0, "useful", 10.0, step=2)
    rows.time("useful", 0.0, 2.0, step=0)
    rows.time("useful", 2.0, 3.0, step=2)
    rows.session(2)
    rows.node(at_s=1.0)
    rows.energy(1.0, 2.0, "startup", 7.0, generation=0)
    rows.energy(2.0, 3.0, "useful", 10.0, step=2)
    rows.steps(3, 2.0, 3.5)
    books = books_of(rows)
    assert by_use(books) == {"useful": 30.0, "lost": 10.0, "startup": 7.0}
    assert (books.optimizer_steps, books.lost_steps, books.lost_samples) == (3, 1, 8)
    assert books.seconds_by_use == {"useful": 2.0, "lost": 1.0}
    assert books.num_rollbacks == 0
    assert books.at_s == 6.0


def test_settings_lose_their_useful_energy_by_a_rollback_but_not_their_energy() -> None:
    rows = begun()
    rows.generation("started", 1, 0.0, setpoint=setpoint(4))
    rows.energy(0.0, 1.0, "useful", 1.0, step=0, shared={"input": 0.25})
    rows.energy(1.0, 2.0, "useful", 10.0, step=1, generation=2)
    rows.rollback(2, 1)
    books = books_of(rows)
    setting = books.settings()[-1]
    assert (setting.energy_j, setting.useful_j, setting.setpoint) == (11.0, 0.75, setpoint(4))
    assert [(part.number, part.useful_j) for part in books.generations()] == [(1, 0.75), (2, 0.0)]


def test_rows_delivered_twice_are_dropped_and_counted() -> None:
    rows = begun()
    rows.energy(0.0, 10.0, "useful", 10.0)
    rows.energy(0.0, 10.0, "useful", 10.0)
    rows.energy(9.0, 11.0, "useful", 10.0)
    rows.energy(9.9995, 12.0, "useful", 5.0)  # rounding
    rows.steps(1, 0.0, 2.0, 1.0)
    rows.steps(1, 0.0, 2.0, 1.0)
    books = books_of(rows)
    assert books.energy() is not None
    assert by_use(books) == {"useful": 15.0}
    assert books.num_dropped == 3
    assert (books.optimizer_steps, books.samples) == (2, 16)


def test_after_a_reboot_node_time_begins_anew() -> None:
    rows = begun()
    rows.energy(0.0, 100.0, "useful", 10.0)
    rows.node(at_s=130.0, boot_id="second")
    rows.rows[-1].monotonic_s = 5.0
    rows.energy(5.0 - ORIGIN_S, 15.0 - ORIGIN_S, "useful", 10.0)
    books = books_of(rows)
    assert by_use(books) == {"useful": 20.0}
    assert books.num_dropped == 0
    assert [(gap.at_s, gap.seconds) for gap in books.not_measured.longest] == [(100.0, 30.0)]
    assert books.at_s == 140.0


def test_without_a_boot_id_a_clock_that_jumped_back_has_begun_anew() -> None:
    rows = RowList()
    rows.session()
    rows.node(boot_id=None)
    rows.energy(0.0, 500.0, "useful", 10.0)
    rows.node(at_s=560.0, boot_id=None)
    rows.rows[-1].monotonic_s = 0.0
    rows.energy(0.0 - ORIGIN_S, 10.0 - ORIGIN_S, "useful", 10.0)
    books = books_of(rows)
    assert (by_use(books), books.num_dropped, books.at_s) == ({"useful": 20.0}, 0, 570.0)


def test_columns_are_the_node_row_s_in_force() -> None:
    rows = begun("cpu gpu0")
    rows.energy(0.0, 10.0, "useful", 1.0, 2.0)
    rows.node("gpu0 cpu", at_s=10.0)
    rows.energy(10.0, 20.0, "useful", 10.0, 20.0)
    books = books_of(rows)
    assert {name: part.value for name, part in books.energy_by("component").items()} == {
        "cpu": 21.0,
        "gpu0": 12.0,
    }


def test_foreign_and_shared_machines_are_told() -> None:
    rows = begun("cpu gpu0")
    rows.energy(0.0, 10.0, "useful", 1.0, 20.0, own_fraction=0.5, foreign=["gpu0"])
    rows.energy(10.0, 20.0, "useful", 1.0, 20.0)
    books = books_of(rows)
    assert (books.foreign_j, books.shared_machine_s) == ({"gpu0": 20.0}, 10.0)


def test_rows_that_make_no_sense_are_named_and_the_rest_is_booked() -> None:
    rows = begun()
    rows.energy(5.0, 4.0, "useful", 1.0)
    rows.energy(0.0, 1.0, "useful", 1.0, 1.0)
    rows.energy(0.0, 1.0, "useful", 1.0, node="never-told")
    rows.energy(0.0, math.nan, "useful", 1.0)
    rows.energy(0.0, 1.0, "useful", 1.0, generation=-1)
    rows.energy(0.0, 1.0, "useful", 1.0, step=10**12)
    rows.add(devices_row(0.0, 1.0, utilisation_fraction=[]))
    rows.note("late", at_s=1e30)
    rows.energy(0.0, 1.0, "useful", 7.0)
    books = books_of(rows)
    books.add("no row")  # type: ignore[arg-type]
    assert by_use(books) == {"useful": 7.0}
    assert books.num_unusable == 9
    assert books.unusable[0].startswith("energy 4: ")
    assert "never-told" not in books.unusable[2]
    for _ in range(300):
        books.add(rows.rows[3])
    assert (len(books.unusable), books.num_unusable) == (100, 309)


def test_energy_that_there_cannot_be_is_unknown() -> None:
    rows = begun("cpu gpu0 gpu1")
    rows.energy(0.0, 10.0, "useful", -5.0, math.inf, 1e14)
    rows.energy(10.0, 20.0, "useful", 5.0, 5.0, 5.0)
    books = books_of(rows)
    assert by_use(books) == {"useful": 15.0}
    assert books.not_measured.component_seconds == 30.0
    assert books.not_measured.fraction == 0.5


# -- what is not measured ---------------------------------------------------------------------------------


def gaps(books: Books) -> list[tuple[str, float, float, str]]:
    return sorted((gap.component, gap.at_s, gap.seconds, gap.reason) for gap in books.not_measured.longest)


def test_unknown_stretches_are_listed_and_neighbours_are_one() -> None:
    rows = begun([component("cpu"), component("gpu0"), component("gpu1", None, detail="no driver for it")])
    rows.energy(0.0, 10.0, "useful", 1.0, None, None, why_unknown={"gpu0": "it hung"})
    rows.energy(10.0, 20.0, "useful", 1.0, None, None, why_unknown={"gpu0": "it hung"})
    rows.energy(20.0, 30.0, "useful", 1.0, 5.0, None, unknown_s={"gpu0": 4.0})
    rows.energy(32.0, 40.0, "useful", 1.0, 5.0, None)
    books = books_of(rows)
    assert gaps(books) == [
        ("cpu", 30.0, 2.0, "no row"),
        ("gpu0", 0.0, 20.0, "it hung"),
        ("gpu0", 20.0, 4.0, "it was not read"),
        ("gpu0", 30.0, 2.0, "no row"),
        ("gpu1", 0.0, 30.0, "no driver for it"),
        ("gpu1", 30.0, 2.0, "no row"),
        ("gpu1", 32.0, 8.0, "no driver for it"),
    ]
    assert books.not_measured.component_seconds == 68.0
    assert books.not_measured.num_gaps == 7
    assert books.not_measured.fraction == pytest.approx(68.0 / 120.0)
    assert books.energy_by("component").keys() == {"cpu", "gpu0"}


def test_a_component_is_expected_from_its_node_row_until_the_next() -> None:
    rows = RowList()
    rows.session()
    rows.node("cpu gpu0", at_s=2.0)
    rows.energy(5.0, 10.0, "useful", 1.0, 1.0)
    rows.node("cpu gpu1", at_s=13.0)
    rows.energy(15.0, 20.0, "useful", 1.0, 1.0)
    books = books_of(rows)
    assert gaps(books) == [
        ("cpu", 2.0, 3.0, "no row"),
        ("cpu", 10.0, 5.0, "no row"),
        ("gpu0", 2.0, 3.0, "no row"),
        ("gpu0", 10.0, 3.0, "no row"),
        ("gpu1", 13.0, 2.0, "no row"),
    ]
    rows.node("", at_s=20.0)  # it books no more, and nothing is expected of it
    rows.end(at_s=500.0)
    assert gaps(books_of(rows)) == gaps(books)


def test_what_was_not_booked_up_to_the_end_is_missing() -> None:
    rows = begun()
    rows.energy(0.0, 100.0, "useful", 1.0)
    rows.note("a moment later", at_s=150.0)
    assert gaps(books_of(rows)) == []  # it may still come
    rows.note("a while later", at_s=170.0)
    assert gaps(books_of(rows)) == [("cpu", 100.0, 70.0, "no row")]
    crashed = [*rows.rows[:-1]]
    after = RowList()
    after.session(0)
    assert gaps(books_of([*crashed, *after.rows])) == [("cpu", 100.0, 50.0, "no row")]
    rows.rows = crashed[:-1]
    rows.end(at_s=104.0)
    assert gaps(books_of(rows)) == []
    rows.end(at_s=106.0)
    assert gaps(books_of(rows)) == [("cpu", 100.0, 6.0, "no row")]


def test_only_the_longest_gaps_are_kept_and_all_are_counted() -> None:
    rows = begun()
    for number in range(350):
        rows.energy(number * 10.0, number * 10.0 + 8.0 - number / 100, "useful", 1.0)
    missing = books_of(rows).not_measured
    assert missing.num_gaps == 349
    assert len(missing.longest) == 100
    assert missing.longest[0].seconds == pytest.approx(2.0 + 3.48)
    assert missing.longest[99].seconds == pytest.approx(2.0 + 2.49)


def test_a_part_of_which_some_is_unknown_is_at_least() -> None:
    rows = begun("cpu gpu0", max_steps=10)
    rows.energy(0.0, 10.0, "startup", 10.0, 10.0)
    rows.energy(10.0, 1010.0, "useful", 10.0, 10.0, unknown_s={"gpu0": 1.5})
    rows.steps(1, 10.0, *[1.0] * 5)
    books = books_of(rows)
    total = books.energy()
    assert total is not None
    assert not total.at_least  # 1.5 s of 2020 is less than a thousandth
    lower = {
        name for attribute in ATTRIBUTES for name, part in books.energy_by(attribute).items() if part.at_least
    }
    assert lower == {"gpu0"}
    rows.energy(1010.0, 1020.0, "useful", 10.0, None)
    books = books_of(rows)
    lower = {
        name for attribute in ATTRIBUTES for name, part in books.energy_by(attribute).items() if part.at_least
    }
    assert lower == {"gpu0", "useful", "simulated", NODE}
    for figure in (books.energy(), books.joules_per_sample(), books.joules_per_token(), books.mean_power_w()):
        assert figure is not None
        assert figure.at_least


# -- uncertainty ------------------------------------------------------------------------------------------


def test_errors_add_linearly_in_one_piece_of_hardware_and_in_quadrature_between_them() -> None:
    card = {"identity": "GPU-1", "quality": "measured"}
    rows = begun([component("gpu0", relative=0.1, **card), component("cpu", relative=0.3)])
    rows.energy(0.0, 10.0, "useful", 100.0, 100.0)
    rows.node([component("gpu0", relative=0.2, **card)], at_s=10.0)
    rows.energy(10.0, 20.0, "useful", 100.0)
    books = books_of(rows)
    total = books.energy()
    assert total is not None
    assert total.uncertainty == pytest.approx(math.hypot(10.0 + 20.0, 30.0))
    assert books.energy_by("component")["gpu0"].uncertainty == pytest.approx(30.0)
    assert total.qualities == ("measured", "simulated")


def test_a_source_without_a_stated_error_makes_the_error_unknown_once_it_gives_energy() -> None:
    rows = begun([component("cpu", relative=None), component("gpu0", relative=0.1)])
    rows.energy(0.0, 10.0, "idle", 0.0, 50.0)
    total = books_of(rows).energy()
    assert total is not None
    assert total.uncertainty == pytest.approx(5.0)
    rows.energy(10.0, 20.0, "useful", 1.0, 50.0)
    books = books_of(rows)
    total = books.energy()
    assert total is not None
    assert total.uncertainty is None
    assert books.energy_by("use")["idle"].uncertainty is not None
    assert books.energy_by("use")["useful"].uncertainty is None


def test_a_use_is_uncertain_by_where_it_was_cut_and_by_what_was_shared_out_but_a_total_is_not() -> None:
    rows = begun(
        [component("gpu0", relative=0.0, resolution_s=0.1), component("cpu", relative=0.0, resolution_s=9.0)]
    )
    rows.energy(0.0, 10.0, "useful", 1000.0, 10.0)
    rows.energy(10.0, 12.0, "checkpoint", 100.0, 10.0, uses={"cpu": "useful"})  # 50 W: 5 J either way
    rows.energy(12.0, 22.0, "useful", 2000.0, 10.0)  # 200 W: 20 J
    books = books_of(rows)
    uses = books.energy_by("use")
    assert uses["checkpoint"].uncertainty == pytest.approx(math.hypot(5.0, 20.0))
    assert uses["useful"].uncertainty == pytest.approx(math.hypot(5.0, 20.0))
    total = books.energy()
    assert total is not None
    assert total.uncertainty == 0.0
    rows.energy(22.0, 32.0, "useful", 1000.0, 0.0, shared={"input": 0.03})
    uses = books_of(rows).energy_by("use")
    assert uses["input"].uncertainty == pytest.approx(30.0)
    assert uses["useful"].uncertainty == pytest.approx(math.hypot(5.0, 20.0, 30.0))


def test_stale_joules_are_told_by_their_quality() -> None:
    rows = begun([component("gpu0", "measured")])
    rows.energy(0.0, 10.0, "useful", 10.0)
    rows.energy(10.0, 20.0, "useful", 5.0, qualities={"gpu0": "stale"})
    books = books_of(rows)
    assert {name: part.value for name, part in books.energy_by("quality").items()} == {
        "measured": 10.0,
        "stale": 5.0,
    }


# -- memory of what can be undone -------------------------------------------------------------------------


def undoable_rows(num: int, saved: list[int], after_j: float = 1.0) -> RowList:
    """One joule in each of ``num`` rows of a step each, ``after_j`` in the 10 after each checkpoint."""
    rows = begun()
    for step in range(num):
        if step in saved:
            rows.add(CheckpointRow(step=step))
        joules = after_j if any(step - number in range(10) for number in saved) else 1.0
        rows.energy(float(step), step + 1.0, "useful", joules, step=step, shared={"input": 0.25})
    return rows


@pytest.mark.parametrize("back", [3, 2603, 5001, 5505])
def test_a_rollback_to_any_saved_step_is_exact_however_long_ago(back: int) -> None:
    num = 6000
    saved = [2603, 5001, 5505]
    target = num - back if back == 3 else back
    rows = undoable_rows(num, saved, after_j=5.0)
    books = books_of(rows)
    (node,) = books._state.energy.nodes.values()
    assert node.undoable.num_rows + len(node.undoable.old) < 2100
    rows.rollback(1, target)
    books.add(rows.rows[-1])
    kept_j = target + 40.0 * sum(number < target for number in saved)
    assert by_use(books) == {"useful": 0.75 * kept_j, "input": 0.25 * kept_j, "lost": num + 120.0 - kept_j}
    assert books.shared_out_j == {"input": 0.25 * kept_j}
    assert books.settings()[-1].useful_j == 0.75 * kept_j


def test_a_rollback_into_the_middle_of_what_was_added_up_takes_its_fraction_and_says_so() -> None:
    rows = undoable_rows(6000, [2600, 5000])
    rows.rollback(1, 2000)
    books = books_of(rows)
    lost = books.energy_by("use")["lost"]
    assert lost.value == pytest.approx(4000.0, abs=0.01)
    total = books.energy()
    assert total is not None
    assert total.value == 6000.0
    assert books.shared_out_j["lost"] == pytest.approx(600.0, abs=0.01)  # of steps 2000 to 2599
    assert lost.uncertainty is not None
    assert lost.uncertainty > 600.0


def test_the_memory_of_many_generations_and_nodes_is_bounded() -> None:
    undoable = Undoable()
    for number in range(5000):
        undoable.add(Page(0, number, number, number % 3, [number], [[1, 10]]), 64, [])
        assert undoable.num_rows + len(undoable.old) <= 64
    undone = undoable.undo(0, 5000, 0)
    assert sum(part.amounts[0] for part in undone) == 5000
    assert all(part.is_exact for part in undone)
    rows = RowList()
    rows.session()
    for number in range(2200):
        rows.node(node=f"node-{number}")
        for place in range(20 if number < 4 else 0):
            rows.energy(
                place * 1.0, place + 1.0, "useful", 1.0, node=f"node-{number}", step=place, generation=place
            )
    books = books_of(rows)
    kept = [node.undoable.num_rows + len(node.undoable.old) for node in books._state.energy.nodes.values()]
    assert max(kept) <= 16
    rows.rollback(20, 0)
    books.add(rows.rows[-1])
    assert by_use(books) == {"lost": 80.0}


def test_limits_of_several_rollbacks() -> None:
    limits = Limits()
    assert limits.of(0) is None
    limits.undo(2, 50)
    limits.undo(4, 70)
    assert [limits.of(generation) for generation in (0, 2, 3, 4, 5)] == [50, 50, 70, 70, None]
    limits.undo(5, 60)
    assert [limits.of(generation) for generation in (2, 3, 5, 6)] == [50, 60, 60, None]
    limits.undo(3, 80)
    assert [limits.of(generation) for generation in (2, 3, 5)] == [50, 60, 60]
    assert limits.void(5, 60)
    assert not limits.void(5, 59)


# -- steps ------------------------------------------------------------------------------------------------


def test_steps_that_count_and_steps_that_were_undone() -> None:
    rows = begun()
    rows.steps(1, 0.0, 5.0, 4.0, 3.0)
    rows.rollback(1, 1)
    rows.steps(4, 3.0, 2.9)  # of generation 1, late
    rows.steps(2, 5.0, 4.1, generation=2)
    books = books_of(rows)
    assert (books.step, books.loss, books.world_size) == (2, 4.1, 2)
    assert books.learning_rate == 1e-3 / 2
    assert (books.optimizer_steps, books.lost_steps, books.num_rollbacks) == (2, 3, 1)
    assert (books.samples, books.lost_samples, books.tokens) == (16, 24, 256)


def test_a_hole_between_steps_is_filled_and_its_rows_may_still_come() -> None:
    rows = begun(train_batch_size=4, sequence_length=10)
    rows.steps(1, 0.0, 5.0, samples=4, tokens=40)
    rows.steps(5, 4.0, 3.0, samples=4, tokens=40)
    books = books_of(rows)
    assert (books.optimizer_steps, books.samples, books.tokens) == (5, 20, 200)
    assert [step for step, _, _ in books.series().loss.points] == [1, 5]
    rows.steps(2, 1.0, 4.5, 4.4, samples=8, tokens=80)
    books = books_of(rows)
    assert (books.optimizer_steps, books.samples, books.tokens) == (5, 28, 280)
    rows.session(9, train_batch_size=4)
    assert (books_of(rows).optimizer_steps, books_of(rows).samples) == (9, 44)
    rows.session(2, train_batch_size=4)
    books = books_of(rows)
    assert (books.optimizer_steps, books.lost_steps, books.lost_samples) == (2, 7, 32)


def test_samples_that_a_step_does_not_say_are_unknown() -> None:
    rows = begun(train_batch_size=None)
    rows.steps(1, 0.0, 5.0)
    rows.steps(2, 1.0, 5.0, samples=None)
    books = books_of(rows)
    assert (books.samples, books.tokens) == (None, 256)
    assert books.joules_per_sample() is None
    rows = begun(train_batch_size=None)
    rows.steps(3, 0.0, 5.0)  # nobody knows of 1 and 2
    assert books_of(rows).samples is None
    assert books_of(rows).optimizer_steps == 3


def test_a_step_done_again_by_a_newer_generation_counts_once() -> None:
    rows = begun()
    rows.steps(1, 0.0, 5.0, 4.0)
    rows.steps(2, 5.0, 4.2, generation=2)
    rows.steps(2, 5.0, 9.0)  # and the older one's delivered again
    books = books_of(rows)
    assert (books.optimizer_steps, books.lost_steps, books.loss) == (2, 1, 4.2)


def test_memory_of_steps_grows_with_generations_only() -> None:
    rows = begun()
    for first in range(1, 20001, 10):
        rows.steps(first, first * 1.0, *[1.0] * 10)
    books = books_of(rows)
    assert len(books._state.steps.kept) == 1
    assert len(books._state.steps.recent) <= 1034
    points = books.series().loss.points
    assert 2000 <= len(points) <= 4001
    assert (points[0][0], points[-1]) == (8, (20000, 20001.0, 1.0))
    rows.rollback(1, 12345)
    books.add(rows.rows[-1])
    assert books.optimizer_steps == 12345
    assert max(step for step, _, _ in books.series().loss.points) == 12344
    assert books.loss is None  # step 12345 is no longer known by itself


# -- now and to go ----------------------------------------------------------------------------------------


def test_recent_power_is_each_node_s_newest_intervals() -> None:
    rows = begun("cpu gpu0")
    rows.node("cpu", node=OTHER)
    rows.energy(0.0, 10.0, "useful", 100.0, 1000.0)
    rows.energy(0.0, 10.0, "useful", 50.0, node=OTHER)
    power = books_of(rows).recent_power_w()
    assert power is not None
    assert (power.value, power.at_least) == (115.0, False)
    rows.energy(10.0, 10.4, "useful", 8.0, 80.0)  # 0.4 s and the 10 s before
    power = books_of(rows).recent_power_w()
    assert power is not None
    assert power.value == pytest.approx(1188.0 / 10.4 + 5.0)
    rows.energy(10.4, 11.4, "checkpoint", 3.0, None)
    power = books_of(rows).recent_power_w()
    assert power is not None
    assert (power.value, power.at_least) == (8.0, True)
    rows.note("later", at_s=100.0)  # both silent
    assert books_of(rows).recent_power_w() is None
    rows.energy(11.4, 100.0, "useful", 886.0, 886.0)
    power = books_of(rows).recent_power_w()
    assert power is not None
    assert (power.value, power.at_least) == (pytest.approx(20.0), True)
    rows.end(at_s=100.0)
    assert books_of(rows).recent_power_w() is None


def test_a_node_that_left_has_no_recent_power() -> None:
    rows = begun()
    rows.node(node=OTHER)
    rows.energy(0.0, 10.0, "useful", 100.0)
    rows.energy(0.0, 10.0, "useful", 100.0, node=OTHER)
    rows.node("", node=OTHER, at_s=10.0)
    assert books_of(rows).recent_power_w() == Quantity(
        10.0, pytest.approx(10.0 * math.hypot(5, 5) / 200), False, ("simulated",)
    )


def test_throughput_and_what_is_to_go_follow_the_present_setting() -> None:
    rows = begun(max_steps=100)
    rows.generation("started", 1, 0.0, setpoint=setpoint(4))
    rows.energy(0.0, 10.0, "startup", 9999.0, generation=0, setting=0)
    rows.steps(1, 10.0, *[1.0] * 10)
    rows.energy(10.0, 20.0, "useful", 1000.0)
    books = books_of(rows)
    assert books.recent_samples_per_second() == 8.0
    assert books.seconds_to_go() == pytest.approx(90.0)
    to_go = books.energy_to_go_j()
    assert to_go is not None
    assert to_go.value == pytest.approx(9000.0)
    # A change that takes 20 s; then steps of 2 s at 25 W.
    rows.energy(20.0, 40.0, "change", 5000.0, step=10, setting=2)
    rows.generation("started", 2, 40.0, setting=2, setpoint=setpoint(2))
    rows.steps(11, 40.0, 1.0, 1.0, step_s=2.0, generation=2, setting=2)
    books = books_of(rows)  # two steps are too few: as before, on average
    assert books.recent_samples_per_second() == pytest.approx(96 / 14)
    assert books.seconds_to_go() == pytest.approx(88 * 14 / 12)
    to_go = books.energy_to_go_j()
    assert to_go is not None
    assert to_go.value == pytest.approx(1000.0 / 12 * 88)
    rows.steps(13, 44.0, *[1.0] * 3, step_s=2.0, generation=2, setting=2)
    rows.energy(40.0, 50.0, "useful", 250.0, step=10, generation=2, setting=2)
    books = books_of(rows)
    assert books.recent_samples_per_second() == 4.0
    assert books.recent_samples_per_second(5.0) == 4.0
    assert books.seconds_to_go() == pytest.approx(85 * 2.0)
    to_go = books.energy_to_go_j()
    assert to_go is not None
    assert to_go.value == pytest.approx(85 * 50.0)


def test_throughput_s_window_ends_with_the_newest_steps() -> None:
    rows = begun()
    rows.steps(1, 0.0, *[1.0] * 40)
    rows.steps(41, 40.0, *[1.0] * 4, step_s=10.0)
    books = books_of(rows)
    assert books.recent_samples_per_second(30.0) == pytest.approx(0.8)
    assert books.recent_samples_per_second(60.0) == pytest.approx(8 * 44 / 80)
    assert Books().recent_samples_per_second() is None


def test_time_between_steps_is_in_what_is_to_go_but_pauses_between_generations_are_not() -> None:
    rows = begun(max_steps=20)
    rows.steps(1, 0.0, *[1.0] * 4)
    rows.steps(5, 8.0, *[1.0] * 4)  # 4 s of validation between
    rows.steps(9, 100.0, *[1.0] * 4, generation=2)  # a recovery
    assert books_of(rows).seconds_to_go() == pytest.approx(8 * 16.0 / 12)


def test_mean_power_is_over_the_time_that_was_metered_and_unknown_where_much_is_missing() -> None:
    rows = begun("cpu gpu0")
    rows.energy(0.0, 100.0, "useful", 100.0, 900.0)
    rows.note("later", at_s=120.0)
    power = books_of(rows).mean_power_w()
    assert power is not None
    assert power.value == 10.0
    rows.energy(100.0, 110.0, "useful", 0.0, None)
    power = books_of(rows).mean_power_w()
    assert power is not None
    assert power.at_least
    rows.energy(110.0, 125.0, "useful", 0.0, None)
    assert books_of(rows).mean_power_w() is None


# -- sessions ---------------------------------------------------------------------------------------------


def test_each_session_has_its_own_time_and_the_time_between_is_not_the_run_s() -> None:
    rows = begun()
    rows.unix_s = START_UNIX_S + 50.0
    rows.energy(0.0, 50.0, "useful", 50.0)
    rows.unix_s = START_UNIX_S + 9000.0
    rows.session(0)
    rows.node(at_s=1.0)
    rows.unix_s = START_UNIX_S + 9010.0
    rows.energy(1.0, 10.0, "useful", 9.0)
    rows.note("here", at_s=4.0)
    rows.end("interrupted", 10.0, reason="SIGTERM")
    books = books_of(rows)
    first, second = books.sessions
    assert (first.offset_s, first.seconds, first.status) == (0.0, 50.0, "no word")
    assert (first.started_unix_s, first.heard_unix_s) == (START_UNIX_S, START_UNIX_S + 50.0)
    assert (second.offset_s, second.seconds, second.status) == (50.0, 10.0, "interrupted")
    assert (second.started_unix_s, second.reason) == (START_UNIX_S + 9000.0, "SIGTERM")
    assert books.at_s == 60.0
    assert [at_s for at_s, _ in books.notes] == [54.0]
    assert books.not_measured.component_seconds == 0.0
    assert books_of(rows.rows[:-1]).sessions[-1].status == "running"


def test_what_comes_before_the_first_session_row_belongs_to_it() -> None:
    rows = RowList()
    rows.note("the disk is slow")
    rows.session(7)
    books = books_of(rows)
    assert [(session.index, session.resumed_step) for session in books.sessions] == [(0, 7)]
    assert (books.step, books.optimizer_steps) == (7, 0)
    assert books_of([LedgerRow(schema_version=1, unix_s=5.0)]).sessions == []


def test_a_node_that_a_session_did_not_introduce_is_booked_with_its_old_columns() -> None:
    rows = begun()
    rows.energy(0.0, 10.0, "useful", 10.0)
    rows.session(0)
    rows.energy(500.0, 510.0, "useful", 7.0)
    books = books_of(rows)
    total = books.energy()
    assert total is not None
    assert total.value == 17.0
    assert books.at_s == 20.0


# -- cards ------------------------------------------------------------------------------------------------


def devices_row(from_s: float, to_s: float, **columns: list[Any]) -> DevicesRow:
    values: dict[str, Any] = {
        "components": ["gpu0"],
        "utilisation_fraction": [0.5],
        "memory_used_bytes": [100],
        "memory_total_bytes": [1000],
        "temperature_c": [60.0],
        "sm_clock_mhz": [1000.0],
        "throttled": [{}],
        "foreign_processes": [0],
    }
    return DevicesRow(node=NODE, t0=from_s, t1=to_s, **(values | columns))


def test_cards_are_told_as_means_over_time_and_extremes() -> None:
    rows = begun()
    rows.add(devices_row(0.0, 60.0, throttled=[{"heat": 0.5}], utilisation_fraction=[None]))
    rows.add(
        devices_row(
            60.0, 80.0, sm_clock_mhz=[1400.0], temperature_c=[81.0], throttled=[{"heat": 1.0, "other": 0.1}]
        )
    )
    rows.add(devices_row(60.0, 80.0, foreign_processes=[9]))  # delivered twice
    rows.add(devices_row(80.0, 100.0, memory_used_bytes=[None], foreign_processes=[2]))
    books = books_of(rows)
    (card,) = books.devices()
    assert (card.node, card.component, card.seconds) == (NODE, "gpu0", 100.0)
    assert card.utilisation_fraction == 0.5
    assert card.sm_clock_mhz == pytest.approx(1080.0)
    assert (card.memory_used_bytes, card.memory_total_bytes, card.temperature_c) == (100, 1000, 81.0)
    assert card.throttled == {"heat": pytest.approx(0.5), "other": pytest.approx(0.02)}
    assert (card.foreign_processes, books.num_dropped) == (2, 1)
    rows.session(0)
    rows.add(devices_row(0.0, 100.0, temperature_c=[None]))
    assert books_of(rows).devices()[0].seconds == 200.0


# -- over time --------------------------------------------------------------------------------------------


def test_power_over_time_by_component_and_in_total() -> None:
    rows = begun("cpu gpu0")
    rows.node("gpu0", node=OTHER)
    rows.energy(0.0, 2.0, "useful", 20.0, 200.0)
    rows.energy(2.0, 3.5, "useful", 15.0, None)
    rows.energy(0.0, 4.0, "useful", 40.0, node=OTHER)
    rows.energy(3.5, 4.0, "useful", 10.0, 50.0)
    power = books_of(rows).series().power_w
    assert power.bin_s == 1.0
    assert power.values["cpu"] == pytest.approx((10.0, 10.0, 10.0, 15.0))
    # Of gpu0 half is known in the third bin, three quarters in the fourth.
    assert power.values["gpu0"] == (
        pytest.approx(110.0),
        pytest.approx(110.0),
        pytest.approx(20.0),
        pytest.approx(80.0),
    )
    assert power.values["total"] == (
        pytest.approx(120.0),
        pytest.approx(120.0),
        pytest.approx(30.0),
        pytest.approx(95.0),
    )
    rows.energy(4.0, 5.0, "useful", 10.0, None)
    power = books_of(rows).series().power_w
    assert power.values["gpu0"][4] is None
    assert power.values["total"][4] is None


def test_bins_widen_and_keep_what_they_held() -> None:
    rows = begun()
    for number in range(500):
        rows.energy(number * 10.0, number * 10.0 + 10.0, "useful", 100.0)
        rows.steps(number * 5 + 1, number * 10.0, *[1.0] * 5, step_s=2.0)
    books = books_of(rows)
    series = books.series()
    assert series.power_w.bin_s == 8.0
    assert len(series.power_w.values["total"]) == math.ceil(5000 / 8) <= MAX_BINS
    assert series.power_w.values["total"] == pytest.approx([10.0] * 625)
    assert series.samples_per_second.values["total"] == pytest.approx([4.0] * 625)
    assert series.samples_per_joule.bin_s >= 30.0
    assert series.samples_per_joule.values["total"] == pytest.approx(
        [0.4] * len(series.samples_per_joule.values["total"])
    )
    rows.rollback(1, 1250)
    books.add(rows.rows[-1])
    done = [value or 0.0 for value in books.series().samples_per_second.values["total"]]
    assert sum(done) * 8.0 == pytest.approx(1250 * 8)
    assert done[: 2496 // 8] == pytest.approx([4.0] * 312)
    assert max(done[2504 // 8 :]) == 0.0


def test_a_loss_that_was_undone_leaves_the_series_and_settings_have_their_beginnings() -> None:
    rows = begun()
    rows.generation("started", 1, 1.0, setpoint=setpoint(4))
    rows.steps(1, 1.0, 5.0, math.nan, 3.0)
    rows.generation("ended", 1, 4.0)
    rows.generation("started", 2, 5.0, setting=1, setpoint=setpoint(4))
    rows.rollback(1, 2)
    rows.steps(3, 5.0, 3.3, generation=2)
    rows.generation("started", 3, 9.0, setting=2, setpoint=setpoint(2))
    books = books_of(rows)
    series = books.series()
    assert series.loss.points == ((1, 2.0, 5.0), (2, 3.0, None), (3, 6.0, 3.3))
    assert series.settings == ((1.0, setpoint(4)), (9.0, setpoint(2)))
    assert books.setpoint == setpoint(2)


def test_use_bands_are_merged_and_become_lost_from_the_undone_step_on() -> None:
    rows = begun()
    rows.time("startup", 0.0, 10.0, generation=0, setting=0)
    for number in range(4):
        rows.time("useful", 10.0 + 10 * number, 20.0 + 10 * number, step=10 * number, shared={"input": 0.1})
    rows.time("checkpoint", 50.0, 51.0, step=40)
    books = books_of(rows)
    assert books.series().uses == ((0.0, 10.0, "startup"), (10.0, 50.0, "useful"), (50.0, 51.0, "checkpoint"))
    rows.rollback(1, 20)
    rows.time("useful", 51.0, 55.0, step=40)  # late
    books = books_of(rows)
    assert books.series().uses == (
        (0.0, 10.0, "startup"), (10.0, 30.0, "useful"), (30.0, 50.0, "lost"), (50.0, 51.0, "checkpoint"),
        (51.0, 55.0, "lost"),
    )  # fmt: skip
    assert books.seconds_by_use == {
        "startup": 10.0, "useful": 18.0, "input": 2.0, "checkpoint": 1.0, "lost": 24.0
    }  # fmt: skip


def test_use_bands_are_bounded() -> None:
    rows = begun()
    for number in range(12000):
        at_s = number * 10.0
        rows.time("useful", at_s, at_s + 9.0, step=number)
        rows.time("checkpoint", at_s + 9.0, at_s + 10.0, step=number)
    books = books_of(rows)
    bands = books.series().uses
    assert len(bands) <= job_time_module._MAX_BANDS
    assert (bands[0][0], bands[-1][1]) == (0.0, 120000.0)
    assert all(one[1] == pytest.approx(other[0]) for one, other in pairwise(bands))
    assert books.seconds_by_use == {"useful": 108000.0, "checkpoint": 12000.0}


# -- what happened ----------------------------------------------------------------------------------------


def test_one_validation_value_is_one_value() -> None:
    rows = begun()
    rows.validation(2, 3.0, at_s=5.0)
    rows.validation(2, 2.9, at_s=6.0)
    rows.validation(4, 2.0, at_s=7.0)
    assert [(at_s, row.loss) for at_s, row in books_of(rows).validations] == [(6.0, 2.9), (7.0, 2.0)]
    rows.rollback(1, 2)
    rows.validation(4, 1.0, at_s=8.0)  # late
    books = books_of(rows)
    assert [(at_s, row.loss) for at_s, row in books.validations] == [(6.0, 2.9)]
    assert books.series().validation_loss.points == ((2, 6.0, 2.9),)


def test_decisions_are_merged_by_id_within_their_session() -> None:
    rows = begun()
    rows.add(DecisionRow(decision_id="d1", action="decrease", reason="hot", at_s=1.0))
    rows.add(DecisionRow(decision_id="d2", action="hold", at_s=2.0, outcome="held"))
    rows.add(DecisionRow(decision_id="d1", measured={"power_w": 5.0}, outcome="kept", at_s=9.0, until_s=20.0))
    rows.add(ObservationRow(at_s=9.0, window_s=5.0, setpoint=None))
    rows.note("end", at_s=10.0)
    rows.session(0)
    rows.add(DecisionRow(decision_id="d1", action="increase", at_s=3.0))
    books = books_of(rows)
    first, second, third = books.decisions
    assert (first.action, first.reason, first.measured, first.outcome) == (
        "decrease",
        "hot",
        {"power_w": 5.0},
        "kept",
    )
    assert (first.at_s, first.until_s) == (1.0, 20.0)
    assert (second.decision_id, third.action, third.at_s) == ("d2", "increase", 13.0)
    for number in range(30):
        rows.add(ObservationRow(at_s=float(number), window_s=5.0, setpoint=None))
    assert [row.at_s for row in books_of(rows).observations] == [20.0 + number for number in range(20)]


def test_rows_that_are_reported_as_they_stand_are_bounded_and_counted() -> None:
    rows = begun()
    for number in range(700):
        rows.note(f"note {number}", at_s=float(number))
        rows.add(GenerationRow(event="started", generation=number, shares=[{"rank": 0}], at_s=float(number)))
    books = books_of(rows)
    texts = [row.text for _, row in books.notes]
    assert (texts[0], texts[99], texts[100], texts[-1], len(texts)) == (
        "note 0",
        "note 99",
        "note 300",
        "note 699",
        500,
    )
    assert books.row_counts["note"] == 700
    shares = [bool(row.shares) for _, row in books.generation_rows]
    assert (sum(shares), shares[-10:]) == (20, [True] * 10)


def test_nodes_tell_what_they_are() -> None:
    rows = begun("cpu gpu0")
    rows.node("cpu", at_s=1.0, num_gpus=2, num_cores=8, not_metered=["gpu0: gone"])
    rows.energy(1.0, 2.0, "useful", 5.0)
    (node,) = books_of(rows).nodes()
    assert (node.node, node.hostname, node.num_gpus, node.num_cores) == (NODE, "host-a", 2, 8)
    assert [facts["component"] for facts in node.components] == ["cpu", "gpu0"]
    assert node.components[0].keys() == {
        "component",
        "source",
        "quality",
        "detail",
        "resolution_s",
        "relative_uncertainty",
    }
    assert node.not_metered == ("gpu0: gone",)
    assert node.energy is not None
    assert node.energy.value == 5.0


def test_the_pretended_run_adds_up() -> None:
    books = books_of(a_run())
    total = books.energy()
    assert total is not None
    assert total.value == 2 * (100.0 - 0.0) * 30.0 + 2 * (600.0 + 4 * 2400.0 + 200.0 + 150.0 + 4 * 1500.0)
    assert by_use(books) == {
        "startup": 1800.0, "useful": 31320.0, "input": 1080.0, "checkpoint": 520.0, "change": 780.0,
        "lost": 3600.0,
    }  # fmt: skip
    assert (books.step, books.optimizer_steps, books.lost_steps) == (70, 70, 10)
    assert books.unusable == []
    assert sum(books.seconds_by_use.values()) == pytest.approx(100.0)
    assert books.run.num_params == 1_000_000
    with pytest.raises(ValueError, match="colour"):
        books.energy_by("colour")
    assert isinstance(a_run()[3], NodeRow)


def test_a_state_of_books_with_other_fields_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would be read with what it does not have left empty, and a report be made of that."""
    kept = Books().to_state()
    Books.from_state(kept)

    class StepBook(books_module.StepBook):
        one_more: int = 0

    monkeypatch.setitem(books_module._State.__annotations__, "steps", StepBook)
    books_module.state_version.cache_clear()
    try:
        with pytest.raises(ValueError, match="state of version"):
            Books.from_state(kept)
    finally:
        monkeypatch.undo()
        books_module.state_version.cache_clear()
    assert Books.from_state(kept).num_rows == 0


def test_joules_per_sample_leave_out_steps_whose_energy_is_not_booked_yet() -> None:
    """Energy comes some seconds after its steps: else a run would look better while it goes on."""
    rows = RowList()
    rows.add(SessionRow(run_id="r", name="r", train_batch_size=10))
    cpu = MeteredComponent(component="cpu", source="rapl", quality="measured")
    rows.add(NodeRow(node="a", boot_id="b", components=[cpu]))
    steps = {"node": "a", "generation": 1, "setting": 1, "loss": [1.0] * 4, "learning_rate": [0.1] * 4}
    rows.add(
        StepsRow(first_step=1, t0=[0.0, 1.0, 2.0, 3.0], seconds=[1.0] * 4, samples=10, tokens=100, **steps)
    )
    rows.add(EnergyRow(node="a", t0=0.0, t1=2.0, use="useful", joules=[60.0], generation=1, setting=1))
    books = books_of(rows.rows)
    per_sample, per_token = books.joules_per_sample(), books.joules_per_token()
    assert per_sample is not None
    assert per_token is not None
    assert (per_sample.value, per_token.value) == (3.0, 0.3), "of two steps, not of four"
    rows.add(
        EnergyRow(node="a", t0=2.0, t1=4.0, use="useful", joules=[60.0], step=2, generation=1, setting=1)
    )
    rows.add(EndRow(status="completed", at_s=4.0))
    ended = books_of(rows.rows).joules_per_sample()
    assert ended is not None
    assert ended.value == 3.0
