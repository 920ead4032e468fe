"""The checkpoints of one run in its storage: written by shards, published, verified, restored, pruned.

    <storage>/checkpoints/<run id>/step-00000120/shard-000.<attempt>.bin
                                                 shard-001.<attempt>.bin
                                                 manifest.json            written last

Any number of runs may share a storage: a store looks, writes and deletes in the folder of its run's id
and nowhere else.

A checkpoint exists from the moment that its manifest does. Every try at a step has its own attempt
in the files' names, so that a retry never mixes with what a torn one left. This module decides
nothing: when to save, what to keep and what to go on from is said by its caller.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import re
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import eadt
from eadt.clock import SYSTEM_CLOCK, Clock
from eadt.errors import ConfigError, EnvironmentFailure
from eadt.training.checkpoint.manifest import (
    CheckpointCorruptError,
    CheckpointInfo,
    Kind,
    Manifest,
    Rejected,
    SampleOrder,
    Shard,
    corrupt,
    layout_differences,
)
from eadt.training.checkpoint.storage import Storage
from eadt.training.state import ITEM_BYTES, Span, StateLayout, StateSlot, merge_spans, missing_spans

FOLDER = "checkpoints"
MANIFEST = "manifest.json"
CHUNK_BYTES = 4 << 20
"""Hashed and written at once: small enough to be still in the processor's cache for the second."""

Moved = Callable[[int], None]
"""Told of bytes as they are written or read."""

_RUN_ID = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
_STEP = re.compile(r"^step-(\d{8,})$")
_SHARD = re.compile(r"^shard-\d{3,}\.([A-Za-z0-9_-]+)\.bin$")
_LOG = logging.getLogger(__name__)


def new_attempt() -> str:
    """A name for one try at saving one step, unlike any other."""
    return uuid.uuid4().hex[:12]


def is_run_id(text: str) -> bool:
    """Whether this can be the name of a run's folder."""
    return _RUN_ID.match(text) is not None


def runs_in(storage: Storage) -> list[str]:
    """Ids of the runs that have a checkpoint in a storage, sorted. Blocks on the storage.

    Raises:
        EnvironmentFailure: EADT-352, the storage cannot be read.
    """
    paths = (path.split("/") for path in storage.files(FOLDER))
    return sorted(
        {path[0] for path in paths if len(path) == 3 and path[2] == MANIFEST and _STEP.match(path[1])}
    )


def _nothing(num_bytes: int) -> None:
    del num_bytes


