"""Checkpoints: what is published is read back, and whatever is torn or damaged is never used.

Real: files, processes, SIGKILL. Stands in for an object store: fsspec's memory file system, with
every kind of rename and copy forbidden.
"""

from __future__ import annotations

import json
import pickle
import signal
import subprocess
import sys
import tempfile
import tracemalloc
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eadt.errors import ConfigError, EadtError, EnvironmentFailure
from eadt.testing.clock import FakeClock
from eadt.training.checkpoint import (
    CheckpointCorruptError,
    CheckpointInfo,
    CheckpointStore,
    Manifest,
    Rejected,
    SampleOrder,
    Shard,
    Storage,
    new_attempt,
    runs_in,
    storage,
    store,
)
from eadt.training.checkpoint import manifest as manifest_module
from eadt.training.state import Span, StateLayout, StateSlot

LAYOUT = StateLayout(
    names=("embed.weight", "layer.weight", "layer.bias", "scale"),
    shapes=((50, 8), (8, 16), (16,), ()),
    rows=("fp32", "exp_avg", "exp_avg_sq"),
)
NUM = LAYOUT.num_elements
ALL: list[Span] = [(0, NUM)]
HALVES: list[list[Span]] = [[(0, 100), (200, 300)], [(100, 200), (300, NUM)]]
RUN = "one"
META = {"optimizer_step": 3, "loss_scale": 1.5, "user": {"k": [1, None, "ä"]}}


