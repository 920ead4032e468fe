"""A node agent that restores a checkpoint: into memory where there is room, else to disk, else an error.

Real: the agent's methods, the storage, and file systems of some MiB, mounted for a process of its own.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from eadt.coordination.state_keeper import StateKeeper
from eadt.errors import EadtError
from eadt.node.agent import NodeAgent, agent_settings
from eadt.record.rows import NoteRow
from eadt.training.checkpoint import CheckpointStore, Manifest, new_attempt
from eadt.training.state import StateLayout, StateSlot
from tests.unit.keeping import LAYOUT as SMALL
from tests.unit.keeping import NUM, Ledger, Node, make_config, make_settings, recorder_into

REPOSITORY = Path(__file__).parents[2]
MIB = 1 << 20
LAYOUT = StateLayout(("weight",), ((MIB,),), ("fp32", "exp_avg", "exp_avg_sq"))
"""12 MiB."""

IN_NAMESPACE = ["unshare", "--map-root-user", "--mount"]


class Place:
    """One node's agent, and a checkpoint of values by their own number.

    Attributes:
        notes: Codes of what the user was told.
    """

    def __init__(self, folder: Path) -> None:
        config = make_config(folder)
        config = config.model_copy(
            update={
                "elastic": config.elastic.model_copy(
                    update={"shared_memory_dir": str(folder / "memory"), "spill_dir": str(folder / "disk")}
                )
            }
        )
        settings = make_settings(folder)
        self.notes: list[str] = []
        self.agent = NodeAgent(
            agent_settings(config, settings, "node0", "127.0.0.1"),
            lambda *event: None,
            lambda row: self.notes.append(row.code) if isinstance(row, NoteRow) else None,
        )
        self.slot = self.agent._folder / "slot-0"
        for part in (self.agent._folder, self.agent._spill):
            part.mkdir(parents=True)
        self.store = CheckpointStore(settings.storage_path, settings.run_id)

    def checkpoint(self, folder: Path) -> Manifest:
        slot = StateSlot(folder / "saved", LAYOUT, writable=True)
        for number, row in enumerate(LAYOUT.rows):
            slot.row(row)[:] = np.arange(MIB) + number
        shard = self.store.write_shard(3, 0, slot, [(0, MIB)], new_attempt())
        slot.close()
        return self.store.publish(3, LAYOUT, {}, [shard], "periodic", {}, None).manifest

    def is_right(self) -> bool:
        slot = StateSlot(self.slot, LAYOUT, writable=False)
        right = all(
            np.array_equal(slot.row(row), np.arange(MIB, dtype=np.float32) + number)
            for number, row in enumerate(LAYOUT.rows)
        )
        slot.close()
        return right


def restore(folder: Path, memory_mib: int, disk_mib: int, stale_mib: int) -> dict[str, Any]:
    """In the process of its own: what comes of a restore where memory and disk are so large.

    Args:
        folder: To work in.
        memory_mib: Size of the memory.
        disk_mib: Size of the disk.
        stale_mib: Size of what an earlier state has left in the slot.
    """
    for name, mib in (("memory", memory_mib), ("disk", disk_mib)):
        (folder / name).mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mib}m", "none", folder / name], check=True)
    place = Place(folder)
    manifest = place.checkpoint(folder)
    place.slot.write_bytes(b"s" * (stale_mib * MIB))
    error = None
    try:
        spans = place.agent.restore(manifest, [0], 0)
        assert spans == [(0, MIB)]
        assert place.is_right()
    except EadtError as caught:
        error = caught.code
    return {
        "error": error,
        "notes": place.notes,
        "on_disk": place.slot.is_symlink(),
        "left": sum(
            path.stat().st_size for part in ("memory", "disk") for path in (folder / part).rglob("slot-*")
        ),
    }


def restored(folder: Path, memory_mib: int, disk_mib: int, stale_mib: int = 0) -> dict[str, Any]:
    if subprocess.run([*IN_NAMESPACE, "mount", "-t", "tmpfs", "none", "/tmp"], check=False).returncode:
        pytest.skip("no file system can be mounted here")
    code = (
        "import json, sys; from pathlib import Path; from tests.unit.test_restore_room import restore; "
        "print(json.dumps(restore(Path(sys.argv[1]), *map(int, sys.argv[2:]))))"
    )
    sizes = [str(mib) for mib in (memory_mib, disk_mib, stale_mib)]
    result = subprocess.run(
        [*IN_NAMESPACE, sys.executable, "-c", code, str(folder), *sizes],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": "."},
    )  # fmt: skip
    assert result.returncode == 0, f"{result.returncode}: {result.stderr}"
    outcome: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return outcome


def test_where_memory_has_room_the_state_lies_there(tmp_path: Path) -> None:
    outcome = restored(tmp_path, memory_mib=80, disk_mib=1)
    assert outcome == {"error": None, "notes": [], "on_disk": False, "left": 12 * MIB}


def test_where_it_has_none_the_state_goes_to_disk_and_the_user_is_told(tmp_path: Path) -> None:
    outcome = restored(tmp_path, memory_mib=8, disk_mib=20)
    assert (outcome["error"], outcome["notes"], outcome["on_disk"]) == (None, ["EADT-335"], True)


def test_what_an_earlier_state_left_in_the_slot_takes_no_room(tmp_path: Path) -> None:
    outcome = restored(tmp_path, memory_mib=80, disk_mib=1, stale_mib=14)
    assert outcome == {"error": None, "notes": [], "on_disk": False, "left": 12 * MIB}


def test_where_there_is_no_room_at_all_it_is_an_error_and_nothing_is_left(tmp_path: Path) -> None:
    outcome = restored(tmp_path, memory_mib=8, disk_mib=2, stale_mib=4)
    assert outcome == {"error": "EADT-320", "notes": [], "on_disk": False, "left": 0}


def test_a_process_that_still_has_the_old_slot_does_not_reach_the_new_one(tmp_path: Path) -> None:
    """An engine that was killed may be writing yet when its successors' state is read in."""
    for name in ("memory", "disk"):
        (tmp_path / name).mkdir()
    place = Place(tmp_path)
    manifest = place.checkpoint(tmp_path)
    late = StateSlot(place.slot, LAYOUT, writable=True)
    place.agent.restore(manifest, [0], 0)
    late.row("fp32")[:] = -1.0
    late.close()
    assert place.is_right()


