"""Batch planning and the assignment of the sample stream to ranks."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eadt.control.batch import (
    BatchPlan,
    InfeasibleBatchError,
    feasible_worker_counts,
    plan_batch,
    sample_positions,
)
from eadt.errors import ConfigError


@pytest.mark.parametrize(
    ("batch", "workers", "max_micro", "micro", "accumulation"),
    [
        (64, 1, 4, 4, 16),
        (64, 2, 4, 4, 8),
        (64, 4, 32, 16, 1),
        (24, 3, 5, 4, 2),
        (7, 1, 4, 1, 7),
        (7, 7, 4, 1, 1),
        (36, 2, 4, 3, 6),
    ],
)
def test_the_largest_micro_batch_that_divides_is_taken(
    batch: int, workers: int, max_micro: int, micro: int, accumulation: int
) -> None:
    assert plan_batch(batch, workers, max_micro) == BatchPlan(batch, workers, micro, accumulation)


@given(st.integers(1, 600), st.integers(1, 40), st.integers(1, 64))
def test_a_plan_holds_the_batch_exactly_or_is_refused_with_the_counts_that_can(
    batch: int, workers: int, max_micro: int
) -> None:
    feasible = feasible_worker_counts(batch, max_micro, 1, 40)
    if workers in feasible:
        plan = plan_batch(batch, workers, max_micro)
        assert plan.micro_batch * plan.accumulation * plan.num_workers == batch
        assert plan.micro_batch <= max_micro
        larger = range(plan.micro_batch + 1, max_micro + 1)
        assert not any(batch // workers % size == 0 for size in larger if size <= batch // workers)
    else:
        with pytest.raises(InfeasibleBatchError) as caught:
            plan_batch(batch, workers, max_micro)
        assert caught.value.feasible_workers
        for count in caught.value.feasible_workers:
            assert plan_batch(batch, count, max_micro).num_workers == count


def test_the_error_names_the_counts_and_survives_pickling() -> None:
    with pytest.raises(InfeasibleBatchError, match=r"12 samples .* 5 workers") as caught:
        plan_batch(12, 5, 4)
    error: InfeasibleBatchError = pickle.loads(pickle.dumps(caught.value))
    assert isinstance(error, ConfigError)
    assert isinstance(error, ValueError)
    assert error.code == "EADT-210"
    assert error.exit_status == 2
    assert error.feasible_workers == (1, 2, 3, 4, 6, 12)
    assert "1, 2, 3, 4, 6, 12" in error.fix
    assert str(error) == str(caught.value)


def test_the_error_names_only_the_nearest_of_many_counts() -> None:
    with pytest.raises(InfeasibleBatchError) as caught:
        plan_batch(5040, 11, 4)
    assert "nearest" in caught.value.fix
    assert "10, 12" in caught.value.fix
    assert "5040" not in caught.value.fix


def test_an_error_without_any_feasible_count_says_what_to_change() -> None:
    error = InfeasibleBatchError(7, 3, [])
    assert "training.train_batch_size" in error.fix


def test_feasible_counts_respect_both_bounds() -> None:
    assert feasible_worker_counts(12, 4, 2, 6) == [2, 3, 4, 6]
    assert feasible_worker_counts(12, 4, 5, 5) == []
    assert feasible_worker_counts(3, 4, 0, 100) == [1, 3]


@pytest.mark.parametrize("numbers", [(0, 1, 1), (8, 0, 1), (8, 1, 0)])
def test_numbers_below_one_are_refused(numbers: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        plan_batch(*numbers)


def test_a_plan_that_does_not_add_up_cannot_be_made() -> None:
    with pytest.raises(ValueError, match="must be train_batch_size"):
        BatchPlan(train_batch_size=8, num_workers=2, micro_batch=3, accumulation=1)


def test_positions_of_a_small_step_by_hand() -> None:
    plan = plan_batch(8, 2, 2)
    assert sample_positions(3, 0, plan) == [[24, 25], [28, 29]]
    assert sample_positions(3, 1, plan) == [[26, 27], [30, 31]]


@pytest.mark.parametrize(("step", "rank"), [(-1, 0), (0, 2), (0, -1)])
def test_positions_outside_the_job_are_refused(step: int, rank: int) -> None:
    with pytest.raises(ValueError, match="no samples"):
        sample_positions(step, rank, plan_batch(8, 2, 2))


@given(st.data())
def test_random_resizes_lose_and_repeat_no_sample(data: st.DataObject) -> None:
    batch = data.draw(st.sampled_from([1, 6, 8, 12, 30, 48]))
    counts = feasible_worker_counts(batch, 8, 1, batch)
    max_micro = data.draw(st.integers(1, 8))
    sizes = data.draw(st.lists(st.sampled_from(counts), min_size=1, max_size=8))
    used: list[int] = []
    for step, workers in enumerate(sizes):
        plan = plan_batch(batch, workers, max_micro)
        in_step: list[int] = []
        for rank in range(workers):
            rows = sample_positions(step, rank, plan)
            assert len(rows) == plan.accumulation
            assert all(len(row) == plan.micro_batch for row in rows)
            in_step += [position for row in rows for position in row]
        assert sorted(in_step) == list(range(step * batch, (step + 1) * batch))
        used += in_step
    assert sorted(used) == list(range(len(sizes) * batch))
