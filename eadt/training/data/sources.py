"""Where text comes from: the hub, local files, or the Python standard library's own sources.

Owns reading and naming documents, in an order that is the same on every machine. Must not tokenise.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from eadt.config.training import PYTHON_STDLIB
from eadt.errors import ConfigError, EnvironmentFailure
from eadt.training.hub import load_dataset
from eadt.units import format_bytes

if TYPE_CHECKING:
    from eadt.config.training import TrainingConfig

STDLIB_MAX_BYTES = 8_000_000
"""How much of the standard library's sources ``python-stdlib`` takes: enough for a quick start."""

_STDLIB_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_PIECE_CHARACTERS = 1 << 20
"""A text file is read in pieces of this size, so that one of any size fits into memory."""

_JSON_LINES = {".jsonl", ".ndjson"}
_SUFFIXES = {".txt", ".parquet"} | _JSON_LINES


class Piece(NamedTuple):
    """A part of a document: the next one of the same, unless the one before ended it."""

    text: str
    ends_document: bool


@dataclass(frozen=True)
class Source:
    """Text to train on.

    Attributes:
        name: For messages.
        identity: Plain values that change when the text may have changed.
        read: Starts reading; each call from the beginning. Raises ``ConfigError`` where data cannot
            be read.
        read_validation: The same for the data set's own validation split; ``None`` where it has none.
        notes: What was assumed or left out, sentences for the user.
        num_bytes: Size of the files; ``None`` where unknown.
    """

    name: str
    identity: list[Any]
    read: Callable[[], Iterator[Piece]]
    read_validation: Callable[[], Iterator[Piece]] | None = None
    notes: tuple[str, ...] = ()
    num_bytes: int | None = None


def open_source(training: TrainingConfig) -> Source:
    """The source that a configuration names. Finds and names files, but reads none yet.

    Raises:
        ConfigError: It does not exist, is empty, or has no such column.
        EnvironmentFailure: It would have to come from the hub, which cannot be reached.
    """
    if training.dataset_path == PYTHON_STDLIB:
        return _stdlib_source()
    if training.dataset_path is not None:
        return _local_source(training.dataset_path, training.dataset_file_pattern, training.text_column)
    if training.dataset_name is not None:
        return _hub_source(training.dataset_name, training.dataset_config_name, training.text_column)
    raise ConfigError(
        "No data set is named.",
        code="EADT-220",
        fix="set training.dataset_name (on the hub) or training.dataset_path (a local file or folder).",
    )


def _stdlib_source() -> Source:
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _STDLIB_SKIPPED]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    # By a hash of the name rather than by the name: a prefix of the alphabet is no fair sample.
    found.sort(key=lambda file: hashlib.sha256(file.relative_to(root).as_posix().encode()).digest())
    files, total = [], 0
    for file in found:
        size = file.stat().st_size
        if 0 < size <= STDLIB_MAX_BYTES - total:
            files.append(file)
            total += size
    if not files:
        raise EnvironmentFailure(
            f"This Python has no sources of its standard library in {root}.",
            code="EADT-364",
            means=f"dataset_path: {PYTHON_STDLIB} has nothing to train on.",
            fix="install the standard library's sources (python3 of a distribution has them), or set "
            "training.dataset_path to a folder of text.",
        )
    listing = [[file.relative_to(root).as_posix(), file.stat().st_size] for file in files]
    return Source(
        name=f"{len(files)} files of Python {platform.python_version()}'s standard library",
        # No times in it: nodes with the same Python have the same data.
        identity=[PYTHON_STDLIB, platform.python_version(), listing],
        read=lambda: _read_files(files, "text"),
        num_bytes=total,
    )


def _local_source(name: str, pattern: str | None, text_column: str) -> Source:
    if "://" in name:
        raise ConfigError(
            f"training.dataset_path takes local files and folders, not {name}.",
            code="EADT-220",
            fix="mount or copy the data to every node, or publish it on a hub and set training.dataset_name.",
        )
    path = Path(name)
    if not path.exists():
        raise ConfigError(
            f"There is no file or folder {name} (searched from {Path.cwd()}).",
            code="EADT-220",
            fix="correct training.dataset_path.",
        )
    notes: list[str] = []
    if path.is_file():
        root, files = path.parent, [path]
    else:
        root, files = path, _files_in(path, pattern, notes)
    try:
        stats = [file.stat() for file in files]
    except OSError as error:
        raise _unreadable(path, error) from error
    listing = [
        [file.relative_to(root).as_posix(), stat.st_size, stat.st_mtime_ns]
        for file, stat in zip(files, stats, strict=True)
    ]
    num_bytes = sum(stat.st_size for stat in stats)
    if num_bytes == 0:
        raise ConfigError(f"{name} is empty.", code="EADT-220", fix="correct training.dataset_path.")
    return Source(
        name=name if path.is_file() else f"{len(files)} files of {name}",
        identity=["files", str(path.resolve()), text_column, listing],
        read=lambda: _read_files(files, text_column),
        notes=tuple(notes),
        num_bytes=num_bytes,
    )


