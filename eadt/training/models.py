"""Causal language models: built from a configuration, identified, and saved for others to load.

Owns everything that knows transformers' model classes. Must not know DeepSpeed, ranks or devices:
models are built on the CPU in fp32, or on the meta device.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import threading
import uuid
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from eadt.errors import ConfigError, EnvironmentFailure
from eadt.training.hub import load_by_name, quiet_transformers
from eadt.training.model_config import model_configuration, reason_of
from eadt.training.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from eadt.config.training import TrainingConfig

ATTENTION = "sdpa"
"""Attention unless ``model_config.attn_implementation`` says otherwise. Measured on one CPU core
(GPT-NeoX and Llama, hidden 128, 4 layers, batch 8, forward and backward): 87 and 110 ms against
90 and 116 ms of ``eager`` at 128 tokens, 522 and 592 against 870 and 836 ms at 512; the gradients
of seven runs were bit-equal with both."""

_KEY = "training.model_name_or_path"
_TRIAL_TOKENS = 8
_SHAPES = re.compile("size of tensor|[Ss]hape|broadcast|must match|mat1|size mismatch|of size")
"""What torch says of tensors that do not fit together."""


# To leave initial weights out transformers takes torch's initialisers away for a while, for all threads: two
# at once would put back what the other had taken away, and no model would have initial weights any more.
_building = threading.RLock()


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
    with _building:
        model = _built(training, vocab_size, seed, meta=meta, initialise=initialise)
    model.train()
    if training.gradient_checkpointing:
        # The non-reentrant kind gives the same losses under ZeRO-3 (tried with DeepSpeed 0.19.8).
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    return model


def _built(training: TrainingConfig, vocab_size: int, seed: int, *, meta: bool, initialise: bool) -> Any:
    from transformers import initialization

    config = model_configuration(training, vocab_size)
    attention = str(training.model_config_overrides.get("attn_implementation", ATTENTION))
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
    return model


def check_model(training: TrainingConfig) -> int | None:
    """Refuse, before anything is started, a model that cannot be built or cannot compute.

    It is built without weights and takes one short sequence in which every tensor is only its shape:
    a fraction of a second, and no memory, whatever the model's size. What comes of the values is not
    looked at; nor are parts whose shapes depend on values, such as the choice of experts.

    Returns:
        Number of parameters; ``None`` where the user's own code builds the model.

    Raises:
        ConfigError: It cannot be built, or its parts do not fit together, or it does not fit the
            tokenizer or the sequence length.
        EnvironmentFailure: It would have to come from the hub, which cannot be reached.
    """
    if training.train_function is not None:
        return None
    from torch._subclasses.fake_tensor import FakeTensorMode

    vocab_size = load_tokenizer(training).vocab_size
    with FakeTensorMode(), torch.no_grad():
        model = build_model(training, vocab_size, initialise=False)
        tokens_BT = torch.zeros(1, min(training.sequence_length, _TRIAL_TOKENS), dtype=torch.long)
        try:
            with _quiet():
                model(input_ids=tokens_BT, labels=tokens_BT)
        except Exception as error:  # without values much else may fail that trains well
            if _SHAPES.search(str(error)):
                raise ConfigError(
                    f"The parts of this {model.config.model_type} model do not fit together: "
                    f"{reason_of(error)}",
                    code="EADT-223",
                    fix="correct training.model_config; sizes that it does not give are the architecture's "
                    "defaults.",
                ) from error
    return int(sum(param.numel() for param in model.parameters()))


@contextmanager
def _quiet() -> Iterator[None]:
    """Within it, torch does not tell what fails without values."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


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
    except MemoryError:
        raise
    except Exception as error:  # whatever a model's class cannot do with its values
        raise ConfigError(
            f"No causal language model can be made from this {config.model_type} configuration: "
            f"{reason_of(error)}",
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