def values(layout: StateLayout, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((len(layout.rows), layout.num_elements), np.float32)


def make_slot(path: Path, spans: Sequence[Span], seed: int, layout: StateLayout = LAYOUT) -> StateSlot:
    """A slot with the right values in ``spans`` and NaN elsewhere, which must never be read."""
    slot = StateSlot(path, layout, writable=True)
    for index, row in enumerate(layout.rows):
        slot.row(row)[:] = np.nan
        for low, high in spans:
            slot.row(row)[low:high] = values(layout, seed)[index, low:high]
    return slot


def save(
    target: CheckpointStore,
    folder: Path,
    step: int,
    parts: Sequence[Sequence[Span]] = HALVES,
    layout: StateLayout = LAYOUT,
) -> CheckpointInfo:
    """A checkpoint whose values are seeded by its step, one shard for each of ``parts``."""
    attempt = new_attempt()
    shards = []
    for index, spans in enumerate(parts):
        slot = make_slot(folder / f"slot-{uuid.uuid4().hex}", spans, step, layout)
        shards.append(target.write_shard(step, index, slot, spans, attempt))
        slot.close()
    return target.publish(step, layout, META, shards, "periodic", {"run": "test"})


def restored(target: CheckpointStore, manifest: Manifest, indices: Sequence[int], folder: Path) -> np.ndarray:
    slot = StateSlot(folder / f"back-{uuid.uuid4().hex}", manifest.layout, writable=True)
    spans = target.restore(manifest, indices, slot)
    assert spans == store.merge_spans(s for index in indices for s in manifest.shards[index].spans)
    result = np.stack([slot.row(name).copy() for name in manifest.layout.rows])
    slot.close()
    return result


def newest(target: CheckpointStore) -> Manifest:
    manifest, rejected = target.newest_valid(LAYOUT)
    assert manifest is not None
    assert rejected == []
    return manifest


def shard_path(where: Path, manifest: Manifest, index: int) -> Path:
    return where / "checkpoints" / RUN / f"step-{manifest.step:08d}" / manifest.shards[index].file


@pytest.fixture
def where(tmp_path: Path) -> Path:
    return tmp_path / "storage"


@pytest.fixture
def local(where: Path) -> CheckpointStore:
    return CheckpointStore(str(where), RUN, FakeClock(unix_s=1_700_000_000.0))


@pytest.fixture
def object_store(monkeypatch: pytest.MonkeyPatch) -> Iterator[CheckpointStore]:
    """Files appear whole when they are closed, and cannot be renamed or copied."""
    from fsspec.implementations.memory import MemoryFileSystem

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("an object store was asked to rename or copy")

    for name in ("mv", "move", "rename", "cp_file", "copy", "cp"):
        monkeypatch.setattr(MemoryFileSystem, name, refuse)
    with pytest.raises(AssertionError):
        MemoryFileSystem().mv("a", "b")
    yield CheckpointStore(f"memory://{uuid.uuid4().hex}/runs", RUN)
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


@pytest.fixture(params=["local", "object_store"])
def either(request: pytest.FixtureRequest) -> CheckpointStore:
    chosen = request.getfixturevalue(request.param)
    assert isinstance(chosen, CheckpointStore)
    return chosen


# --- what is written comes back -------------------------------------------------------------------


def test_a_checkpoint_of_several_shards_comes_back(either: CheckpointStore, tmp_path: Path) -> None:
    either.check_writable()
    assert either.newest_valid(LAYOUT) == (None, [])
    info = save(either, tmp_path, 120)
    assert info.path.endswith("/checkpoints/one/step-00000120")
    assert either.steps() == [120]
    manifest = newest(either)
    assert manifest == info.manifest
    assert (manifest.step, manifest.kind, manifest.meta, manifest.info) == (
        120,
        "periodic",
        META,
        {"run": "test"},
    )
    assert manifest.layout == LAYOUT
    assert manifest.num_bytes == LAYOUT.num_bytes
    assert np.array_equal(restored(either, manifest, [0, 1], tmp_path), values(LAYOUT, 120))


def test_a_part_is_restored_alone(local: CheckpointStore, tmp_path: Path) -> None:
    save(local, tmp_path, 7)
    part = restored(local, newest(local), [1], tmp_path)
    assert np.array_equal(part[:, 100:200], values(LAYOUT, 7)[:, 100:200])
    assert not part[:, :100].any()


def test_the_manifest_is_for_people_and_other_programs(local: CheckpointStore, where: Path) -> None:
    info = save(local, where.parent, 120)
    body = json.loads((Path(info.path) / "manifest.json").read_text())
    assert {"step": 120, "kind": "periodic", "format": 1, "dtype": "<f4"}.items() <= body.items()
    assert body["fingerprint"] == LAYOUT.fingerprint
    assert body["unix_s"] == info.manifest.unix_s == 1_700_000_000.0
    shard = body["shards"][0]
    raw = np.frombuffer((Path(info.path) / shard["file"]).read_bytes(), "<f4")
    # Span by span, row by row, as documented.
    expected = [values(LAYOUT, 120)[row, low:high] for low, high in HALVES[0] for row in range(3)]
    assert np.array_equal(raw, np.concatenate(expected))
    assert [p.name for p in Path(info.path).glob("*.tmp")] == []


def test_a_store_can_be_sent_to_another_process(either: CheckpointStore, tmp_path: Path) -> None:
    save(either, tmp_path, 1)
    there = pickle.loads(pickle.dumps(either))
    manifest = pickle.loads(pickle.dumps(newest(either)))
    assert np.array_equal(restored(there, manifest, [0, 1], tmp_path), values(LAYOUT, 1))


def test_saving_and_restoring_make_no_second_copy(local: CheckpointStore, tmp_path: Path) -> None:
    layout = StateLayout(("w",), ((2 << 20,),), LAYOUT.rows)
    slot = make_slot(tmp_path / "big", [(0, layout.num_elements)], 0, layout)
    local.check_writable()  # Imports pyarrow, which is not what is measured here.
    tracemalloc.start()
    shard = local.write_shard(1, 0, slot, [(0, layout.num_elements)], "a")
    local.publish(1, layout, {}, [shard], "final", {})
    manifest, _ = local.newest_valid(layout, deep=False)
    assert manifest is not None
    local.restore(manifest, [0], slot)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert layout.num_bytes == 24 << 20
    assert peak < 3 << 20


@st.composite
def partitions(draw: st.DrawFn) -> tuple[StateLayout, list[list[Span]], list[list[int]]]:
    """A layout, its elements dealt out to shards, and the shards dealt out to other nodes."""
    shapes = draw(st.lists(st.lists(st.integers(1, 7), max_size=3).map(tuple), min_size=1, max_size=4))
    rows = draw(st.sampled_from([("fp32",), ("fp32", "momentum"), LAYOUT.rows]))
    layout = StateLayout(tuple(f"p{i}" for i in range(len(shapes))), tuple(shapes), rows)
    cuts = draw(st.sets(st.integers(0, layout.num_elements), max_size=8)) | {0, layout.num_elements}
    edges = sorted(cuts)
    num_shards = draw(st.integers(1, 4))
    parts: list[list[Span]] = [[] for _ in range(num_shards)]
    for span in pairwise(edges):
        parts[draw(st.integers(0, num_shards - 1))].append(span)
    groups: list[list[int]] = [[] for _ in range(draw(st.integers(1, 3)))]
    for index in range(num_shards):
        groups[draw(st.integers(0, len(groups) - 1))].append(index)
    return layout, parts, groups


@settings(max_examples=40)
@given(case=partitions())
def test_any_partition_is_read_back_by_any_other(
    case: tuple[StateLayout, list[list[Span]], list[list[int]]],
) -> None:
    layout, parts, groups = case
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "CHUNK_BYTES", 64)
        target = CheckpointStore(f"{folder}/storage", RUN)
        save(target, Path(folder), 1, parts, layout)
        manifest, _ = target.newest_valid(layout)
        assert manifest is not None
        together = sum(restored(target, manifest, group, Path(folder)) for group in groups)
        assert np.array_equal(together, values(layout, 1))


