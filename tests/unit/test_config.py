"""Configuration: its defaults, its checks and the errors a user sees. Reads files in a temporary folder."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from pydantic import ValidationError

from eadt.config import (
    InvalidConfigError,
    MpsConfig,
    RunConfig,
    TrainingConfig,
    check_paths,
    config_from_dict,
    inactive_settings,
    json_schema,
    load_config,
    reference_markdown,
    require_paths,
)
from eadt.config.aliases import ALIASES
from eadt.config.base import join_key, split_key
from eadt.config.checks import require_precision
from eadt.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"
EXAMPLES = sorted(CONFIGS.glob("*.yaml"))

ISSUE_SAMPLE = """
training:
  model_name_or_path: "EleutherAI/pythia-410m"
  dataset_name: "wikitext"
  per_device_train_batch_size: 4
  gradient_accumulation_steps: 16
  energy_monitoring_interval: 60
  energy_efficiency_threshold: 0.75
  adaptive_precision: true
  dynamic_layer_freezing: true
deepspeed:
  zero_optimization:
    stage: 3
  adaptive_training:
    enabled: true
    energy_threshold_high: 250
    energy_threshold_low: 150
mps:
  enabled: true
  initial_thread_percentage: 50
  shared_resources: 2
"""


def minimal(**sections: Any) -> dict[str, Any]:
    """The shortest valid configuration, with whole sections replaced or keys of ``training`` added."""
    training = {"model_name_or_path": "gpt2", "dataset_name": "wikitext", **sections.pop("training", {})}
    return {"training": training, **sections}


def problems_of(data: dict[str, Any]) -> dict[str, str]:
    """Messages by key."""
    with pytest.raises(InvalidConfigError) as caught:
        config_from_dict(data)
    return {problem.key: problem.message for problem in caught.value.problems}


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write_file(text: str, name: str = "my run.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write_file


class TestGoodFiles:
    @pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
    def test_examples_load_and_match_the_schema(self, path: Path) -> None:
        config = load_config(path)
        assert config.run.name == path.stem
        jsonschema.validate(yaml.safe_load(path.read_text()), _lenient_numbers(json_schema()))

    def test_the_example_file_holds_the_keys_of_the_issue(self) -> None:
        assert yaml.safe_load((CONFIGS / "training_config.yaml").read_text()) == yaml.safe_load(ISSUE_SAMPLE)

    def test_values_of_the_sample(self, write: Any) -> None:
        config = load_config(write(ISSUE_SAMPLE))
        assert config.training.model_name_or_path == "EleutherAI/pythia-410m"
        assert config.training.model_init == "pretrained"
        assert config.deepspeed.zero_stage == 3
        assert (config.mps.thread_percentage, config.mps.workers_per_gpu) == (50, 2)
        assert config.train_batch_size(num_workers=6) == 4 * 16 * 6
        assert config.run.name == "my-run"
        assert config.run_folder == Path("runs/my-run")
        assert config.storage_path == "runs/my-run"

    def test_design_defaults(self) -> None:
        config = config_from_dict(minimal())
        policy = config.policy
        assert (policy.power_high_w, policy.power_low_w) == (250, 200)
        assert (policy.efficiency_low, policy.efficiency_high) == (0.1, 0.2)
        assert (policy.thread_decrease_step, policy.thread_increase_step, policy.thread_scale_step) == (
            10,
            10,
            15,
        )
        assert (policy.min_thread_percentage, policy.max_workers_per_gpu) == (25, 4)
        assert config.training.energy_monitoring_interval == 60
        assert config.supervisor.decision_interval == 300
        assert config.deepspeed.zero_stage == 1

    def test_empty_sections_mean_the_defaults(self, write: Any) -> None:
        text = "elastic:\nmps:\nrun:\ntraining: {model_name_or_path: gpt2, dataset_name: wikitext}\n"
        assert load_config(write(text)).elastic.mode == "auto"

    def test_frozen(self) -> None:
        config = config_from_dict(minimal())
        with pytest.raises(ValidationError):
            config.training.max_steps = 3  # type: ignore[misc]

    def test_round_trips_through_json_and_pickle(self) -> None:
        data = minimal(
            training={"model_config": {"attention_dropout": 0.0}},
            deepspeed={"gradient_clipping": 0.5, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}},
        )
        config = config_from_dict(data)
        dumped = json.loads(json.dumps(config.model_dump(mode="json")))
        assert config_from_dict(dumped).model_dump() == config.model_dump()
        assert pickle.loads(pickle.dumps(config)) == config

    def test_exponent_without_a_dot_is_a_number(self, write: Any) -> None:
        text = "training: {model_name_or_path: gpt2, dataset_name: wikitext, learning_rate: 5e-5}"
        assert load_config(write(text)).training.learning_rate == 5e-5

    def test_anchors_and_merge_keys(self, write: Any) -> None:
        text = (
            "training: {model_name_or_path: gpt2, dataset_name: wikitext, train_function_args: {}}\n"
            "power:\n  estimate: &e {idle_w: 20}\n  simulated:\n    <<: *e\n"
        )
        assert load_config(write(text)).power.simulated.idle_w == 20

    def test_random_init_without_a_name(self) -> None:
        training = {
            "model_config": {"model_type": "llama"},
            "tokenizer_name_or_path": "byte",
            "dataset_path": "python-stdlib",
        }
        config = config_from_dict({"training": training})
        assert config.training.model_init == "random"
        assert config.training.model_config_overrides == {"model_type": "llama"}

    def test_train_function_needs_neither_model_nor_data(self) -> None:
        config = config_from_dict({"training": {"train_function": "my_project.train:main"}})
        assert config.training.train_function == "my_project.train:main"

    def test_home_is_expanded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", "/somewhere")
        config = config_from_dict(minimal(storage={"path": "~/out"}))
        assert config.storage_path == "/somewhere/out"

    def test_python_names_are_checked_too(self) -> None:
        training = TrainingConfig(model_name_or_path="gpt2", dataset_name="wikitext", max_steps=5)
        assert RunConfig(training=training).training.max_steps == 5


class TestDeepSpeed:
    def test_any_key_is_passed_through(self) -> None:
        section = {"zero_optimization": {"stage": 2, "overlap_comm": True}, "steps_per_print": 7}
        config = config_from_dict(minimal(deepspeed={**section, "adaptive_training": {"enabled": True}}))
        assert config.deepspeed.passthrough() == section

    def test_stage_defaults_beside_other_keys(self) -> None:
        config = config_from_dict(minimal(deepspeed={"zero_optimization": {"overlap_comm": True}}))
        assert config.deepspeed.passthrough()["zero_optimization"] == {"stage": 1, "overlap_comm": True}

    @pytest.mark.parametrize("stage", [-1, 4, "3", True, 1.5])
    def test_stage_is_0_to_3(self, stage: Any) -> None:
        found = problems_of(minimal(deepspeed={"zero_optimization": {"stage": stage}}))
        assert "must be 0, 1, 2 or 3" in found["deepspeed.zero_optimization.stage"]

    @pytest.mark.parametrize(
        ("key", "place"),
        [
            ("train_batch_size", "training.train_batch_size"),
            ("train_micro_batch_size_per_gpu", "training.per_device_train_batch_size"),
            ("gradient_accumulation_steps", "training.gradient_accumulation_steps"),
        ],
    )
    def test_keys_that_eadt_sets_are_refused(self, key: str, place: str) -> None:
        assert place in problems_of(minimal(deepspeed={key: 8}))[f"deepspeed.{key}"]

    def test_misspelt_deepspeed_key(self) -> None:
        found = problems_of(minimal(deepspeed={"zero_optimisation": {"stage": 2}}))
        assert "zero_optimization" in found["deepspeed.zero_optimisation"]

    def test_auto_is_refused_where_it_stands(self) -> None:
        section = {"optimizer": {"params": {"betas": [0.9, "auto"]}}, "bf16": {"enabled": "auto"}}
        found = problems_of(minimal(deepspeed=section))
        assert set(found) == {"deepspeed.optimizer.params.betas[1]", "deepspeed.bf16.enabled"}

    def test_values_are_adopted_by_training(self) -> None:
        params = {"lr": 1e-3, "betas": [0.8, 0.99], "eps": 1e-6, "weight_decay": 0}
        config = config_from_dict(
            minimal(
                deepspeed={
                    "gradient_clipping": 0.5,
                    "bf16": {"enabled": True},
                    "optimizer": {"params": params},
                }
            )
        )
        training = config.training
        assert training.max_grad_norm == 0.5
        assert training.precision == "bf16"
        assert (training.learning_rate, training.weight_decay, training.adam_epsilon) == (1e-3, 0, 1e-6)
        assert (training.adam_beta1, training.adam_beta2) == (0.8, 0.99)

    @pytest.mark.parametrize(
        ("training", "deepspeed", "key", "other"),
        [
            (
                {"max_grad_norm": 1.0},
                {"gradient_clipping": 0.5},
                "deepspeed.gradient_clipping",
                "max_grad_norm",
            ),
            ({"precision": "fp32"}, {"bf16": {"enabled": True}}, "deepspeed.bf16.enabled", "precision"),
            ({"precision": "bf16"}, {"fp16": {"enabled": True}}, "deepspeed.fp16.enabled", "precision"),
            (
                {"learning_rate": 1e-4},
                {"optimizer": {"params": {"lr": 1e-3}}},
                "deepspeed.optimizer.params.lr",
                "learning_rate",
            ),
            ({"warmup_steps": 5}, {"scheduler": {"type": "OneCycle"}}, "deepspeed.scheduler", "warmup_steps"),
        ],
    )
    def test_contradictions(
        self, training: dict[str, Any], deepspeed: dict[str, Any], key: str, other: str
    ) -> None:
        assert f"training.{other}" in problems_of(minimal(training=training, deepspeed=deepspeed))[key]

    def test_equal_values_are_no_contradiction(self) -> None:
        config = config_from_dict(
            minimal(training={"max_grad_norm": 0.5}, deepspeed={"gradient_clipping": 0.5})
        )
        assert config.training.max_grad_norm == 0.5

    def test_two_precisions(self) -> None:
        section = {"bf16": {"enabled": True}, "fp16": {"enabled": True}}
        assert "keep one" in problems_of(minimal(deepspeed=section))["deepspeed.fp16.enabled"]


class TestMps:
    @pytest.mark.parametrize(
        ("section", "expected"),
        [
            ({}, (50, 2)),
            ({"preset": "max_single_process"}, (100, 1)),
            ({"preset": "balanced"}, (50, 2)),
            ({"preset": "max_parallel"}, (25, 4)),
            ({"shared_resources": 4}, (25, 4)),
            ({"shared_resources": 1}, (100, 1)),
            ({"initial_thread_percentage": 100}, (100, 1)),
            ({"initial_thread_percentage": 10}, (10, 4)),
            ({"initial_thread_percentage": 35, "shared_resources": 3}, (35, 3)),
            ({"preset": "balanced", "initial_thread_percentage": 50}, (50, 2)),
            ({"enabled": False, "preset": "max_parallel"}, (100, 1)),
        ],
    )
    def test_share_and_count(self, section: dict[str, Any], expected: tuple[int, int]) -> None:
        mps = MpsConfig.model_validate(section)
        assert (mps.thread_percentage, mps.workers_per_gpu) == expected

    def test_numbers_against_the_preset(self) -> None:
        section = {"preset": "balanced", "initial_thread_percentage": 40, "shared_resources": 3}
        found = problems_of(minimal(mps=section))
        assert "means 50" in found["mps.initial_thread_percentage"]
        assert "means 2" in found["mps.shared_resources"]


@pytest.mark.parametrize(
    ("data", "key", "words"),
    [
        ({"training": {"dataset_name": "x"}}, "training.model_name_or_path", "no model"),
        ({"training": {"model_name_or_path": "gpt2"}}, "training.dataset_path", "no data"),
        (
            {"training": {"dataset_name": "x", "model_config": {"model_type": "gpt_neox"}}},
            "training.tokenizer_name_or_path",
            "byte",
        ),
        (
            {
                "training": {
                    "dataset_name": "x",
                    "model_config": {"model_type": "llama"},
                    "tokenizer_name_or_path": "byte",
                    "model_init": "pretrained",
                }
            },
            "training.model_init",
            "model_init: random",
        ),
        (
            minimal(training={"model_config": {"model_type": "llama"}}),
            "training.model_config.model_type",
            "contradicts",
        ),
        (minimal(training={"dataset_path": "x"}), "training.dataset_path", "two data sets"),
        (
            minimal(training={"dataset_file_pattern": "*.txt"}),
            "training.dataset_file_pattern",
            "dataset_path",
        ),
        (
            {
                "training": {
                    "model_name_or_path": "m",
                    "dataset_path": "python-stdlib",
                    "dataset_config_name": "c",
                }
            },
            "training.dataset_config_name",
            "dataset_name",
        ),
        (minimal(training={"max_steps": 10, "warmup_steps": 10}), "training.warmup_steps", "max_steps"),
        (
            minimal(training={"eval_steps": 10, "validation_fraction": 0.0}),
            "training.eval_steps",
            "validation_fraction",
        ),
        (
            minimal(training={"train_function_args": {"a": 1}}),
            "training.train_function_args",
            "train_function",
        ),
        (minimal(training={"train_function": "a.b.c"}), "training.train_function", "module:function"),
        (minimal(training={"train_function": "a-b:c"}), "training.train_function", "module:function"),
        (
            minimal(deepspeed={"adaptive_training": {"energy_threshold_low": 300}}),
            "deepspeed.adaptive_training.energy_threshold_low",
            "energy_threshold_high",
        ),
        (minimal(policy={"power_low_w": 260}), "policy.power_low_w", "power_high_w"),
        (minimal(policy={"efficiency_low": 0.3}), "policy.efficiency_low", "efficiency_high"),
        (minimal(policy={"type": "schedule"}), "policy.schedule", "at_step"),
        (
            minimal(policy={"schedule": [{"at_step": 1, "num_workers": 1}]}),
            "policy.schedule",
            "policy.type schedule",
        ),
        (
            minimal(policy={"type": "schedule", "schedule": [{"at_step": 1}]}),
            "policy.schedule[0]",
            "nothing",
        ),
        (
            minimal(
                policy={
                    "type": "schedule",
                    "schedule": [{"at_step": 2, "num_workers": 1}, {"at_step": 2, "num_workers": 2}],
                }
            ),
            "policy.schedule[1].at_step",
            "rise",
        ),
        (
            minimal(
                policy={"type": "schedule", "schedule": [{"at_step": 2, "num_workers": 4}]},
                elastic={"max_workers": 3},
            ),
            "policy.schedule[0].num_workers",
            "1 to 3",
        ),
        (
            minimal(
                policy={"type": "schedule", "schedule": [{"at_step": 2, "num_workers": 4}]},
                supervisor={"enabled": False},
            ),
            "policy.type",
            "supervisor.enabled",
        ),
        (minimal(elastic={"min_workers": 4, "max_workers": 3}), "elastic.min_workers", "max_workers"),
        (minimal(elastic={"num_workers": 1, "min_workers": 2}), "elastic.num_workers", "min_workers"),
        (minimal(elastic={"num_workers": 4, "max_workers": 3}), "elastic.num_workers", "max_workers"),
        (minimal(power={"simulated": {"idle_w": 400}}), "power.simulated.idle_w", "max_w"),
        (
            minimal(training={"energy_monitoring_interval": 301}),
            "supervisor.decision_interval",
            "energy_monitoring_interval",
        ),
        (minimal(power={"sampling_interval": 61}), "power.sampling_interval", "energy_monitoring_interval"),
        (
            minimal(mps={"initial_thread_percentage": 20}),
            "mps.initial_thread_percentage",
            "min_thread_percentage",
        ),
        (
            minimal(mps={"shared_resources": 3}, policy={"max_workers_per_gpu": 2}),
            "mps.shared_resources",
            "max_workers_per_gpu",
        ),
        (
            minimal(training={"precision": "fp16"}, resources={"use_gpu": False}),
            "training.precision",
            "set training.precision: bf16 or fp32, or resources.use_gpu: true",
        ),
        (
            minimal(deepspeed={"fp16": {"enabled": True}}, resources={"use_gpu": False}),
            "deepspeed.fp16.enabled",
            "bf16",
        ),
        (
            minimal(training={"model_config": {"n_positions": 512}}),
            "training.sequence_length",
            "1024 tokens are more than the model's 512 positions",
        ),
        (
            minimal(deepspeed={"optimizer": {"type": "Muon"}}),
            "deepspeed.optimizer.type",
            "AdamW, Adam, Lion or SGD",
        ),
        (minimal(deepspeed={"optimizer": {"type": 3}}), "deepspeed.optimizer.type", "AdamW"),
        (minimal(deepspeed={"optimizer": {"params": 3}}), "deepspeed.optimizer.params", "mapping"),
        (minimal(deepspeed={"optimizer": {"type": "auto"}}), "deepspeed.optimizer.type", "'auto'"),
        (
            minimal(deepspeed={"optimizer": {"type": "Adam", "params": {"amsgrad": True}}}),
            "deepspeed.optimizer.params.amsgrad",
            "amsgrad",
        ),
        (minimal(run={"name": "../x"}), "run.name", "letter or digit"),
        (minimal(storage={"path": " "}), "storage.path", "empty"),
        (minimal(training={"learning_rate": float("nan")}), "training.learning_rate", "finite"),
        (minimal(training={"max_steps": True}), "training.max_steps", "whole number, not true"),
        (minimal(training={"sequence_length": 1}), "training.sequence_length", "at least 2"),
        (minimal(training={"validation_fraction": 1}), "training.validation_fraction", "below 1"),
        (minimal(training={"dataset_name": 5}), "training.dataset_name", "quotes"),
        (
            minimal(training={"adaptive_precision": {"enabled": "yes"}}),
            "training.adaptive_precision",
            "true or false",
        ),
        (minimal(elastic={"mode": "inplace"}), "elastic.mode", "did you mean in_place?"),
        (minimal(report={"formats": ["pdf"]}), "report.formats[0]", "json, markdown or html"),
        (minimal(mps=3), "mps", "a mapping of keys"),
    ],
)
def test_each_wrong_value_is_named_with_what_to_change(data: dict[str, Any], key: str, words: str) -> None:
    found = problems_of(data)
    assert words in found[key]
    assert len(found) == 1, f"one cause, one message, but got {found}"


@pytest.mark.parametrize(
    "data",
    [
        minimal(training={"precision": "fp16"}, resources={"use_gpu": True}),
        minimal(training={"precision": "fp16"}),
        minimal(training={"precision": "bf16"}, resources={"use_gpu": False}),
        minimal(training={"sequence_length": 512, "model_config": {"n_positions": 512}}),
        minimal(training={"model_config": {"max_position_embeddings": -1}}),
        minimal(training={"model_config": {"n_positions": 8}, "train_function": "a:b"}),
        minimal(deepspeed={"optimizer": {"type": "Adam", "params": {"amsgrad": False}}}),
    ],
)
def test_what_may_work_is_accepted(data: dict[str, Any]) -> None:
    config_from_dict(data)


@pytest.mark.parametrize(
    ("precision", "is_gpu", "refused"),
    [("fp16", False, True), ("fp16", True, False), ("bf16", False, False), (None, False, False)],
)
def test_fp16_is_refused_where_there_is_no_gpu(precision: str | None, is_gpu: bool, refused: bool) -> None:
    config = config_from_dict(minimal(training={"precision": precision}))
    if not refused:
        require_precision(config, is_gpu=is_gpu)
        return
    with pytest.raises(InvalidConfigError, match=r"training\.precision: fp16 is for GPUs") as caught:
        require_precision(config, is_gpu=is_gpu)
    assert caught.value.code == "EADT-201"


def test_boundary_values_are_accepted() -> None:
    config = config_from_dict(
        minimal(
            training={"energy_monitoring_interval": 300, "max_steps": 10, "warmup_steps": 9},
            elastic={"num_workers": 3, "min_workers": 3, "max_workers": 3},
            mps={"initial_thread_percentage": 25, "shared_resources": 4},
        )
    )
    assert config.elastic.num_workers == 3


@pytest.mark.parametrize(
    ("data", "key", "nearest"),
    [
        (minimal(training={"sequence_lenght": 3}), "training.sequence_lenght", "training.sequence_length"),
        (minimal(training={"modelconfig": {}}), "training.modelconfig", "training.model_config"),
        (minimal(elastic={"max_steps": 3}), "elastic.max_steps", "training.max_steps"),
        (minimal(training={"seed": 3}), "training.seed", "run.seed"),
        (minimal(checkpoints={}), "checkpoints", "checkpoint"),
        (minimal(training={"lr": 1e-3}), "training.lr", "training.learning_rate"),
        (minimal(training={"LR": 1e-3}), "training.LR", "training.learning_rate"),
        (minimal(lr=1e-3), "lr", "training.learning_rate"),
        (minimal(training={"epochs": 3}), "training.epochs", "training.num_train_epochs"),
        (minimal(training={"batch-size": 3}), "training.batch-size", "training.train_batch_size"),
        (minimal(training={"steps": 3}), "training.steps", "training.max_steps"),
        (minimal(seed=3), "seed", "run.seed"),
        (minimal(mps={"workers_per_gpu": 2}), "mps.workers_per_gpu", "mps.shared_resources"),
        (minimal(elastic={"num_gpus": 2}), "elastic.num_gpus", "resources.use_gpu"),
        (minimal(power={"simulated": {"wattage": 3}}), "power.simulated.wattage", None),
        (
            minimal(policy={"type": "schedule", "schedule": [{"at_stp": 3, "num_workers": 1}]}),
            "policy.schedule[0].at_stp",
            "policy.schedule[0].at_step",
        ),
    ],
)
def test_unknown_keys_get_the_nearest_valid_one(data: dict[str, Any], key: str, nearest: str | None) -> None:
    with pytest.raises(InvalidConfigError) as caught:
        config_from_dict(data)
    (problem,) = caught.value.problems
    assert (problem.key, problem.nearest) == (key, nearest)
    if nearest is None:
        assert "max_w" in problem.message
        assert "num_gpus" in problem.message


@pytest.mark.parametrize(
    ("data", "key", "message"),
    [
        (
            minimal(training={"batch_size": 3}),
            "training.batch_size",
            "unknown key; did you mean train_batch_size or per_device_train_batch_size?",
        ),
        (
            minimal(output_dir="x"),
            "output_dir",
            "unknown key here; did you mean run.folder or storage.path?",
        ),
        (
            minimal(training={"adam_beta": 0.9}),
            "training.adam_beta",
            "unknown key; did you mean adam_beta1 or adam_beta2?",
        ),
        (minimal(training={"max_step": 3}), "training.max_step", "unknown key; did you mean max_steps?"),
        (
            minimal(deepspeed={"stage": 3}),
            "deepspeed.stage",
            "unknown key, which DeepSpeed would ignore; did you mean deepspeed.zero_optimization.stage?",
        ),
    ],
)
def test_the_few_names_that_may_be_meant_are_named(data: dict[str, Any], key: str, message: str) -> None:
    assert problems_of(data) == {key: message}


def test_an_alias_of_what_a_run_needs_is_the_only_problem() -> None:
    training = {"model": "gpt2", "dataset": "wikitext"}
    assert problems_of({"training": training}) == {
        "training.model": "unknown key; did you mean model_name_or_path or model_config?",
        "training.dataset": "unknown key; did you mean dataset_name or dataset_path?",
    }


def test_aliases_are_no_keys_and_lead_to_keys() -> None:
    everywhere = set(reference_keys())
    for alias, keys in ALIASES.items():
        assert f"training.{alias}" not in everywhere, alias
        assert set(keys) - {"deepspeed.zero_optimization.stage"} <= everywhere, alias


def reference_keys() -> list[str]:
    return [
        f"{section}.{inner.alias or name}"
        for section, field in RunConfig.model_fields.items()
        for name, inner in field.annotation.model_fields.items()  # type: ignore[union-attr]
    ]


def test_conflicts_within_a_section_hide_none_across_sections() -> None:
    found = problems_of(
        minimal(training={"warmup_steps": 9, "max_steps": 3}, power={"sampling_interval": 61.0})
    )
    assert set(found) == {"training.warmup_steps", "power.sampling_interval"}


class TestErrorsOfAFile:
    TEXT = """\
