"""Runs the stock loop under Ray Train, resized by ``ResizeDecision`` at steps fixed in advance."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from ray.train import CheckpointConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from eadt.adapters.ray_train import NoopDecision, ResizeDecision, ScalingDecision, ScalingPolicy
from stock.loop import train

STEPS_JUDGED = 4
"""Steps after the first by which the ordinary step at the new size is judged; the same as EADT's."""


class CommandedPolicy(ScalingPolicy):
    """Resizes as soon as every worker has reported the checkpoint that goes with it."""

    def __init__(self, scaling_config: ScalingConfig) -> None:
        super().__init__(scaling_config)
        self._target = scaling_config.num_workers
        self._reported: dict[int, int] = {}

    def _get_num_workers_for_resource_request(self) -> int:
        return self._target

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        self._maybe_send_resource_request()
        return self._decide()

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> ScalingDecision:
        self._maybe_send_resource_request()
        for rank, status in worker_group_status.worker_statuses.items():
            if status.training_report is not None:
                self._reported[rank] = status.training_report.metrics["resize_to"]
        if len(self._reported) < worker_group_state.num_workers:
            return NoopDecision()
        self._target = self._reported[0]
        self._reported.clear()
        return self._decide()

    def _decide(self) -> ResizeDecision:
        return ResizeDecision(
            num_workers=self._target,
            resources_per_worker=self.scaling_config._resources_per_worker_not_none,
        )


class CommandedTrainer(TorchTrainer):
    """A ``TorchTrainer`` with the policy above: Ray Train itself has no public place for one."""

    def _initialize_and_run_controller(self, **kwargs: Any) -> Any:
        kwargs["scaling_policy"] = CommandedPolicy(self.scaling_config)
        return super()._initialize_and_run_controller(**kwargs)


def run(
    folder: Path,
    name: str,
    loop_config: dict[str, Any],
    num_workers: int,
    resizes: dict[int, int],
    max_steps: int | None,
    cpus_per_worker: float = 1.0,
) -> list[dict[str, Any]]:
    """Train with resizes after the given steps; returns what the first rank logged."""
    folder.mkdir(parents=True, exist_ok=True)
    scratch = folder / "scratch"
    scratch.mkdir()
    log = folder / "steps.jsonl"
    trainer = CommandedTrainer if resizes else TorchTrainer
    trainer(
        train,
        train_loop_config={
            **loop_config,
            "step_log": str(log),
            "scratch": str(scratch),
            "resizes": {str(step): workers for step, workers in resizes.items()},
            "max_steps": max_steps,
        },
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=num_workers, resources_per_worker={"CPU": cpus_per_worker}),
        run_config=RunConfig(
            name=name, storage_path=str(folder / "storage"), checkpoint_config=CheckpointConfig(num_to_keep=1)
        ),
    ).fit()
    return [json.loads(line) for line in log.read_text().splitlines()]


def pauses(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The pause of each resize: end of the last step before to end of the first after, less a step."""
    found: list[dict[str, Any]] = []
    starts = [index for index, row in enumerate(rows) if row["event"] == "start"]
    for begin, end in zip(starts[1:], [*starts[2:], len(rows)], strict=True):
        before, start, after = rows[:begin], rows[begin], rows[begin + 1 : end]
        last = next(row for row in reversed(before) if row["event"] == "step")
        saved = next(row for row in reversed(before) if row["event"] == "saved")
        steps = [row for row in after if row["event"] == "step"]
        assert steps[0]["step"] == last["step"] + 1, "a step was lost or done twice"
        ordinary_s = statistics.median(row["t1"] - row["t0"] for row in steps[1 : 1 + STEPS_JUDGED])
        found.append(
            {
                "from_workers": last["world_size"],
                "to_workers": start["world_size"],
                "seconds": steps[0]["t1"] - last["t1"] - ordinary_s,
                "ordinary_step_s": ordinary_s,
                "lost_steps": 0,
                "parts": {
                    "save_s": saved["t"] - last["t1"],
                    "group_s": start["t"] - saved["t"],
                    **start["parts"],
                    "first_step_s": steps[0]["t1"] - steps[0]["t0"],
                },
                "loss_before": last["loss"],
                "loss_after": steps[0]["loss"],
            }
        )
    return found
