"""What goes wrong, goes wrong in a real process, and the run goes on to the losses of the calm one.

Real: coordinator, node agents, fork server, engine processes with DeepSpeed and gloo, signals, state in
memory and over sockets, checkpoints and their damage on disk, where it can be mounted a tiny file system in
memory. Pretended: Ray's part (hosts are registered directly, so that a "worker group" is not replaced unless
a test does it), that two nodes are two machines, and a node's loss: its engines are killed, its memory is
removed, and its agent answers no more.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from eadt.errors import EnvironmentFailure
from eadt.node import agent as node_agent
from eadt.record.rows import CheckpointRow, EndRow, FaultRow, NoteRow, RollbackRow
from eadt.report import build_report
from eadt.testing.faults import Fault, FaultKind, FaultPlan, Moment
from eadt.testing.local_run import LocalResult, LocalRun
from tests.integration.trial import Trial, assert_same_losses, setpoint

pytestmark = pytest.mark.integration

EVERY = 4
SNAPSHOTS = {"snapshot_every_steps": EVERY}


def assert_fired(result: LocalResult, fault: Fault, times: int = 1) -> None:
    assert len(FaultPlan(result.attempt_folder).fired(fault)) == times


def only(rows: list[Any]) -> Any:
    (row,) = rows
    return row


@pytest.mark.parametrize(("stage", "rank"), [(0, 1), (1, 0), (2, 1), (3, 0)])
def test_engine_killed(trial: Trial, stage: int, rank: int) -> None:
    faults: list[Fault] = []
    result = trial.run(
        trial.config("killed", stage=stage, checkpoint=SNAPSHOTS),
        plan_faults=lambda plan: faults.append(plan.fail_at(rank, 11)),
    )
    assert_fired(result, faults[0])
    assert_same_losses(result, trial.expected(stage=stage))
    assert only(result.rows(RollbackRow)).resumed_step == 8
    fault = only(result.rows(FaultRow))
    assert (fault.kind, "signal 9" in fault.detail) == ("killed", True)
    recovery = only(result.recoveries)
    assert recovery.lost_steps <= EVERY
    # What was done again is what came after the snapshot, with the same samples.
    done_twice = [step for step, rows in result.samples.items() if len(rows) > 12]
    assert set(done_twice) <= {9, 10, 11}
    assert {9, 10} <= set(done_twice)
    assert all(len(set(rows)) == 12 for rows in result.samples.values())
    # No host was asked for: the same places, in the next generation.
    assert [spec.generation for spec in result.specs] == [1, 1, 2, 2]
    energy = build_report(result.folder).energy_j
    by_use = {use: part.value for use, part in energy.by_use.items() if part is not None}
    assert by_use["lost"] > 0
    assert by_use["change"] > 0
    assert energy.total is not None
    assert sum(by_use.values()) == pytest.approx(energy.total.value, abs=1e-6)


def test_engine_fails_over_and_over(trial: Trial) -> None:
    faults: list[Fault] = []
    result = trial.run(
        trial.config("failing", elastic={"max_engine_failures": 2}),
        plan_faults=lambda plan: faults.append(plan.fail_at(1, 5, FaultKind.ERROR, times=9)),
    )
    assert_fired(result, faults[0], times=2)
    assert result.status == "failed"
    assert isinstance(result.error, EnvironmentFailure)
    assert result.error.code == "EADT-337"
    assert "planned fault: error in rank 1" in result.error.what
    assert "Traceback" in str(result.error.fix)
    assert result.rows(EndRow)[-1].status == "failed"
    assert max(result.losses) < 5


def test_failures_with_progress_between_are_forgiven(trial: Trial) -> None:
    faults: list[Fault] = []

    def plan_faults(plan: FaultPlan) -> None:
        faults.extend(plan.fail_at(1, step, FaultKind.OUT_OF_MEMORY) for step in (7, 11, 15))

    result = trial.run(
        trial.config("failing", elastic={"max_engine_failures": 2}, checkpoint=SNAPSHOTS),
        plan_faults=plan_faults,
    )
    for fault in faults:
        assert_fired(result, fault)
    assert_same_losses(result, trial.expected())
    assert [row.kind for row in result.rows(FaultRow)] == ["out_of_memory"] * 3


def test_error_in_engines_built_ahead(trial: Trial) -> None:
    """The present engines train on; then they stop first, and the next ones have the room."""
    faults: list[Fault] = []
    result = trial.run(
        trial.config("ahead"),
        [(5, setpoint(3))],
        plan_faults=lambda plan: faults.append(
            plan.fail_at(2, None, FaultKind.OUT_OF_MEMORY, Moment.PREPARE, world_size=3)
        ),
    )
    assert_fired(result, faults[0])
    assert_same_losses(result, trial.expected())
    assert result.rows(RollbackRow) == []
    assert "EADT-331" in [row.code for row in result.rows(NoteRow)]
    assert [row.world_size for row in result.generations] == [2, 3]
    assert only(result.resizes).lost_steps == 0


@pytest.mark.parametrize(("moment", "times"), [(Moment.PREPARE, 2), (Moment.STEP, 1)])
def test_setting_that_cannot_work(trial: Trial, moment: Moment, times: int) -> None:
    """After engines built ahead and others built with all the room have failed, or the first step has, the
    run goes back to the setting before: it does not end for a change that it did not need."""
    faults: list[Fault] = []
    result = trial.run(
        trial.config("ahead", elastic={"max_engine_failures": 1}),
        [(5, setpoint(3))],
        plan_faults=lambda plan: faults.append(
            plan.fail_at(2, None, FaultKind.OUT_OF_MEMORY, moment, world_size=3, times=9)
        ),
    )
    assert_fired(result, faults[0], times)
    assert_same_losses(result, trial.expected())
    assert set(result.world_sizes.values()) == {2}
    assert [row.lost_steps for row in result.recoveries] in ([], [0])
    note = only([row for row in result.rows(NoteRow) if row.code == "EADT-338"])
    assert "going back to 2 workers" in note.text
    assert [change["state"] for change in result.changes] == ["failed"]


@pytest.mark.parametrize("rank", [0, 1])
def test_killed_while_saving_a_snapshot(trial: Trial, rank: int) -> None:
    """The half-written slot is never used: the snapshot before is."""
    faults: list[Fault] = []
    result = trial.run(
        trial.config("torn", stage=3, checkpoint=SNAPSHOTS),
        plan_faults=lambda plan: faults.append(plan.fail_at(rank, 8, moment=Moment.SAVE)),
    )
    assert_fired(result, faults[0])
    assert_same_losses(result, trial.expected(stage=3))
    assert only(result.rows(RollbackRow)).resumed_step == 4


def test_killed_while_handing_over(trial: Trial) -> None:
    """The change is carried out all the same, from the snapshot before."""
    faults: list[Fault] = []
    result = trial.run(
        trial.config("torn", checkpoint=SNAPSHOTS),
        [(5, setpoint(1))],
        plan_faults=lambda plan: faults.append(plan.fail_at(1, 6, moment=Moment.SAVE)),
    )
    assert_fired(result, faults[0])
    assert_same_losses(result, trial.expected())
    assert only(result.rows(RollbackRow)).resumed_step == 4
    assert result.generations[-1].world_size == 1


def test_newest_checkpoint_corrupt(trial: Trial, tmp_path: Path) -> None:
    expected = trial.expected()
    keep = {"every_steps": 3, "keep": 3}

    async def interrupt(run: LocalRun) -> None:
        await run.until(run.store.steps)
        await run.interrupt()

    saved = trial.run(trial.config("run", checkpoint=keep), [(5, _save_asked), (9, interrupt)])
    assert saved.status == "interrupted"
    newest, older = saved.checkpoints[:2]
    shard = next((tmp_path / "run").glob(f"checkpoints/*/step-{newest:08d}/shard-*.bin"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    resumed = trial.run(trial.config("run", checkpoint=keep))
    assert_same_losses(resumed, expected, after=older)
    note = only([row for row in resumed.rows(NoteRow) if row.code == "EADT-256"])
    assert f"step {newest}" in note.text


async def _save_asked(run: LocalRun) -> None:
    """By now the coordinator knows of the step before the last."""
    await run.until(lambda: "save" in run.commands)


def test_interrupted_and_run_again(trial: Trial) -> None:
    expected = trial.expected(stage=2)
    first = trial.run(trial.config("run", stage=2), [(7, lambda run: run.interrupt())])
    assert first.status == "interrupted"
    assert first.checkpoints == [8]
    assert first.rows(CheckpointRow)[-1].kind == "just_in_time"
    second = trial.run(trial.config("run", stage=2))
    assert_same_losses(second, expected, after=8)
    assert {**first.losses, **second.losses}.keys() == expected.losses.keys()
    for step, loss in first.losses.items():
        assert loss == pytest.approx(expected.losses[step], rel=1e-5)


@pytest.fixture
def tiny_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder in a file system of 1 MB in memory; where none can be mounted, one that says it is full."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "eadt-test", folder], capture_output=True
    )
    if mount.returncode != 0:
        real = node_agent._free_bytes
        monkeypatch.setattr(
            node_agent,
            "_free_bytes",
            lambda path: 1 << 20 if folder in path.parents else real(path),
        )
    yield folder
    if mount.returncode == 0:
        subprocess.run(["umount", folder], check=True)


def test_no_room_in_shared_memory(trial: Trial, tiny_memory: Path) -> None:
    """State goes through the disk, and the run says so."""
    on_disk: list[Path] = []

    def look(run: LocalRun) -> None:
        on_disk.extend(path.resolve() for path in run.memory_folders["node0"].glob("slot-*"))

    result = trial.run(
        trial.config("spilled"), [(4, setpoint(1)), (8, look), (10, setpoint(3))],
        shared_memory_dir=str(tiny_memory),
    )  # fmt: skip
    assert_same_losses(result, trial.expected())
    assert on_disk
    assert all("spill-node0" in str(path) for path in on_disk)
    note = only([row for row in result.rows(NoteRow) if row.code == "EADT-335"])
    assert "no room" in note.text
    assert len(result.resizes) == 2


@pytest.mark.parametrize("stage", [1, 3])
def test_node_lost(trial: Trial, stage: int) -> None:
    """Half of the state in memory goes with the node: the run goes on from the checkpoint, on the other."""

    async def wait_and_lose(run: LocalRun) -> None:
        await run.until(run.store.steps)
        run.lose_node("node1")

    result = trial.run(
        trial.config("lost", stage=stage, checkpoint={**SNAPSHOTS, "every_steps": 4}),
        [(6, _save_asked), (10, wait_and_lose)],
        nodes=(2, 2),
    )
    assert_same_losses(result, trial.expected(stage=stage))
    assert "node_lost" in [row.kind for row in result.rows(FaultRow)]
    resumed_step = only(result.rows(RollbackRow)).resumed_step
    assert 4 <= resumed_step <= 10
    after = [spec for spec in result.specs if spec.generation > 1]
    assert {spec.node_id for spec in after} == {"node0"}
    assert result.generations[-1].world_size >= 1