def test_a_shard_that_is_damaged_leaves_nothing_in_the_slot(tmp_path: Path) -> None:
    for name in ("memory", "disk"):
        (tmp_path / name).mkdir()
    place = Place(tmp_path)
    manifest = place.checkpoint(tmp_path)
    [shard] = tmp_path.rglob("shard-*.bin")
    with shard.open("r+b") as file:
        file.write(b"damage")
    with pytest.raises(EadtError, match="EADT-354"):
        place.agent.restore(manifest, [0], 0)
    assert not place.slot.exists()


def test_room_that_a_restored_state_took_is_not_asked_for_again(tmp_path: Path) -> None:
    """Else the slots that engines save into would go to disk though memory has room for them."""
    asked: list[int] = []

    class Asked(Node):
        async def reserve(self, num_bytes: int) -> str:
            asked.append(num_bytes)
            return ""

    async def work() -> None:
        settings = make_settings(tmp_path)
        node = Asked("node0", tmp_path, settings)
        node.fill(0, 7.0)
        shard = await node.write_shard(10, 0, 0, SMALL, [(0, NUM)], new_attempt())
        node.store.publish(10, SMALL, {"step": 10}, [shard], "periodic", {}, settings.sample_order)
        recorder = recorder_into(Ledger(), has_session=True)
        keeper = StateKeeper(settings, recorder, {"node0": (node.info, node)}, lambda slot: None)
        await keeper.find_checkpoint()
        await keeper.restore(["node0"])
        generation: Any = SimpleNamespace(
            placement=SimpleNamespace(node_ids=["node0"]),
            specs=[SimpleNamespace(node_id="node0", rank=0)],
            ready={0: {"spans": [(0, NUM)]}},
            layout=SMALL,
        )
        await keeper.reserve(generation)
        assert asked == [(settings.num_slots - 1) * SMALL.num_bytes]

    asyncio.run(work())
