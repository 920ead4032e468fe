"""Whether the worker counts that a configuration names can hold its global batch.

Pure; called by ``eadt validate`` and the trainer before Ray is started, and again by the trainer when
the number of devices is known. (Not in :mod:`eadt.config`, which lies below this layer.)
"""

from __future__ import annotations

from collections.abc import Iterator

from eadt.config import ConfigProblem, RunConfig, problem_at
from eadt.control.batch import feasible_worker_counts


def check_batch(
    config: RunConfig, num_workers: int | None = None, max_workers: int | None = None
) -> list[ConfigProblem]:
    """What cannot hold the global batch; empty if nothing is wrong, or nothing can be known yet.

    Args:
        config: The run.
        num_workers: Initial workers, where found out; ``None``: ``elastic.num_workers``.
        max_workers: Most workers, where found out; ``None``: ``elastic.max_workers``.
    """
    initial = num_workers or config.elastic.num_workers
    most = max_workers or config.elastic.max_workers
    return [problem_at(config, key, message) for key, message in _problems(config, initial, most)]


def _problems(config: RunConfig, initial: int | None, most: int | None) -> Iterator[tuple[str, str]]:
    training = config.training
    if training.train_batch_size is None and initial is None:
        return
    batch = config.train_batch_size(initial or 1)
    least = config.elastic.min_workers
    micro = training.per_device_train_batch_size
    counts = feasible_worker_counts(batch, micro, least, most if most is not None else batch)
    bounds = f"{least} or more" if most is None else f"{least} to {most}"
    key = "training.train_batch_size"
    if not counts:
        yield (
            key,
            f"a global batch of {batch} cannot be split evenly over any allowed number of workers "
            f"({bounds}): change training.train_batch_size, or elastic.min_workers and elastic.max_workers",
        )
        return
    can = f"those that can are {', '.join(map(str, counts[:12]))}{', ...' if len(counts) > 12 else ''}"
    if initial is not None and initial not in counts:
        yield (
            "elastic.num_workers",
            f"{initial} workers cannot hold a global batch of {batch}; {can}: change "
            f"elastic.num_workers or {key}",
        )
    for index, entry in enumerate(config.policy.schedule):
        if entry.num_workers is not None and entry.num_workers not in counts:
            yield (
                f"policy.schedule[{index}].num_workers",
                f"{entry.num_workers} workers cannot hold a global batch of {batch}; {can}",
            )
