"""The sample order: a permutation an epoch, whatever is asked, in whatever process."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eadt.control.batch import plan_batch
from eadt.training.sampler import SampleOrder, micro_batches


@given(num_samples=st.integers(1, 3000), seed=st.integers(0, 2**63), epoch=st.integers(0, 10**6))
@settings(max_examples=60)
def test_each_epoch_holds_every_sample_once(num_samples, seed, epoch):
    begin = epoch * num_samples
    found = SampleOrder(num_samples, seed).indices(np.arange(begin, begin + num_samples))
    assert np.array_equal(np.sort(found), np.arange(num_samples))


@given(
    num_samples=st.integers(1, 90),
    worker_counts=st.lists(st.sampled_from([1, 2, 3, 4, 6, 8, 12, 24]), min_size=1, max_size=30),
    max_micro_batch=st.integers(1, 9),
    seed=st.integers(0, 99),
)
@settings(max_examples=60)
def test_no_sample_is_lost_or_repeated_under_random_resizes(
    num_samples, worker_counts, max_micro_batch, seed
):
    order = SampleOrder(num_samples, seed)
    used = []
    for step, num_workers in enumerate(worker_counts):
        plan = plan_batch(24, num_workers, max_micro_batch)
        batch = [
            sample
            for rank in range(num_workers)
            for _, micro_batch in micro_batches(order, step, rank, plan)
            for sample in micro_batch
        ]
        assert sorted(batch) == sorted(order.indices(range(24 * step, 24 * step + 24)))
        used += batch
    counts = np.bincount(used, minlength=num_samples)
    whole_epochs = len(used) // num_samples
    assert counts.min() >= whole_epochs
    assert counts.max() <= whole_epochs + (len(used) % num_samples > 0)


def test_the_order_is_stateless_and_straddles_epochs():
    order = SampleOrder(10, seed=3)
    stream = order.indices(range(40))
    for position in (39, 0, 12, 9, 10):
        assert order.index(position) == stream[position]
    two_epochs = order.indices([[8, 9], [10, 11]])
    assert two_epochs.shape == (2, 2)
    assert two_epochs.dtype == np.int64
    assert two_epochs.ravel().tolist() == stream[8:12].tolist()
    assert [order.epoch(9), order.epoch(10)] == [0, 1]


def test_epochs_and_seeds_differ():
    orders = [tuple(SampleOrder(1000, seed).indices(np.arange(1000))) for seed in range(3)]
    order = SampleOrder(1000, 0)
    orders += [tuple(order.indices(np.arange(1000) + 1000 * epoch)) for epoch in (1, 2)]
    assert len(set(orders)) == 5


def test_the_order_never_changes_between_versions():
    # A resumed run relies on it: with another order it would repeat some samples and skip others.
    assert SampleOrder(1000, 0).indices(range(6)).tolist() == [963, 901, 633, 130, 862, 686]


def test_a_copy_in_another_process_gives_the_same():
    order = SampleOrder(777, 5)
    copy = pickle.loads(pickle.dumps(order))
    assert np.array_equal(copy.indices(range(2000)), order.indices(range(2000)))


def test_the_shuffle_is_uniform():
    # How often each of 20 samples comes at each of 20 places in 4000 epochs: 200 expected. The
    # statistic has 361 degrees of freedom; 460 is 3.5 standard deviations above its mean.
    n, num_epochs = 20, 4000
    found = SampleOrder(n, 1).indices(np.arange(n * num_epochs)).reshape(num_epochs, n)
    table = np.stack([np.bincount(found[:, place], minlength=n) for place in range(n)])
    assert ((table - num_epochs / n) ** 2 / (num_epochs / n)).sum() < 460


def test_neighbours_are_independent_in_a_large_set():
    found = SampleOrder(1_000_000, 2).indices(np.arange(20_000)).astype(float)
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 0.03


@pytest.mark.parametrize(("num_samples", "seed"), [(0, 0), (5, -1)])
def test_impossible_orders_are_refused(num_samples, seed):
    with pytest.raises(ValueError, match="at least"):
        SampleOrder(num_samples, seed)


def test_negative_positions_are_refused():
    with pytest.raises(ValueError, match="positions"):
        SampleOrder(5, 0).index(-1)
