"""What a checkpoint says about itself: the manifest, by which it is found, checked and refused.

The manifest is written last, so a folder without one is not a checkpoint. It carries a checksum of
itself: half a manifest, or one with a flipped byte, is told from a whole one.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

from eadt.errors import ConfigError, EadtError
from eadt.training.state import Span, StateLayout

FORMAT = 1
NUM_NAMED = 3
"""So many differing parameters are named in a message."""

Kind = Literal["periodic", "just_in_time", "final"]


class CheckpointCorruptError(EadtError):
    """EADT-354: what was read is not what was written. Fall back to an older checkpoint."""

    exit_status = 3


def corrupt(what: str) -> CheckpointCorruptError:
    """A :class:`CheckpointCorruptError` with its code."""
    return CheckpointCorruptError(
        what,
        code="EADT-354",
        means="this checkpoint is not used; the newest older one that verifies is",
        fix="nothing, if an older one is there; else start again with checkpoint.resume: never",
    )


@dataclass(frozen=True)
class Shard:
    """One file of a checkpoint, written by one node.

    The file holds little-endian float32 values and nothing else: for each span in order, for each
    row of the layout in order, the span's elements.

    Attributes:
        file: Name in the checkpoint's folder.
        num_bytes: Size of the file.
        sha256: Checksum of the file, hexadecimal.
        spans: Elements in it, sorted and disjoint.
    """

    file: str
    num_bytes: int
    sha256: str
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class Rejected:
    """A checkpoint that was looked at and not taken.

    Attributes:
        step: Its optimizer step.
        reason: Why, for the user.
    """

    step: int
    reason: str


@dataclass(frozen=True)
class SampleOrder:
    """What decides which samples each optimizer step takes. With another one a run cannot go on: it would
    lose samples and repeat others.

    Attributes:
        train_batch_size: Samples per optimizer step, whole job.
        seed: The run's seed.
        sequence_length: Tokens of a sample.
        data_fingerprint: Hash of the prepared tokens; ``None`` where the run brings its own data.
        data_source: Where they came from, for people; ``None`` likewise.
    """

    train_batch_size: int
    seed: int
    sequence_length: int
    data_fingerprint: str | None = None
    data_source: str | None = None

    def differences(self, now: SampleOrder) -> list[str]:
        """What is another now, a phrase each, by the keys of the configuration."""
        lines = [
            f"{key}: was {before}, is {after}"
            for key, before, after in (
                ("training.train_batch_size", self.train_batch_size, now.train_batch_size),
                ("run.seed", self.seed, now.seed),
                ("training.sequence_length", self.sequence_length, now.sequence_length),
            )
            if before != after
        ]
        # The same text cut otherwise is other data too, but that has been said by then.
        same_cut = (self.seed, self.sequence_length) == (now.seed, now.sequence_length)
        known = self.data_fingerprint is not None and now.data_fingerprint is not None
        if (
            known
            and self.data_fingerprint != now.data_fingerprint
            and (same_cut or self.data_source != now.data_source)
        ):
            lines.append(f"the data: was {_data(self)}, is {_data(now)}")
        return lines


def _data(order: SampleOrder) -> str:
    return f"{order.data_source} (tokens {(order.data_fingerprint or '')[:8]})"


@dataclass(frozen=True)
class Manifest:
    """A published checkpoint.

    Attributes:
        step: Optimizer steps done.
        kind: Why it was written.
        layout: Places of all elements.
        meta: The small values of the saved state, as in :class:`eadt.training.state.SavedState`.
        shards: The files; together they cover the layout.
        info: What the writer wants to have said about it, for display.
        order: What decides which samples its run's steps take; ``None`` where that was not written.
        eadt_version: The version that wrote it.
        unix_s: When it was published.
    """

    step: int
    kind: Kind
    layout: StateLayout
    meta: dict[str, Any]
    shards: tuple[Shard, ...]
    info: dict[str, Any]
    order: SampleOrder | None
    eadt_version: str
    unix_s: float

    @property
    def num_bytes(self) -> int:
        """Size of all shards."""
        return sum(shard.num_bytes for shard in self.shards)

    def to_json(self) -> bytes:
        """The manifest file's content."""
        body = {
            "format": FORMAT,
            "dtype": "<f4",
            "step": self.step,
            "kind": self.kind,
            "fingerprint": self.layout.fingerprint,
            "layout": self.layout.as_dict(),
            "meta": self.meta,
            "shards": [asdict(shard) for shard in self.shards],
            "info": self.info,
            "order": None if self.order is None else asdict(self.order),
            "eadt_version": self.eadt_version,
            "unix_s": self.unix_s,
        }
        # Through JSON once, so that the checksum is over what a reader will see (lists for tuples).
        body = json.loads(json.dumps(body))
        return (json.dumps({**body, "sha256": _checksum(body)}, indent=None) + "\n").encode()

    @staticmethod
    def from_json(content: bytes, step: int) -> Manifest:
        """Read a manifest file.

        Args:
            content: The file.
            step: The step by the folder's name.

        Raises:
            CheckpointCorruptError: It is not what was written.
            ConfigError: EADT-252, a newer EADT wrote it.
        """
        try:
            body = json.loads(content)
            checksum, version = body.pop("sha256"), int(body["format"])
            written_by = str(body["eadt_version"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise corrupt(f"the manifest of step {step} cannot be read ({error})") from error
        if checksum != _checksum(body):
            raise corrupt(f"the manifest of step {step} is damaged: its checksum does not match")
        if version > FORMAT:
            raise ConfigError(
                f"the checkpoint of step {step} was written by a newer EADT ({written_by}, "
                f"format {version}; this one reads up to {FORMAT})",
                code="EADT-252",
                means="the run cannot go on from it, and is not started over it",
                fix="install that version or a newer one, or give the run another storage.path",
            )
        if body["step"] != step:
            raise corrupt(f"the manifest in the folder of step {step} is of step {body['step']}")
        return Manifest(
            step=step,
            kind=body["kind"],
            layout=StateLayout.from_dict(body["layout"]),
            meta=body["meta"],
            shards=tuple(
                Shard(**{**shard, "spans": tuple((low, high) for low, high in shard["spans"])})
                for shard in body["shards"]
            ),
            info=body["info"],
            order=SampleOrder(**body["order"]) if body.get("order") else None,
            eadt_version=written_by,
            unix_s=body["unix_s"],
        )


@dataclass(frozen=True)
class CheckpointInfo:
    """A checkpoint that has just been published.

    Attributes:
        path: Its folder in the storage.
        manifest: What was published.
    """

    path: str
    manifest: Manifest


def _checksum(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def layout_differences(found: StateLayout, wanted: StateLayout) -> list[str]:
    """What sets the layout of a checkpoint apart from the run's, the first few of each kind.

    Args:
        found: The checkpoint's.
        wanted: The run's.
    """
    if found.rows != wanted.rows:
        return [
            f"the optimizer keeps {', '.join(wanted.rows[1:]) or 'nothing'}; "
            f"the checkpoint has {', '.join(found.rows[1:]) or 'nothing'}"
        ]
    theirs = dict(zip(found.names, found.shapes, strict=True))
    ours = dict(zip(wanted.names, wanted.shapes, strict=True))
    groups = {
        "of another shape: ": [
            f"{name} ({_shape(theirs[name])} in the checkpoint, {_shape(shape)} in the model)"
            for name, shape in ours.items()
            if theirs.get(name, shape) != shape
        ],
        "only in the checkpoint: ": [f"{n} ({_shape(s)})" for n, s in theirs.items() if n not in ours],
        "only in the model: ": [f"{n} ({_shape(s)})" for n, s in ours.items() if n not in theirs],
    }
    lines = [title + _first(items) for title, items in groups.items() if items]
    return lines or ["the same parameters in another order"]


def _first(items: list[str]) -> str:
    more = len(items) - NUM_NAMED
    return ", ".join(items[:NUM_NAMED]) + (f" and {more} more" if more > 0 else "")


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"
