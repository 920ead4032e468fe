"""Tokenise once: documents become packed sequences in a cache folder that all runs share.

Owns the packing, the validation split and the cache (key, atomic publishing, repair of torn
entries). Any number of processes may prepare the same data at once: each works in a folder of its
own, the first to finish publishes, the others use what is there.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from eadt import clock
from eadt.errors import ConfigError, EnvironmentFailure
from eadt.training.data.sources import Piece, Source, describe_size, open_source
from eadt.training.data.store import (
    FORMAT_VERSION,
    TRAIN_NAME,
    VALIDATION_NAME,
    PreparedData,
    read_prepared,
    token_dtype,
    write_meta,
)
from eadt.training.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from eadt.config.training import TrainingConfig

Progress = Callable[[str], None]
"""Takes one line that says what is being done."""

_PROGRESS_INTERVAL_S = 2.0
_ENCODE_BATCH = 256
_ENCODE_CHARACTERS = 4 << 20
_COPY_ROWS = 4096
_WORK_PREFIX = ".preparing-"
_ABANDONED_AFTER_S = 24 * 3600.0
_FAIR_SHARE = 3.0
"""A split by documents counts as fair within this factor of the fraction that was asked for."""


def default_cache_dir() -> Path:
    """Folder of tokenised data sets on this machine: ``$XDG_CACHE_HOME/eadt/datasets``."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "eadt" / "datasets"


def prepare_dataset(
    training: TrainingConfig,
    cache_dir: Path | str,
    seed: int,
    progress: Progress | None = None,
    *,
    tokenizer: Tokenizer | None = None,
) -> PreparedData:
    """Tokenise the data set of a configuration, or find it in the cache.

    Blocks, as long as it takes to read and tokenise all text. Idempotent; safe to run in several
    processes at once.

    Args:
        training: The section ``training`` of the configuration.
        cache_dir: Folder of the cache, made if needed.
        seed: Chooses what is held back for validation.
        progress: Gets a line every few seconds and at each stage.
        tokenizer: Used in place of the configuration's, if it is loaded already.

    Raises:
        ConfigError: The data does not exist, is empty or too short, or has no such column.
        EnvironmentFailure: The hub cannot be reached, or the cache cannot be written.
    """
    say = progress or (lambda _: None)
    if tokenizer is None:
        say("loading the tokenizer")
        tokenizer = load_tokenizer(training)
    say("finding the data")
    source = open_source(training)
    fingerprint = _fingerprint(training, source, tokenizer, seed)
    target = Path(cache_dir) / fingerprint
    prepared = read_prepared(target)
    if prepared is not None:
        say(f"tokenised data found in the cache: {prepared.describe()}")
        return prepared
    try:
        Path(cache_dir).mkdir(parents=True, exist_ok=True)
        _remove_abandoned(Path(cache_dir))
        work = Path(cache_dir) / f"{_WORK_PREFIX}{fingerprint}-{uuid.uuid4().hex[:8]}"
        work.mkdir()
        try:
            say(f"tokenising {describe_size(source)}")
            made = _tokenise(training, source, tokenizer, seed, work, fingerprint, say)
            prepared = _publish(made, target)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise _cannot_write(Path(cache_dir), error) from error
    say(f"tokenised: {prepared.describe()}")
    return prepared


def check_dataset(prepared: PreparedData, train_batch_size: int) -> None:
    """Refuse a data set that cannot fill one global batch.

    Raises:
        ConfigError: It has fewer sequences than ``train_batch_size``.
    """
    count = prepared.num_train_sequences
    if count < train_batch_size:
        raise ConfigError(
            f"The data set ({prepared.source}) has {count} training sequences of "
            f"{prepared.sequence_length} tokens, fewer than one global batch of {train_batch_size}.",
            code="EADT-225",
            means="Not even one optimizer step could be made without repeating samples.",
            fix=f"use more data, or set training.train_batch_size to at most {count}, or shorten "
            "training.sequence_length.",
        )


def _fingerprint(training: TrainingConfig, source: Source, tokenizer: Tokenizer, seed: int) -> str:
    key = [
        FORMAT_VERSION,
        source.identity,
        tokenizer.fingerprint(),
        tokenizer.vocab_size,
        training.sequence_length,
        training.validation_fraction,
        seed if training.validation_fraction > 0 else None,
    ]
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]


