"""Which sample each position of the endless sample stream is: shuffled anew in each epoch.

Owns the order only. Who takes which positions is :mod:`eadt.control.batch`'s affair, so that the
order cannot depend on the number of workers. Holds no state that moves: any process can ask for
any position at any time, in particular the engines that take over after a resize.

The permutation of an epoch is *computed*, not stored: a Feistel network over the bits of the
sample number, keyed by (seed, epoch), with cycle walking down to the number of samples (Black and
Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002). A shuffled array would cost each
new engine a second and 80 MB for ten million samples, in the middle of a resize; this costs a
fraction of a millisecond a batch at any size, and nothing to start. It uses integer arithmetic
only, and from numpy only ``SeedSequence``, whose output is guaranteed: ``Generator.permutation``
may change between numpy versions, which would repeat and skip samples when a run is resumed.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from eadt.control.batch import BatchPlan, sample_positions

_NUM_ROUNDS = 12
"""Feistel rounds. Four make a good shuffle of large sets; small sets have few bits a round."""

_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
"""Constants of the splitmix64 finaliser (Steele, Lea and Flood, OOPSLA 2014)."""


@lru_cache(maxsize=8)
def _round_keys(seed: int, epoch: int) -> NDArray[np.uint64]:
    """One key per round, ``[_NUM_ROUNDS]``."""
    keys: NDArray[np.uint64] = (
        np.random.SeedSequence([seed, epoch]).generate_state(_NUM_ROUNDS, np.uint64).astype(np.uint64)
    )
    return keys


def _mix(values: NDArray[np.uint64], key: np.uint64) -> NDArray[np.uint64]:
    mixed = values ^ key
    mixed = (mixed ^ (mixed >> np.uint64(30))) * _MIX_1
    mixed = (mixed ^ (mixed >> np.uint64(27))) * _MIX_2
    mixed ^= mixed >> np.uint64(31)
    return mixed


class SampleOrder:
    """The endless stream of positions: each epoch holds every sample exactly once, in its own order.

    Thread-safe, picklable, and equal in every process for equal arguments.

    Args:
        num_samples: Samples per epoch.
        seed: The run's seed, at least 0.
    """

    def __init__(self, num_samples: int, seed: int) -> None:
        if num_samples < 1 or seed < 0:
            raise ValueError(f"num_samples must be at least 1 and seed at least 0: {num_samples}, {seed}")
        self.num_samples = num_samples
        self.seed = seed
        num_bits = max(2, (num_samples - 1).bit_length())
        self._low_bits = np.uint64(num_bits // 2)
        self._low_mask = np.uint64((1 << (num_bits // 2)) - 1)
        self._high_mask = np.uint64((1 << (num_bits - num_bits // 2)) - 1)

    def epoch(self, position: int) -> int:
        """The epoch that a position belongs to, counted from 0."""
        return position // self.num_samples

    def index(self, position: int) -> int:
        """The sample at a position of the stream, ``0 <= index < num_samples``."""
        return int(self.indices([position])[0])

    def indices(self, positions: ArrayLike) -> NDArray[np.int64]:
        """The samples at positions of the stream, in the same shape; they may lie in any epochs."""
        wanted = np.asarray(positions, dtype=np.int64)
        if wanted.size and int(wanted.min()) < 0:
            raise ValueError("positions must be at least 0")
        epochs, offsets = np.divmod(wanted, self.num_samples)
        found = np.empty(wanted.shape, dtype=np.int64)
        for epoch in np.unique(epochs):
            mask = epochs == epoch
            found[mask] = self._permute(offsets[mask].astype(np.uint64), int(epoch))
        return found

    def _permute(self, values: NDArray[np.uint64], epoch: int) -> NDArray[np.int64]:
        if self.num_samples == 1:
            return np.zeros(values.shape, dtype=np.int64)
        keys = _round_keys(self.seed, epoch)
        moved = self._encrypt(values, keys)
        # The network permutes the next power of two; walking along the cycle until the value is a
        # sample number again permutes just the samples. Fewer than two turns on average.
        outside = np.flatnonzero(moved >= self.num_samples)
        while outside.size:
            moved[outside] = self._encrypt(moved[outside], keys)
            outside = outside[moved[outside] >= self.num_samples]
        return moved.astype(np.int64)

    def _encrypt(self, values: NDArray[np.uint64], keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
        low = values & self._low_mask
        high = values >> self._low_bits
        for turn in range(0, _NUM_ROUNDS, 2):
            high = high ^ (_mix(low, keys[turn]) & self._high_mask)
            low = low ^ (_mix(high, keys[turn + 1]) & self._low_mask)
        return (high << self._low_bits) | low


def micro_batches(
    order: SampleOrder, step: int, rank: int, plan: BatchPlan
) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """What a rank takes in one optimizer step, one item per forward pass.

    Each item is the micro-batch's first position in the stream, and its samples ``[micro_batch]``.

    Args:
        order: The run's sample order.
        step: Optimizer step, 0-based: the number of steps completed before it.
        rank: Rank within the active workers.
        plan: The split in force during this step.
    """
    for positions in sample_positions(step, rank, plan):
        yield positions[0], order.indices(positions)
