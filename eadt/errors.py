"""The errors of EADT, split by what the caller does about them.

Abort (:class:`ConfigError`, :class:`EnvironmentFailure`, :class:`DeadlineError`), degrade
(:class:`DevicePermissionError`, :class:`DeviceUnsupportedError`, :class:`StaleDataError`) or retry
(:class:`TransientDeviceError`). Every error carries a stable code (``EADT-...``), says what
happened, what it means for this run and how to fix it, survives pickling, and knows the exit
status of the command that ends because of it.
"""

from __future__ import annotations

from typing import Any


class EadtError(Exception):
    """An error that is meant for the user: never shown with a traceback.

    Args:
        what: What happened, one sentence.
        code: Stable code, ``EADT-`` and three digits.
        means: What it means for this run; empty where obvious.
        fix: What the user can do; empty where nothing.
    """

    exit_status = 1

    def __init__(self, what: str, *, code: str = "EADT-100", means: str = "", fix: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.code = code
        self.means = means
        self.fix = fix

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.what, self.code, self.means, self.fix)

    def __str__(self) -> str:
        lines = [f"{self.code}: {self.what}"]
        if self.means:
            lines.append(f"  this means: {self.means}")
        if self.fix:
            lines.append(f"  to fix it:  {self.fix}")
        return "\n".join(lines)


def _rebuild(cls: type[EadtError], what: str, code: str, means: str, fix: str) -> EadtError:
    error = cls.__new__(cls)
    EadtError.__init__(error, what, code=code, means=means, fix=fix)
    return error


class ConfigError(EadtError):
    """The user's configuration is wrong. Abort before anything is started."""

    exit_status = 2


class EnvironmentFailure(EadtError):
    """The machine, cluster or storage cannot do what the run needs. Abort."""

    exit_status = 3


class DeadlineError(EadtError):
    """A deadline or budget cannot be met, or ran out. Abort."""

    exit_status = 4


class DevicePermissionError(EadtError):
    """A lever or sensor needs a privilege that we lack. Degrade: go on without it, and say so."""

    exit_status = 3


class DeviceUnsupportedError(EadtError):
    """The device has no such lever or sensor. Degrade."""

    exit_status = 3


class StaleDataError(EadtError):
    """Data is older than its maximum age. Degrade: act as if it were unknown."""


class TransientDeviceError(EadtError):
    """A reading or write failed in a way that may pass. Retry later."""
