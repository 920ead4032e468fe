"""Which of the nodes' state slots hold something that is still needed. Pure bookkeeping.

A slot number stands for one file on every node. A slot may be written when nothing holds it: not
the newest complete state, not a checkpoint that is being written from it, not engines that load.
"""

from __future__ import annotations


class SlotTable:
    """The slots of a run and who holds them."""

    def __init__(self, num_slots: int) -> None:
        self._holds: list[set[str]] = [set() for _ in range(num_slots)]

    @property
    def num_slots(self) -> int:
        """Slots there are."""
        return len(self._holds)

    def hold(self, slot: int, reason: str) -> None:
        """Keep a slot's content; idempotent."""
        self._holds[slot].add(reason)

    def release(self, reason: str) -> list[int]:
        """End this reason wherever it holds; returns the slots that became free by it."""
        freed = []
        for slot, holds in enumerate(self._holds):
            if reason in holds:
                holds.discard(reason)
                if not holds:
                    freed.append(slot)
        return freed

    def free(self) -> tuple[int, ...]:
        """Slots that may be written."""
        return tuple(slot for slot, holds in enumerate(self._holds) if not holds)
