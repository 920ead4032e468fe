"""The state of a run between two generations: where each element lives, and how it is moved.

A *layout* gives every parameter a fixed place on one axis of ``num_elements`` float32 values; a
*slot* is one memory-mapped file a node with a few rows of that axis (the fp32 weights and the
optimizer's moments). Each rank writes just the fragments that it owns, and the ranks of the next
generation, however many they are, read just those that they need: no collective, no gathering.
The files are sparse, so a node's slot takes memory only for what its ranks wrote.

This module knows neither torch nor DeepSpeed; :mod:`eadt.training.zero_state` does.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from eadt.errors import EnvironmentFailure

FloatArray = npt.NDArray[np.float32]
Span = tuple[int, int]
"""A half-open range of elements on the layout's axis."""

ITEM_BYTES = 4
FETCH_ELEMENTS = 4 << 20
"""Elements per network message: 16 MiB, so that streaming needs no second copy of the state."""


@dataclass(frozen=True)
class StateLayout:
    """Places of all parameters on one axis of elements; equal on every rank of a run.

    Attributes:
        names: Parameter names in the model's order.
        shapes: Their shapes.
        rows: What is kept for each element; the first is always ``fp32``, the weights.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    rows: tuple[str, ...]
    offsets: dict[str, int] = field(init=False, repr=False, compare=False)
    num_elements: int = field(init=False, compare=False)

    def __post_init__(self) -> None:
        offsets: dict[str, int] = {}
        position = 0
        for name, shape in zip(self.names, self.shapes, strict=True):
            offsets[name] = position
            position += int(np.prod(shape, dtype=np.int64))
        object.__setattr__(self, "offsets", offsets)
        object.__setattr__(self, "num_elements", position)

    @property
    def num_bytes(self) -> int:
        """Bytes of a whole slot, all rows."""
        return self.num_elements * len(self.rows) * ITEM_BYTES

    @property
    def fingerprint(self) -> str:
        """Identifies model and optimizer: a checkpoint with another one is of another model."""
        text = repr((self.names, self.shapes, self.rows))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def as_dict(self) -> dict[str, Any]:
        """JSON form, for a checkpoint's manifest."""
        return {"names": self.names, "shapes": self.shapes, "rows": self.rows}

    @staticmethod
    def from_dict(values: dict[str, Any]) -> StateLayout:
        """Inverse of :meth:`as_dict`."""
        return StateLayout(
            names=tuple(values["names"]),
            shapes=tuple(tuple(shape) for shape in values["shapes"]),
            rows=tuple(values["rows"]),
        )


def merge_spans(spans: Iterable[Span]) -> list[Span]:
    """The union of ``spans``, sorted, with touching ones joined."""
    merged: list[Span] = []
    for start, stop in sorted(spans):
        if start >= stop:
            continue
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return merged


def span_elements(spans: Iterable[Span]) -> int:
    """Number of elements in disjoint spans."""
    return sum(stop - start for start, stop in spans)


def overlaps(wanted: Span, spans: Sequence[Span]) -> Iterator[Span]:
    """The parts of ``wanted`` that lie in ``spans``."""
    for start, stop in spans:
        low, high = max(start, wanted[0]), min(stop, wanted[1])
        if low < high:
            yield low, high


def missing_spans(wanted: Sequence[Span], present: Sequence[Span]) -> list[Span]:
    """What of ``wanted`` is not in ``present``; both sorted and disjoint."""
    missing: list[Span] = []
    for start, stop in wanted:
        position = start
        for low, high in overlaps((start, stop), present):
            if position < low:
                missing.append((position, low))
            position = high
        if position < stop:
            missing.append((position, stop))
    return missing


