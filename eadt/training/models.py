"""Causal language models: built from a configuration, identified, and saved for others to load.

Owns everything that knows transformers' model classes. Must not know DeepSpeed, ranks or devices:
models are built on the CPU in fp32, or on the meta device.
"""

from __future__ import annotations

import difflib
import json
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from eadt.errors import ConfigError, EnvironmentFailure
from eadt.training.hub import load_by_name, quiet_transformers
from eadt.training.tokenizer import Tokenizer

if TYPE_CHECKING:
    from eadt.config.training import TrainingConfig

ATTENTION = "sdpa"
"""Attention unless ``model_config.attn_implementation`` says otherwise. Measured on one CPU core
(GPT-NeoX and Llama, hidden 128, 4 layers, batch 8, forward and backward): 87 and 110 ms against
90 and 116 ms of ``eager`` at 128 tokens, 522 and 592 against 870 and 836 ms at 512; the gradients
of seven runs were bit-equal with both."""

_KEY = "training.model_name_or_path"


def build_model(
    training: TrainingConfig,
    vocab_size: int,
    *,
    seed: int = 0,
    meta: bool = False,
    initialise: bool = True,
) -> Any:
    """The model of a run: a transformers causal language model, fp32, on the CPU, in training mode.

    Equal arguments give equal weights in every process. The global random state is left alone.

    Args:
        training: The section ``training`` of the configuration.
        vocab_size: Embedding rows that the tokenizer needs.
        seed: Seed of random weights.
        meta: Parameters and buffers on the meta device: names and shapes, no memory, no values.
        initialise: ``False`` leaves the weights undefined (buffers are right), for a model whose
            weights come from a state: milliseconds instead of the time to draw or load them.

    Raises:
        ConfigError: The model does not exist, is no causal language model, or does not fit the
            tokenizer or the sequence length.
        EnvironmentFailure: It would have to come from the hub, which cannot be reached.
    """
    from transformers import initialization

    config, attention = _model_configuration(training, vocab_size)
    if meta:
        with torch.device("meta"):
            model = _from_config(config, attention)
    elif not initialise:
        with initialization.no_init_weights():
            model = _from_config(config, attention)
        model.tie_weights()  # otherwise a part of the initialisation
    elif training.model_init == "pretrained" and training.model_name_or_path is not None:
        model = _from_pretrained(training.model_name_or_path, config, attention)
    else:
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed: that would change the GPUs' random states too.
            torch.default_generator.manual_seed(seed)
            model = _from_config(config, attention)
    model.train()
    if training.gradient_checkpointing:
        # The non-reentrant kind gives the same losses under ZeRO-3 (tried with DeepSpeed 0.19.8).
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    return model


