"""Tiny runs without Ray, for the tests of elasticity: their configurations, and how they are compared."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from eadt.config import RunConfig, config_from_dict
from eadt.control.setpoint import Setpoint
from eadt.testing.faults import FaultPlan
from eadt.testing.local_run import Action, LocalResult, WarmEngines, run_local

MODELS: dict[str, dict[str, Any]] = {
    "gpt_neox": {"model_type": "gpt_neox"},
    "llama": {"model_type": "llama", "num_key_value_heads": 1, "tie_word_embeddings": True},
}
MAX_STEPS = 18
SHARE = 50
"""One of the machine's two cores for each engine, so that no more threads than that compete."""


class Trial:
    """What one test needs to make runs.

    Args:
        engines: The session's warm fork server.
        text: A text file to train on.
        folder: The test's own folder.
        calm_runs: Uninterrupted runs of this session, by configuration.
    """

    def __init__(
        self, engines: WarmEngines, text: Path, folder: Path, calm_runs: dict[str, LocalResult]
    ) -> None:
        self._engines = engines
        self._text = text
        self._folder = folder
        self._attempts = itertools.count()
        self._calm_runs = calm_runs

    def config(
        self,
        name: str,
        *,
        model: str = "gpt_neox",
        stage: int = 1,
        precision: str = "fp32",
        num_workers: int = 2,
        training: dict[str, Any] | None = None,
        deepspeed: dict[str, Any] | None = None,
        elastic: dict[str, Any] | None = None,
        checkpoint: dict[str, Any] | None = None,
    ) -> RunConfig:
        """A run in a folder of that name: 12 samples a step, clipped, warm-up and cosine, weight decay."""
        shape = {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "max_position_embeddings": 64,
        }
        schedule = {} if deepspeed and "scheduler" in deepspeed else {"warmup_steps": 4}
        rate = {} if deepspeed and "optimizer" in deepspeed else {"learning_rate": 3e-3, "weight_decay": 0.1}
        return config_from_dict(
            {
                "run": {"name": name, "folder": str(self._folder / name)},
                "training": {
                    "model_config": {**MODELS[model], **shape},
                    "tokenizer_name_or_path": "byte",
                    "dataset_path": str(self._text),
                    "sequence_length": 32,
                    "train_batch_size": 12,
                    "per_device_train_batch_size": 3,
                    "max_steps": MAX_STEPS,
                    "max_grad_norm": 0.5,
                    "eval_batches": 1,
                    "precision": precision,
                    **schedule,
                    **rate,
                    **(training or {}),
                },
                "deepspeed": {"zero_optimization": {"stage": stage}, **(deepspeed or {})},
                "mps": {"initial_thread_percentage": SHARE},
                "elastic": {"num_workers": num_workers, "prepare_ahead": "always", **(elastic or {})},
                "checkpoint": {
                    "every_steps": None,
                    "snapshot_every_steps": None,
                    "save_final_model": False,
                    **(checkpoint or {}),
                },
                "power": {"source": "estimate"},
            }
        )

    def expected(self, **options: Any) -> LocalResult:
        """The run that nothing happens to; takes what :meth:`config` takes. Done once a session."""
        config = self.config("expected", **options)
        key = config.model_dump_json(exclude={"run"})
        if key not in self._calm_runs:
            self._calm_runs[key] = self.run(config)
        return self._calm_runs[key]

    def run(
        self,
        config: RunConfig,
        schedule: Sequence[tuple[int, Action]] = (),
        *,
        nodes: Sequence[int] = (4,),
        plan_faults: Callable[[FaultPlan], None] | None = None,
        **node_options: Any,
    ) -> LocalResult:
        """Carry it through; see :func:`run_local`."""
        return run_local(
            config,
            self._engines,
            self._folder / f"attempt-{next(self._attempts)}",
            nodes=nodes,
            schedule=schedule,
            plan_faults=plan_faults,
            **node_options,
        )


def setpoint(num_workers: int, precision: str = "fp32", share: int = SHARE, num_nodes: int = 1) -> Setpoint:
    """A setpoint with as many workers a node as it takes."""
    return Setpoint(num_workers, math.ceil(num_workers / num_nodes), share, precision=precision)


def assert_same_losses(
    result: LocalResult, expected: LocalResult, tolerance: float = 1e-5, *, after: int = 0
) -> None:
    """All steps after ``after`` were done, each with the loss of the uninterrupted run."""
    assert result.status == "completed", result.error
    assert expected.status == "completed", expected.error
    assert sorted(expected.losses) == list(range(1, MAX_STEPS + 1))
    assert sorted(result.losses) == list(range(after + 1, MAX_STEPS + 1))
    apart = {
        step: abs(loss - expected.losses[step]) / abs(expected.losses[step])
        for step, loss in result.losses.items()
    }
    assert max(apart.values()) <= tolerance, apart
    # Losses that stand still would be equal whatever happened to the optimizer's state.
    assert expected.losses[MAX_STEPS] < 0.95 * expected.losses[1]


def assert_each_sample_once(result: LocalResult, expected: LocalResult) -> None:
    """No sample was lost or repeated, and each was used in the step that it belongs to."""
    assert {step: sorted(rows) for step, rows in result.samples.items()} == {
        step: sorted(rows) for step, rows in expected.samples.items()
    }
    taken = [row for rows in result.samples.values() for row in rows]
    assert len(taken) == len(set(taken)) == 12 * MAX_STEPS