# --- what is torn or damaged is not used ----------------------------------------------------------


def truncate(path: Path) -> None:
    size = path.stat().st_size
    with open(path, "r+b") as file:
        file.truncate(size - 1)
    assert path.stat().st_size == size - 1


def lengthen(path: Path) -> None:
    size = path.stat().st_size
    with open(path, "ab") as file:
        file.write(b"\0")
    assert path.stat().st_size == size + 1


def flip(path: Path) -> None:
    before = path.read_bytes()
    middle = len(before) // 2
    path.write_bytes(before[:middle] + bytes([before[middle] ^ 1]) + before[middle + 1 :])
    after = path.read_bytes()
    assert sum(a != b for a, b in zip(before, after, strict=True)) == 1


def remove(path: Path) -> None:
    path.unlink()
    assert not path.exists()


@pytest.mark.parametrize(
    ("damage", "reason", "seen_by_size"),
    [
        (truncate, "bytes instead of", True),
        (lengthen, "bytes instead of", True),
        (remove, "is missing", True),
        (flip, "checksum does not match", False),
    ],
)
def test_a_damaged_shard_falls_back_to_the_one_before(
    local: CheckpointStore, where: Path, tmp_path: Path, damage: object, reason: str, seen_by_size: bool
) -> None:
    save(local, tmp_path, 10)
    save(local, tmp_path, 20)
    newer = newest(local)
    path = shard_path(where, newer, 1)
    assert callable(damage)
    damage(path)

    manifest, rejected = local.newest_valid(LAYOUT)
    assert manifest is not None
    assert manifest.step == 10
    assert [item.step for item in rejected] == [20]
    assert reason in rejected[0].reason
    assert path.name in rejected[0].reason

    fresh = CheckpointStore(str(where), RUN)
    shallow, _ = fresh.newest_valid(LAYOUT, deep=False)
    assert shallow is not None
    assert shallow.step == (10 if seen_by_size else 20)

    with pytest.raises(CheckpointCorruptError) as caught:
        restored(local, newer, [0, 1], tmp_path)
    assert caught.value.code == "EADT-354"
    assert path.name in str(caught.value)
    assert np.array_equal(restored(local, manifest, [0, 1], tmp_path), values(LAYOUT, 10))


@pytest.mark.parametrize("damage", [truncate, flip, lambda path: path.write_bytes(b"{}")])
def test_a_damaged_manifest_falls_back(local: CheckpointStore, tmp_path: Path, damage: object) -> None:
    save(local, tmp_path, 10)
    path = Path(save(local, tmp_path, 20).path) / "manifest.json"
    before = path.read_bytes()
    assert callable(damage)
    damage(path)
    if damage is truncate:
        truncate(path)  # The first byte was the closing newline.
    assert path.read_bytes() != before
    manifest, rejected = local.newest_valid(LAYOUT, deep=False)
    assert manifest is not None
    assert manifest.step == 10
    assert [item.step for item in rejected] == [20]
    assert "manifest" in rejected[0].reason


def test_a_folder_without_manifest_is_no_checkpoint(either: CheckpointStore, tmp_path: Path) -> None:
    save(either, tmp_path, 10)
    slot = make_slot(tmp_path / "s", ALL, 20)
    either.write_shard(20, 0, slot, ALL, "torn")
    assert either.storage.files("checkpoints/one/step-00000020") == {"shard-000.torn.bin": LAYOUT.num_bytes}
    assert either.steps() == [10]
    manifest, rejected = either.newest_valid(LAYOUT)
    assert manifest is not None
    assert manifest.step == 10
    assert rejected == [Rejected(20, "the save of step 20 was not finished: it has no manifest")]