def _files_in(folder: Path, pattern: str | None, notes: list[str]) -> list[Path]:
    visible = sorted(
        (
            file
            for file in folder.glob(pattern or "**/*")
            if file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts)
        ),
        key=lambda file: file.relative_to(folder).as_posix(),
    )
    if pattern is not None:
        if not visible:
            raise ConfigError(
                f"No file of {folder} matches {pattern!r}.",
                code="EADT-220",
                fix="correct training.dataset_file_pattern; **/*.txt also looks into the folders below.",
            )
        return visible
    files = [file for file in visible if file.suffix.lower() in _SUFFIXES]
    others = Counter(file.suffix or "no ending" for file in visible if file.suffix.lower() not in _SUFFIXES)
    seen = ", ".join(f"{count} × {suffix}" for suffix, count in others.most_common(5))
    if not files:
        raise ConfigError(
            f"{folder} holds no .txt, .jsonl or .parquet file" + (f" (but {seen})." if seen else "."),
            code="EADT-220",
            fix="set training.dataset_file_pattern to take other files as text (such as **/*.py), or correct "
            "training.dataset_path.",
        )
    if others:
        notes.append(f"Files of {folder} that are not .txt, .jsonl or .parquet were left out: {seen}.")
    return files


def _read_files(files: Iterable[Path], text_column: str) -> Iterator[Piece]:
    for file in files:
        suffix = file.suffix.lower()
        try:
            if suffix in _JSON_LINES:
                yield from _read_json_lines(file, text_column)
            elif suffix == ".parquet":
                yield from _read_parquet(file, text_column)
            else:
                yield from _read_text(file)
        except OSError as error:
            raise _unreadable(file, error) from error


def _read_text(file: Path) -> Iterator[Piece]:
    with file.open(encoding="utf-8", errors="replace", newline="") as stream:
        text = stream.read(_PIECE_CHARACTERS)
        while text:
            # Up to the end of the line, so that a token is not cut where it need not be.
            text += stream.readline(_PIECE_CHARACTERS)
            following = stream.read(_PIECE_CHARACTERS)
            yield Piece(text, ends_document=not following)
            text = following


def _read_json_lines(file: Path, text_column: str) -> Iterator[Piece]:
    with file.open(encoding="utf-8", errors="replace") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            where = f"{file}, line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ConfigError(
                    f"{where}, is not JSON: {error}.",
                    code="EADT-222",
                    fix="correct the file: one JSON object a line.",
                ) from error
            if not isinstance(row, dict):
                raise ConfigError(
                    f"{where}, is no JSON object.", code="EADT-222", fix='write {"text": "..."} a line.'
                )
            if text_column not in row:
                raise _no_column(where, text_column, row)
            text = _as_text(row[text_column], where, text_column)
            # JSON can hold half of a surrogate pair, which no tokenizer takes.
            yield Piece(text.encode("utf-8", "replace").decode("utf-8"), ends_document=True)


def _read_parquet(file: Path, text_column: str) -> Iterator[Piece]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            if text_column not in table.schema_arrow.names:
                raise _no_column(str(file), text_column, table.schema_arrow.names)
            for batch in table.iter_batches(batch_size=1024, columns=[text_column]):
                for value in batch.column(0).to_pylist():
                    yield Piece(_as_text(value, str(file), text_column), ends_document=True)
    except pyarrow.ArrowInvalid as error:
        raise ConfigError(
            f"{file} is no readable parquet file: {error}", code="EADT-222", fix="write the file anew."
        ) from error


def _hub_source(name: str, config_name: str | None, text_column: str) -> Source:
    notes = []
    if config_name is None and name.split("/")[-1] == "wikitext":
        config_name = "wikitext-2-raw-v1"
        notes.append(f"{name} without dataset_config_name: {config_name} is used.")
    splits = load_dataset(name, config_name, key="training.dataset_name")
    train = splits.get("train")
    if train is None:
        raise ConfigError(
            f"The data set {name} has no split named train, only {', '.join(splits)}.",
            code="EADT-220",
            fix="choose another data set or dataset_config_name.",
        )
    validation = splits.get("validation")
    for split in (train, validation):
        if split is not None and text_column not in split.column_names:
            raise _no_column(f"The data set {name}", text_column, split.column_names)

    def read(split: Any) -> Iterator[Piece]:
        for row in split.select_columns([text_column]):
            yield Piece(_as_text(row[text_column], name, text_column), ends_document=True)

    full_name = f"{name} ({config_name})" if config_name else name
    return Source(
        name=full_name,
        identity=[
            "hub",
            full_name,
            text_column,
            [s._fingerprint for s in (train, validation) if s is not None],
        ],
        read=lambda: read(train),
        read_validation=None if validation is None else lambda: read(validation),
        notes=tuple(notes),
        num_bytes=train.info.dataset_size,
    )


def _as_text(value: Any, where: str, text_column: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ConfigError(
            f"{where}: column {text_column!r} holds {type(value).__name__}, not text.",
            code="EADT-221",
            fix="set training.text_column to the column that holds the text.",
        )
    return value


def _no_column(where: str, text_column: str, columns: Iterable[str]) -> ConfigError:
    return ConfigError(
        f"{where}: there is no column {text_column!r}. Columns: {', '.join(map(str, columns)) or 'none'}.",
        code="EADT-221",
        fix="set training.text_column to the column that holds the text.",
    )


def _unreadable(path: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"{path} cannot be read: {error.strerror or error}.",
        code="EADT-222",
        fix="check its permissions, or correct training.dataset_path.",
    )


def describe_size(source: Source) -> str:
    """The source with its size, for progress lines."""
    return source.name if source.num_bytes is None else f"{source.name} ({format_bytes(source.num_bytes)})"