class _SequenceFile:
    """Packs token streams into rows of ``sequence_length`` and appends them to a file."""

    def __init__(self, file: Path, sequence_length: int, dtype: np.dtype[Any]) -> None:
        self.num_sequences = 0
        self._length = sequence_length
        self._dtype = dtype
        self._stream = file.open("wb")
        self._rest = np.empty(0, dtype=dtype)

    def append(self, tokens: NDArray[np.int64]) -> None:
        """Add tokens; what does not fill a row waits for the next call."""
        joined = np.concatenate([self._rest, tokens.astype(self._dtype)])
        whole = len(joined) // self._length
        self._stream.write(joined[: whole * self._length].tobytes())
        self._rest = joined[whole * self._length :].copy()
        self.num_sequences += whole

    def close(self) -> None:
        """Write through to the disk. Tokens that fill no row are dropped."""
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()


def _tokenise(
    training: TrainingConfig,
    source: Source,
    tokenizer: Tokenizer,
    seed: int,
    work: Path,
    fingerprint: str,
    say: Progress,
) -> PreparedData:
    """Write all files of the data set into the folder ``work``."""
    length, dtype = training.sequence_length, token_dtype(tokenizer.vocab_size)
    fraction = training.validation_fraction
    files = {name: _SequenceFile(work / name, length, dtype) for name in (TRAIN_NAME, VALIDATION_NAME)}
    num_tokens = 0
    last_said_s = clock.monotonic_s()
    own_split = fraction > 0 and source.read_validation is not None
    try:
        for name, document, tokens in _token_stream(source, tokenizer, own_split):
            held_back = not own_split and _is_held_back(document, fraction, seed)
            files[VALIDATION_NAME if held_back else name].append(tokens)
            num_tokens += len(tokens)
            if clock.monotonic_s() - last_said_s >= _PROGRESS_INTERVAL_S:
                last_said_s = clock.monotonic_s()
                say(f"tokenising: {num_tokens / 1e6:.1f} million tokens of {document + 1} documents")
    finally:
        for file in files.values():
            file.close()
    counts = files[TRAIN_NAME].num_sequences, files[VALIDATION_NAME].num_sequences
    validation_from = "split" if own_split else "documents"
    if fraction == 0:
        validation_from = "none"
    elif not own_split and not _is_fair(counts, fraction):
        counts = _split_sequences(work, counts, length, dtype, fraction, seed)
        validation_from = "sequences"
    if counts[0] == 0 or (fraction > 0 and counts[1] == 0):
        raise _too_short(source, num_tokens, length, fraction)
    prepared = PreparedData(
        path=work,
        num_train_sequences=counts[0],
        num_validation_sequences=counts[1],
        sequence_length=length,
        vocab_size=tokenizer.vocab_size,
        fingerprint=fingerprint,
        content_fingerprint=_content_fingerprint(work),
        source=source.name,
        validation_from=validation_from,
        notes=source.notes,
    )
    write_meta(prepared)
    return prepared


def _token_stream(
    source: Source, tokenizer: Tokenizer, own_split: bool
) -> Iterator[tuple[str, int, NDArray[np.int64]]]:
    """(file, number of the document, tokens) of all text, an end-of-text token after each document."""
    splits = [(TRAIN_NAME, source.read())]
    if own_split and source.read_validation is not None:
        splits.append((VALIDATION_NAME, source.read_validation()))
    end = np.asarray([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id], dtype=np.int64)
    for name, pieces in splits:
        document = 0
        for batch in _batched(piece for piece in pieces if piece.text or piece.ends_document):
            encoded = tokenizer.encode_batch([piece.text for piece in batch])
            for piece, tokens in zip(batch, encoded, strict=True):
                if len(tokens):
                    yield name, document, np.concatenate([tokens, end]) if piece.ends_document else tokens
                document += piece.ends_document


