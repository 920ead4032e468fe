"""What every command shares: where text goes, how errors are shown, and the exit status.

With ``-o json`` standard output holds exactly one JSON document; all else, also what libraries and Ray's
workers print, goes to standard error. Exit status: 0 well, 1 anything unexpected, 2 the user's
configuration, 3 the environment, 4 a deadline or budget, 130 interrupted.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from contextlib import suppress
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

import typer
from rich.console import Console
from rich.text import Text

from eadt import clock
from eadt.config import InvalidConfigError
from eadt.errors import EadtError

UNEXPECTED_CODE = "EADT-101"
INTERRUPTED_STATUS = 130


class OutputFormat(StrEnum):
    """How a command answers."""

    TEXT = "text"
    JSON = "json"


class Output:
    """Standard output and standard error of one command, for the time of a ``with`` block.

    Leaving the block with an error shows it and ends the command with the error's exit status; there is
    never a traceback on the screen.

    Args:
        output_format: How the command answers.
    """

    def __init__(self, output_format: OutputFormat = OutputFormat.TEXT) -> None:
        self.is_json = output_format is OutputFormat.JSON
        self.crash_folder: Path | None = None
        """Where the traceback of an unexpected error goes; ``None``: the system's temporary folder."""
        self.console = Console(stderr=self.is_json, highlight=False)
        """For text: standard output, or standard error with ``-o json``."""
        self.error_console = Console(stderr=True, highlight=False)
        self._document_stream: TextIO | None = None
        self._saved_stdout: TextIO | None = None
        self._has_answered = False

    def __enter__(self) -> Self:
        """Set standard output aside for the document, where one is asked for."""
        if self.is_json:
            self._set_stdout_aside()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Show the error, if there is one, and end the command."""
        try:
            status = self._show_error(error)
        finally:
            self._put_stdout_back()
        if status is not None:
            raise typer.Exit(status) from None

    def text(self, text: str | Text, style: str = "") -> None:
        """Print text for people; brackets in it mean nothing special."""
        self.console.print(Text(text) if isinstance(text, str) else text, style=style, soft_wrap=True)

    def remark(self, text: str) -> None:
        """Print a remark on standard error."""
        self.error_console.print(Text(text), style="yellow", soft_wrap=True)

    def document(self, value: Any) -> None:
        """Print the one JSON document of this command; only with ``-o json``."""
        assert self.is_json, "text was asked for"
        assert not self._has_answered, "a command prints one JSON document"
        self._has_answered = True
        stream = self._document_stream or sys.stdout
        stream.write(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")
        stream.flush()

    # -- errors --------------------------------------------------------------------------------------------

    def _show_error(self, error: BaseException | None) -> int | None:
        """Show an error; returns the exit status, or ``None`` where the exception is to go its way."""
        if error is None or isinstance(error, typer.Exit | SystemExit):
            return None
        if isinstance(error, KeyboardInterrupt):
            self.remark("Interrupted.")
            self._answer({"error": {"code": "interrupted", "what": "interrupted by the user"}})
            return INTERRUPTED_STATUS
        if isinstance(error, BrokenPipeError):  # `eadt ... | head`
            with suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            return 1
        if isinstance(error, EadtError):
            self.show(error)
            self._answer({"error": error_document(error)})
            return error.exit_status
        if not isinstance(error, Exception):
            return None
        unexpected = _unexpected(error, self._write_traceback(error))
        self.show(unexpected)
        self._answer({"error": error_document(unexpected)})
        return unexpected.exit_status

    def show(self, error: EadtError) -> None:
        """Print an error on standard error: what, what it means, how to fix it, with its code."""
        text = Text(f"{error.code}: ", style="bold red")
        text.append(error.what, style="not bold default")
        self.error_console.print(text, soft_wrap=True)
        for head, part in (("this means", error.means), ("to fix it", error.fix)):
            if part:
                line = Text(f"  {head + ':':<12}", style="bold")
                line.append(part.replace("\n", "\n    "), style="not bold default")
                self.error_console.print(line, soft_wrap=True)

    def _answer(self, document: dict[str, Any]) -> None:
        if self.is_json and not self._has_answered:
            self.document(document)

    def _write_traceback(self, error: Exception) -> Path | None:
        text = "".join(traceback.format_exception(error))
        name = f"eadt-crash-{datetime.fromtimestamp(clock.unix_s(), UTC):%Y%m%d-%H%M%S}-{os.getpid()}.txt"
        for folder in (self.crash_folder, Path(tempfile.gettempdir())):
            if folder is not None and folder.is_dir():
                with suppress(OSError):
                    path = folder / name
                    path.write_text(text)
                    return path
        return None

    # -- standard output -----------------------------------------------------------------------------------

    def _set_stdout_aside(self) -> None:
        """Let everything that is printed from here on, by child processes too, go to standard error."""
        sys.stdout.flush()
        self._saved_stdout = sys.stdout
        if _has_descriptor(sys.stdout, 1) and _has_descriptor(sys.stderr, 2):
            self._document_stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
            os.dup2(2, 1)
        else:  # within another program, such as a test
            self._document_stream = sys.stdout
        sys.stdout = sys.stderr

    def _put_stdout_back(self) -> None:
        if self._saved_stdout is None:
            return
        sys.stderr.flush()
        sys.stdout, self._saved_stdout = self._saved_stdout, None
        if self._document_stream is not None and self._document_stream is not sys.stdout:
            os.dup2(self._document_stream.fileno(), 1)
            self._document_stream.close()
        self._document_stream = None


def _has_descriptor(stream: TextIO, descriptor: int) -> bool:
    try:
        return stream.fileno() == descriptor
    except (OSError, ValueError):
        return False


def error_document(error: EadtError) -> dict[str, Any]:
    """An error as plain values, with all problems of a configuration one by one."""
    document: dict[str, Any] = {
        "code": error.code,
        "what": error.what,
        "means": error.means,
        "fix": error.fix,
        "exit_status": error.exit_status,
    }
    if isinstance(error, InvalidConfigError):
        document["problems"] = [
            {
                "file": problem.file,
                "line": problem.line,
                "key": problem.key,
                "message": problem.message,
                "nearest": problem.nearest,
            }
            for problem in error.problems
        ]
    return document


def _unexpected(error: Exception, path: Path | None) -> EadtError:
    where = f"the traceback is in {path}" if path else "its traceback could not be written anywhere"
    return EadtError(
        f"unexpected error: {type(error).__name__}: {str(error).strip() or 'no message'}",
        code=UNEXPECTED_CODE,
        means="this is a fault of EADT or of a library it uses, not of your configuration",
        fix=f"{where}; please report it with that file",
    )