training:
  model_name_or_path: gpt2
  dataset_name: wikitext
  dataset_path: also-this
  max_steps: many
  sequence_lenght: 64
deepspeed:
  train_batch_size: 5
elastic:
  min_workers: 5
  max_workers: 3
  lease_s: 0
"""

    def test_all_at_once_with_file_and_line(self, write: Any) -> None:
        path = write(self.TEXT)
        with pytest.raises(InvalidConfigError) as caught:
            load_config(path)
        error = caught.value
        assert [(p.line, p.key) for p in error.problems] == [
            (4, "training.dataset_path"),
            (5, "training.max_steps"),
            (6, "training.sequence_lenght"),
            (8, "deepspeed.train_batch_size"),
            (10, "elastic.min_workers"),
            (12, "elastic.lease_s"),
        ]
        assert error.exit_status == 2
        assert error.code == "EADT-201"
        for problem in error.problems:
            assert f"{path}:{problem.line}: {problem.key}: {problem.message}" in str(error)

    def test_no_consequences_of_other_errors(self, write: Any) -> None:
        text = "training:\n  model_name_or_pth: gpt2\n  dataset_name: 7\n"
        with pytest.raises(InvalidConfigError) as caught:
            load_config(write(text))
        assert [p.key for p in caught.value.problems] == [
            "training.model_name_or_pth",
            "training.dataset_name",
        ]

    def test_survives_pickling(self, write: Any) -> None:
        with pytest.raises(InvalidConfigError) as caught:
            load_config(write(self.TEXT))
        copy = pickle.loads(pickle.dumps(caught.value))
        assert copy.problems == caught.value.problems
        assert str(copy) == str(caught.value)

    def test_key_given_twice(self, write: Any) -> None:
        text = "training:\n  model_name_or_path: gpt2\n  dataset_name: w\n  model_name_or_path: gpt2\n"
        with pytest.raises(
            InvalidConfigError, match=r"yaml:4: training.model_name_or_path: given twice.*line 2"
        ):
            load_config(write(text))

    def test_key_that_is_no_text(self, write: Any) -> None:
        text = "training: {model_name_or_path: gpt2, dataset_name: w}\n1: 2\n"
        with pytest.raises(InvalidConfigError) as caught:
            load_config(write(text))
        (problem,) = caught.value.problems
        assert problem.line == 2
        assert "must be text" in problem.message

    def test_alias_to_itself(self, write: Any) -> None:
        with pytest.raises(InvalidConfigError, match="refers to itself"):
            load_config(write("training: &t\n  train_function_args: *t\n"))

    @pytest.mark.parametrize("text", ["", "# only a comment\n", "---\n"])
    def test_empty(self, write: Any, text: str) -> None:
        with pytest.raises(ConfigError, match=r"empty|holds nothing"):
            load_config(write(text))

    @pytest.mark.parametrize(("text", "kind"), [("- a\n", "a list"), ("hello\n", "the text 'hello'")])
    def test_no_sections(self, write: Any, text: str, kind: str) -> None:
        with pytest.raises(ConfigError, match=kind):
            load_config(write(text))

    def test_no_training(self, write: Any) -> None:
        with pytest.raises(InvalidConfigError, match="training: is missing"):
            load_config(write("mps:\n  enabled: true\n"))

    @pytest.mark.parametrize(
        ("text", "place"),
        [
            ("training:\n  a: [1\n", ":3:"),
            ("training:\n\ta: 1\n", ":2:"),
            ("a: 1\n---\nb: 2\n", ":2:"),
            ("a: !!python/object:os.system {}\n", ":1:"),
            ("a: *nowhere\n", ":1:"),
        ],
    )
    def test_not_yaml(self, write: Any, text: str, place: str) -> None:
        with pytest.raises(ConfigError, match="not valid YAML") as caught:
            load_config(write(text))
        assert caught.value.code == "EADT-203"
        assert place in caught.value.what

    def test_control_character(self, write: Any) -> None:
        with pytest.raises(ConfigError, match="not valid YAML"):
            load_config(write("a: \x00\n"))

    def test_missing_file_names_a_near_one(self, write: Any) -> None:
        path = write("a: 1", name="quickstart.yaml")
        with pytest.raises(ConfigError, match="there is no file") as caught:
            load_config(path.with_name("quikstart.yaml"))
        assert caught.value.code == "EADT-202"
        assert "quickstart.yaml" in caught.value.fix

    def test_folder(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="is a folder"):
            load_config(tmp_path)

    def test_path_through_a_file(self, write: Any) -> None:
        with pytest.raises(ConfigError, match="cannot be read"):
            load_config(write("a: 1") / "x.yaml")

    def test_not_utf8(self, tmp_path: Path) -> None:
        path = tmp_path / "latin.yaml"
        path.write_bytes("training:\n  dataset_name: café\n".encode("latin-1"))
        with pytest.raises(ConfigError, match=r"latin\.yaml:2: not UTF-8"):
            load_config(path)

    def test_byte_order_mark_is_harmless(self, tmp_path: Path) -> None:
        path = tmp_path / "bom.yaml"
        path.write_bytes(b"\xef\xbb\xbftraining: {model_name_or_path: gpt2, dataset_name: w}\n")
        assert load_config(path).training.dataset_name == "w"


class TestPaths:
    @pytest.fixture(autouse=True)
    def _in_empty_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)

    @staticmethod
    def found(**sections: Any) -> dict[str, str]:
        training = {"model_name_or_path": "gpt2", "dataset_path": "python-stdlib"}
        data = {**sections, "training": {**training, **sections.get("training", {})}}
        return {p.key: p.message for p in check_paths(config_from_dict(data))}

    def test_nothing_wrong(self) -> None:
        assert self.found() == {}

    def test_hub_names_and_remote_storage_are_left_alone(self) -> None:
        training = {"model_name_or_path": "EleutherAI/pythia-70m", "tokenizer_name_or_path": "byte"}
        assert self.found(training=training, storage={"path": "s3://bucket/x"}) == {}

    def test_missing_data(self) -> None:
        assert (
            "there is no file or folder"
            in self.found(training={"dataset_path": "data"})["training.dataset_path"]
        )

    def test_data(self, tmp_path: Path) -> None:
        data = tmp_path / "data"
        (data / "deep").mkdir(parents=True)
        check = {"training": {"dataset_path": "data"}}
        assert "holds no data" in self.found(**check)["training.dataset_path"]
        (data / "deep" / "a.txt").touch()
        (data / ".hidden").write_text("x")
        assert "are empty" in self.found(**check)["training.dataset_path"]
        (data / "deep" / "b.txt").write_text("words")
        assert self.found(**check) == {}
        check["training"]["dataset_file_pattern"] = "*.jsonl"
        assert "'*.jsonl'" in self.found(**check)["training.dataset_path"]
        check["training"]["dataset_file_pattern"] = "**/*.txt"
        assert self.found(**check) == {}

    def test_empty_file(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").touch()
        assert "is empty" in self.found(training={"dataset_path": "a.txt"})["training.dataset_path"]

    @pytest.mark.parametrize("name", ["./model", "/nowhere/model", "a/b/c", "models/tiny"])
    def test_missing_model_folder(self, tmp_path: Path, name: str) -> None:
        (tmp_path / "models").mkdir()
        training = {"model_name_or_path": name, "tokenizer_name_or_path": name}
        assert set(self.found(training=training)) == {
            "training.model_name_or_path",
            "training.tokenizer_name_or_path",
        }

    def test_model_folder(self, tmp_path: Path) -> None:
        folder = tmp_path / "model"
        folder.mkdir()
        training = {"model_name_or_path": "model"}
        assert "config.json" in self.found(training=training)["training.model_name_or_path"]
        (folder / "config.json").write_text("{}")
        assert "no weights" in self.found(training=training)["training.model_name_or_path"]
        assert self.found(training={**training, "model_init": "random"}) == {}
        (folder / "model.safetensors").write_text("x")
        assert self.found(training=training) == {}

    def test_model_that_is_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "model.bin").write_text("x")
        found = self.found(training={"model_name_or_path": "./model.bin"})
        assert "is a file" in found["training.model_name_or_path"]

    def test_storage_behind_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "taken").write_text("x")
        found = self.found(storage={"path": f"file://{tmp_path}/taken/out"}, run={"folder": "taken"})
        assert set(found) == {"storage.path", "run.folder"}

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
    def test_storage_without_permission(self, tmp_path: Path) -> None:
        locked = tmp_path / "locked"
        locked.mkdir(mode=0o555)
        assert "cannot be written" in self.found(storage={"path": str(locked / "out")})["storage.path"]

    def test_file_and_line_are_known_after_loading(self, write: Any) -> None:
        config = load_config(write("training:\n  model_name_or_path: gpt2\n  dataset_path: gone\n"))
        with pytest.raises(InvalidConfigError, match=r"yaml:3: training.dataset_path") as caught:
            require_paths(config)
        assert caught.value.code == "EADT-204"


class TestInactive:
    def test_sample_names_all_three(self, write: Any) -> None:
        sentences = inactive_settings(load_config(write(ISSUE_SAMPLE)))
        keys = [
            "training.adaptive_precision",
            "training.dynamic_layer_freezing",
            "deepspeed.adaptive_training.enabled",
        ]
        assert [s.split(" ")[0] for s in sentences] == keys
        assert all("is accepted but not active yet: " in s for s in sentences)

    @pytest.mark.parametrize("value", [False, {"enabled": False, "formats": ["bf16"]}])
    def test_off_is_silent(self, value: Any) -> None:
        assert inactive_settings(config_from_dict(minimal(training={"adaptive_precision": value}))) == []

    @pytest.mark.parametrize("value", [True, {"enabled": True}, {"formats": ["bf16"]}])
    def test_on_is_said(self, value: Any) -> None:
        assert len(inactive_settings(config_from_dict(minimal(training={"adaptive_precision": value})))) == 1

    def test_numbers_of_a_switched_off_lever(self) -> None:
        config = config_from_dict(minimal(mps={"enabled": False, "shared_resources": 2}))
        assert inactive_settings(config) == ["mps.shared_resources has no effect: mps.enabled is false."]


class TestDescriptions:
    def test_schema_refuses_unknown_keys_and_describes_each(self) -> None:
        schema = json_schema()
        jsonschema.Draft202012Validator.check_schema(schema)
        assert schema["additionalProperties"] is False
        assert "model_config" in schema["$defs"]["TrainingConfig"]["properties"]
        for name, definition in schema["$defs"].items():
            for key, value in definition["properties"].items():
                assert value.get("description") or "$ref" in value, f"{name}.{key} has no description"
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({"training": {"sequence_lenght": 3}}, schema)

    def test_reference_lists_every_key(self) -> None:
        text = reference_markdown()
        for section, field in RunConfig.model_fields.items():
            assert f"### `{section}`" in text
            for name, inner in field.annotation.model_fields.items():  # type: ignore[union-attr]
                assert f"`{section}.{inner.alias or name}" in text
        assert "| `policy.power_high_w` | number | `250.0` |" in text
        assert "| `policy.schedule[].at_step` | integer | required |" in text


@pytest.mark.parametrize("key", ["", "a", "a.b", "a[0]", "a.b[12].c[3]"])
def test_keys_split_and_join(key: str) -> None:
    assert join_key(split_key(key)) == key


def test_import_is_light() -> None:
    """A fresh process, because this one has other tests' imports."""
    code = (
        "import sys, eadt.config; print([m for m in ('torch', 'ray', 'numpy', 'pynvml') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def _lenient_numbers(schema: dict[str, Any]) -> dict[str, Any]:
    """PyYAML's own loader, used here as an editor would, reads ``1e-3`` as text: allow it."""
    text = json.dumps(schema).replace('"type": "number"', '"type": ["number", "string"]')
    return json.loads(text)  # type: ignore[no-any-return]
