"""However a run ends, what it had last is made durable first, and it does end.

Real: the coordinator and its loop, slots, the storage. Pretended: engines, whose words the test says.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from eadt.coordination import coordinator as coordinator_module
from eadt.coordination import state_keeper
from eadt.coordination.coordinator import Coordinator
from eadt.coordination.placement import Host
from eadt.errors import EnvironmentFailure
from eadt.record.rows import CheckpointRow, EndRow
from eadt.training.checkpoint import CheckpointStore
from tests.unit.keeping import LAYOUT, NUM, Ledger, Node, make_settings, recorder_into, storage_is_full


class Run:
    """A coordinator on one node, brought to training by :meth:`train`."""

    def __init__(self, folder: Path, **sections: Any) -> None:
        # Snapshots only: nothing is durable before the end.
        self.settings = make_settings(folder, checkpoint={"every_steps": None}, **sections)
        self.ledger = Ledger()
        self.coordinator = Coordinator(self.settings, recorder_into(self.ledger, has_session=False))
        self.node = Node("node0", folder, self.settings)
        self.store = CheckpointStore(self.settings.storage_path, self.settings.run_id)
        self.task = asyncio.create_task(self.coordinator.run())

    async def train(self) -> None:
        """One engine trains."""
        self.coordinator.add_node(self.node.info, self.node)
        self.coordinator.register_host(Host(0, 1, "node0"))
        await self.until(lambda: self.node.specs)
        self.say("ready", layout=LAYOUT, num_params=NUM, spans=[(0, NUM)], device_bytes=0)
        await self.until(lambda: any(command[0] == "go" for command in self.node.sent))
        self.say("loaded", timings={"load_s": 0.1}, t=1.0, step=0, num_remote_bytes=0)

    def say(self, kind: str, **values: Any) -> None:
        self.coordinator.engine_event("node0", "engine-1-0", kind, values)

    def save(self, step: int, *, stopped: bool = False) -> None:
        """The engine has saved the state of a step."""
        self.node.fill(0, step)
        self.say(
            "saved", step=step, slot=0, stopped=stopped, final=False, meta={"step": step}, seconds=0.1, t=2.0
        )

    async def until(self, condition: Callable[[], object]) -> None:
        while not condition():
            await asyncio.sleep(0.001)

    def end(self) -> EndRow:
        (row,) = [row for row in self.ledger.rows if isinstance(row, EndRow)]
        return row

    def saved_steps(self) -> list[tuple[int, str]]:
        return [(row.step, row.kind) for row in self.ledger.rows if isinstance(row, CheckpointRow)]


def in_loop(work: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(20):
            await work()

    asyncio.run(bounded())


def test_an_error_of_the_users_code_ends_the_run_after_its_snapshot_is_saved(tmp_path: Path) -> None:
    async def work() -> None:
        run = Run(tmp_path)
        await run.train()
        run.save(7)
        run.say("error", cause="user", text="KeyError: 'x'")
        run.say("exit", status=1, log_tail="")
        await run.task
        assert (run.coordinator.status, run.store.steps()) == ("failed", [7])
        assert run.saved_steps() == [(7, "just_in_time")]
        assert run.coordinator.error is not None
        assert "KeyError" in run.coordinator.error.what
        assert run.end().status == "failed"
        # The end is said last: who reads it finds the checkpoint.
        assert isinstance(run.ledger.rows[-1], EndRow)

    in_loop(work)


def test_somebody_outside_ends_the_run_while_it_trains(tmp_path: Path) -> None:
    async def work() -> None:
        run = Run(tmp_path)
        await run.train()
        run.save(7)
        first = EnvironmentFailure("Ray Train gave up", code="EADT-304")
        run.coordinator.fail(first)
        run.coordinator.fail(EnvironmentFailure("and the rest fell over", code="EADT-306"))
        assert not run.coordinator.apply(run.settings.setpoint, "too late", None)["accepted"]
        await run.task
        assert run.coordinator.error is first
        assert run.node.killed[:1] == ["engine-1-0"]
        assert run.store.steps() == [7]

    in_loop(work)


def test_a_defect_of_ours_does_not_cost_the_state(tmp_path: Path) -> None:
    async def work() -> None:
        run = Run(tmp_path)
        await run.train()
        run.save(7)

        def broken() -> None:
            raise ZeroDivisionError

        run.coordinator._reconcile = broken  # type: ignore[method-assign]
        await run.task
        assert run.coordinator.error is not None
        assert run.coordinator.error.code == "EADT-199"
        assert run.store.steps() == [7]

    in_loop(work)


def test_a_run_that_fails_before_it_has_a_state_just_ends(tmp_path: Path) -> None:
    async def work() -> None:
        run = Run(tmp_path)
        run.coordinator.fail(EnvironmentFailure("no worker could be placed", code="EADT-306"))
        await run.task
        assert (run.coordinator.status, run.saved_steps(), run.node.num_writes) == ("failed", [], 0)
        assert await run.coordinator.wait_for_end(0.0)

    in_loop(work)


def test_the_end_does_not_wait_for_a_storage_that_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coordinator_module, "LAST_SAVE_S", 0.01)

    async def work() -> None:
        run = Run(tmp_path)
        await run.train()
        run.save(7)
        run.node.after_write = asyncio.Event().wait
        run.coordinator.fail(EnvironmentFailure("over", code="EADT-304"))
        await run.task
        assert run.coordinator.status == "failed"
        assert "could not be saved" in run.ledger.notes("EADT-255")[0]

    in_loop(work)


def test_an_interrupted_run_tries_its_save_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_keeper, "_LAST_PAUSES_S", (0.0, 0.0))

    async def work() -> None:
        run = Run(tmp_path)
        await run.train()
        failures = [storage_is_full]

        async def fail_once() -> None:
            if failures:
                await failures.pop()()

        run.node.after_write = fail_once
        run.coordinator.interrupt("Ctrl-C")
        await run.until(lambda: ("stop",) in run.node.sent)
        run.save(9, stopped=True)
        await run.task
        assert (run.coordinator.status, run.store.steps()) == ("interrupted", [9])
        assert len(run.ledger.notes("EADT-255")) == 1

    in_loop(work)


def test_a_paused_run_is_durable(tmp_path: Path) -> None:
    """Nobody takes the state over: it is not left in memory alone."""

    async def work() -> None:
        run = Run(tmp_path)
        await run.train()
        run.coordinator.apply(run.settings.setpoint.with_(paused=True), "a user pauses", "d1")
        await run.until(lambda: ("stop",) in run.node.sent)
        run.save(9, stopped=True)
        await run.until(run.store.steps)
        assert run.coordinator.status == "training"  # and it is not over
        run.coordinator.interrupt("enough")
        await run.task
        assert run.node.num_writes == 1

    in_loop(work)
