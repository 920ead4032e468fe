"""What DeepSpeed is given: an optimizer with the run's numbers and schedule, and none that cannot move."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from typing import Any

import pytest
import torch

from eadt.config import config_from_dict
from eadt.config.training import MOVABLE_OPTIMIZERS, TrainingConfig
from eadt.control.batch import BatchPlan
from eadt.errors import ConfigError
from eadt.training.deepspeed_setup import deepspeed_config, require_movable
from eadt.training.engine_spec import ComputeShare, EngineSpec, TrainingJob
from eadt.training.zero_state import moment_names

WEIGHT = [torch.nn.Parameter(torch.zeros(2))]


def make_spec(deepspeed: dict[str, Any], **training: Any) -> EngineSpec:
    values = {"train_function": "a:b", "warmup_steps": 2, "learning_rate": 0.25, **training}
    config = TrainingConfig.model_validate(values)
    return EngineSpec(
        engine_id="e",
        generation=1,
        rank=0,
        node_id="n",
        node_ip="127.0.0.1",
        job=TrainingJob(training=config, deepspeed=deepspeed, seed=3, precision="fp32", max_steps=10),
        batch=BatchPlan(2, 1, 2, 1),
        share=ComputeShare(),
    )


def optimizer_section(section: dict[str, Any]) -> dict[str, Any]:
    spec = make_spec({"optimizer": section}, adam_beta2=0.9, adam_epsilon=1e-5)
    return deepspeed_config(spec)["optimizer"]  # type: ignore[no-any-return]


def test_numbers_that_the_optimizer_section_leaves_out_are_those_of_training() -> None:
    assert optimizer_section({"type": "adamw", "params": {"eps": 1e-7}}) == {
        "type": "AdamW",
        "params": {"lr": 0.25, "betas": [0.9, 0.9], "eps": 1e-7, "torch_adam": True},
    }
    assert optimizer_section({"params": {"lr": 0.5, "torch_adam": False}})["type"] == "AdamW"
    assert optimizer_section({"params": {"lr": 0.5, "torch_adam": False}})["params"]["torch_adam"] is False
    assert optimizer_section({"type": "sgd", "params": {"momentum": 0.9}}) == {
        "type": "SGD",
        "params": {"lr": 0.25, "momentum": 0.9},
    }


def test_without_an_optimizer_section_there_is_none() -> None:
    assert "optimizer" not in deepspeed_config(make_spec({}))


def test_what_the_configuration_takes_can_be_carried_over() -> None:
    for name in MOVABLE_OPTIMIZERS:
        optimizer = getattr(torch.optim, name, None)
        if optimizer is not None:
            require_movable(optimizer(WEIGHT, lr=0.1))
    for name in ("FusedLion", "DeepSpeedCPULion"):
        assert moment_names(type(name, (), {})()) == ("exp_avg",)


@pytest.mark.parametrize(
    ("optimizer", "words"),
    [
        (torch.optim.AdamW(WEIGHT, amsgrad=True), "amsgrad"),
        (torch.optim.Adam([{"params": WEIGHT, "amsgrad": True}]), "amsgrad"),
        (torch.optim.RMSprop(WEIGHT), "RMSprop"),
    ],
)
def test_what_cannot_be_carried_over_is_refused(optimizer: torch.optim.Optimizer, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        require_movable(optimizer)
    assert caught.value.code == "EADT-240"
    assert caught.value.fix


@pytest.mark.parametrize("name", MOVABLE_OPTIMIZERS)
def test_the_configuration_takes_them_in_any_case(name: str) -> None:
    for spelt in (name, name.lower()):
        data = {"training": {"train_function": "a:b"}, "deepspeed": {"optimizer": {"type": spelt}}}
        assert config_from_dict(data).deepspeed.optimizer == {"type": spelt}


_RUN = """
import os, sys
import torch, torch.distributed as dist
from eadt.training.deepspeed_setup import deepspeed_config, initialize_deepspeed
from tests.unit.test_deepspeed_setup import make_spec
spec = make_spec({sections})
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
factory = {factory}
model, config = torch.nn.Linear(2, 1), deepspeed_config(spec)
engine = initialize_deepspeed(spec, model, factory, config, torch.device("cpu"))
rates = []
for _ in range(4):
    loss = engine(torch.ones(2, 2)).sum()
    engine.backward(loss)
    rates.append(engine.optimizer.param_groups[0]["lr"])
    engine.step()
print(rates)
"""


def train(sections: dict[str, Any], factory: str = "None") -> subprocess.CompletedProcess[str]:
    """Four steps of the real thing, in a process of its own, since DeepSpeed changes the one it is in."""
    code = _RUN.format(sections=sections, factory=factory)
    env = {"PATH": "", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "RANK": "0", "LOCAL_RANK": "0"}
    env |= {"WORLD_SIZE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=env, check=False
    )


def test_the_schedule_of_training_holds_with_an_optimizer_of_deepspeed() -> None:
    result = train({"zero_optimization": {"stage": 1}, "optimizer": {"type": "SGD"}})
    assert result.returncode == 0, result.stderr
    rates = json.loads(result.stdout.splitlines()[-1])
    cosine = 0.25 * (1 + math.cos(math.pi / 8)) / 2  # one of the eight steps after two of warm-up
    assert rates == pytest.approx([0.0, 0.125, 0.25, cosine])


def test_a_users_optimizer_that_cannot_be_carried_over_is_refused_before_deepspeed_takes_it() -> None:
    result = train({}, factory="lambda model: torch.optim.AdamW(model.parameters(), amsgrad=True)")
    assert "EADT-240" in result.stderr
    assert result.returncode == 1
