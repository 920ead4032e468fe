"""The whole job's time, cut into stretches that adjoin."""

from __future__ import annotations

import pytest

from eadt.coordination.job_time import JobTime


def test_stretches_adjoin_from_the_begin() -> None:
    time = JobTime()
    assert time.use == "startup"
    rows = [
        time.become("useful", 3.0, 0, 1, 1),
        time.become("checkpoint", 8.0, 10, 1, 1),
        time.become("useful", 8.5, 10, 1, 1),
        time.cut(20.0, 30),
    ]
    assert [(row.use, row.t0_s, row.t1_s, row.step) for row in rows if row] == [
        ("startup", 0.0, 3.0, 0),
        ("useful", 3.0, 8.0, 0),
        ("checkpoint", 8.0, 8.5, 10),
        ("useful", 8.5, 20.0, 10),
    ]
    assert time.use == "useful"
    assert time.age_s(25.0) == pytest.approx(5.0)


def test_a_moment_before_the_begin_ends_nothing_and_moves_nothing_back() -> None:
    time = JobTime()
    time.become("useful", 5.0, 0, 1, 1)
    assert time.become("change", 4.0, 7, 1, 1) is None
    ended = time.become("useful", 6.0, 7, 2, 1)
    assert ended is not None
    assert (ended.use, ended.t0_s, ended.t1_s) == ("change", 5.0, 6.0)


def test_waiting_for_input_is_a_part_of_useful_time_and_never_more_than_all_of_it() -> None:
    time = JobTime()
    time.become("useful", 0.0, 0, 1, 1)
    time.waited_for_input(1.0)
    ended = time.cut(4.0, 3)
    assert ended is not None
    assert ended.shared == {"input": 0.25}
    time.waited_for_input(99.0)
    ended = time.become("validation", 5.0, 4, 1, 1)
    assert ended is not None
    assert ended.shared == {"input": 1.0}
    time.waited_for_input(1.0)  # came late, from a step that ended before
    ended = time.cut(6.0, 4)
    assert ended is not None
    assert ended.shared == {}