def test_nothing_is_left_to_go_on_from(local: CheckpointStore, where: Path, tmp_path: Path) -> None:
    save(local, tmp_path, 10)
    flip(shard_path(where, newest(local), 0))
    manifest, rejected = local.newest_valid(LAYOUT)
    assert manifest is None
    assert [item.step for item in rejected] == [10]


def test_what_a_restore_found_corrupt_can_be_rejected(local: CheckpointStore, tmp_path: Path) -> None:
    save(local, tmp_path, 10)
    save(local, tmp_path, 20)
    local.reject(newest(local), "node b read rubbish")
    manifest, rejected = local.newest_valid(LAYOUT, deep=False)
    assert manifest is not None
    assert manifest.step == 10
    assert rejected == [Rejected(20, "node b read rubbish")]
    save(local, tmp_path, 20)
    assert newest(local).step == 20


def test_the_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(CheckpointCorruptError("x", code="EADT-354", fix="y")))
    assert isinstance(error, CheckpointCorruptError)
    assert isinstance(error, EadtError)
    assert (error.what, error.code, error.fix, error.exit_status) == ("x", "EADT-354", "y", 3)


CHILD = """
import os, sys
import numpy as np
from eadt.training.checkpoint import CheckpointStore
from eadt.training.state import StateLayout, StateSlot

storage, slot_path, where = sys.argv[1:]
layout = StateLayout(("w",), ((1 << 20,),), ("fp32", "exp_avg", "exp_avg_sq"))

def block(*args):
    print("reached", flush=True)
    sys.stdin.read()

class Slot(StateSlot):
    def row(self, name):
        if where == "shard" and name == "exp_avg_sq":
            block()
        return super().row(name)

if where == "manifest":
    os.replace = block
store = CheckpointStore(storage, "one")
shard = store.write_shard(20, 0, Slot(slot_path, layout, writable=False), [(0, 1 << 20)], "killed")
store.publish(20, layout, {}, [shard], "periodic", {})
"""


@pytest.mark.parametrize("place", ["shard", "manifest"])
def test_killed_during_save(local: CheckpointStore, where: Path, tmp_path: Path, place: str) -> None:
    layout = StateLayout(("w",), ((1 << 20,),), LAYOUT.rows)
    spans = [(0, 1 << 20)]
    save(local, tmp_path, 10, [spans], layout)
    slot = make_slot(tmp_path / "s", spans, 20, layout)
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(where), str(tmp_path / "s"), place],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        assert child.stdout.readline() == b"reached\n"
        assert child.poll() is None
        child.send_signal(signal.SIGKILL)
        assert child.wait(30) == -signal.SIGKILL
    finally:
        child.kill()
        child.stdin.close()
        child.stdout.close()
    left = local.storage.files("checkpoints/one/step-00000020")
    written = left["shard-000.killed.bin"]
    # The fault fired where it was meant to: in the middle of the file, or just before the manifest.
    if place == "shard":
        assert 0 < written < layout.num_bytes
        assert len(left) == 1
    else:
        assert written == layout.num_bytes
        assert sorted(name.split(".")[-1] for name in left) == ["bin", "tmp"]
    manifest, rejected = local.newest_valid(layout)
    assert manifest is not None
    assert manifest.step == 10
    assert [item.step for item in rejected] == [20]
    assert "no manifest" in rejected[0].reason

    # The run that comes after saves the same step again, beside what is left, then cleans up.
    shard = local.write_shard(20, 0, slot, spans, "again")
    local.publish(20, layout, {}, [shard], "periodic", {})
    assert [item.split("/")[-1] for item in local.prune(2) if item.endswith(".killed.bin")]
    assert sorted(local.storage.files("checkpoints/one/step-00000020")) == [
        "manifest.json",
        "shard-000.again.bin",
    ]
    manifest, rejected = local.newest_valid(layout)
    assert manifest is not None
    assert (manifest.step, rejected) == (20, [])
    assert np.array_equal(restored(local, manifest, [0], tmp_path), values(layout, 20))


def test_a_failed_write_leaves_nothing(either: CheckpointStore, tmp_path: Path) -> None:
    class Broken(StateSlot):
        def row(self, name: str) -> np.ndarray:
            if name == "exp_avg":
                raise OSError(28, "No space left on device")
            return super().row(name)

    slot = Broken(tmp_path / "s", LAYOUT, writable=True)
    with pytest.raises(EnvironmentFailure, match="No space left") as caught:
        either.write_shard(5, 0, slot, ALL, "a")
    assert caught.value.code == "EADT-351"
    assert either.storage.files("checkpoints") == {}


