"""Energy split rules: hand-computed examples for each, and what must hold for any ledger."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eadt.report.accounting import Account, account_for
from eadt.report.timeline import USES, job_timeline
from tests.unit.ledger_factory import NODE, OTHER, START_UNIX_S, Rows, synthetic_run


def uses(account: Account) -> dict[str, float]:
    """Joules by use, without the zero ones, rounded to 1e-9 J."""
    return {use: round(energy_j, 9) for use, energy_j in account.by("use").items() if energy_j}


def begun() -> Rows:
    rows = Rows()
    rows.run()
    rows.node()
    return rows


def test_a_step_splits_a_sample_in_proportion_to_time() -> None:
    rows = begun()
    rows.phase(0.0, "restart")
    rows.phase(4.0, "train")
    rows.step(1, 4.0, 10.0)
    rows.energy(0.0, 10.0, 100.0)
    account = account_for(rows.rows)
    assert uses(account) == {"restart": 40.0, "useful": 60.0}
    assert account.total_j == 100.0
    assert account.seconds_by_use == pytest.approx({"restart": 4.0, "useful": 6.0})


def test_phases_outside_of_steps() -> None:
    rows = begun()
    for t, phase in ((0.0, "restart"), (2.0, "train"), (5.0, "checkpoint"), (8.0, "idle")):
        rows.phase(t, phase)
    rows.step(1, 2.0, 5.0)
    rows.energy(0.0, 10.0, 10.0)
    assert uses(account_for(rows.rows)) == {"restart": 2.0, "useful": 3.0, "checkpoint": 3.0, "idle": 2.0}


def test_checkpoint_inside_a_step_wins_over_useful_but_restart_and_idle_do_not() -> None:
    rows = begun()
    rows.phase(0.0, "train")
    rows.phase(2.0, "checkpoint")
    rows.phase(3.0, "idle")
    rows.phase(4.0, "restart")
    rows.step(1, 0.0, 10.0)
    rows.energy(0.0, 10.0, 10.0)
    assert uses(account_for(rows.rows)) == {"useful": 9.0, "checkpoint": 1.0}


def test_time_before_the_first_phase_is_idle() -> None:
    rows = begun()
    rows.energy(0.0, 4.0, 8.0)
    rows.phase(3.0, "restart")
    assert uses(account_for(rows.rows)) == {"idle": 6.0, "restart": 2.0}


def test_training_between_two_steps_of_a_generation_is_useful_and_between_generations_restart() -> None:
    rows = begun()
    rows.phase(0.0, "train")
    rows.step(1, 0.0, 2.0, generation=0)
    rows.step(2, 3.0, 5.0, generation=0)
    rows.step(3, 7.0, 9.0, generation=1)
    rows.energy(0.0, 10.0, 10.0)
    # 2-3 within generation 0; 5-7 between generations; 9-10 after the last step.
    assert uses(account_for(rows.rows)) == {"useful": 7.0, "restart": 3.0}


def test_steps_undone_by_a_rollback_are_lost_with_the_attempt_under_way() -> None:
    rows = begun()
    rows.phase(0.0, "train")
    rows.step(1, 0.0, 1.0)
    rows.step(2, 1.0, 2.0)
    rows.step(3, 2.0, 3.0)
    rows.phase(3.5, "restart")  # step 4 died half a second in
    rows.rollback(4.0, resumed_step=1)
    rows.phase(5.0, "train")
    rows.step(2, 5.0, 6.0, generation=1, loss=2.0)
    rows.step(3, 6.0, 7.0, generation=1, loss=1.0)
    rows.energy(0.0, 7.0, 70.0)
    account = account_for(rows.rows)
    assert uses(account) == {"useful": 30.0, "lost": 25.0, "restart": 15.0}
    assert (account.optimizer_steps, account.lost_steps) == (3, 2)
    assert (account.samples, account.lost_samples, account.tokens) == (24, 16, 24 * 16)


def test_an_attempt_without_a_completed_step_is_lost_even_if_no_step_was_undone() -> None:
    rows = begun()
    rows.phase(0.0, "train")
    rows.step(1, 0.0, 1.0)
    rows.phase(3.0, "restart")
    rows.rollback(3.5, resumed_step=1)
    rows.phase(4.0, "train")
    rows.step(2, 4.0, 5.0, generation=1)
    rows.energy(0.0, 5.0, 5.0)
    account = account_for(rows.rows)
    assert uses(account) == {"useful": 2.0, "lost": 2.0, "restart": 1.0}
    assert account.lost_steps == 0


def test_without_a_phase_row_the_rollback_s_own_time_ends_the_lost_attempt() -> None:
    rows = begun()
    rows.phase(0.0, "train")
    rows.step(1, 0.0, 1.0)
    rows.rollback(3.0, resumed_step=1)
    rows.step(2, 5.0, 6.0, generation=1)
    rows.energy(0.0, 6.0, 6.0)
    assert uses(account_for(rows.rows)) == {"useful": 2.0, "lost": 2.0, "restart": 2.0}


def test_only_the_attempt_that_fell_back_is_lost_not_the_orderly_end_before_it() -> None:
    rows = begun()
    rows.phase(0.0, "train")
    rows.step(1, 0.0, 1.0)
    rows.phase(2.0, "restart")  # an orderly change of generation: 1-2 is restart
    rows.phase(3.0, "train")
    rows.phase(4.0, "restart")  # the new generation dies before its first step: 3-4 is lost
    rows.rollback(4.5, resumed_step=1)
    rows.phase(5.0, "train")
    rows.step(2, 5.0, 6.0, generation=2)
    rows.energy(0.0, 6.0, 6.0)
    assert uses(account_for(rows.rows)) == {"useful": 2.0, "restart": 3.0, "lost": 1.0}


def test_a_second_rollback_reaches_further_back_and_counts_the_work_lost_twice() -> None:
    rows = begun()
    rows.phase(0.0, "train")
    rows.step(1, 0.0, 1.0)
    rows.step(2, 1.0, 2.0)
    rows.rollback(2.0, resumed_step=1)
    rows.step(2, 2.0, 3.0, generation=1)
    rows.rollback(3.0, resumed_step=0)
    rows.step(1, 3.0, 4.0, generation=2)
    rows.energy(0.0, 4.0, 4.0)
    account = account_for(rows.rows)
    assert uses(account) == {"useful": 1.0, "lost": 3.0}
    assert (account.optimizer_steps, account.lost_steps) == (1, 3)


def test_repeated_steps_without_a_rollback_row_count_once() -> None:
    rows = begun()
    rows.phase(0.0, "train")
    rows.step(1, 0.0, 1.0)
    rows.step(2, 1.0, 2.0)
    rows.step(2, 2.0, 3.0, node=OTHER, generation=1, primary=False)
    rows.step(2, 2.0, 3.0, generation=1)
    rows.energy(0.0, 3.0, 3.0)
    account = account_for(rows.rows)
    assert (account.optimizer_steps, account.lost_steps) == (2, 1)
    assert uses(account) == {"useful": 2.0, "lost": 1.0}


def test_the_same_row_twice_counts_once() -> None:
    rows = begun()
    rows.step(1, 0.0, 1.0)
    rows.step(1, 0.0, 1.0)
    account = account_for(rows.rows)
    assert (account.optimizer_steps, account.lost_steps, account.samples) == (1, 0, 8)


def test_gaps_are_unknown_and_listed() -> None:
    rows = begun()
    rows.phase(0.0, "train")
    rows.step(1, 0.0, 10.0)
    rows.energy(0.0, 2.0, 20.0)
    rows.energy(2.0, 5.0, None)
    rows.energy(6.0, 8.0, 20.0)
    account = account_for(rows.rows)
    assert account.total_j == 40.0
    assert [(gap.at_s, gap.seconds, gap.reason) for gap in account.unmeasured] == [
        (2.0, 3.0, "gap"),
        (8.0, 2.0, "no sample"),
        (5.0, 1.0, "no sample"),
    ]
    assert account.unmeasured_s == 6.0
    assert account.covered_s == 10.0


def test_a_counter_that_goes_backwards_is_a_gap_never_negative_energy() -> None:
    rows = begun()
    rows.energy(0.0, 1.0, 5.0)
    rows.energy(1.0, 2.0, -3.0)
    account = account_for(rows.rows)
    assert account.total_j == 5.0
    assert [gap.reason for gap in account.unmeasured] == ["counter went backwards"]


def test_nothing_measured_is_unknown_not_zero() -> None:
    rows = Rows()
    rows.run()
    rows.node(components="")
    rows.phase(0.0, "train")
    rows.step(1, 0.0, 4.0)
    account = account_for(rows.rows)
    assert account.total_j is None
    assert [(gap.component, gap.seconds) for gap in account.unmeasured] == [("all", 4.0)]


def test_nodes_have_clocks_of_their_own() -> None:
    rows = Rows()
    rows.run()
    rows.node(NODE)
    rows.node(OTHER, origin_s=5000.0, components="gpu0")
    rows.phase(0.0, "train")
    rows.phase(5000.0, "idle", OTHER)
    rows.step(1, 0.0, 10.0)
    rows.energy(0.0, 10.0, 10.0)
    rows.rows[-1]["unix_s"] = rows.rows[0]["unix_s"] + 10.0
    rows.now_s = 10.0
    rows.energy(5000.0, 5010.0, 30.0, node=OTHER, component="gpu0", quality="measured")
    rows.rows[-1]["unix_s"] = rows.rows[0]["unix_s"] + 10.0
    account = account_for(rows.rows)
    assert uses(account) == {"useful": 10.0, "idle": 30.0}
    assert account.by("component") == {"cpu": 10.0, "gpu0": 30.0}
    assert account.by("quality") == {"measured": 30.0, "simulated": 10.0}
    assert account.by("node") == {NODE: 10.0, OTHER: 30.0}
    assert account.seconds_by_use == pytest.approx({"useful": 10.0})  # the job works while a node idles
    assert account.unmeasured == []


def resumed_rows(*, reboot: bool, with_rollback: bool) -> list[dict[str, Any]]:
    """4 s of training that are killed in step 4, and 100 s later 3 s more from step 2's checkpoint."""
    first = begun()
    first.phase(0.0, "train")
    for step in (1, 2, 3):
        first.step(step, step - 1.0, float(step), loss=5.0 - step)
        first.energy(step - 1.0, float(step), 10.0)
    first.energy(3.0, 4.0, 10.0)
    second = Rows(origin_unix_s=START_UNIX_S + 104.0)
    offset = 0.0 if reboot else 104.0  # a reboot begins the monotonic clock anew
    second.run("resumed")
    second.node(NODE, origin_s=offset)
    if with_rollback:
        second.add("rollback", generation=1, resumed_step=2, reason="resumed from a checkpoint")
    second.phase(offset, "restart")
    second.phase(offset + 1.0, "train")
    second.step(3, offset + 1.0, offset + 2.0, generation=1, loss=1.5)
    second.step(4, offset + 2.0, offset + 3.0, generation=1, loss=1.0)
    for second_s in range(3):
        second.energy(offset + second_s, offset + second_s + 1.0, 10.0)
    for row in second.rows:  # rows are written within the 3 s
        row["unix_s"] = min(row["unix_s"], START_UNIX_S + 107.0)
    second.run("ended", "completed")
    second.rows[-1]["unix_s"] = START_UNIX_S + 107.0
    return first.rows + second.rows


