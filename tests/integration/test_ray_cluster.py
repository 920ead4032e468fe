"""Recovery and resizing on a Ray cluster of several nodes.

Real: Ray (three raylets on this machine), Ray Train, node agents, engines, state over the network, drains,
SIGKILL. Pretended: that the nodes are machines; each has its own folder for shared memory, but they share
the machine's cores, clock and disk (the storage that holds checkpoints).
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from eadt.clock import SYSTEM_CLOCK, unix_s
from eadt.config import PowerConfig
from eadt.control.setpoint import Setpoint
from eadt.node.meter import Meter
from eadt.node.sensors import detect_sources
from eadt.record.rows import ChangeRow, CheckpointRow, EnergyRow, GenerationRow, NoteRow, RollbackRow
from tests.integration.live_run import LiveRun, assert_equal_losses, tiny_config

pytestmark = [pytest.mark.integration, pytest.mark.slow]

NODE = {"num_cpus": 1, "object_store_memory": 80_000_000}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    head = {"num_cpus": 0, "object_store_memory": 80_000_000, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    before = os.environ.get("RAY_ADDRESS")
    os.environ["RAY_ADDRESS"] = cluster.address
    ray.init(address=cluster.address, namespace="eadt", log_to_driver=False, logging_level="error")
    try:
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()
        os.environ.pop("RAY_ADDRESS")
        if before is not None:
            os.environ["RAY_ADDRESS"] = before


@pytest.fixture
def two_nodes(cluster: Cluster) -> Cluster:
    """The cluster with exactly two nodes for training, whatever a test before did."""
    while len(cluster.worker_nodes) < 2:
        cluster.add_node(**NODE)
    cluster.wait_for_nodes()
    return cluster


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Losses of the first steps of a run that nobody disturbs."""
    while len(cluster.worker_nodes) < 2:
        cluster.add_node(**NODE)
    cluster.wait_for_nodes()
    with LiveRun(tiny_config(tmp_path_factory.mktemp("runs") / "undisturbed")) as run:
        run.until_step(300)
    return run.losses()


def test_a_killed_host_is_replaced_alone_and_training_does_not_notice(
    two_nodes: Cluster, undisturbed: dict[int, float], tmp_path: Path
) -> None:
    with LiveRun(tiny_config(tmp_path / "hostkill")) as run:
        run.until_step(20)
        hosts = {host["world_rank"]: host["pid"] for host in run.snapshot()["hosts"]}
        engines = run.engine_pids()
        os.kill(hosts[1], signal.SIGKILL)

        def replaced() -> bool:
            now = {host["world_rank"]: host["pid"] for host in run.snapshot()["hosts"]}
            return now.get(1) not in (None, hosts[1])

        run.until("the killed host's replacement", replaced)
        run.until_step(run.step + 20)
        assert {host["world_rank"]: host["pid"] for host in run.snapshot()["hosts"]}[0] == hosts[0]
        assert run.engine_pids() == engines
    assert not run.rows(RollbackRow)
    assert len([row for row in run.rows(GenerationRow) if row.event == "started"]) == 1
    assert_equal_losses(run.losses(), undisturbed, at_least=40)


def test_a_killed_supervisor_comes_back_with_its_state_and_training_goes_on(
    two_nodes: Cluster, tmp_path: Path
) -> None:
    with LiveRun(tiny_config(tmp_path / "supervisorkill")) as run:
        run.until("a decision", lambda: run.of_type("decision"))
        before = ray.get(run.coordinator.status.remote())
        step = run.step
        ray.kill(run.supervisor, no_restart=False)
        run.until("the note of its return", lambda: run.of_type("note", code="EADT-372"))
        run.until_step(step + 20)
        status = run.until("its decisions", lambda: ray.get(run.coordinator.status.remote()).get("decisions"))
        assert before["decisions"][0]["decision_id"] in {row["decision_id"] for row in status}
    assert not run.rows(RollbackRow)


def test_a_drained_node_hands_its_state_over_and_no_step_is_lost(
    two_nodes: Cluster, undisturbed: dict[int, float], tmp_path: Path
) -> None:
    with LiveRun(tiny_config(tmp_path / "drain")) as run:
        run.until_step(20)
        leaving = max(two_nodes.worker_nodes, key=lambda node: node.node_id)
        drain(two_nodes, leaving.node_id)
        run.until("the drain to be heard of", lambda: run.of_type("fault", kind="drain"))
        run.until("one worker", lambda: run.of_type("change", from_workers=2, to_workers=1))
        assert run.snapshot()["node_ids"] != [leaving.node_id]
        step = run.step
        two_nodes.remove_node(leaving, allow_graceful=False)
        run.until("the loss to be seen", lambda: run.of_type("fault", kind="node_lost"))
        run.until_step(step + 20)
    started = [row for row in run.rows(GenerationRow) if row.event == "started"]
    assert started[1].remote_bytes > 0, "the leaving node's part came over the network"
    assert not run.rows(RollbackRow)
    assert run.of_type("change", from_workers=2)[0]["lost_steps"] == 0
    assert_equal_losses(run.losses(), undisturbed, at_least=40)