# --- publishing -----------------------------------------------------------------------------------


def test_shards_that_do_not_cover_the_layout_are_not_published(
    local: CheckpointStore, tmp_path: Path
) -> None:
    with pytest.raises(EnvironmentFailure, match="lack elements 100 to 200") as caught:
        save(local, tmp_path, 5, HALVES[:1])
    assert caught.value.code == "EADT-353"
    assert local.steps() == []


def test_a_storage_that_the_nodes_do_not_share_is_noticed(local: CheckpointStore, tmp_path: Path) -> None:
    elsewhere = CheckpointStore(str(tmp_path / "disk of another node"), RUN)
    slot = make_slot(tmp_path / "s", ALL, 5)
    shard = elsewhere.write_shard(5, 0, slot, ALL, "a")
    with pytest.raises(EnvironmentFailure, match="is not in") as caught:
        local.publish(5, LAYOUT, {}, [shard], "periodic", {})
    assert caught.value.code == "EADT-353"
    assert "share" in caught.value.fix
    assert local.steps() == []


def test_a_value_that_json_does_not_know_is_refused(local: CheckpointStore, tmp_path: Path) -> None:
    slot = make_slot(tmp_path / "s", ALL, 5)
    shard = local.write_shard(5, 0, slot, ALL, "a")
    with pytest.raises(ConfigError, match="cannot be saved") as caught:
        local.publish(5, LAYOUT, {"user": {1, 2}}, [shard], "periodic", {})
    assert caught.value.code == "EADT-253"
    assert local.steps() == []


@pytest.mark.parametrize(("spans", "attempt"), [([(0, NUM + 1)], "a"), (ALL, "a/b"), (ALL, "")])
def test_wrong_arguments_are_refused(
    local: CheckpointStore, tmp_path: Path, spans: list[Span], attempt: str
) -> None:
    slot = StateSlot(tmp_path / "s", LAYOUT, writable=True)
    with pytest.raises(ValueError, match=r"spans|attempt"):
        local.write_shard(1, 0, slot, spans, attempt)


def test_a_slot_of_another_layout_is_refused(local: CheckpointStore, tmp_path: Path) -> None:
    save(local, tmp_path, 1)
    other = StateSlot(tmp_path / "s", StateLayout(("w",), ((4,),), LAYOUT.rows), writable=True)
    with pytest.raises(ValueError, match="another layout"):
        local.restore(newest(local), [0], other)


def test_a_step_saved_again_replaces_the_first(either: CheckpointStore, tmp_path: Path) -> None:
    save(either, tmp_path, 5)
    first = newest(either)
    save(either, tmp_path, 5, [ALL])
    second = newest(either)
    assert len(second.shards) == 1
    assert not {s.file for s in first.shards} & {s.file for s in second.shards}
    assert len(either.prune(2)) == 2
    assert newest(either) == second


# --- other models, other versions -----------------------------------------------------------------


def test_a_checkpoint_of_another_model_is_refused(local: CheckpointStore, tmp_path: Path) -> None:
    save(local, tmp_path, 10)
    other = StateLayout(
        ("embed.weight", "layer.weight", "layer.bias", "head.0", "head.1", "head.2", "head.3"),
        ((60, 8), (8, 16), (16,), (1,), (2,), (3,), (4,)),
        LAYOUT.rows,
    )
    with pytest.raises(ConfigError) as caught:
        local.newest_valid(other)
    assert caught.value.code == "EADT-251"
    assert caught.value.exit_status == 2
    text = str(caught.value)
    assert "another model" in text
    assert "embed.weight (50x8 in the checkpoint, 60x8 in the model)" in text
    assert "only in the checkpoint: scale (scalar)" in text
    assert "only in the model: head.0 (1), head.1 (2), head.2 (3) and 1 more" in text
    with pytest.raises(ConfigError, match="another model"):
        local.newest_valid(other.fingerprint)
    assert local.newest_valid(LAYOUT.fingerprint)[0] == newest(local) == local.newest_valid()[0]


def test_another_optimizer_and_another_order_are_named(local: CheckpointStore, tmp_path: Path) -> None:
    save(local, tmp_path, 10)
    with pytest.raises(ConfigError, match="the optimizer keeps momentum; the checkpoint has exp_avg"):
        local.newest_valid(replace(LAYOUT, rows=("fp32", "momentum")))
    with pytest.raises(ConfigError, match="another order"):
        local.newest_valid(StateLayout(LAYOUT.names[::-1], LAYOUT.shapes[::-1], LAYOUT.rows))


