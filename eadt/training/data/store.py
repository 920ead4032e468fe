"""Tokenised data on disk: two flat files of token ids and a description.

Owns the format. A folder holds ``train.bin`` and ``validation.bin``, each ``[N, sequence_length]``
little-endian unsigned integers of 16 or 32 bits, and ``meta.json`` with their numbers. Reading is
memory-mapped: opening costs microseconds, and the processes of a node share the pages.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from eadt.errors import EnvironmentFailure

FORMAT_VERSION = 1
META_NAME = "meta.json"
TRAIN_NAME = "train.bin"
VALIDATION_NAME = "validation.bin"


@dataclass(frozen=True)
class PreparedData:
    """A tokenised data set in a cache folder. Picklable.

    Attributes:
        path: The folder.
        num_train_sequences: Sequences to train on; one epoch.
        num_validation_sequences: Sequences held back; 0 where none were asked for.
        sequence_length: Tokens per sequence.
        vocab_size: Embedding rows that the tokenizer needs.
        fingerprint: Key of the cache: which files, tokenizer and settings it was made from.
        content_fingerprint: Hash of the tokens themselves: equal on nodes with equal data, whatever
            their files' names and times.
        source: Where the text came from, for people.
        validation_from: ``split`` (the data set brought one), ``documents`` (whole documents were
            held back), ``sequences`` (too few documents for that) or ``none``.
        notes: What was assumed or left out, sentences for the user.
    """

    path: Path
    num_train_sequences: int
    num_validation_sequences: int
    sequence_length: int
    vocab_size: int
    fingerprint: str
    content_fingerprint: str
    source: str
    validation_from: str
    notes: tuple[str, ...] = ()

    def describe(self) -> str:
        """One phrase for people."""
        return (
            f"{self.num_train_sequences} sequences of {self.sequence_length} tokens to train on, "
            f"{self.num_validation_sequences} for validation, from {self.source}"
        )


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest of the two storage types that holds all token ids."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def write_meta(prepared: PreparedData) -> None:
    """Write the description, last of the files in ``prepared.path``."""
    values = asdict(prepared) | {"format_version": FORMAT_VERSION}
    del values["path"]
    (prepared.path / META_NAME).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def read_prepared(path: Path) -> PreparedData | None:
    """The data set in a folder, or ``None`` if there is none or it is torn (sizes do not fit)."""
    try:
        values = json.loads((path / META_NAME).read_text(encoding="utf-8"))
        if values.pop("format_version") != FORMAT_VERSION:
            return None
        prepared = PreparedData(path=path, **values | {"notes": tuple(values["notes"])})
        row_bytes = prepared.sequence_length * token_dtype(prepared.vocab_size).itemsize
        for name, count in (
            (TRAIN_NAME, prepared.num_train_sequences),
            (VALIDATION_NAME, prepared.num_validation_sequences),
        ):
            if (path / name).stat().st_size != count * row_bytes:
                return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return prepared


class Sequences:
    """Fixed-length sequences in a memory-mapped file; like a read-only list of ``[sequence_length]``."""

    def __init__(self, file: Path, num_sequences: int, sequence_length: int, dtype: np.dtype[Any]) -> None:
        self._file = file
        self._shape = (num_sequences, sequence_length)
        self._dtype = dtype
        self._rows: NDArray[Any] | None = None

    def __len__(self) -> int:
        return self._shape[0]

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        """Token ids ``[sequence_length]`` of one sequence, a copy."""
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        row: NDArray[np.int64] = self._mapped()[index].astype(np.int64)
        return row

    def batch(self, indices: ArrayLike) -> NDArray[np.int64]:
        """Token ids ``[len(indices), sequence_length]`` of several sequences, a copy."""
        rows: NDArray[np.int64] = self._mapped()[np.asarray(indices, dtype=np.int64)].astype(np.int64)
        return rows

    def _mapped(self) -> NDArray[Any]:
        if self._rows is None:
            if len(self) == 0:  # an empty file cannot be mapped
                self._rows = np.empty(self._shape, dtype=self._dtype)
            else:
                self._rows = np.memmap(self._file, dtype=self._dtype, mode="r", shape=self._shape)
        return self._rows

    def __getstate__(self) -> dict[str, Any]:
        # A pickled memory map would carry all its data; the other process maps the file itself.
        return self.__dict__ | {"_rows": None}


class TokenDataset:
    """An opened data set. Picklable; mapped on first use, in each process anew.

    Attributes:
        prepared: Its numbers.
        train: Sequences to train on.
        validation: Sequences held back.
    """

    def __init__(self, prepared: PreparedData) -> None:
        self.prepared = prepared
        length, dtype = prepared.sequence_length, token_dtype(prepared.vocab_size)
        self.train = Sequences(prepared.path / TRAIN_NAME, prepared.num_train_sequences, length, dtype)
        self.validation = Sequences(
            prepared.path / VALIDATION_NAME, prepared.num_validation_sequences, length, dtype
        )


def open_prepared(path: Path | str) -> TokenDataset:
    """Open the data set that :func:`~eadt.training.data.prepare.prepare_dataset` put into a folder.

    Raises:
        EnvironmentFailure: There is none, or it is torn.
    """
    prepared = read_prepared(Path(path))
    if prepared is None:
        raise EnvironmentFailure(
            f"There is no complete tokenised data set in {path}.",
            code="EADT-363",
            means="This process cannot train.",
            fix="start the run again: it is made anew. On several nodes, each must have or make its own.",
        )
    return TokenDataset(prepared)