class CheckpointStore:
    """The checkpoints of one run in one storage. Can be pickled; opens nothing until it is used.

    ``write_shard`` and ``restore`` may run on any number of nodes and threads at once, each with
    its own slot; ``publish``, ``newest_valid`` and ``prune`` are for one caller at a time.

    Args:
        storage_path: As Ray's ``storage_path``: a local folder that all nodes share, or a URI.
        run_id: The run's id, the name of its folder.
        clock: Gives the times in the manifests.
    """

    def __init__(self, storage_path: str, run_id: str, clock: Clock = SYSTEM_CLOCK) -> None:
        if not is_run_id(run_id):
            raise ValueError(f"{run_id!r} cannot be the name of a run's folder")
        self.storage = Storage(storage_path)
        self.folder = f"{FOLDER}/{run_id}"
        self._clock = clock
        self._bad: dict[tuple[int, tuple[str, ...]], str] = {}

    def check_writable(self) -> None:
        """See :meth:`Storage.check_writable`."""
        self.storage.check_writable()

    def write_shard(
        self,
        step: int,
        index: int,
        slot: StateSlot,
        spans: Sequence[Span],
        attempt: str,
        moved: Moved = _nothing,
    ) -> Shard:
        """Write the elements ``spans`` of every row of ``slot``. Blocks until they are on the disk.

        Streams: no second copy of the state is made.

        Args:
            step: Optimizer steps done.
            index: Number of the shard, another for each writer.
            slot: A slot with those elements; must not change meanwhile.
            spans: Elements to write.
            attempt: As :func:`new_attempt` gives it, the same for all shards of one checkpoint.
            moved: Told of the bytes as they are written.

        Raises:
            EnvironmentFailure: EADT-351, the storage cannot be written.
        """
        file = f"shard-{index:03d}.{attempt}.bin"
        if not _SHARD.match(file):
            raise ValueError(f"attempt must be letters, digits, '-' and '_': {attempt!r}")
        merged = tuple(merge_spans(spans))
        if merged and not 0 <= merged[0][0] < merged[-1][1] <= slot.layout.num_elements:
            raise ValueError(f"spans {merged[0][0]} to {merged[-1][1]} are not in the layout")
        digest = hashlib.sha256()
        num_bytes = 0
        with self.storage.create(f"{self._folder(step)}/{file}") as stream:
            for piece in _pieces(slot, merged):
                digest.update(piece)
                stream.write(piece)
                num_bytes += piece.nbytes
                moved(piece.nbytes)
        return Shard(file, num_bytes, digest.hexdigest(), merged)

    def publish(
        self,
        step: int,
        layout: StateLayout,
        meta: dict[str, Any],
        shards: Sequence[Shard],
        kind: Kind,
        info: dict[str, Any],
        order: SampleOrder | None = None,
    ) -> CheckpointInfo:
        """Make the written shards a checkpoint, in place of an earlier one of the same step.

        Args:
            step: Optimizer steps done.
            layout: The run's layout.
            meta: As :attr:`SavedState.meta`; comes back as JSON gives it (tuples as lists).
            shards: What :meth:`write_shard` returned on the nodes.
            kind: Why it was written.
            info: Further values to be read by people, as JSON.
            order: What decides which samples the steps take; a run that goes on must have the same.

        Raises:
            ConfigError: EADT-253, ``meta`` or ``info`` holds something that JSON does not know.
            EnvironmentFailure: EADT-353, shards are missing; EADT-351, it cannot be written.
        """
        folder = self._folder(step)
        present = self.storage.files(folder)
        for shard in shards:
            if present.get(shard.file) != shard.num_bytes:
                raise EnvironmentFailure(
                    f"{shard.file} of step {step} was written, but is not in {self.storage.display(folder)}",
                    code="EADT-353",
                    means="this checkpoint is not published; earlier ones are untouched",
                    fix="set storage.path to a place that all nodes share",
                )
        lost = missing_spans(
            [(0, layout.num_elements)], merge_spans(s for part in shards for s in part.spans)
        )
        if lost:
            raise EnvironmentFailure(
                f"the shards of step {step} lack elements {lost[0][0]} to {lost[0][1]}",
                code="EADT-353",
                means="this checkpoint is not published; earlier ones are untouched",
            )
        manifest = Manifest(
            step=step,
            kind=kind,
            layout=layout,
            meta=meta,
            shards=tuple(shards),
            info=info,
            order=order,
            eadt_version=eadt.__version__,
            unix_s=self._clock.unix_s(),
        )
        try:
            content = manifest.to_json()
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"the state of step {step} holds a value that cannot be saved: {error}",
                code="EADT-253",
                means="this checkpoint is not published",
                fix="keep only numbers, text, lists and dictionaries in what your training function saves",
            ) from error
        self.storage.publish(f"{folder}/{MANIFEST}", content)
        return CheckpointInfo(self.storage.display(folder), manifest)

    def steps(self) -> list[int]:
        """Steps of the published checkpoints, newest first; whether they verify is not looked at."""
        return [step for step, files in self._folders() if MANIFEST in files]

    def newest_valid(
        self, expected: StateLayout | str | None = None, *, deep: bool = True
    ) -> tuple[Manifest | None, list[Rejected]]:
        """The newest checkpoint that verifies, and what was newer and does not, with the reasons.

        Args:
            expected: The run's layout, or its fingerprint; ``None`` takes any.
            deep: Read all bytes for their checksums; else look at the sizes only, and leave the
                rest to :meth:`restore`. What that then finds corrupt goes to :meth:`reject`.

        Raises:
            ConfigError: EADT-251, the newest is of another model; EADT-252, of a newer EADT.
            EnvironmentFailure: EADT-352, the storage cannot be read.
        """
        rejected: list[Rejected] = []
        for step, files in self._folders():
            try:
                manifest = self._load(step, files)
                self._check_model(manifest, expected)
                self._check_sizes(manifest, files)
                if deep:
                    self._check_bytes(manifest)
            except CheckpointCorruptError as error:
                rejected.append(Rejected(step, error.what))
                _LOG.warning("EADT-354: checkpoint of step %d is not used: %s", step, error.what)
            else:
                return manifest, rejected
        return None, rejected

    def reject(self, manifest: Manifest, reason: str) -> None:
        """Remember, while this object lives, that a checkpoint turned out to be corrupt."""
        self._bad[_identity(manifest)] = reason

    def restore(
        self, manifest: Manifest, shard_indices: Iterable[int], slot: StateSlot, moved: Moved = _nothing
    ) -> list[Span]:
        """Read shards into a slot, checking them on the way. Blocks on the storage.

        Streams straight into the slot. If it raises, what the slot holds must not be used.

        Args:
            manifest: As :meth:`newest_valid` gave it.
            shard_indices: Which of its shards.
            slot: A writable slot of the same layout.
            moved: Told of the bytes as they are read.

        Returns:
            The elements that are in the slot now, sorted and disjoint.

        Raises:
            CheckpointCorruptError: EADT-354, a shard is not what was written.
            EnvironmentFailure: EADT-320, no room; EADT-352, the storage cannot be read.
        """
        if slot.layout != manifest.layout:
            raise ValueError("the slot has another layout than the checkpoint")
        spans: list[Span] = []
        for index in shard_indices:
            shard = manifest.shards[index]
            slot.reserve(shard.spans)
            self._fill(manifest.step, shard, _pieces(slot, shard.spans), moved)
            spans.extend(shard.spans)
        return merge_spans(spans)

    def prune(self, keep: int, writing: Collection[str] = ()) -> list[str]:
        """Delete what this run no longer needs: older checkpoints, corrupt ones and what torn ones left.

        The newest ``keep`` stay, counting only those whose manifest and sizes verify and that were
        not rejected; if there is none, nothing published is deleted. A checkpoint of a newer EADT
        stays. The manifest goes first, so that a crash in here leaves no checkpoint with holes.

        Args:
            keep: Checkpoints to keep, at least 1.
            writing: Attempts that are being written just now: their files stay.

        Returns:
            Names of the deleted folders and files, below the storage.

        Raises:
            EnvironmentFailure: EADT-352, the storage cannot be read.
        """
        if keep < 1:
            raise ValueError("keep must be at least 1")
        kept = 0
        corrupted: list[int] = []
        doomed: list[int] = []
        deleted: list[str] = []
        for step, files in self._folders():
            if MANIFEST not in files:
                if not _attempts(files) & set(writing):
                    doomed.append(step)
                continue
            try:
                manifest = self._load(step, files)
                self._check_sizes(manifest, files)
            except CheckpointCorruptError:
                corrupted.append(step)
                continue
            except ConfigError:
                continue
            if kept == keep:
                doomed.append(step)
                continue
            kept += 1
            needed = {MANIFEST} | {shard.file for shard in manifest.shards}
            for file in files.keys() - needed:
                if not _attempts([file]) & set(writing):
                    self.storage.delete(f"{self._folder(step)}/{file}")
                    deleted.append(f"{self._folder(step)}/{file}")
        for step in doomed + (corrupted if kept else []):
            self.storage.delete(f"{self._folder(step)}/{MANIFEST}")
            self.storage.delete_folder(self._folder(step))
            deleted.append(self._folder(step))
        return deleted

    def remove(self) -> list[str]:
        """Delete all that is this run's. Blocks on the storage.

        The manifests go first, so that a crash in here leaves no checkpoint with holes.

        Returns:
            Names of the files that could not be deleted, below the storage.

        Raises:
            EnvironmentFailure: EADT-352, the storage cannot be read.
        """
        for file in self.storage.files(self.folder):
            if file.rpartition("/")[2] == MANIFEST:
                self.storage.delete(f"{self.folder}/{file}")
        self.storage.delete_folder(self.folder)
        return [f"{self.folder}/{file}" for file in self.storage.files(self.folder)]

    def upload_folder(self, local: str | Path, name: str) -> str:
        """See :meth:`Storage.upload_folder`."""
        return self.storage.upload_folder(local, name)

    def _folder(self, step: int) -> str:
        return f"{self.folder}/step-{step:08d}"

    def _folders(self) -> list[tuple[int, dict[str, int]]]:
        """Step, and sizes by file name, of every checkpoint folder, newest first."""
        folders: dict[int, dict[str, int]] = {}
        for path, num_bytes in self.storage.files(self.folder).items():
            folder, _, file = path.partition("/")
            match = _STEP.match(folder)
            if match and file:
                folders.setdefault(int(match[1]), {})[file] = num_bytes
        return sorted(folders.items(), reverse=True)

    def _load(self, step: int, files: dict[str, int]) -> Manifest:
        if MANIFEST not in files:
            raise corrupt(f"the save of step {step} was not finished: it has no manifest")
        try:
            manifest = Manifest.from_json(self.storage.read(f"{self._folder(step)}/{MANIFEST}"), step)
        except FileNotFoundError as error:
            raise corrupt(f"the manifest of step {step} is gone") from error
        if _identity(manifest) in self._bad:
            raise corrupt(self._bad[_identity(manifest)])
        return manifest

    def _check_model(self, manifest: Manifest, expected: StateLayout | str | None) -> None:
        wanted = expected.fingerprint if isinstance(expected, StateLayout) else expected
        if wanted is None or manifest.layout.fingerprint == wanted:
            return
        what = f"{self.storage.display(self._folder(manifest.step))} is a checkpoint of another model"
        if isinstance(expected, StateLayout):
            what += ": " + "; ".join(layout_differences(manifest.layout, expected))
        raise ConfigError(
            what,
            code="EADT-251",
            means="the run cannot go on from it, and is not started over it",
            fix="use that model's and optimizer's settings, or give the run another name or storage.path",
        )

    @staticmethod
    def _check_sizes(manifest: Manifest, files: dict[str, int]) -> None:
        for shard in manifest.shards:
            if shard.file not in files:
                raise corrupt(f"{shard.file} of step {manifest.step} is missing")
            if files[shard.file] != shard.num_bytes:
                raise corrupt(
                    f"{shard.file} of step {manifest.step} has {files[shard.file]} bytes "
                    f"instead of {shard.num_bytes}"
                )

    def _check_bytes(self, manifest: Manifest) -> None:
        try:
            for shard in manifest.shards:
                self._fill(manifest.step, shard, _scratch(shard.num_bytes))
        except CheckpointCorruptError as error:
            # Sizes alone would not show it again, and prune looks at no more than those.
            self.reject(manifest, error.what)
            raise

    def _fill(self, step: int, shard: Shard, pieces: Iterable[memoryview], moved: Moved = _nothing) -> None:
        """Read a whole shard into ``pieces``, one after the other, and check it."""
        digest = hashlib.sha256()
        try:
            with self.storage.open(f"{self._folder(step)}/{shard.file}") as stream:
                for piece in pieces:
                    done = 0
                    while done < piece.nbytes:
                        count = stream.readinto(piece[done:])  # type: ignore[attr-defined]
                        if not count:
                            raise corrupt(f"{shard.file} of step {step} ends too early")
                        done += count
                        moved(count)
                    digest.update(piece)
                if stream.read(1):
                    raise corrupt(f"{shard.file} of step {step} is longer than {shard.num_bytes} bytes")
        except FileNotFoundError as error:
            raise corrupt(f"{shard.file} of step {step} is missing") from error
        except EnvironmentFailure as error:
            # A bad sector: other files of the same storage may well be readable.
            if getattr(error.__cause__, "errno", None) == errno.EIO:
                raise corrupt(f"{shard.file} of step {step}: {error.what}") from error
            raise
        if digest.hexdigest() != shard.sha256:
            raise corrupt(f"{shard.file} of step {step} is damaged: its checksum does not match")


def _identity(manifest: Manifest) -> tuple[int, tuple[str, ...]]:
    """The attempt is in the files' names, so this tells two tries at one step apart."""
    return manifest.step, tuple(shard.file for shard in manifest.shards)


def _attempts(files: Iterable[str]) -> set[str]:
    return {match[1] for match in map(_SHARD.match, files) if match}


def _pieces(slot: StateSlot, spans: Iterable[Span]) -> Iterator[memoryview]:
    """The slot's memory in the order of a shard's file: span by span, row by row."""
    chunk = CHUNK_BYTES // ITEM_BYTES
    for start, stop in spans:
        for name in slot.layout.rows:
            row = slot.row(name)
            for low in range(start, stop, chunk):
                yield row[low : min(low + chunk, stop)].data.cast("B")


def _scratch(num_bytes: int) -> Iterator[memoryview]:
    """As many bytes to read into, over and over the same few."""
    buffer = memoryview(bytearray(min(num_bytes, CHUNK_BYTES)))
    for start in range(0, num_bytes, CHUNK_BYTES):
        yield buffer[: num_bytes - start]
