"""Checkpoints: states of a run made durable, in any storage that Ray's ``storage_path`` takes.

Knows no torch and no Ray; a node agent writes and reads its own shards, the coordinator publishes.
"""

from __future__ import annotations

from eadt.training.checkpoint.manifest import (
    CheckpointCorruptError,
    CheckpointInfo,
    Kind,
    Manifest,
    Rejected,
    SampleOrder,
    Shard,
)
from eadt.training.checkpoint.run_file import RunFile, RunPlace
from eadt.training.checkpoint.storage import Storage
from eadt.training.checkpoint.store import CheckpointStore, new_attempt, runs_in

__all__ = [
    "CheckpointCorruptError",
    "CheckpointInfo",
    "CheckpointStore",
    "Kind",
    "Manifest",
    "Rejected",
    "RunFile",
    "RunPlace",
    "SampleOrder",
    "Shard",
    "Storage",
    "new_attempt",
    "runs_in",
]
