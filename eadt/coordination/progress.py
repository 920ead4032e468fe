"""Waiting for a long call as long as it makes progress: a large state takes its time, a hung disk does not.

Knows no Ray and no storage; the caller says how to ask for progress.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from eadt.clock import SYSTEM_CLOCK, Clock
from eadt.errors import EadtError, EnvironmentFailure

Result = TypeVar("Result")

STALL_S = 600.0
"""A call is given up when nothing has moved for so long. Some storages take a whole file in the background
and tell only at its end; they get as long as one that moves nothing."""

LOOK_S = 5.0
"""How often progress is asked for."""


class StalledError(EnvironmentFailure):
    """EADT-356: a call was given up, since nothing moved. What it does may still be under way."""


async def while_it_moves(
    call: Awaitable[Result],
    moved: Callable[[], Awaitable[int]],
    *,
    clock: Clock = SYSTEM_CLOCK,
    stall_s: float = STALL_S,
    look_s: float = LOOK_S,
) -> Result:
    """The call's result, however long it takes, unless it makes no progress.

    Args:
        call: What is waited for.
        moved: Tells bytes moved so far; another number than the last time is progress. An
            :class:`EadtError` of its own is none.
        clock: What ``stall_s`` is measured with.
        stall_s: Longest time without progress, in s.
        look_s: Time between two questions, in s.

    Raises:
        StalledError: Nothing moved for ``stall_s``.
    """
    waiting = asyncio.ensure_future(call)
    seen, since_s = -1, clock.monotonic_s()
    try:
        while True:
            done, _ = await asyncio.wait([waiting], timeout=look_s)
            if done:
                return waiting.result()
            try:
                now = await moved()
            except EadtError:
                now = seen
            if now != seen:
                seen, since_s = now, clock.monotonic_s()
            elif clock.monotonic_s() - since_s >= stall_s:
                raise StalledError(
                    f"a node has neither written nor read a byte for {stall_s:.0f} s",
                    code="EADT-356",
                    means="this transfer was given up; what was in the storage is untouched",
                    fix="see whether the storage answers on that node",
                )
    finally:
        waiting.cancel()
