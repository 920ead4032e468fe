"""One write at a time, none forgotten, and nothing taken away from one that is under way.

Real: slots, the storage, checkpoints, the loop. Pretended: engines, and the line to a node.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from eadt.coordination import state_keeper
from eadt.coordination.progress import StalledError
from eadt.coordination.state_keeper import StateKeeper
from eadt.errors import EnvironmentFailure
from eadt.record.rows import CheckpointRow
from eadt.training.checkpoint import CheckpointStore, SampleOrder, Storage
from eadt.training.checkpoint import store as store_module
from tests.unit.keeping import Ledger, Node, make_settings, nothing, recorder_into, state_of, storage_is_full


class Kept:
    """A state keeper with its nodes, in a loop of its own."""

    def __init__(self, folder: Path, num_nodes: int = 1, **sections: Any) -> None:
        self.settings = make_settings(folder, **sections)
        self.nodes = [Node(f"node{number}", folder, self.settings) for number in range(num_nodes)]
        self.ledger = Ledger()
        self.granted: list[int] = []
        lines = {node.info.node_id: (node.info, node) for node in self.nodes}
        self.lines = lines
        self.keeper = StateKeeper(
            self.settings, recorder_into(self.ledger, has_session=True), lines, self.granted.append
        )
        self.store = CheckpointStore(self.settings.storage_path, self.settings.run_id)

    def save(self, step: int, slot: int = 0) -> None:
        """The engines have saved a state."""
        self.keeper.saving(slot)
        self.keeper.saved(state_of(self.nodes, step, slot), slot)

    def written(self) -> list[tuple[int, str]]:
        """Checkpoints that were booked: step and kind."""
        return [(row.step, row.kind) for row in self.ledger.rows if isinstance(row, CheckpointRow)]


def in_loop(work: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(20):
            await work()

    asyncio.run(bounded())


def test_the_newest_state_becomes_a_checkpoint_of_this_run(tmp_path: Path) -> None:
    async def work() -> None:
        kept = Kept(tmp_path, num_nodes=2)
        assert kept.keeper.is_durable  # nothing is there to lose
        kept.save(10)
        assert not kept.keeper.is_durable
        await kept.keeper.persist("periodic")
        assert kept.keeper.is_durable
        manifest, _ = kept.store.newest_valid(state_of(kept.nodes, 10, 1).layout)
        assert manifest is not None
        assert (manifest.step, len(manifest.shards), manifest.info["run_id"]) == (10, 2, "demo-1")
        assert manifest.order == SampleOrder(12, 0, kept.settings.job.training.sequence_length)
        assert kept.written() == [(10, "periodic")]
        await kept.keeper.persist("just_in_time")  # it is durable: nothing is written again
        assert kept.written() == [(10, "periodic")]

    in_loop(work)


def test_one_write_at_a_time(tmp_path: Path) -> None:
    """A second one waits for the first, and then takes what is newest; meanwhile none is due."""

    async def work() -> None:
        kept = Kept(tmp_path)
        node, go_on = kept.nodes[0], asyncio.Event()
        node.after_write = go_on.wait
        kept.save(10, slot=0)
        assert kept.keeper.is_checkpoint_due(10)
        first = asyncio.create_task(kept.keeper.persist("periodic"))
        while not node.num_writing:
            await asyncio.sleep(0)
        assert not kept.keeper.is_checkpoint_due(30)
        kept.save(21, slot=1)
        last = asyncio.create_task(kept.keeper.persist("just_in_time"))
        for _ in range(20):
            await asyncio.sleep(0)
        assert not last.done()
        assert 0 not in kept.granted  # the slot that is being written from
        go_on.set()
        await asyncio.gather(first, last)
        assert node.most_writing == 1
        assert kept.granted == [0]
        assert kept.written() == [(10, "periodic"), (21, "just_in_time")]
        assert kept.store.steps() == [21, 10]

    in_loop(work)


def test_two_writes_asked_for_at_once_are_one(tmp_path: Path) -> None:
    async def work() -> None:
        kept = Kept(tmp_path)
        kept.save(10)
        await asyncio.gather(kept.keeper.persist("periodic"), kept.keeper.persist("periodic"))
        assert (kept.nodes[0].num_writes, kept.written()) == (1, [(10, "periodic")])

    in_loop(work)


def test_a_failed_write_is_due_again_at_the_next_step_and_then_less_and_less_often(tmp_path: Path) -> None:
    async def work() -> None:
        kept = Kept(tmp_path)
        node, keeper = kept.nodes[0], kept.keeper
        node.after_write = storage_is_full
        tried = []
        for step in range(1, 60):
            if keeper.is_checkpoint_due(step):
                tried.append(step)
                kept.save(step, slot=step % 2)
                await keeper.persist("periodic")
        # After 1, 2, 4, 8 steps, and never more than the usual 10.
        assert tried == [10, 11, 13, 17, 25, 35, 45, 55]
        assert len(kept.ledger.notes("EADT-255")) == len(tried)
        assert "no space left" in kept.ledger.notes("EADT-255")[0]
        assert (kept.store.steps(), keeper.has_checkpoint) == ([], False)
        node.after_write = nothing
        kept.save(65)
        await keeper.persist("periodic")
        assert (kept.store.steps(), keeper.has_checkpoint) == ([65], True)
        assert next(step for step in range(66, 90) if keeper.is_checkpoint_due(step)) == 75
        # Forgiven: the next failure is tried again at once.
        node.after_write = storage_is_full
        kept.save(75)
        await keeper.persist("periodic")
        assert keeper.is_checkpoint_due(76)

    in_loop(work)


def test_a_slot_is_kept_until_every_node_has_ended_its_write(tmp_path: Path) -> None:
    """One node fails at once, the other still reads from the slot."""

    async def work() -> None:
        kept = Kept(tmp_path, num_nodes=2)
        go_on = asyncio.Event()
        kept.nodes[0].after_write, kept.nodes[1].after_write = storage_is_full, go_on.wait
        kept.save(10, slot=0)
        task = asyncio.create_task(kept.keeper.persist("periodic"))
        while kept.nodes[0].num_writes == 0 or kept.nodes[0].num_writing:
            await asyncio.sleep(0)
        kept.save(12, slot=1)
        for _ in range(20):
            await asyncio.sleep(0)
        assert kept.granted == []
        go_on.set()
        await task
        assert kept.granted == [0]
        assert kept.store.steps() == []

    in_loop(work)


def test_what_may_still_be_written_is_not_pruned(tmp_path: Path) -> None:
    """A write that was given up goes on where it hangs; one that failed has ended, and is cleared away."""

    async def given_up() -> None:
        raise StalledError("nothing moved", code="EADT-356")

    async def work() -> None:
        kept = Kept(tmp_path)
        node = kept.nodes[0]
        for step, what in ((10, given_up), (11, storage_is_full)):
            node.after_write = what
            kept.save(step)
            await kept.keeper.persist("periodic")
        assert len(kept.store.storage.files(kept.store.folder)) == 2
        node.after_write = nothing
        kept.save(13)
        await kept.keeper.persist("periodic")
        folders = {path.split("/")[0] for path in kept.store.storage.files(kept.store.folder)}
        assert folders == {"step-00000010", "step-00000013"}

    in_loop(work)


def test_a_checkpoint_that_is_written_counts_though_old_ones_cannot_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        kept = Kept(tmp_path)

        def fail(*args: Any) -> None:
            raise EnvironmentFailure("the storage cannot be listed", code="EADT-352")

        monkeypatch.setattr(store_module.CheckpointStore, "prune", fail)
        kept.save(10)
        await kept.keeper.persist("periodic")
        assert kept.written() == [(10, "periodic")]
        assert kept.ledger.notes("EADT-255") == []
        assert "cannot be listed" in kept.ledger.notes("EADT-355")[0]
        assert kept.keeper.has_checkpoint
        assert not kept.keeper.is_checkpoint_due(11)

    in_loop(work)


def test_a_node_that_has_gone_is_named(tmp_path: Path) -> None:
    async def work() -> None:
        kept = Kept(tmp_path, num_nodes=2)
        kept.save(10)
        del kept.lines["node1"]
        await kept.keeper.persist("periodic")
        (note,) = kept.ledger.notes("EADT-255")
        assert "node1" in note
        assert kept.keeper.is_checkpoint_due(11)

    in_loop(work)


def test_at_the_end_a_failed_write_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_keeper, "_LAST_PAUSES_S", (0.0, 0.0))

    async def work() -> None:
        kept = Kept(tmp_path)
        node = kept.nodes[0]
        failures = [storage_is_full, storage_is_full]

        async def fail_twice() -> None:
            if failures:
                await failures.pop()()

        node.after_write = fail_twice
        kept.save(10)
        await kept.keeper.persist_at_last("just_in_time")
        assert kept.written() == [(10, "just_in_time")]
        assert node.num_writes == 3
        await kept.keeper.persist_at_last("just_in_time")
        assert node.num_writes == 3
        # Not for ever.
        node.after_write = storage_is_full
        kept.save(20)
        await kept.keeper.persist_at_last("just_in_time")
        assert (node.num_writes, kept.keeper.is_durable) == (6, False)

    in_loop(work)


def test_memory_is_given_back_only_for_what_is_durable(tmp_path: Path) -> None:
    async def work() -> None:
        kept = Kept(tmp_path)
        kept.nodes[0].after_write = storage_is_full
        kept.save(10)
        await kept.keeper.move_to_storage()
        assert kept.keeper.newest is not None
        kept.nodes[0].after_write = nothing
        await kept.keeper.move_to_storage()
        assert kept.keeper.newest is None
        assert kept.keeper.resumed_step == 10

    in_loop(work)


def test_a_run_finds_its_own_checkpoint_and_does_not_write_it_again(tmp_path: Path) -> None:
    async def work() -> None:
        kept = Kept(tmp_path)
        kept.save(10)
        await kept.keeper.persist("periodic")
        other = CheckpointStore(Storage(kept.settings.storage_path).path, "demo-2")
        manifest = kept.store.newest_valid()[0]
        assert manifest is not None
        later = tmp_path / "later"
        later.mkdir()
        again = Kept(later, storage={"path": kept.settings.storage_path})
        await again.keeper.find_checkpoint()
        assert again.keeper.resumed_step == 10
        await again.keeper.restore(["node0"])
        assert again.keeper.is_durable
        assert not again.keeper.is_checkpoint_due(19)
        assert again.keeper.is_checkpoint_due(20)
        assert other.steps() == []

    in_loop(work)
