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
from eadt.coordination.progress import StalledError
from eadt.coordination.recorder import Recorder
from eadt.coordination.settings import RunSettings
from eadt.coordination.slots import SlotTable
from eadt.errors import EadtError, EnvironmentFailure
from eadt.record.rows import CheckpointRow
from eadt.training.checkpoint import CheckpointInfo, CheckpointStore, Kind, Manifest, Shard, new_attempt
from eadt.training.state import ITEM_BYTES, SavedState, StatePart, merge_spans, span_elements

_LAST_PAUSES_S = (1.0, 5.0)
"""Pauses between the tries of a save that nothing comes after."""


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
        self._store = CheckpointStore(settings.storage_path, settings.run_id)
        self._manifest: Manifest | None = None
        self._newest: SavedState | None = None
        self._newest_slot: int | None = None
        self._durable_step = 0
        self._retry_step = 0
        self._num_failed_writes = 0
        self._writing = asyncio.Lock()
        self._attempts: set[str] = set()
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
        """Whether the state of ``step`` should be made durable: not while another one is being written.

        After a failed write the next step is due again, after another one the second next, and so on
        with twice the distance each time, up to the usual one.
        """
        every = self._settings.checkpoint_every_steps
        if every is None or self._writing.locked():
            return False
        return step - self._durable_step >= every and step >= self._retry_step

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
        """Make the newest state durable, unless it is, while training goes on; one write at a time.

        A failure is noted, and not fatal: the state is due again soon after.
        """
        async with self._writing:
            state, slot = self._newest, self._newest_slot
            if state is None or slot is None or self.is_durable:
                return
            begun_s = monotonic_s()
            try:
                info = await self._write(state, slot, kind)
            except (EadtError, OSError) as error:
                every = self._settings.checkpoint_every_steps or 1
                self._retry_step = state.step + min(every, 2**self._num_failed_writes)
                self._num_failed_writes += 1
                self._recorder.note(
                    "EADT-255", f"the checkpoint of step {state.step} could not be written: {error}"
                )
                return
            self._durable_step, self._manifest = state.step, info.manifest
            self._retry_step = self._num_failed_writes = 0
            self._recorder.book(
                CheckpointRow(
                    step=state.step,
                    path=info.path,
                    seconds=monotonic_s() - begun_s,
                    num_bytes=info.manifest.num_bytes,
                    kind=kind,
                )
            )
            await self._prune()

    async def _write(self, state: SavedState, slot: int, kind: Kind) -> CheckpointInfo:
        """Have the nodes write their parts, and publish them; nothing is published where one fails."""
        attempt = new_attempt()
        reason = f"persist-{attempt}"
        self._slots.hold(slot, reason)
        self._attempts.add(attempt)
        try:
            # All of them end before the slot is given back: what is read must not change meanwhile.
            written = await asyncio.gather(
                *(
                    self._write_part(state, index, slot, part, attempt)
                    for index, part in enumerate(state.parts)
                ),
                return_exceptions=True,
            )
            if not any(isinstance(result, StalledError) for result in written):
                self._attempts.discard(attempt)  # else its node may be writing still
            shards: list[Shard] = []
            for result in written:
                if isinstance(result, BaseException):
                    raise result
                shards.append(result)
            run = {"run_id": self._settings.run_id, "name": self._settings.name}
            return await asyncio.to_thread(
                self._store.publish,
                state.step,
                state.layout,
                state.meta,
                shards,
                kind,
                run,
                self._settings.sample_order,
            )
        finally:
            self._release(reason)

    async def _write_part(
        self, state: SavedState, index: int, slot: int, part: StatePart, attempt: str
    ) -> Shard:
        node = self._nodes.get(part.node_id)
        if node is None:
            raise EnvironmentFailure(f"node {part.node_id[:8]} has gone with its part of it", code="EADT-336")
        return await node[1].write_shard(state.step, index, slot, state.layout, part.spans, attempt)

    async def _prune(self) -> None:
        """Delete what is no longer needed; what cannot be deleted now is tried again after the next write."""
        try:
            await asyncio.to_thread(self._store.prune, self._settings.keep_checkpoints, self._attempts.copy())
        except (EadtError, OSError) as error:
            self._recorder.note("EADT-355", f"older checkpoints could not be removed: {error}")

    @property
    def is_durable(self) -> bool:
        """Whether the newest state is in a checkpoint; true where there is no state."""
        return self._newest is None or self._newest.step <= self._durable_step

    async def persist_at_last(self, kind: Kind) -> None:
        """Make the newest state durable where nothing comes after: a failed write is tried again at once."""
        await self.persist(kind)
        for pause_s in _LAST_PAUSES_S:
            if self.is_durable:
                return
            await asyncio.sleep(pause_s)
            await self.persist(kind)

    async def move_to_storage(self) -> None:
        """Have the newest state in a checkpoint only; it stays in memory where that fails."""
        await self.persist("just_in_time")
        if self.is_durable:
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
        for node_id, shards in wanted.items():
            num_bytes = sum(manifest.shards[number].num_bytes for number in shards)
            self._reserved[node_id] = max(num_bytes, self._reserved.get(node_id, 0))
        infos = {node_id: self._nodes[node_id][0] for node_id in node_ids}
        parts = tuple(
            StatePart(node_id, infos[node_id].slot_paths[slot], infos[node_id].state_address, tuple(found))
            for node_id, found in zip(node_ids, spans, strict=True)
        )
        self._newest = SavedState(manifest.step, manifest.meta, manifest.layout, parts)
        self._newest_slot = slot
        self._slots.hold(slot, "newest")
        self._durable_step = manifest.step