@pytest.mark.parametrize("reboot", [True, False])
@pytest.mark.parametrize("with_rollback", [True, False])
def test_a_resumed_run_adds_up_over_its_sessions(reboot: bool, with_rollback: bool) -> None:
    account = account_for(resumed_rows(reboot=reboot, with_rollback=with_rollback))
    assert len(account.sessions) == 2
    assert (account.optimizer_steps, account.lost_steps) == (4, 1)
    # Lost: step 3 and the second in which step 4 was under way. The 100 s between are not the run's.
    assert uses(account) == {"useful": 40.0, "lost": 20.0, "restart": 10.0}
    assert account.unmeasured == []
    assert sum(account.seconds_by_use.values()) == pytest.approx(7.0)
    assert account.timeline[-1][1] == pytest.approx(7.0)


def test_an_agent_that_comes_back_on_a_running_node_keeps_the_time_base() -> None:
    rows = begun()
    rows.phase(0.0, "train")
    rows.step(1, 0.0, 2.0)
    rows.energy(0.0, 2.0, 2.0)
    rows.node(NODE, t=3.0)
    rows.step(2, 2.0, 5.0)
    rows.energy(4.0, 5.0, 1.0)
    account = account_for(rows.rows)
    assert len(account.bases) == 1
    assert uses(account) == {"useful": 3.0}
    assert [(gap.at_s, gap.seconds) for gap in account.unmeasured] == [(2.0, 2.0)]