class StateSlot:
    """One node's memory-mapped slot file. Not thread-safe; any number of processes may map it.

    Space is reserved before it is written (``posix_fallocate``), so that a full file system is an
    error with a name and never a SIGBUS.
    """

    def __init__(self, path: str | Path, layout: StateLayout, *, writable: bool) -> None:
        self.path = Path(path)
        self.layout = layout
        flags = (os.O_RDWR | os.O_CREAT) if writable else os.O_RDONLY
        self._fd = os.open(self.path, flags, 0o600)
        size = max(layout.num_bytes, 1)
        if writable and os.fstat(self._fd).st_size < size:
            os.ftruncate(self._fd, size)
        access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
        self._map = mmap.mmap(self._fd, size, access=access)
        flat = np.frombuffer(self._map, dtype=np.float32, count=layout.num_elements * len(layout.rows))
        self._rows: FloatArray | None = flat.reshape(len(layout.rows), layout.num_elements)

    def row(self, name: str) -> FloatArray:
        """The ``[num_elements]`` float32 array of one row, a view into the file."""
        assert self._rows is not None, "slot is closed"
        row: FloatArray = self._rows[self.layout.rows.index(name)]
        return row

    def reserve(self, spans: Iterable[Span]) -> None:
        """Take the memory for these spans of every row.

        Raises:
            EnvironmentFailure: EADT-320, the file system behind the slot is full.
        """
        for start, stop in merge_spans(spans):
            for index in range(len(self.layout.rows)):
                offset = (index * self.layout.num_elements + start) * ITEM_BYTES
                try:
                    os.posix_fallocate(self._fd, offset, (stop - start) * ITEM_BYTES)
                except OSError as error:
                    raise EnvironmentFailure(
                        f"no room for the run's state in {self.path.parent}: {error.strerror}",
                        code="EADT-320",
                        means="the state could not be handed over in memory",
                        fix="give the container more shared memory, or set elastic.spill_dir to a folder "
                        "on a disk with room",
                    ) from error

    def close(self) -> None:
        """Unmap; the file stays. Views handed out must be gone by then."""
        self._rows = None
        try:
            self._map.close()
        except BufferError:
            # A view is still alive somewhere: the mapping then goes with the process.
            return
        finally:
            os.close(self._fd)


@dataclass(frozen=True)
class StatePart:
    """What one node holds of a saved state.

    Attributes:
        node_id: The Ray node.
        path: The slot file on that node.
        address: Host and port of that node's :class:`StateServer`.
        spans: Elements that are in the file, sorted and disjoint.
    """

    node_id: str
    path: str
    address: tuple[str, int]
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class SavedState:
    """A complete state of the run at the end of an optimizer step, wherever its parts are.

    Attributes:
        step: Optimizer steps done.
        meta: Small values that go along: optimizer step, schedules, loss scale, the user's own.
        layout: Places of all elements.
        parts: One per node; together they cover the layout.
    """

    step: int
    meta: dict[str, Any]
    layout: StateLayout
    parts: tuple[StatePart, ...]

    def missing(self) -> list[Span]:
        """Elements that no part holds; empty for a complete state."""
        present = merge_spans(span for part in self.parts for span in part.spans)
        return missing_spans([(0, self.layout.num_elements)], present)


class StateReader:
    """Reads elements of a saved state: from this node's slot, else from the node that has them."""

    def __init__(self, state: SavedState, node_id: str, authkey: bytes) -> None:
        self._state = state
        self._authkey = authkey
        self._local = [part for part in state.parts if part.node_id == node_id]
        self._remote = [part for part in state.parts if part.node_id != node_id]
        self._slots = {part.path: StateSlot(part.path, state.layout, writable=False) for part in self._local}
        self._connections: dict[tuple[str, int], Connection] = {}
        self.num_remote_bytes = 0

    def read(self, row: str, start: int, out: FloatArray) -> None:
        """Fill ``out`` ``[n]`` with the elements ``start`` to ``start + n`` of a row. Blocks.

        Raises:
            EnvironmentFailure: EADT-321, some element is nowhere to be had.
        """
        wanted = (start, start + len(out))
        done: list[Span] = []
        for part in self._local:
            for low, high in overlaps(wanted, part.spans):
                out[low - start : high - start] = self._slots[part.path].row(row)[low:high]
                done.append((low, high))
        for part in self._remote:
            for low, high in missing_spans(list(overlaps(wanted, part.spans)), merge_spans(done)):
                self._fetch(part, row, low, out[low - start : high - start])
                done.append((low, high))
        lost = missing_spans([wanted], merge_spans(done))
        if lost:
            raise EnvironmentFailure(
                f"the saved state of step {self._state.step} lacks elements {lost[0][0]} to {lost[0][1]}",
                code="EADT-321",
            )

    def _fetch(self, part: StatePart, row: str, start: int, out: FloatArray) -> None:
        connection = self._connections.get(part.address)
        if connection is None:
            connection = Client(part.address, authkey=self._authkey)
            self._connections[part.address] = connection
        for low in range(0, len(out), FETCH_ELEMENTS):
            piece = out[low : low + FETCH_ELEMENTS]
            connection.send((part.path, self._state.layout, row, start + low, start + low + len(piece)))
            target = piece if piece.flags["C_CONTIGUOUS"] else np.empty_like(piece)
            connection.recv_bytes_into(target.data.cast("B"))
            if target is not piece:
                piece[:] = target
            self.num_remote_bytes += target.nbytes

    def close(self) -> None:
        """Close connections and mappings."""
        for connection in self._connections.values():
            connection.close()
        for slot in self._slots.values():
            slot.close()
        self._connections.clear()
        self._slots.clear()
