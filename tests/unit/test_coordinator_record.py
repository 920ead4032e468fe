"""What the coordinator books while a run goes on: the real coordinator, recorder and books.

Pretended: the nodes, which only write down what they are told, and the engines, whose words are the test's.
The clock is fake; the loop's own waits are some hundredths of a second.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from eadt.cluster import Devices
from eadt.config import config_from_dict
from eadt.coordination.coordinator import Coordinator
from eadt.coordination.metering import Metered
from eadt.coordination.nodes import NodeInfo
from eadt.coordination.placement import Host
from eadt.coordination.recorder import Recorder
from eadt.record.books import Books
from eadt.record.rows import (
    AnyRow,
    EndRow,
    FaultRow,
    GenerationRow,
    NodeRow,
    NoteRow,
    RollbackRow,
    Row,
    SessionRow,
    StepsRow,
    TimeRow,
)
from eadt.testing.clock import FakeClock
from eadt.trainer import run_settings
from eadt.training.engine_spec import EngineSpec
from eadt.training.state import StateLayout

SomeRow = TypeVar("SomeRow", bound=Row)
LAYOUT = StateLayout(("weight",), ((4, 4),), ("fp32", "exp_avg", "exp_avg_sq"))
DEADLINE_S = 20.0


class FakeNode:
    """A node agent that does nothing."""

    def __init__(self) -> None:
        self.specs: list[EngineSpec] = []
        self.told: list[tuple[Any, ...]] = []
        self.uses: list[str] = []
        self.metered: list[Metered] = []

    def fork(self, specs: Sequence[EngineSpec]) -> None:
        self.specs.extend(specs)

    def send(self, engine_ids: Sequence[str], *command: Any) -> None:
        self.told.append(command)

    def kill(self, engine_ids: Sequence[str]) -> None:
        self.told.append(("kill", *engine_ids))

    def set_use(self, use: str) -> None:
        self.uses.append(use)

    def set_metered(self, metered: Metered) -> None:
        self.metered.append(metered)

    async def ping(self, timeout_s: float) -> None:
        """It is there."""

    async def available_bytes(self) -> int:
        return 1 << 40

    async def reserve(self, num_bytes: int) -> str:
        return ""


class Run:
    """A coordinator and what it wrote down."""

    def __init__(self, folder: Path, *, interval_s: float = 60.0) -> None:
        config = config_from_dict(
            {
                "run": {"name": "r", "folder": str(folder)},
                "training": {
                    "train_function": "own:train", "train_batch_size": 4, "per_device_train_batch_size": 4,
                    "max_steps": 100, "energy_monitoring_interval": interval_s, "precision": "fp32",
                },
                "mps": {"preset": "max_single_process"},
                "elastic": {"num_workers": 1, "max_workers": 2},
                "checkpoint": {"every_steps": None, "snapshot_every_steps": 5, "save_final_model": False},
            }
        )  # fmt: skip
        self.clock = FakeClock()
        self.recorder = Recorder(self.clock)
        self.rows: list[AnyRow] = []
        self.recorder.begin(self, Books())
        settings = run_settings(config, "r-1", Devices(False, 1, 2.0), None)
        self.coordinator = Coordinator(settings, self.recorder)

    def append(self, row: AnyRow) -> None:
        self.rows.append(row)

    def of(self, kind: type[SomeRow]) -> list[SomeRow]:
        return [row for row in self.rows if isinstance(row, kind)]

    def add_node(
        self, name: str = "a", *, window_s: float = 0.0, notes: tuple[tuple[str, str], ...] = ()
    ) -> FakeNode:
        node = FakeNode()
        info = NodeInfo(
            node_id=name, ip="127.0.0.1", hostname=f"host-{name}", cores=(0, 1), num_gpus=0,
            state_address=("127.0.0.1", 1), slot_paths=("s0", "s1"), identities={"cpu": f"{name}/cpu"},
            honest_window_s=window_s, notes=notes,
        )  # fmt: skip
        self.coordinator.add_node(info, node)  # type: ignore[arg-type]
        return node

    def say(self, spec: EngineSpec, kind: str, *, at_s: float | None = None, **values: Any) -> None:
        """An engine says something; its node's clock is a thousand seconds ahead of the session's."""
        self.coordinator.heard(spec.node_id, self.recorder.at_s + 1000.0)
        if kind in ("loaded", "use"):
            values["t"] = (self.recorder.at_s if at_s is None else at_s) + 1000.0
        self.coordinator.engine_event(spec.node_id, spec.engine_id, kind, values)

    def step(self, spec: EngineSpec, number: int, seconds: float = 1.0) -> None:
        self.clock.advance(seconds)
        t1 = self.recorder.at_s + 1000.0
        self.say(
            spec, "step", step=number, t0=t1 - seconds, t1=t1, learning_rate=1e-3, primary=True, loss=2.0,
            samples=4, tokens=40, world_size=1, input_s=0.0,
        )  # fmt: skip

    async def until(self, condition: Callable[[], Any]) -> Any:
        async with asyncio.timeout(DEADLINE_S):
            while not (value := condition()):
                await asyncio.sleep(0.01)
        return value

    async def until_training(self, node: FakeNode, step: int = 0) -> EngineSpec:
        """Answer for the engine that is built next, until it trains."""
        spec: EngineSpec = await self.until(lambda: node.specs and node.specs[-1])
        self.say(spec, "ready", layout=LAYOUT, spans=(), num_params=16, timings={}, device_bytes=None)
        await self.until(lambda: any(command[0] == "go" for command in node.told))
        node.told.clear()
        self.say(spec, "loaded", step=step, timings={"load_s": 0.0}, num_remote_bytes=0)
        return spec


def carry_through(run: Run, story: Callable[[], Awaitable[None]]) -> None:
    async def tell() -> None:
        task = asyncio.create_task(run.coordinator.run())
        try:
            await run.until(lambda: run.of(SessionRow))
            await asyncio.wait_for(story(), DEADLINE_S)
        except BaseException:
            task.cancel()
            raise
        run.coordinator.interrupt("the test is done")
        if run.coordinator._current is not None:
            run.coordinator._current = None  # its engines are nobody's
        await asyncio.wait_for(task, DEADLINE_S)
        run.recorder.close()

    asyncio.run(tell())


def test_a_session_in_rows_from_its_start_to_its_end(tmp_path: Path) -> None:
    run = Run(tmp_path)

    async def story() -> None:
        node = run.add_node()
        run.clock.advance(4.0)
        run.coordinator.register_host(Host(0, 1, "a", pid=7))
        spec = await run.until_training(node)
        run.say(spec, "use", use="validation", step=0, primary=True)
        run.clock.advance(2.0)
        run.say(spec, "use", use="useful", step=0, primary=True)
        for number in range(1, 4):
            run.step(spec, number)
        assert node.metered == [Metered(("cpu",), (), (7,))]
        assert spec.setting == 1

    carry_through(run, story)
    assert isinstance(run.rows[0], SessionRow)
    assert [row.step for row in run.of(GenerationRow) if row.event == "started"] == [0]
    assert [(row.use, row.t0_s, row.t1_s) for row in run.of(TimeRow)][:4] == [
        ("startup", 0.0, 4.0), ("validation", 4.0, 6.0), ("useful", 6.0, 9.0),
    ]  # fmt: skip
    assert sum(len(row.t0) for row in run.of(StepsRow)) == 3
    [end] = run.of(EndRow)
    assert (end.status, end.reason) == ("interrupted", "the test is done")
    books = run.recorder.books
    assert (books.step, books.samples) == (3, 12)
    assert books.sessions[-1].status == "interrupted"


def test_an_engine_that_dies_undoes_what_came_after_the_state_gone_back_to(tmp_path: Path) -> None:
    run = Run(tmp_path)

    async def story() -> None:
        node = run.add_node()
        run.coordinator.register_host(Host(0, 1, "a"))
        spec = await run.until_training(node)
        for number in range(1, 4):
            run.step(spec, number)
        node.uses.clear()
        run.say(spec, "exit", status=-9, log_tail="")
        await run.until(lambda: run.of(RollbackRow))
        assert node.uses == ["change"]
        assert run.recorder.job_use == "change"
        run.clock.advance(5.0)
        again = await run.until_training(node)
        assert (again.generation, again.setting) == (2, 1), "the setting is the same"
        run.step(again, 1)

    carry_through(run, story)
    [rollback] = run.of(RollbackRow)
    assert (rollback.generation, rollback.resumed_step) == (1, 0)
    assert run.of(FaultRow)[0].kind == "killed"
    books = run.recorder.books
    assert (books.lost_steps, books.lost_samples, books.optimizer_steps) == (3, 12, 1)
    assert books.seconds_by_use["lost"] == 3.0
    assert books.seconds_by_use["change"] == 5.0


def test_while_a_worker_group_assembles_nodes_go_on_booking_as_before(tmp_path: Path) -> None:
    run = Run(tmp_path)

    async def story() -> None:
        nodes = {name: run.add_node(name) for name in ("a", "b")}
        run.coordinator.register_host(Host(0, 2, "a"))
        assert nodes["a"].metered == []
        run.coordinator.register_host(Host(1, 2, "b"))
        assert [nodes[name].metered[-1].components for name in "ab"] == [("cpu",), ("cpu",)]
        run.coordinator.register_host(Host(0, 1, "a"))  # a smaller group: complete at once
        assert [nodes[name].metered[-1].components for name in "ab"] == [("cpu",), ()]

    carry_through(run, story)


def test_a_node_that_goes_gives_its_machines_meter_to_another(tmp_path: Path) -> None:
    run = Run(tmp_path)

    async def story() -> None:
        first, second = run.add_node("a"), FakeNode()
        info = NodeInfo("b", "127.0.0.1", "host-a", (0, 1), 0, ("", 1), ("s0",), {"cpu": "a/cpu"})
        run.coordinator.add_node(info, second)  # type: ignore[arg-type]
        for rank, name in enumerate("ab"):
            run.coordinator.register_host(Host(rank, 2, name))
        assert first.metered[-1].components == ("cpu",)
        assert all(metered.components == () for metered in second.metered)
        run.coordinator.lose_node("a", "a test")
        assert second.metered[-1].components == ("cpu",)

    carry_through(run, story)


def test_what_a_nodes_sensors_lack_is_said_once_for_all_that_are_alike(tmp_path: Path) -> None:
    run = Run(tmp_path, interval_s=2.0)

    async def story() -> None:
        for name in ("a", "b"):
            run.add_node(name, window_s=5.0, notes=(("EADT-350", "CPU through RAPL: closed."),))

    carry_through(run, story)
    texts = {row.code: row.text for row in run.of(NoteRow)}
    assert texts["EADT-350"] == "host-a: CPU through RAPL: closed."
    assert "5 s" in texts["EADT-357"]
    assert "set it higher" in texts["EADT-357"]
    assert [row.code for row in run.of(NoteRow)] == ["EADT-350", "EADT-357"]


def test_a_nodes_moment_is_placed_by_messages_not_by_wall_clocks(tmp_path: Path) -> None:
    run = Run(tmp_path)

    async def story() -> None:
        run.clock.advance(50.0)
        run.clock.step_unix_s(-7200.0)
        run.coordinator.heard("a", 1050.0)
        run.coordinator.book(NodeRow(node="a", monotonic_s=1049.0))

    carry_through(run, story)
    [row] = run.of(NodeRow)
    assert row.at_s == 49.0