def test_a_lost_node_costs_no_more_than_back_to_the_checkpoint_and_a_new_one_is_used(
    two_nodes: Cluster, undisturbed: dict[int, float], tmp_path: Path
) -> None:
    with LiveRun(tiny_config(tmp_path / "nodeloss")) as run:
        run.until("a checkpoint", lambda: run.of_type("checkpoint"))
        run.until_step(run.step + 5)
        leaving = max(two_nodes.worker_nodes, key=lambda node: node.node_id)
        two_nodes.remove_node(leaving, allow_graceful=False)
        run.until("the loss to be seen", lambda: run.of_type("fault", kind="node_lost"))
        run.until("one worker", lambda: run.snapshot()["is_training"]
                  and run.snapshot()["setpoint"].num_workers == 1)  # fmt: skip
        run.until_step(run.step + 10)
        two_nodes.add_node(**NODE)
        run.until("two workers again", lambda: run.snapshot()["is_training"]
                  and run.snapshot()["setpoint"].num_workers == 2)  # fmt: skip
        run.until_step(run.step + 10)
    rollbacks = run.rows(RollbackRow)
    assert len(rollbacks) >= 1
    checkpoints = {row.step for row in run.rows(CheckpointRow)} | {0}
    assert rollbacks[0].resumed_step in checkpoints
    assert_equal_losses(run.losses(), undisturbed, at_least=60)


@pytest.mark.parametrize("mode", ["group", "restart"])
def test_resizing_the_worker_group_keeps_the_losses(
    two_nodes: Cluster, undisturbed: dict[int, float], tmp_path: Path, mode: str
) -> None:
    with LiveRun(tiny_config(tmp_path / mode, elastic={"mode": mode})) as run:
        for step, workers in ((15, 1), (40, 2)):
            run.until_step(step)
            setpoint = Setpoint(workers, 1, 100)
            answer = ray.get(run.coordinator.apply.remote(setpoint, f"the test at step {step}", f"t{step}"))
            assert answer["accepted"]
            run.until(f"{workers} workers", lambda: run.of_type("change", to_workers=workers))  # noqa: B023
        run.until_step(run.step + 10)
    resizes = run.rows(ChangeRow)
    assert [(row.from_workers, row.to_workers, row.kind) for row in resizes] == [
        (2, 1, mode),
        (1, 2, mode),
    ]
    assert all(row.lost_steps == 0 for row in resizes)
    assert_equal_losses(run.losses(), undisturbed, at_least=50)


def drain(cluster: Cluster, node_id: str) -> None:
    """Give Ray a preemption notice for a node, as KubeRay and clouds do."""
    from ray._raylet import GcsClient
    from ray.core.generated import autoscaler_pb2

    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    client: Any = GcsClient(address=cluster.address)
    accepted, why = client.drain_node(node_id, reason, "the test", int((unix_s() + 60) * 1000))
    assert accepted, why


def test_two_runs_at_once_book_what_is_their_own_and_the_sum_is_the_meters(
    two_nodes: Cluster, tmp_path: Path
) -> None:
    """Both runs have a host on each node. The nodes are one machine, so there is one CPU to book: in each run
    one node books it, each run its part, and the parts add up to what a meter of the test's own reads."""
    options: dict[str, Any] = {
        "resources": {"training_cores_per_node": 1, "cpus_per_worker": 0.5},
        "power": {
            "source": "estimate",
            "booking_interval": 1.0,
            "estimate": {"idle_w": 10, "per_core_w": 10},
        },
    }
    selection = detect_sources(PowerConfig.model_validate(options["power"]), SYSTEM_CLOCK)
    meter = Meter(selection.sources)
    meter.start()
    with (
        LiveRun(tiny_config(tmp_path / "one", **options)) as one,
        LiveRun(tiny_config(tmp_path / "two", **options)) as two,
    ):
        for run in (one, two):
            run.until_step(10)
        begun = boundary(meter)
        for run in (one, two):
            run.until_step(run.step + 150)
        ended = boundary(meter)
        for run in (one, two):
            run.until("its rows", lambda: last_booked_s(run) > ended[0])  # noqa: B023
    meter.stop()
    selection.close()
    whole_j = ended[1] - begun[1]
    parts_j = [joules_between(run, begun[0], ended[0]) for run in (one, two)]
    assert sum(parts_j) == pytest.approx(whole_j, rel=0.05)
    assert min(parts_j) > 0.3 * whole_j, "neither run is idle"
    for run in (one, two):
        rows = run.rows(EnergyRow)
        assert {len(row.joules) for row in rows} == {1}, "the CPU, and nothing twice"
        assert any(row.own_fraction is not None for row in rows)
        assert "EADT-353" in [row.code for row in run.rows(NoteRow)]
        assert run.result is not None
        assert run.result.report.energy_j.not_measured.fraction < 0.02


def boundary(meter: Meter) -> tuple[float, float]:
    """A moment, and the CPU's energy until then; all processes of a machine share its monotonic clock."""
    at_s, points = meter.cut()
    return at_s, points["cpu"].energy_j


def last_booked_s(run: LiveRun) -> float:
    return max((row.t1 for row in run.rows(EnergyRow)), default=0.0)


def joules_between(run: LiveRun, begun_s: float, ended_s: float) -> float:
    """The run's energy in a stretch of the machine's time; rows that lie across its ends count in part."""
    total_j = 0.0
    for row in run.rows(EnergyRow):
        inside_s = min(row.t1, ended_s) - max(row.t0, begun_s)
        if inside_s > 0:
            total_j += sum(joules or 0.0 for joules in row.joules) * inside_s / (row.t1 - row.t0)
    return total_j
