"""For tests of the state keeper and of a run's end: nodes whose slots and checkpoints are real.

Pretended: the engines, whose words are said by the test, and the line to the node, which is a call.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from eadt.cluster import Devices
from eadt.config import RunConfig, config_from_dict
from eadt.coordination.metering import Metered
from eadt.coordination.nodes import NodeInfo
from eadt.coordination.recorder import Recorder
from eadt.coordination.settings import RunSettings
from eadt.errors import EnvironmentFailure
from eadt.record.rows import AnyRow, NoteRow, SessionRow
from eadt.trainer import run_settings
from eadt.training.checkpoint import CheckpointStore, Manifest, Shard
from eadt.training.engine_spec import EngineSpec
from eadt.training.state import SavedState, Span, StateLayout, StatePart, StateSlot

LAYOUT = StateLayout(("w", "b"), ((8, 4), (4,)), ("fp32", "exp_avg", "exp_avg_sq"))
NUM = LAYOUT.num_elements


def make_config(folder: Path, **sections: Any) -> RunConfig:
    """A run that brings its own loop and data."""
    values: dict[str, Any] = {
        "run": {"name": "demo", "folder": str(folder / "run")},
        "training": {"train_function": "own:train", "train_batch_size": 12, "max_steps": 100},
        "elastic": {"num_workers": 1, "max_workers": 2},
        "checkpoint": {"every_steps": 10},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return config_from_dict(values)


def make_settings(folder: Path, **sections: Any) -> RunSettings:
    """Its settings, on one CPU node."""
    return run_settings(make_config(folder, **sections), "demo-1", Devices(False, 1, 2.0), None)


class Ledger:
    """Keeps rows in memory."""

    def __init__(self) -> None:
        self.rows: list[AnyRow] = []

    def append(self, row: AnyRow) -> None:
        self.rows.append(row)

    def notes(self, code: str) -> list[str]:
        return [row.text for row in self.rows if isinstance(row, NoteRow) and row.code == code]


def recorder_into(ledger: Ledger, *, has_session: bool) -> Recorder:
    recorder = Recorder()
    recorder.begin(ledger, recorder.books)
    if has_session:
        recorder.book(SessionRow(run_id="demo-1", name="demo"))
    return recorder


class Node:
    """One node, as a ``NodeClient``.

    Attributes:
        after_write: Awaited when a shard is written, before that is told: raises, or holds the write up.
        num_writing: Writes under way now.
        most_writing: Most that were under way at once.
    """

    def __init__(self, node_id: str, folder: Path, settings: RunSettings) -> None:
        self.folder = folder / node_id
        self.folder.mkdir()
        self.info = NodeInfo(
            node_id=node_id,
            ip="127.0.0.1",
            hostname=node_id,
            cores=(0, 1),
            num_gpus=0,
            state_address=("127.0.0.1", 1),
            slot_paths=tuple(str(self.folder / f"slot-{n}") for n in range(settings.num_slots)),
            identities={},
        )
        self.store = CheckpointStore(settings.storage_path, settings.run_id)
        self.after_write: Callable[[], Any] = nothing
        self.num_writes = self.num_writing = self.most_writing = 0
        self.specs: list[EngineSpec] = []
        self.sent: list[tuple[Any, ...]] = []
        self.killed: list[str] = []

    def fill(self, slot: int, value: float, spans: Sequence[Span] = ((0, NUM),)) -> None:
        """What engines do when they save."""
        target = StateSlot(self.info.slot_paths[slot], LAYOUT, writable=True)
        for name in LAYOUT.rows:
            for low, high in spans:
                target.row(name)[low:high] = value
        target.close()

    def fork(self, specs: Sequence[EngineSpec]) -> None:
        self.specs.extend(specs)

    def send(self, engine_ids: Sequence[str], *command: Any) -> None:
        self.sent.append(command)

    def kill(self, engine_ids: Sequence[str]) -> None:
        self.killed.extend(engine_ids)

    def set_use(self, use: str) -> None: ...

    def set_metered(self, metered: Metered) -> None: ...

    async def ping(self, timeout_s: float) -> None: ...

    async def available_bytes(self) -> int:
        return 1 << 40

    async def reserve(self, num_bytes: int) -> str:
        return ""

    async def write_shard(
        self, step: int, index: int, slot: int, layout: StateLayout, spans: Sequence[Span], attempt: str
    ) -> Shard:
        self.num_writes += 1
        self.num_writing += 1
        self.most_writing = max(self.most_writing, self.num_writing)
        source = StateSlot(self.info.slot_paths[slot], layout, writable=False)
        try:
            shard = await asyncio.to_thread(self.store.write_shard, step, index, source, spans, attempt)
            await self.after_write()
            return shard
        finally:
            source.close()
            self.num_writing -= 1

    async def restore(self, manifest: Manifest, shards: Sequence[int], slot: int) -> list[Span]:
        target = StateSlot(self.info.slot_paths[slot], manifest.layout, writable=True)
        try:
            return await asyncio.to_thread(self.store.restore, manifest, shards, target)
        finally:
            target.close()


async def nothing() -> None:
    return None


async def storage_is_full() -> None:
    """What ``after_write`` may be: the storage fails."""
    raise EnvironmentFailure("no space left", code="EADT-351")


def state_of(nodes: Sequence[Node], step: int, slot: int) -> SavedState:
    """A state that each node holds its share of, filled with its step's number."""
    size = NUM // len(nodes)
    parts = []
    for number, node in enumerate(nodes):
        span = (number * size, NUM if number == len(nodes) - 1 else (number + 1) * size)
        node.fill(slot, step, [span])
        parts.append(StatePart(node.info.node_id, node.info.slot_paths[slot], ("127.0.0.1", 1), (span,)))
    return SavedState(step, {"step": step}, LAYOUT, tuple(parts))