def _batched(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Pieces in lists that are worth a tokenizer's call and bounded in memory."""
    batch: list[Piece] = []
    num_characters = 0
    for piece in pieces:
        batch.append(piece)
        num_characters += len(piece.text)
        if len(batch) >= _ENCODE_BATCH or num_characters >= _ENCODE_CHARACTERS:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch


def _is_held_back(document: int, fraction: float, seed: int) -> bool:
    """Whether a document is for validation: by a hash, so that it needs no list of all documents."""
    digest = hashlib.blake2b(f"{seed}:{document}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < fraction * 2.0**64


def _is_fair(counts: tuple[int, int], fraction: float) -> bool:
    """Whether the split by documents came out near the fraction; with few documents it cannot."""
    num_train, num_validation = counts
    wanted = fraction * (num_train + num_validation)
    return (
        num_train > 0
        and num_validation > 0
        and wanted / _FAIR_SHARE <= num_validation <= wanted * _FAIR_SHARE
    )


def _split_sequences(
    work: Path, counts: tuple[int, int], length: int, dtype: np.dtype[Any], fraction: float, seed: int
) -> tuple[int, int]:
    """Split anew by sequences instead of documents: at least one for each side.

    Returns:
        Sequences for training and for validation; unchanged if there are fewer than two.
    """
    total = sum(counts)
    if total < 2:
        return total, 0
    whole = work / "all.bin"
    with whole.open("wb") as joined:
        for name in (TRAIN_NAME, VALIDATION_NAME):
            with (work / name).open("rb") as part:
                shutil.copyfileobj(part, joined)
    num_validation = min(max(1, round(fraction * total)), total - 1)
    # Raw words of Philox, not Generator.choice: their values are the same in every numpy version.
    rank = np.random.Philox(np.random.SeedSequence([seed, total])).random_raw(total)
    is_held_back = np.zeros(total, dtype=bool)
    is_held_back[np.argsort(rank, kind="stable")[:num_validation]] = True
    rows = np.memmap(whole, dtype=dtype, mode="r", shape=(total, length))
    for name, chosen in ((TRAIN_NAME, ~is_held_back), (VALIDATION_NAME, is_held_back)):
        with (work / name).open("wb") as stream:
            for start in range(0, total, _COPY_ROWS):
                rows[start : start + _COPY_ROWS][chosen[start : start + _COPY_ROWS]].tofile(stream)
            stream.flush()
            os.fsync(stream.fileno())
    del rows
    whole.unlink()
    return total - num_validation, num_validation


def _content_fingerprint(work: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name in (TRAIN_NAME, VALIDATION_NAME):
        digest.update(f"{name}:{(work / name).stat().st_size}".encode())
        with (work / name).open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def _publish(made: PreparedData, target: Path) -> PreparedData:
    """Rename the finished folder to its place, unless another process was faster."""
    for _ in range(3):
        try:
            made.path.rename(target)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise
            published = read_prepared(target)
            if published is not None:
                return published
            _move_aside(target)
        else:
            return replace(made, path=target)
    raise OSError(errno.EBUSY, f"{target} keeps being replaced by torn data")


def _move_aside(torn: Path) -> None:
    """Take a torn entry away. Renamed first: a reader must not see it half removed."""
    aside = torn.parent / f"{_WORK_PREFIX}torn-{uuid.uuid4().hex[:8]}"
    try:
        torn.rename(aside)
    except FileNotFoundError:
        return  # another process took it away
    if aside.is_dir():
        shutil.rmtree(aside, ignore_errors=True)
    else:
        aside.unlink(missing_ok=True)


def _remove_abandoned(cache_dir: Path) -> None:
    """Remove what killed processes left behind."""
    oldest_s = clock.unix_s() - _ABANDONED_AFTER_S
    for work in cache_dir.glob(f"{_WORK_PREFIX}*"):
        try:
            if work.stat().st_mtime < oldest_s:
                shutil.rmtree(work, ignore_errors=True)
        except FileNotFoundError:
            continue


def _too_short(source: Source, num_tokens: int, length: int, fraction: float) -> ConfigError:
    if num_tokens == 0:
        return ConfigError(
            f"There is no text in {source.name}.", code="EADT-220", fix="correct training.dataset_path."
        )
    needed = "one training and one validation sequence" if fraction > 0 else "one training sequence"
    return ConfigError(
        f"{source.name} has {num_tokens} tokens: too few for {needed} of {length} tokens.",
        code="EADT-225",
        fix="use more data or shorten training.sequence_length.",
    )


def _cannot_write(cache_dir: Path, error: OSError) -> EnvironmentFailure:
    return EnvironmentFailure(
        f"The tokenised data cannot be written to {cache_dir}: {error.strerror or error}.",
        code="EADT-362",
        means="Nothing was started; an earlier cache is untouched.",
        fix="free space on that disk or make the folder writable.",
    )