def test_decisions_are_merged_by_id_and_null_never_overwrites() -> None:
    rows = begun()
    rows.add("decision", 1.0, decision_id="a", at_s=1.0, action="decrease", measured=None, outcome="pending")
    rows.add("decision", 2.0, decision_id="b", at_s=2.0, action="hold", outcome="held")
    rows.add("decision", 9.0, decision_id="a", action=None, measured={"power_w": 5.0}, outcome="kept")
    first, second = account_for(rows.rows).decisions
    assert (first["action"], first["measured"], first["outcome"]) == ("decrease", {"power_w": 5.0}, "kept")
    assert second["outcome"] == "held"


def test_validations_that_were_rolled_back_do_not_count() -> None:
    rows = begun()
    rows.step(1, 0.0, 1.0)
    rows.add("validation", step=0, loss=5.0)
    rows.add("validation", step=2, loss=9.0)
    rows.rollback(2.0, resumed_step=1)
    rows.add("validation", step=2, loss=3.0)
    assert [item.row["loss"] for item in account_for(rows.rows).validations] == [5.0, 3.0]


def test_a_step_that_does_not_say_its_samples_makes_the_sum_unknown() -> None:
    rows = begun()
    rows.step(1, 0.0, 1.0)
    rows.step(2, 1.0, 2.0, samples=None)
    account = account_for(rows.rows)
    assert account.samples is None
    assert account.tokens is None
    assert account.optimizer_steps == 2


