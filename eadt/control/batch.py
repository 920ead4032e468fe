"""Which rank takes which samples, at any number of workers, with the global batch unchanged.

Owns the split of ``train_batch_size`` into workers x accumulation x micro batch, and the assignment
of the endless sample stream to ranks. Optimizer step ``s`` (0-based) uses the stream positions
``s * B`` to ``(s + 1) * B`` whatever the number of workers, so a resize between two steps can
neither lose nor repeat a sample. Knows nothing of epochs, seeds or data: what a position means is
the sampler's affair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from eadt.errors import ConfigError

_NUM_COUNTS_NAMED = 12
"""Error messages list every worker count that works up to this many, else the nearest ones."""


class InfeasibleBatchError(ConfigError, ValueError):
    """The global batch cannot be split over that many workers.

    Attributes:
        train_batch_size: Samples per optimizer step, whole job.
        num_workers: The count that was asked for.
        feasible_workers: The counts that can hold the batch, ascending; empty where none can.
    """

    def __init__(self, train_batch_size: int, num_workers: int, feasible_workers: Sequence[int]) -> None:
        self.train_batch_size = train_batch_size
        self.num_workers = num_workers
        self.feasible_workers = tuple(feasible_workers)
        workers = "1 worker" if num_workers == 1 else f"{num_workers} workers"
        super().__init__(
            f"A global batch of {train_batch_size} samples cannot be split evenly over {workers}.",
            code="EADT-210",
            means="train_batch_size stays constant through every resize, so this count is refused.",
            fix=_name_feasible(self.feasible_workers, num_workers),
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.train_batch_size, self.num_workers, self.feasible_workers)


def _name_feasible(feasible: tuple[int, ...], wanted: int) -> str:
    if not feasible:
        return (
            "No worker count within the bounds can hold it: change training.train_batch_size or the bounds."
        )
    named = sorted(sorted(feasible, key=lambda count: abs(count - wanted))[:_NUM_COUNTS_NAMED])
    prefix = "the nearest worker counts that can hold it" if len(named) < len(feasible) else "counts that can"
    return f"{prefix}: {', '.join(map(str, named))}; or change training.train_batch_size."


@dataclass(frozen=True)
class BatchPlan:
    """How one optimizer step's samples are split; ``micro x accumulation x workers`` is the batch.

    Attributes:
        train_batch_size: Samples per optimizer step, whole job.
        num_workers: Active workers (ranks).
        micro_batch: Samples per rank and forward pass (``train_micro_batch_size_per_gpu``).
        accumulation: Forward passes per rank and optimizer step (``gradient_accumulation_steps``).
    """

    train_batch_size: int
    num_workers: int
    micro_batch: int
    accumulation: int

    def __post_init__(self) -> None:
        if min(self.train_batch_size, self.num_workers, self.micro_batch, self.accumulation) < 1:
            raise ValueError(f"every part of a batch plan must be at least 1: {self}")
        if self.micro_batch * self.accumulation * self.num_workers != self.train_batch_size:
            raise ValueError(f"micro_batch x accumulation x num_workers must be train_batch_size: {self}")


def plan_batch(train_batch_size: int, num_workers: int, max_micro_batch: int) -> BatchPlan:
    """Split the global batch over ``num_workers`` with the largest micro batch that divides evenly.

    Args:
        train_batch_size: Samples per optimizer step, whole job.
        num_workers: Active workers.
        max_micro_batch: Most samples that one rank may take through one forward pass.

    Raises:
        InfeasibleBatchError: ``num_workers`` does not divide ``train_batch_size``; it names the
            counts that do.
        ValueError: An argument is below 1.
    """
    if min(train_batch_size, num_workers, max_micro_batch) < 1:
        raise ValueError(
            f"train_batch_size, num_workers and max_micro_batch must be at least 1, "
            f"not {train_batch_size}, {num_workers} and {max_micro_batch}"
        )
    per_worker, left_over = divmod(train_batch_size, num_workers)
    if left_over or not per_worker:
        feasible = feasible_worker_counts(train_batch_size, max_micro_batch, 1, train_batch_size)
        raise InfeasibleBatchError(train_batch_size, num_workers, feasible)
    micro = next(size for size in range(min(max_micro_batch, per_worker), 0, -1) if per_worker % size == 0)
    return BatchPlan(train_batch_size, num_workers, micro, per_worker // micro)


def feasible_worker_counts(
    train_batch_size: int, max_micro_batch: int, min_workers: int, max_workers: int
) -> list[int]:
    """Worker counts within the bounds (both included) that :func:`plan_batch` accepts, ascending.

    ``max_micro_batch`` does not exclude a count, because accumulation takes up what a micro batch
    cannot hold; it is taken so that callers pass the same numbers as to :func:`plan_batch`.
    """
    if max_micro_batch < 1:
        raise ValueError(f"max_micro_batch must be at least 1, not {max_micro_batch}")
    first, last = max(min_workers, 1), min(max_workers, train_batch_size)
    return [count for count in range(first, last + 1) if train_batch_size % count == 0]


def sample_positions(step: int, rank: int, plan: BatchPlan) -> list[list[int]]:
    """Positions in the endless sample stream that ``rank`` uses in optimizer step ``step``.

    Over all ranks each position of ``[step * B, (step + 1) * B)`` comes exactly once. In each
    forward pass the ranks take neighbouring runs of ``micro_batch`` positions.

    Args:
        step: Optimizer step, 0-based: the number of steps completed before it.
        rank: Rank within the active workers.
        plan: The split in force during this step.

    Returns:
        ``[accumulation][micro_batch]`` positions, in the order in which they are to be used.
    """
    if step < 0 or not 0 <= rank < plan.num_workers:
        raise ValueError(f"no samples for step {step}, rank {rank} of {plan.num_workers} workers")
    per_pass = plan.micro_batch * plan.num_workers
    begin = step * plan.train_batch_size + rank * plan.micro_batch
    return [
        list(range(begin + index * per_pass, begin + index * per_pass + plan.micro_batch))
        for index in range(plan.accumulation)
    ]
