"""``eadt validate``: what a new user gets wrong is found, with its place, before anything is started."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result
from typer.testing import CliRunner

from eadt.cli import app
from eadt.cli import validate as module
from eadt.config import InvalidConfigError, config_from_dict, require_paths
from eadt.errors import DeviceUnsupportedError

MODEL = {
    "model_type": "qwen3",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 8,
    "intermediate_size": 64,
}
LAYER = 4 * 32 * 32 + 2 * 8 + 3 * 32 * 64 + 2 * 32  # attention, its two norms, MLP, two norms
PARAMETERS = 2 * 264 * 32 + 2 * LAYER + 32
TRAINING: dict[str, Any] = {
    "model_config": MODEL,
    "tokenizer_name_or_path": "byte",
    "dataset_path": "python-stdlib",
    "train_batch_size": 12,
    "max_steps": 600,
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with no cluster around it, and no GPU on the machine."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return tmp_path


def validate(*options: str, training: dict[str, Any] | None = None, **sections: Any) -> Result:
    data = {"training": {**TRAINING, **(training or {})}, "elastic": {"num_workers": 2}, **sections}
    Path("run.yaml").write_text(yaml.safe_dump(data))
    return CliRunner().invoke(app, ["validate", "run.yaml", *options])


def notes_of(result: Result) -> list[str]:
    assert result.exit_code == 0, result.stderr
    return list(json.loads(result.stdout)["notes"])


class TestDeep:
    def test_a_model_that_can_be_built_is_described(self) -> None:
        text = validate().stdout
        assert "run.yaml is valid" in text
        assert f"qwen3 ({PARAMETERS:,} parameters, random weights)" in text
        document = json.loads(validate("--deep", "-o", "json").stdout)
        assert document["num_parameters"] == PARAMETERS
        assert document["notes"] == []

    @pytest.mark.parametrize(
        ("values", "words"),
        [
            ({"hiden_size": 3}, "no setting hiden_size (did you mean hidden_size?)"),
            ({"model_type": "qwen33"}, "knows no model_type 'qwen33': set training.model_config.model_type"),
            ({"layer_types": ["full_attention"]}, "`num_hidden_layers` (2) must be equal"),
            ({"num_key_value_heads": 3}, "cannot share 3"),
        ],
    )
    def test_values_that_make_no_model_are_found_with_their_place(
        self, values: dict[str, Any], words: str
    ) -> None:
        result = validate(training={"model_config": MODEL | values})
        assert result.exit_code == 2
        (line,) = [line for line in result.stderr.splitlines() if words in line]
        assert line.startswith("  run.yaml:6: training.model_config: ")
        assert "EADT-223" in result.stderr
        assert result.stdout == ""
        assert "Traceback" not in result.stderr

    def test_light_says_what_it_did_not_look_at(self) -> None:
        assert notes_of(validate("--light", "-o", "json")) == [
            "The model was not built; --deep does it and finds values that make none."
        ]
        own = {"train_function": "a:b", "model_config": {}}
        assert notes_of(validate("-o", "json", training=own)) == []

    def test_what_is_on_the_hub_is_not_fetched(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))

        def refuse(*_: Any, **__: Any) -> None:
            raise AssertionError("the network was asked")

        monkeypatch.setattr("huggingface_hub.utils.get_session", refuse)
        (note,) = notes_of(
            validate(
                "--deep",
                "-o",
                "json",
                training={
                    "model_config": {},
                    "model_name_or_path": "nobody/nothing",
                    "tokenizer_name_or_path": None,
                },
            )
        )
        assert note.startswith("The model was not built: it or its tokenizer is not in this machine's")

    def test_the_users_own_code_is_not_run(self) -> None:
        result = validate(
            "--deep", "-o", "json", training={"train_function": "no.such:code", "model_config": {}}
        )
        assert json.loads(result.stdout)["num_parameters"] is None
        assert notes_of(result) == []

    def test_without_the_libraries_it_says_so(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "eadt.training.models", None)
        (note,) = notes_of(validate("--deep", "-o", "json"))
        assert note.startswith("The model was not built: ")


class TestPrecision:
    def test_fp16_without_gpus_is_an_error_where_it_is_certain(self) -> None:
        result = validate(training={"precision": "fp16"}, resources={"use_gpu": False})
        assert result.exit_code == 2
        assert "training.precision: fp16 is for GPUs" in result.stderr

    @pytest.mark.parametrize(
        ("precision", "resources", "noted"),
        [("fp16", {}, True), ("fp16", {"use_gpu": True}, False), ("bf16", {}, False)],
    )
    def test_fp16_is_noted_where_only_the_cluster_knows(
        self, precision: str, resources: dict[str, Any], noted: bool
    ) -> None:
        result = validate("-o", "json", training={"precision": precision}, resources=resources)
        assert any("this machine shows none" in note for note in notes_of(result)) is noted

    @pytest.mark.parametrize(("num_gpus", "noted"), [(0, True), (1, False), (None, True)])
    def test_a_gpu_of_this_machine_is_taken_for_one_of_the_cluster(
        self, num_gpus: int | None, noted: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
        monkeypatch.setattr("eadt.adapters.nvml.Nvml", lambda: _Library(num_gpus))
        config = config_from_dict({"training": {**TRAINING, "precision": "fp16"}})
        assert bool(module._precision_notes(config)) is noted


class _Library:
    def __init__(self, num_gpus: int | None) -> None:
        self._num_gpus = num_gpus

    def open(self) -> None:
        if self._num_gpus is None:
            raise DeviceUnsupportedError("no driver", code="EADT-340")

    def num_gpus(self) -> int:
        assert self._num_gpus is not None
        return self._num_gpus

    def close(self) -> None:
        pass


class TestLength:
    @pytest.fixture
    def model(self, folder: Path) -> Path:
        (folder / "model").mkdir()
        (folder / "model" / "model.safetensors").write_bytes(b"x")
        self.write(folder / "model", {"model_type": "gpt2", "n_positions": 512})
        return folder / "model"

    def write(self, model: Path, values: Any) -> None:
        (model / "config.json").write_text(json.dumps(values))

    def found(self, model: Path, **training: Any) -> dict[str, str]:
        training = {"model_name_or_path": str(model), "dataset_path": "python-stdlib", **training}
        try:
            require_paths(config_from_dict({"training": training}))
        except InvalidConfigError as error:
            return {problem.key: problem.message for problem in error.problems}
        return {}

    def test_more_tokens_than_a_folders_model_has_positions(self, model: Path) -> None:
        found = self.found(model, sequence_length=513)
        assert list(found) == ["training.sequence_length"]
        assert "513 tokens are more than the 512 positions" in found["training.sequence_length"]
        assert self.found(model, sequence_length=512) == {}

    def test_own_code_and_changed_positions_are_left_alone(self, model: Path) -> None:
        assert self.found(model, sequence_length=513, train_function="a:b") == {}
        assert self.found(model, sequence_length=513, model_config={"max_position_embeddings": 600}) == {}

    @pytest.mark.parametrize("values", [{}, {"n_positions": -1}, {"n_positions": None}, ["no mapping"]])
    def test_models_without_positions_take_any_length(self, model: Path, values: Any) -> None:
        self.write(model, values)
        assert self.found(model, sequence_length=100_000) == {}

    def test_a_model_of_the_file(self) -> None:
        result = validate(training={"model_config": MODEL | {"max_position_embeddings": 256}})
        assert result.exit_code == 2
        assert "1024 tokens are more than the model's 256 positions" in result.stderr


def test_bounds_that_the_batch_does_not_allow_are_noted() -> None:
    result = validate("-o", "json", elastic={"num_workers": 2, "max_workers": 5})
    assert notes_of(result)[0] == (
        "elastic.max_workers: 5 workers cannot hold a global batch of 12; at most 4 are used."
    )


def test_light_loads_no_heavy_library_and_says_what_it_notes() -> None:
    validate()
    code = (
        "import sys\nfrom eadt.cli import app\nfrom typer.testing import CliRunner\n"
        "result = CliRunner().invoke(app, ['validate', 'run.yaml', '--light'])\n"
        "assert 'note: The model was not built' in result.stdout, result.stdout\n"
        "print(sorted({'torch', 'ray', 'deepspeed', 'transformers', 'datasets', 'numpy'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert result.stdout.strip() == "[]"