def test_rows_that_lack_what_they_need_are_named() -> None:
    rows = begun()
    rows.add("energy", node=NODE, t0=0.0, component="cpu", energy_j=1.0)
    rows.add("step", node=NODE, generation=None, step=1, t0=0.0, t1=1.0)
    rows.energy(2.0, 1.0, 5.0)
    account = account_for(rows.rows)
    assert account.unusable == ["energy 3", "step 4", "energy 5"]
    assert account.total_j is None


def test_job_timeline_prefers_useful_and_leaves_holes() -> None:
    stretches = [(0.0, 5.0, "idle"), (2.0, 4.0, "useful"), (3.0, 6.0, "restart"), (8.0, 9.0, "lost")]
    assert job_timeline(stretches) == [
        (0.0, 2.0, "idle"),
        (2.0, 4.0, "useful"),
        (4.0, 6.0, "restart"),
        (8.0, 9.0, "lost"),
    ]


def test_the_synthetic_run_adds_up() -> None:
    rows = synthetic_run()
    account = account_for(rows)
    booked_j = math.fsum(
        row["energy_j"] for row in rows if row["type"] == "energy" and row["energy_j"] is not None
    )
    assert account.total_j == pytest.approx(booked_j, rel=1e-12)
    assert set(uses(account)) == set(USES)
    assert account.lost_steps == 4
    assert account.unmeasured_s == pytest.approx(6.0)


_TIMES = st.floats(min_value=0.0, max_value=100.0, allow_nan=False).map(lambda value: round(value, 3))
_NODES = st.sampled_from([NODE, OTHER])
_EVENTS = st.one_of(
    st.tuples(st.just("phase"), _NODES, _TIMES, st.sampled_from(["train", "restart", "checkpoint", "idle"])),
    st.tuples(st.just("step"), _NODES, _TIMES, st.integers(1, 6), st.integers(0, 3), st.booleans()),
    st.tuples(st.just("rollback"), _TIMES, st.integers(0, 5)),
    st.tuples(
        st.just("energy"),
        _NODES,
        _TIMES,
        st.floats(0.0, 20.0),
        st.one_of(st.none(), st.floats(-1.0, 1e6)),
        st.sampled_from(["cpu", "gpu0"]),
    ),
    st.tuples(st.just("node"), _NODES, _TIMES, st.sampled_from([0.0, 1000.0])),
    st.tuples(st.just("resumed")),
)


@settings(max_examples=150)
@given(events=st.lists(_EVENTS, max_size=40))
def test_whatever_is_booked_the_parts_sum_to_the_meter(events: list[tuple[Any, ...]]) -> None:
    rows = begun()
    booked: list[float] = []
    for kind, *values in events:
        if kind == "phase":
            rows.phase(values[1], values[2], values[0])
        elif kind == "step":
            node, t0, step, generation, primary = values
            rows.step(step, t0, t0 + 1.5, generation=generation, node=node, primary=primary)
        elif kind == "rollback":
            rows.rollback(*values)
        elif kind == "energy":
            node, t0, seconds, energy_j, component = values
            rows.energy(t0, t0 + seconds, energy_j, component=component, node=node)
            if energy_j is not None and energy_j >= 0:
                booked.append(energy_j)
        elif kind == "node":
            rows.node(values[0], values[1], origin_s=values[2])
        else:
            rows.new_file()
            rows.run("resumed")
    account = account_for(rows.rows)
    assert account.unusable == []
    assert (account.total_j is None) == (not booked)
    total_j = account.total_j or 0.0
    assert total_j == pytest.approx(math.fsum(booked), rel=1e-9, abs=1e-9)
    for attribute in ("use", "component", "quality", "node"):
        parts = account.by(attribute)
        assert math.fsum(parts.values()) == pytest.approx(total_j, rel=1e-9, abs=1e-9)
        assert all(energy_j >= 0 for energy_j in parts.values())
    assert set(account.by("use")) <= set(USES)
    assert all(gap.seconds > 0 for gap in account.unmeasured)
    assert account.unmeasured_s <= account.covered_s + 1e-6
    # Time: no overlap, nothing negative.
    assert all(start < end for start, end, _ in account.timeline)
    ends = [
        (end, after[0]) for (_, end, _), after in zip(account.timeline, account.timeline[1:], strict=False)
    ]
    assert all(end <= start for end, start in ends)
    # Steps: each counted once, and only what was booked.
    kept = [step.step for _, step in account.kept_steps]
    assert len(kept) == len(set(kept)) == account.optimizer_steps
