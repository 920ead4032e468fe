"""A run on a real Ray cluster, watched and disturbed from a test."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import ray

from eadt.actors import NAMESPACE, agent_prefix, coordinator_name
from eadt.config import RunConfig, config_from_dict
from eadt.record.ledger import read_ledger
from eadt.record.rows import Row, StepsRow
from eadt.supervisor_actor import supervisor_name
from eadt.trainer import EnergyAdaptiveTrainer, TrainingResult

DEADLINE_S = 150.0

SomeRow = TypeVar("SomeRow", bound=Row)


def tiny_config(folder: Path, **sections: Any) -> RunConfig:
    """A GPT-NeoX of 30 thousand parameters; steps of some 20 ms; ``sections`` are merged in."""
    values: dict[str, Any] = {
        "run": {"name": folder.name, "folder": str(folder)},
        "training": {
            "model_config": {
                "model_type": "gpt_neox",
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "intermediate_size": 64,
            },
            "tokenizer_name_or_path": "byte",
            "dataset_path": "python-stdlib",
            "sequence_length": 32,
            "train_batch_size": 12,
            "per_device_train_batch_size": 2,
            "max_steps": 100_000,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            "precision": "fp32",
            "energy_monitoring_interval": 2,
        },
        "mps": {"initial_thread_percentage": 100, "shared_resources": 1},
        "policy": {"type": "hold"},
        "supervisor": {"decision_interval": 4},
        "elastic": {"num_workers": 2, "max_workers": 2},
        "checkpoint": {"every_steps": 40, "snapshot_every_steps": 10, "save_final_model": False},
        "resources": {"training_cores_per_node": 1, "cpus_per_worker": 1},
        "report": {"formats": ["json"]},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return config_from_dict(values)


class LiveRun:
    """A run in a thread. Ends with an interrupt, since its steps are far too many to be done."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.events: list[dict[str, Any]] = []
        self.result: TrainingResult | None = None
        self.failure: BaseException | None = None
        self.trainer = EnergyAdaptiveTrainer(config, on_event=self.events.append, fresh=True)
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> LiveRun:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.finish()

    def _run(self) -> None:
        try:
            self.result = self.trainer.fit()
        except BaseException as error:
            self.failure = error

    def finish(self) -> TrainingResult:
        """End the run and wait for its result."""
        self.trainer.interrupt("the test is done")
        self._thread.join(DEADLINE_S)
        assert self.failure is None, repr(self.failure)
        assert self.result is not None, "the run did not end"
        return self.result

    def until(self, what: str, condition: Callable[[], Any]) -> Any:
        """Wait for a condition to be true and return its value."""
        deadline = time.monotonic() + DEADLINE_S  # noqa: TID251
        while time.monotonic() < deadline:  # noqa: TID251
            assert self.failure is None, repr(self.failure)
            value = condition()
            if value:
                return value
            threading.Event().wait(0.1)
        raise AssertionError(f"waited in vain for {what}; last events: {self.events[-8:]}")

    def until_step(self, step: int) -> None:
        """Wait until training has done ``step`` steps."""
        self.until(f"step {step}", lambda: self.step >= step)

    @property
    def step(self) -> int:
        """Steps done, as the display was told."""
        steps = [event["status"].step or 0 for event in self.events if event["type"] == "progress"]
        return max(steps, default=0)

    def of_type(self, type_: str, /, **values: Any) -> list[dict[str, Any]]:
        """Events of one type with these values."""
        return [
            event
            for event in self.events
            if event["type"] == type_ and all(event.get(key) == value for key, value in values.items())
        ]

    @property
    def run_id(self) -> str:
        return self.until("the run's id", lambda: self.of_type("session"))[0]["run_id"]

    @property
    def coordinator(self) -> Any:
        return ray.get_actor(coordinator_name(self.run_id), namespace=NAMESPACE)

    @property
    def supervisor(self) -> Any:
        return ray.get_actor(supervisor_name(self.run_id), namespace=NAMESPACE)

    def snapshot(self) -> dict[str, Any]:
        return ray.get(self.coordinator.snapshot.remote())

    def engine_pids(self) -> set[int]:
        """Processes of all engines on all nodes."""
        pids: set[int] = set()
        for node_id in {host["node_id"] for host in self.snapshot()["hosts"]}:
            agent = ray.get_actor(agent_prefix(self.run_id) + node_id, namespace=NAMESPACE)
            pids |= set(ray.get(agent.engine_pids.remote()).values())
        return pids

    def rows(self, kind: type[SomeRow]) -> list[SomeRow]:
        """Ledger rows of one type."""
        rows = read_ledger(self.config.run_folder / "ledger").rows
        return [row for row in rows if isinstance(row, kind)]

    def losses(self) -> dict[int, float | None]:
        """Loss by step; of a step that was done twice, the later."""
        return {
            step: loss for row in self.rows(StepsRow) for step, loss in enumerate(row.loss, row.first_step)
        }


def assert_equal_losses(found: dict[int, float], wanted: dict[int, float], *, at_least: int) -> None:
    """Every step from 1 on was done, and its loss is the uninterrupted run's to 1e-5 relative."""
    assert len(found) >= at_least
    assert sorted(found) == list(range(1, len(found) + 1))
    for step in sorted(set(found) & set(wanted)):
        assert abs(found[step] - wanted[step]) <= 1e-5 * abs(wanted[step]), f"step {step}"
