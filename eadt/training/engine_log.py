"""What an engine prints: a file on disk, of which the newest part is kept.

Engines append to their files themselves, so that printing needs nobody who reads. Whoever starts them
looks at the files from time to time with :func:`bound`, so that no disk is filled.
"""

from __future__ import annotations

from pathlib import Path

LIMIT_BYTES = 4 << 20
KEPT_BYTES = 1 << 20
_TAIL_BYTES = 4000
_CUT = b"[what was printed before has been cut off]\n"


def log_path(folder: Path, engine_id: str) -> Path:
    """The file of one engine."""
    return folder / f"{engine_id}.log"


def bound(path: Path, limit_bytes: int = LIMIT_BYTES, kept_bytes: int = KEPT_BYTES) -> None:
    """Cut a file down to its end where it is too large, under the hands of a process that appends to it.

    What is printed in the moment of the cut may be lost.

    Args:
        path: The file; nothing is done where there is none.
        limit_bytes: Size from which on it is cut.
        kept_bytes: How much of its end is kept.
    """
    try:
        if path.stat().st_size <= limit_bytes:
            return
        with path.open("r+b") as file:
            end = _end_of(path, kept_bytes)
            file.truncate(0)
        with path.open("ab") as file:
            file.write(_CUT + end)
    except OSError:
        return  # it has gone, or its disk is full: the next look may do better


def tail(path: Path) -> str:
    """The end of what was printed; empty where there is nothing."""
    try:
        return _end_of(path, _TAIL_BYTES).decode(errors="replace")
    except OSError:
        return ""


def _end_of(path: Path, num_bytes: int) -> bytes:
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - num_bytes))
        return file.read(num_bytes)
