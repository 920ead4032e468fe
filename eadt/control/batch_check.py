"""Whether the worker counts that a configuration names can hold its global batch.

Pure; called by ``eadt validate`` and the trainer before Ray is started, and again by the trainer when
the number of devices is known. (Not in :mod:`eadt.config`, which lies below this layer.)
"""

from __future__ import annotations

from collections.abc import Iterator

from eadt.config import ConfigProblem, RunConfig, problem_at
from eadt.control.batch import feasible_worker_counts
from eadt.control.presets import initial_setpoint

_NUM_NAMED = 12
"""Counts named in one message."""


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


def batch_notes(config: RunConfig) -> list[str]:
    """Sentences on workers and devices that a configuration allows, but its global batch does not."""
    training, elastic = config.training, config.elastic
    if training.train_batch_size is None and elastic.num_workers is None:
        return []
    batch = config.train_batch_size(elastic.num_workers or 1)
    counts = _counts(config, batch, elastic.max_workers)
    if not counts:
        return []
    notes = []
    for key, count, used in (
        ("elastic.min_workers", elastic.min_workers, f"at least {counts[0]} are"),
        ("elastic.max_workers", elastic.max_workers, f"at most {counts[-1]} are"),
    ):
        if count is not None and count not in counts:
            notes.append(f"{key}: {count} workers cannot hold a global batch of {batch}; {used} used.")
    if elastic.num_workers is None:
        more = " or more" if elastic.max_workers in counts else ""  # whatever they are, they are not used
        notes.append(
            f"With {config.mps.workers_per_gpu} workers a device, a global batch of {batch} can start on "
            f"{_listed(_device_counts(config, counts))} devices{more}."
        )
    return notes


def _counts(config: RunConfig, batch: int, most: int | None) -> list[int]:
    """Allowed numbers of workers that can hold a batch."""
    micro = config.training.per_device_train_batch_size
    return feasible_worker_counts(batch, micro, config.elastic.min_workers, batch if most is None else most)


def _device_counts(config: RunConfig, counts: list[int]) -> list[int]:
    """Numbers of devices on which a run starts with one of these numbers of workers."""
    # On more devices, only a bound could make one of these numbers, and it makes it on fewer too.
    last = -(-counts[-1] // config.mps.workers_per_gpu)
    return [n for n in range(1, last + 1) if initial_setpoint(config, n).num_workers in counts]


def _listed(counts: list[int]) -> str:
    return ", ".join(map(str, counts[:_NUM_NAMED])) + (", ..." if len(counts) > _NUM_NAMED else "")


def _problems(config: RunConfig, initial: int | None, most: int | None) -> Iterator[tuple[str, str]]:
    training = config.training
    if training.train_batch_size is None and initial is None:
        return
    batch = config.train_batch_size(initial or 1)
    least = config.elastic.min_workers
    counts = _counts(config, batch, most)
    bounds = f"{least} or more" if most is None else f"{least} to {most}"
    key = "training.train_batch_size"
    if not counts:
        yield (
            key,
            f"a global batch of {batch} cannot be split evenly over any allowed number of workers "
            f"({bounds}): change training.train_batch_size, or elastic.min_workers and elastic.max_workers",
        )
        return
    can = f"those that can are {_listed(counts)}"
    if initial is not None and initial not in counts:
        yield (
            "elastic.num_workers",
            f"{initial} workers cannot hold a global batch of {batch}; {can}: change "
            f"elastic.num_workers or {key}",
        )
    if initial is None and not _device_counts(config, counts):
        yield (
            key,
            f"with {config.mps.workers_per_gpu} workers a device, no number of devices makes a number of "
            f"workers that can hold a global batch of {batch}; {can}: change {key} or mps.shared_resources, "
            "or set elastic.num_workers",
        )
    for index, entry in enumerate(config.policy.schedule):
        if entry.num_workers is not None and entry.num_workers not in counts:
            yield (
                f"policy.schedule[{index}].num_workers",
                f"{entry.num_workers} workers cannot hold a global batch of {batch}; {can}",
            )