def test_a_checkpoint_of_a_newer_version_is_refused_and_kept(
    local: CheckpointStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as future:
        future.setattr("eadt.training.checkpoint.manifest.FORMAT", 2)
        future.setattr("eadt.__version__", "7.1")
        save(local, tmp_path, 10)
    with pytest.raises(ConfigError, match=r"newer EADT \(7.1, format 2") as caught:
        local.newest_valid(LAYOUT)
    assert caught.value.code == "EADT-252"
    save(local, tmp_path, 20)
    assert local.prune(1) == []
    assert local.steps() == [20, 10]


# --- retention ------------------------------------------------------------------------------------


def test_the_newest_are_kept(either: CheckpointStore, tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        save(either, tmp_path, step)
    assert either.prune(2) == ["checkpoints/one/step-00000020", "checkpoints/one/step-00000010"]
    assert either.steps() == [40, 30]
    assert either.storage.files("checkpoints/one/step-00000010") == {}
    assert np.array_equal(restored(either, newest(either), [0, 1], tmp_path), values(LAYOUT, 40))
    assert either.prune(2) == []


def test_torn_leftovers_go_but_what_is_being_written_stays(either: CheckpointStore, tmp_path: Path) -> None:
    slot = make_slot(tmp_path / "s", ALL, 0)
    save(either, tmp_path, 20)
    for step, attempt in ((10, "old"), (30, "dead"), (40, "now"), (20, "stray")):
        either.write_shard(step, 0, slot, ALL, attempt)
    deleted = either.prune(1, writing=["now"])
    assert sorted(deleted) == [
        "checkpoints/one/step-00000010",
        "checkpoints/one/step-00000020/shard-000.stray.bin",
        "checkpoints/one/step-00000030",
    ]
    assert list(either.storage.files("checkpoints/one/step-00000040")) == ["shard-000.now.bin"]
    assert either.prune(1) == ["checkpoints/one/step-00000040"]
    assert newest(either).step == 20


def test_the_newest_valid_one_is_never_deleted(local: CheckpointStore, where: Path, tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save(local, tmp_path, step)
    truncate(shard_path(where, newest(local), 0))
    flip(shard_path(where, newest_of(local, 20), 0))
    manifest, rejected = local.newest_valid(LAYOUT)
    assert manifest is not None
    assert (manifest.step, [item.step for item in rejected]) == (10, [30, 20])
    assert local.prune(1) == ["checkpoints/one/step-00000030", "checkpoints/one/step-00000020"]
    assert newest(local) == manifest


def newest_of(target: CheckpointStore, step: int) -> Manifest:
    content = target.storage.read(f"checkpoints/one/step-{step:08d}/manifest.json")
    return Manifest.from_json(content, step)


def test_without_a_valid_one_nothing_published_is_deleted(
    local: CheckpointStore, where: Path, tmp_path: Path
) -> None:
    save(local, tmp_path, 10)
    truncate(shard_path(where, newest(local), 0))
    assert local.prune(1) == []
    assert local.steps() == [10]
    with pytest.raises(ValueError, match="keep"):
        local.prune(0)


def test_other_files_in_the_storage_are_left_alone(local: CheckpointStore, where: Path) -> None:
    save(local, where.parent, 10)
    (where / "checkpoints" / RUN / "notes.txt").write_text("mine")
    (where / "checkpoints" / RUN / "step-old").mkdir()
    (where / "checkpoints" / RUN / "step-old" / "x").write_text("mine")
    assert local.prune(1) == []
    assert (where / "checkpoints" / RUN / "notes.txt").read_text() == "mine"
    assert (where / "checkpoints" / RUN / "step-old" / "x").read_text() == "mine"


# --- the storage itself ---------------------------------------------------------------------------


def test_a_storage_that_cannot_be_written_is_refused_with_a_fix(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    target = CheckpointStore(str(tmp_path / "file" / "storage"), RUN)
    with pytest.raises(EnvironmentFailure) as caught:
        target.check_writable()
    assert caught.value.code == "EADT-350"
    assert caught.value.exit_status == 3
    assert str(tmp_path / "file" / "storage") in caught.value.what
    assert "Not a directory" in caught.value.what
    assert "storage.path" in caught.value.fix


def test_a_check_leaves_nothing_behind(local: CheckpointStore, where: Path) -> None:
    local.check_writable()
    assert list(where.iterdir()) == []


@pytest.mark.parametrize("uri", ["foo://bucket/x", "no such scheme://x"])
def test_an_unknown_kind_of_storage_is_refused(uri: str) -> None:
    with pytest.raises(ConfigError, match=r"storage\.path") as caught:
        CheckpointStore(uri, RUN).check_writable()
    assert caught.value.code == "EADT-250"


def test_local_paths_may_be_relative_uris_or_odd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save(CheckpointStore("runs/ä b%20#?", RUN), tmp_path, 1)
    assert (
        tmp_path / "runs" / "ä b%20#?" / "checkpoints" / RUN / "step-00000001" / "manifest.json"
    ).is_file()
    save(CheckpointStore(f"file://{tmp_path}/uri", RUN), tmp_path, 2)
    assert CheckpointStore(str(tmp_path / "uri"), RUN).steps() == [2]


def test_a_folder_is_uploaded_and_replaces_the_last(either: CheckpointStore, tmp_path: Path) -> None:
    local = tmp_path / "model"
    (local / "sub").mkdir(parents=True)
    (local / "model-1.safetensors").write_bytes(b"1" * 100)
    (local / "sub" / "config.json").write_text("{}")
    assert either.upload_folder(local, "final").endswith("/final")
    (local / "model-1.safetensors").rename(local / "model.safetensors")
    either.upload_folder(str(local), "final")
    assert either.storage.files("final") == {"model.safetensors": 100, "sub/config.json": 2}


def test_a_folder_that_is_there_already_stays(local: CheckpointStore, where: Path) -> None:
    (where / "final").mkdir(parents=True)
    (where / "final" / "config.json").write_text("{}")
    assert local.upload_folder(where / "final", "final") == f"{where}/final"
    assert (where / "final" / "config.json").read_text() == "{}"


def test_an_unreadable_storage_is_not_an_empty_one(
    local: CheckpointStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(local, tmp_path, 10)
    manifest = newest(local)
    fired = []

    class Failing:
        type_name = "local"

        def get_file_info(self, selector: object) -> object:
            fired.append(selector)
            raise OSError(110, "Connection timed out")

        def open_input_stream(self, path: str, **options: object) -> object:
            fired.append(path)
            raise OSError(5, "Input/output error")

    broken = CheckpointStore(local.storage.path, RUN)
    monkeypatch.setattr(storage, "_resolve", lambda path: (Failing(), path))
    with pytest.raises(EnvironmentFailure, match="timed out") as caught:
        broken.newest_valid(LAYOUT)
    assert caught.value.code == "EADT-352"
    # A bad sector is another matter: other checkpoints may be fine.
    slot = StateSlot(tmp_path / "s", LAYOUT, writable=True)
    with pytest.raises(CheckpointCorruptError, match="Input/output error"):
        broken.restore(manifest, [0], slot)
    assert len(fired) == 2


def test_importing_takes_neither_torch_nor_pyarrow() -> None:
    code = (
        "import sys, eadt.training.checkpoint as c; c.CheckpointStore('s3://bucket/x', 'one');"
        "assert not {'torch', 'ray', 'pyarrow', 'fsspec'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_shards_know_their_size_and_sum(local: CheckpointStore, tmp_path: Path) -> None:
    slot = make_slot(tmp_path / "s", ALL, 3)
    shard = local.write_shard(3, 2, slot, [(5, 7), (7, 9), (0, 0)], "a1")
    assert isinstance(shard, Shard)
    assert (shard.file, shard.num_bytes, shard.spans) == ("shard-002.a1.bin", 4 * 3 * 4, ((5, 9),))
    empty = local.write_shard(3, 3, slot, [], "a1")
    assert (empty.num_bytes, empty.spans) == (0, ())


# --- several runs in one storage ------------------------------------------------------------------


def beside(target: CheckpointStore, run_id: str) -> CheckpointStore:
    return CheckpointStore(target.storage.path, run_id)


def test_runs_share_a_storage_without_seeing_each_other(either: CheckpointStore, tmp_path: Path) -> None:
    other = beside(either, "other")
    for step in (30, 40):
        save(other, tmp_path, step)
    slot = make_slot(tmp_path / "s", ALL, 50)
    other.write_shard(50, 0, slot, ALL, "now")  # is being written
    for step in (10, 20):
        save(either, tmp_path, step)
    assert either.prune(1) == ["checkpoints/one/step-00000010"]
    assert (either.steps(), other.steps()) == ([20], [40, 30])
    assert newest(either).step == 20
    assert other.storage.files("checkpoints/other/step-00000050") == {"shard-000.now.bin": LAYOUT.num_bytes}
    assert beside(either, "third").newest_valid(LAYOUT) == (None, [])
    assert runs_in(either.storage) == ["one", "other"]


def test_a_run_is_removed_alone(either: CheckpointStore, tmp_path: Path) -> None:
    # An id that begins with the other's: on object storage a folder is only how names begin.
    other = beside(either, "one-more")
    save(either, tmp_path, 10)
    save(other, tmp_path, 10)
    assert either.remove() == []
    assert either.storage.files("checkpoints/one") == {}
    assert other.steps() == [10]
    assert np.array_equal(restored(other, newest(other), [0, 1], tmp_path), values(LAYOUT, 10))
    assert either.remove() == []


def test_what_could_not_be_removed_is_named(
    local: CheckpointStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(local, tmp_path, 10)
    monkeypatch.setattr(Storage, "delete", lambda self, name: None)
    monkeypatch.setattr(Storage, "delete_folder", lambda self, name: None)
    assert "checkpoints/one/step-00000010/manifest.json" in local.remove()


@pytest.mark.parametrize("run_id", ["", "..", "a/b", ".hidden", "a b"])
def test_an_id_that_is_no_folders_name_is_refused(tmp_path: Path, run_id: str) -> None:
    with pytest.raises(ValueError, match="run's folder"):
        CheckpointStore(str(tmp_path), run_id)


# --- which samples come next ----------------------------------------------------------------------

ORDER = SampleOrder(12, 0, 32, "ab" * 16, "text.txt")


def test_a_manifest_says_which_samples_come_next(local: CheckpointStore, tmp_path: Path) -> None:
    slot = make_slot(tmp_path / "s", ALL, 5)
    info = local.publish(5, LAYOUT, {}, [local.write_shard(5, 0, slot, ALL, "a")], "final", {}, ORDER)
    assert newest(local).order == info.manifest.order == ORDER
    body = json.loads((Path(info.path) / "manifest.json").read_text())
    assert body["order"]["train_batch_size"] == 12


def test_a_manifest_from_before_says_nothing_of_them(local: CheckpointStore, tmp_path: Path) -> None:
    body = json.loads((Path(save(local, tmp_path, 5).path) / "manifest.json").read_text())
    del body["sha256"], body["order"]
    content = json.dumps({**body, "sha256": manifest_module._checksum(body)}).encode()
    assert Manifest.from_json(content, 5).order is None


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        ({}, []),
        ({"train_batch_size": 24}, ["training.train_batch_size: was 12, is 24"]),
        ({"seed": 1}, ["run.seed: was 0, is 1"]),
        # The same text cut otherwise has another fingerprint: that is not said twice.
        (
            {"sequence_length": 64, "data_fingerprint": "cd" * 16},
            ["training.sequence_length: was 32, is 64"],
        ),
        (
            {"data_fingerprint": "cd" * 16},
            ["the data: was text.txt (tokens abababab), is text.txt (tokens cdcdcdcd)"],
        ),
        (
            {"seed": 1, "data_fingerprint": "cd" * 16, "data_source": "b.txt"},
            ["run.seed: was 0, is 1", "the data: was text.txt (tokens abababab), is b.txt (tokens cdcdcdcd)"],
        ),
        ({"data_source": "copied/text.txt"}, []),
        ({"data_fingerprint": None, "data_source": None}, []),
    ],
)
def test_what_differs_is_listed(changes: dict[str, object], lines: list[str]) -> None:
    assert ORDER.differences(replace(ORDER, **changes)) == lines


# --- progress -------------------------------------------------------------------------------------


def test_bytes_are_told_as_they_move(
    local: CheckpointStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "CHUNK_BYTES", 256)
    slot = make_slot(tmp_path / "s", ALL, 5)
    told: list[int] = []
    shard = local.write_shard(5, 0, slot, ALL, "a", told.append)
    assert (sum(told), max(told)) == (LAYOUT.num_bytes, 256)
    manifest = local.publish(5, LAYOUT, {}, [shard], "final", {}).manifest
    told.clear()
    local.restore(manifest, [0], slot, told.append)
    assert (sum(told), max(told)) == (LAYOUT.num_bytes, 256)
