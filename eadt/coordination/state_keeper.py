"""Where the run's newest complete state lies: in which slots of the nodes, and in which checkpoint.

Owns the slots, and what of them engines may write. It starts nothing by itself, and knows nothing of
setpoints: the coordinator tells it what engines have saved, and takes from it what the next ones load.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence

from eadt.clock import monotonic_s
from eadt.coordination.generation import Generation
from eadt.coordination.nodes import NodeClient, NodeInfo
from eadt.coordination.recorder import Recorder
from eadt.coordination.settings import RunSettings
from eadt.coordination.slots import SlotTable
from eadt.errors import EadtError
from eadt.record.rows import CheckpointRow
from eadt.training.checkpoint import CheckpointStore, Kind, Manifest, new_attempt
from eadt.training.state import ITEM_BYTES, SavedState, StatePart, merge_spans, span_elements


class StateKeeper:
    """See the module. Used from the coordinator's loop only; no method blocks.

    Args:
        settings: The run.
        recorder: Its books.
        nodes: The coordinator's nodes, which change while the run goes on.
        on_granted: Called with a slot that the engines may write from now on.
    """

    def __init__(
        self,
        settings: RunSettings,
        recorder: Recorder,
        nodes: Mapping[str, tuple[NodeInfo, NodeClient]],
        on_granted: Callable[[int], None],
    ) -> None:
        self._settings = settings
        self._recorder = recorder
        self._nodes = nodes
        self._on_granted = on_granted
        self._slots = SlotTable(settings.num_slots)
        self._granted: set[int] = set()
        self._store = CheckpointStore(settings.storage_path)
        self._manifest: Manifest | None = None
        self._newest: SavedState | None = None
        self._newest_slot: int | None = None
        self._checkpoint_step = 0
        self._reserved: dict[str, int] = {}

    # -- what there is --------------------------------------------------------------------------

    @property
    def newest(self) -> SavedState | None:
        """The newest complete state in the nodes' memory."""
        return self._newest

    @property
    def resumed_step(self) -> int:
        """The step from which a generation would go on now; 0 for the beginning."""
        if self._newest is not None:
            return self._newest.step
        return self._manifest.step if self._manifest is not None else 0

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is a checkpoint to go back to."""
        return self._manifest is not None

    def is_checkpoint_due(self, step: int) -> bool:
        """Whether the state of ``step`` should be made durable."""
        every = self._settings.checkpoint_every_steps
        return every is not None and step - self._checkpoint_step >= every

    async def find_checkpoint(self) -> None:
        """Look for the newest checkpoint of this run that verifies; say which were passed over."""
        self._manifest, rejected = await asyncio.to_thread(self._store.newest_valid, None)
        for rejection in rejected:
            self._recorder.note(
                "EADT-256", f"checkpoint of step {rejection.step} passed over: {rejection.reason}"
            )

    # -- slots ----------------------------------------------------------------------------------

    def node_came(self, node_id: str) -> None:
        """A node's agent is up, for the first time or again: it has reserved nothing."""
        self._reserved.pop(node_id, None)

    async def reserve(self, generation: Generation) -> None:
        """See to it that each node has room for what its ranks will save."""
        for node_id in generation.placement.node_ids:
            spans = merge_spans(
                span
                for spec in generation.specs
                if spec.node_id == node_id
                for span in generation.ready[spec.rank]["spans"]
            )
            num_bytes = (
                span_elements(spans) * len(generation.layout.rows) * ITEM_BYTES * self._slots.num_slots
            )
            reserved = self._reserved.get(node_id, 0)
            if num_bytes > reserved:
                note = await self._nodes[node_id][1].reserve(num_bytes - reserved)
                self._reserved[node_id] = num_bytes
                if note:
                    self._recorder.note("EADT-335", note)

    def begin_loading(self) -> tuple[int, ...]:
        """Engines take the newest state now; returns the slots that they may write."""
        if self._newest_slot is not None:
            self._slots.hold(self._newest_slot, "loading")
        return self._grant_free()

    def end_loading(self) -> None:
        """The engines have the state."""
        self._release("loading")

    def can_save(self) -> bool:
        """Whether engines have a slot to save into; makes room where nothing else needs the old state."""
        if not self._granted:
            if self._slots.num_slots > 1 or self._newest is None:
                return False  # a checkpoint is being written from it: soon
            self.forget_newest()
        return True

    def make_room(self) -> None:
        """The last step is done, and its state has no slot."""
        if self._slots.num_slots == 1:
            self.forget_newest()  # else a checkpoint is being written: its end frees the other one

    def saving(self, slot: int) -> None:
        """A rank has saved its part into a slot; others may not have yet."""
        self._granted.discard(slot)
        self._slots.hold(slot, "saving")

    def saved(self, state: SavedState, slot: int) -> None:
        """A state is complete: it takes the place of the one before."""
        self._release("newest")
        self._slots.hold(slot, "newest")
        self._slots.release("saving")
        self._newest, self._newest_slot = state, slot

    def engines_failed(self) -> None:
        """A state that was being saved will never be complete; one on a node that has gone is lost."""
        self._slots.release("saving")
        self._grant_free()
        self.drop_lost()

    def drop_lost(self) -> None:
        """Forget the newest state if a node that holds a part of it has gone."""
        if self._newest is not None and any(part.node_id not in self._nodes for part in self._newest.parts):
            self.forget_newest()

    def forget_newest(self) -> None:
        """Give the memory of the newest state back."""
        self._newest, self._newest_slot = None, None
        self._release("newest")

    def _release(self, reason: str) -> None:
        for freed in self._slots.release(reason):
            if freed not in self._granted:
                self._granted.add(freed)
                self._on_granted(freed)

    def _grant_free(self) -> tuple[int, ...]:
        free = self._slots.free()
        self._granted = set(free)
        return free

    # -- checkpoints ----------------------------------------------------------------------------

    async def persist(self, kind: Kind) -> None:
        """Make the newest state durable, while training goes on; a failure is noted, and not fatal."""
        state, slot = self._newest, self._newest_slot
        if state is None or slot is None:
            return
        self._checkpoint_step = state.step
        reason = f"persist-{state.step}"
        self._slots.hold(slot, reason)
        begun_s = monotonic_s()
        try:
            attempt = new_attempt()
            shards = await asyncio.gather(
                *(
                    self._nodes[part.node_id][1].write_shard(
                        state.step, index, slot, state.layout, part.spans, attempt
                    )
                    for index, part in enumerate(state.parts)
                )
            )
            run = {"run_id": self._settings.run_id, "train_batch_size": self._settings.train_batch_size}
            info = await asyncio.to_thread(
                self._store.publish, state.step, state.layout, state.meta, list(shards), kind, run
            )
            await asyncio.to_thread(self._store.prune, self._settings.keep_checkpoints, [attempt])
            self._manifest, _ = await asyncio.to_thread(self._store.newest_valid, None, deep=False)
        except (EadtError, OSError, KeyError) as error:
            self._recorder.note(
                "EADT-255", f"the checkpoint of step {state.step} could not be written: {error}"
            )
            return
        finally:
            self._release(reason)
        self._recorder.book(
            CheckpointRow(
                step=state.step,
                path=info.path,
                seconds=monotonic_s() - begun_s,
                num_bytes=info.num_bytes,
                kind=kind,
            )
        )

    async def persist_unsaved(self) -> None:
        """A checkpoint just in time, unless the newest state has one already."""
        if self._newest is not None and self._newest.step > self._checkpoint_step:
            await self.persist("just_in_time")

    async def move_to_storage(self) -> None:
        """Have the newest state in a checkpoint only; it stays in memory where that fails."""
        await self.persist("just_in_time")
        if self._manifest is not None and self._newest and self._manifest.step == self._newest.step:
            self.forget_newest()

    async def restore(self, node_ids: Sequence[str]) -> None:
        """Read the checkpoint into the nodes' slots, each node its share of the shards.

        Raises:
            CheckpointCorruptError: A shard is not what the manifest says.
            EnvironmentFailure: A node does not answer.
        """
        manifest = self._manifest
        if manifest is None:
            return
        slot = self._slots.free()[0]
        numbers = range(len(manifest.shards))
        wanted = {node_id: list(numbers)[index :: len(node_ids)] for index, node_id in enumerate(node_ids)}
        spans = await asyncio.gather(
            *(self._nodes[node_id][1].restore(manifest, shards, slot) for node_id, shards in wanted.items())
        )
        infos = {node_id: self._nodes[node_id][0] for node_id in node_ids}
        parts = tuple(
            StatePart(node_id, infos[node_id].slot_paths[slot], infos[node_id].state_address, tuple(found))
            for node_id, found in zip(node_ids, spans, strict=True)
        )
        self._newest = SavedState(manifest.step, manifest.meta, manifest.layout, parts)
        self._newest_slot = slot
        self._slots.hold(slot, "newest")
        self._checkpoint_step = manifest.step