def save_hf_folder(
    model: Any,
    tokenizer: Tokenizer | None,
    folder: Path | str,
    *,
    state_dict: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Save model and tokenizer so that ``from_pretrained(folder)`` loads both. Blocks on the disk.

    The folder appears whole or not at all; one that was there is replaced.

    Args:
        model: A model of :func:`build_model`; it may be on the meta device if ``state_dict`` is given.
        tokenizer: Saved with it; ``None`` saves the model alone.
        folder: A local folder.
        state_dict: Full weights by parameter name, in place of the model's own. A tied parameter
            need be there once only.

    Raises:
        EnvironmentFailure: The folder cannot be written.
    """
    quiet_transformers()
    target = Path(folder)
    work = target.parent / f".{target.name}-{uuid.uuid4().hex[:8]}"
    weights = None if state_dict is None else _untied(model, state_dict)
    try:
        with _configured_for_use(model, tokenizer):
            model.save_pretrained(work, state_dict=weights)
        _set_saved_dtype(work, next(iter((weights or model.state_dict()).values())).dtype)
        if tokenizer is not None:
            tokenizer.save(work)
        _replace(work, target)
    except OSError as error:
        raise EnvironmentFailure(
            f"The model cannot be saved to {target}: {error.strerror or error}.",
            code="EADT-365",
            means="The checkpoints hold the same weights; only the Hugging Face folder is missing.",
            fix="free space or make the folder writable, and run the same command again.",
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _model_configuration(training: TrainingConfig, vocab_size: int) -> tuple[Any, str]:
    """The transformers configuration of the run's model, and its attention implementation."""
    from transformers import AutoConfig

    quiet_transformers()
    given = dict(training.model_config_overrides)
    attention = str(given.pop("attn_implementation", ATTENTION))
    name = training.model_name_or_path
    pretrained = training.model_init == "pretrained" and name is not None
    if name is not None:

        def load(local_only: bool) -> Any:
            return AutoConfig.from_pretrained(name, local_files_only=local_only)

        _require_config_file(name)
        config = load_by_name(load, what="model", name=name, key=_KEY)
    else:
        config = _configuration_of_type(given.pop("model_type", None))
    overrides = {_own_name(config, key): value for key, value in given.items()}
    _apply_overrides(config, overrides)
    # A model of our own takes the tokenizer's size; a published one keeps its own unless it was
    # given another tokenizer.
    ours = name is None or (not pretrained and training.tokenizer_name_or_path is not None)
    sized = _own_name(config, "vocab_size") in overrides
    if ours and not sized:
        config.vocab_size = vocab_size
    if config.vocab_size < vocab_size:
        raise ConfigError(
            f"The model has {config.vocab_size} embedding rows, the tokenizer needs {vocab_size}.",
            code="EADT-226",
            fix="use the model's own tokenizer, or training.model_init: random"
            + (" without training.model_config.vocab_size." if sized else "."),
        )
    bounded = _own_name(config, "max_position_embeddings") in overrides
    _check_length(training, config, adjust=name is None and not bounded)
    config.use_cache = False  # of no use in training, and it warns under gradient checkpointing
    return config, attention


def _own_name(config: Any, key: str) -> str:
    """What an architecture calls a common setting: ``max_position_embeddings`` is GPT-2's ``n_positions``."""
    return str(config.attribute_map.get(key, key))


def _require_config_file(name: str) -> None:
    path = Path(name)
    if path.exists() and not (path / "config.json").is_file():
        raise ConfigError(
            f"{name} holds no config.json, so it is no Hugging Face model folder.",
            code="EADT-223",
            fix=f"correct {_KEY}.",
        )


def _configuration_of_type(model_type: Any) -> Any:
    from transformers import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        near = difflib.get_close_matches(str(model_type), CONFIG_MAPPING.keys(), n=1)
        raise ConfigError(
            f"transformers knows no model_type {model_type!r}.",
            code="EADT-223",
            fix="set training.model_config.model_type to "
            + (f"{near[0]}, for example." if near else "gpt_neox or llama, for example."),
        )
    return CONFIG_MAPPING[model_type]()


def _apply_overrides(config: Any, overrides: dict[str, Any]) -> None:
    """Build the configuration anew with changes, refusing keys that transformers would ignore in silence."""
    known = set(config.to_dict())
    unknown = sorted(key for key in overrides if key not in known and not hasattr(config, key))
    if unknown:
        near = [(key, difflib.get_close_matches(key, known, n=1)) for key in unknown]
        hints = ", ".join(f"{key} (did you mean {match[0]}?)" if match else key for key, match in near)
        raise ConfigError(
            f"A {config.model_type} model has no setting {hints}.",
            code="EADT-223",
            fix="correct or remove it in training.model_config.",
        )
    if not overrides:
        return
    values = {key: value for key, value in config.to_dict().items() if key not in _derived(config, overrides)}
    values |= overrides
    try:
        changed = type(config).from_dict(values)
    except Exception as error:  # each configuration class validates in its own way
        raise ConfigError(
            f"training.model_config does not make a {config.model_type} model: {error}",
            code="EADT-223",
            fix="correct training.model_config.",
        ) from error
    config.__dict__.clear()
    config.__dict__.update(changed.__dict__)


def _derived(config: Any, overrides: dict[str, Any]) -> set[str]:
    """Values that transformers computes from others, and that must not be kept when those change."""
    derived = set()
    if {_own_name(config, key) for key in ("hidden_size", "num_attention_heads")} & set(overrides):
        derived |= {"head_dim"}
    if _own_name(config, "num_attention_heads") in overrides and (
        getattr(config, "num_key_value_heads", None) == getattr(config, "num_attention_heads", None)
    ):
        derived |= {"num_key_value_heads"}
    return derived


def _check_length(training: TrainingConfig, config: Any, *, adjust: bool) -> None:
    longest = getattr(config, "max_position_embeddings", None)
    if not isinstance(longest, int) or training.sequence_length <= longest:
        return
    if adjust:
        config.max_position_embeddings = training.sequence_length
        return
    raise ConfigError(
        f"training.sequence_length is {training.sequence_length}, the model takes at most {longest} tokens.",
        code="EADT-226",
        fix=f"set training.sequence_length to at most {longest}, or raise "
        "training.model_config.max_position_embeddings where the architecture allows it.",
    )


def _from_config(config: Any, attention: str) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        try:
            return AutoModelForCausalLM.from_config(
                config, attn_implementation=attention, dtype=torch.float32
            )
        except ValueError as error:
            if attention != ATTENTION or "attention" not in str(error):
                raise
            return AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    except (ValueError, TypeError, ImportError, RuntimeError, KeyError, AttributeError) as error:
        reason = str(error).split("\n")[0][:300]
        raise ConfigError(
            f"No causal language model can be made from this {config.model_type} configuration: {reason}",
            code="EADT-223",
            fix="correct training.model_config or training.model_name_or_path.",
        ) from error


def _from_pretrained(name: str, config: Any, attention: str) -> Any:
    from transformers import AutoModelForCausalLM

    def load(local_only: bool) -> Any:
        arguments: dict[str, Any] = {
            "config": config,
            "dtype": torch.float32,
            "local_files_only": local_only,
            "output_loading_info": True,
        }
        try:
            return AutoModelForCausalLM.from_pretrained(name, attn_implementation=attention, **arguments)
        except ValueError as error:
            if attention != ATTENTION or "attention" not in str(error):
                raise
            return AutoModelForCausalLM.from_pretrained(name, attn_implementation="eager", **arguments)

    model, loading = load_by_name(load, what="model", name=name, key=_KEY)
    missing = sorted(loading["missing_keys"])
    if missing:
        raise ConfigError(
            f"The weights of {name} are incomplete: {len(missing)} are missing, such as {missing[0]}.",
            code="EADT-223",
            means="They would be random, which differs from what `pretrained` promises.",
            fix="add them, or set training.model_init: random.",
        )
    return model


def _untied(model: Any, state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights without the second names of tied ones, which safetensors files must not hold twice."""
    parameters = {name for name, _ in model.named_parameters()}
    missing = sorted(parameters - set(state_dict))
    if missing:
        raise ValueError(f"state_dict lacks {len(missing)} parameters of the model, such as {missing[0]}")
    names = parameters | {name for name, _ in model.named_buffers()}
    return {name: tensor.detach().contiguous() for name, tensor in state_dict.items() if name in names}


@contextmanager
def _configured_for_use(model: Any, tokenizer: Tokenizer | None) -> Iterator[None]:
    """Within it, the model's settings are those of a model to be used, not trained."""
    settings = [model.config] + ([model.generation_config] if model.generation_config is not None else [])
    wanted: dict[str, Any] = {"use_cache": True}
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        wanted["eos_token_id"] = tokenizer.eos_token_id
    before = [{key: getattr(setting, key, None) for key in wanted} for setting in settings]
    for setting in settings:
        for key, value in wanted.items():
            setattr(setting, key, value)
    try:
        yield
    finally:
        for setting, values in zip(settings, before, strict=True):
            for key, value in values.items():
                setattr(setting, key, value)


def _set_saved_dtype(folder: Path, dtype: torch.dtype) -> None:
    """Name the dtype of the weights, not that of the model in memory, which DeepSpeed may have changed."""
    file = folder / "config.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    values["dtype"] = str(dtype).removeprefix("torch.")
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _replace(work: Path, target: Path) -> None:
    old = work.with_name(f"{work.name}-old")
    if target.exists():
        target.rename(old)
    work.rename(target)
    shutil.rmtree(old, ignore_errors=True)
