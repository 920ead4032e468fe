"""From the user's values to the transformers configuration of a causal language model.

Owns what is known of transformers' configuration classes. A configuration is always constructed from
values, never changed afterwards: classes compute some values from others while they are constructed
(``layer_types``, ``head_dim``), each in its own way. Must not build models, and imports transformers
on use only.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eadt.errors import ConfigError
from eadt.training.hub import load_by_name, quiet_transformers

if TYPE_CHECKING:
    from eadt.config.training import TrainingConfig

_NAME_KEY = "training.model_name_or_path"
_POSITIONS = "max_position_embeddings"
_SPECIAL_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")

_SAME_IDEA = (
    {"hidden_size", "n_embd", "d_model", "word_embed_proj_dim"},
    {"intermediate_size", "n_inner", "ffn_dim", "d_ff", "d_inner", "ffn_hidden_size"},
    {"num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"},
    {"num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"},
    {"max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_seq_length"},
    {"attention_dropout", "attn_pdrop", "attn_dropout"},
    {"hidden_dropout", "hidden_dropout_prob", "resid_pdrop", "resid_dropout", "dropout"},
    {"hidden_act", "activation_function", "hidden_activation", "activation"},
    {"rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps"},
)
"""What architectures call the same thing, to name the right one for a wrong one."""


def model_configuration(training: TrainingConfig, vocab_size: int) -> Any:
    """The transformers configuration of the run's model.

    Args:
        training: The section ``training`` of the configuration.
        vocab_size: Embedding rows that the tokenizer needs.

    Raises:
        ConfigError: The values make no model, or none that fits the tokenizer and the sequence length.
        EnvironmentFailure: It would have to come from the hub, which cannot be reached.
    """
    quiet_transformers()
    given = dict(training.model_config_overrides)
    given.pop("attn_implementation", None)  # not the model's, but how it is computed
    name = training.model_name_or_path
    published: Any = None
    written: dict[str, Any] = {}
    if name is None:
        cls = _class_of_type(given.pop("model_type", None))
    else:
        published, written = _published(name)
        cls = type(published)
    changes = {_own_name(cls, key): value for key, value in given.items()}
    _require_known(cls, changes, written)
    sized = "vocab_size" in changes
    # A model of our own takes the tokenizer's size; a published one keeps its own unless it was
    # given another tokenizer.
    replaced = training.model_init != "pretrained" and training.tokenizer_name_or_path is not None
    if name is None or replaced:
        changes = {"vocab_size": vocab_size} | changes
        changes = _special_tokens(cls, written, changes["vocab_size"]) | changes
    if name is None:
        changes = _positions(cls, training.sequence_length) | changes
    changes = _shared_heads(cls, written, changes) | changes
    config = published
    if published is None or changes:
        config = _construct(cls, _deciding_values(cls, written) | changes)
    _check_vocabulary(config, vocab_size, sized=sized)
    _check_length(config, training.sequence_length)
    _check_heads(config)
    config.use_cache = False  # of no use in training, and it warns under gradient checkpointing
    return config


def reason_of(error: BaseException) -> str:
    """A library's error in one line: what it says last, without the names of its validators."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    if isinstance(error, KeyError):
        return f"it knows no {lines[0]}"
    last = next((line for line in reversed(lines) if re.match(r"\w*Error: ", line)), None)
    text = re.sub(r"^\w*Error: ", "", last) if last is not None else lines[0]
    return re.sub(r"\s+", " ", text)[:300]


# -- where values come from ---------------------------------------------------------------------------


def _class_of_type(model_type: Any) -> Any:
    from transformers import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        near = difflib.get_close_matches(str(model_type), CONFIG_MAPPING.keys(), n=3)
        raise ConfigError(
            f"transformers knows no model_type {model_type!r}.",
            code="EADT-223",
            fix=f"set training.model_config.model_type to {_either(near or ['gpt_neox', 'llama'])}, "
            "for example.",
        )
    return CONFIG_MAPPING[model_type]


def _published(name: str) -> tuple[Any, dict[str, Any]]:
    """The configuration of a folder or of a model on the hub, and the values of its ``config.json``."""
    from transformers import AutoConfig

    path = Path(name)
    if path.exists() and not (path / "config.json").is_file():
        raise ConfigError(
            f"{name} holds no config.json, so it is no Hugging Face model folder.",
            code="EADT-223",
            fix=f"correct {_NAME_KEY}.",
        )

    def load(local_only: bool) -> tuple[Any, dict[str, Any]]:
        config = AutoConfig.from_pretrained(name, local_files_only=local_only)
        values, _ = type(config).get_config_dict(name, local_files_only=local_only)
        return config, {_own_name(type(config), key): value for key, value in values.items()}

    return load_by_name(load, what="model", name=name, key=_NAME_KEY)


def _special_tokens(cls: Any, written: Mapping[str, Any], vocab_size: Any) -> dict[str, Any]:
    """Special tokens of the tokenizer that a class or folder was made for, and that are none here."""
    fields = _fields(cls)
    changes: dict[str, Any] = {}
    for key in _SPECIAL_TOKENS:
        if key not in fields or "None" not in str(fields[key].type):
            continue
        token = written.get(key, fields[key].default)
        tokens = token if isinstance(token, list) else [token]
        outside = isinstance(vocab_size, int) and any(isinstance(t, int) and t >= vocab_size for t in tokens)
        if outside:
            changes[key] = None
    return changes


def _positions(cls: Any, sequence_length: int) -> dict[str, Any]:
    """As many positions as a sequence has tokens, where a class has fewer by default."""
    key = _own_name(cls, _POSITIONS)
    longest = _fields(cls)[key].default if key in _fields(cls) else None
    return {key: sequence_length} if isinstance(longest, int) and longest < sequence_length else {}


def _shared_heads(cls: Any, written: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Key and value heads for another number of attention heads, where their own number was not given.

    Where there were as many, there still are. Else as many of them as share the heads evenly: a class's
    default of 8 cannot serve 4 heads.
    """
    heads_key, key = _own_name(cls, "num_attention_heads"), _own_name(cls, "num_key_value_heads")
    fields = _fields(cls)
    if heads_key not in changes or key in changes or not {heads_key, key} <= set(fields):
        return {}
    heads = changes[heads_key]
    before = [written.get(name, fields[name].default) for name in (heads_key, key)]
    if not all(isinstance(number, int) and number > 0 for number in (heads, *before)):
        return {}
    return {key: heads if before[0] == before[1] else math.gcd(heads, before[1])}


def _deciding_values(cls: Any, written: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a ``config.json`` from which the class computes all others, and they themselves.

    Files hold computed values too, such as one layer type for each layer. Those must be computed anew
    when a value changes from which they follow.
    """
    if not written:
        return {}
    whole = _construct(cls, written).to_dict()
    decide = dict(written)
    # Lists first: they follow from numbers more often than numbers from them.
    for key in sorted(written, key=lambda key: not isinstance(written[key], list)):
        fewer = {other: value for other, value in decide.items() if other != key}
        try:
            if cls(**copy.deepcopy(fewer)).to_dict() == whole:
                decide = fewer
        except Exception:  # it cannot be left out
            continue
    return decide


def _construct(cls: Any, values: Mapping[str, Any]) -> Any:
    try:
        return cls(**copy.deepcopy(dict(values)))
    except Exception as error:  # each configuration class validates in its own way
        raise ConfigError(
            f"training.model_config does not make a {cls.model_type} model: {reason_of(error)}",
            code="EADT-223",
            fix="correct training.model_config.",
        ) from error


# -- names --------------------------------------------------------------------------------------------


def _own_name(cls: Any, key: str) -> str:
    """The field behind a name that a class knows: ``max_position_embeddings`` is GPT-2's ``n_positions``.

    In a few classes it is the other way round, and the common name is the field.
    """
    fields = _fields(cls)
    for common, own in cls.attribute_map.items():
        if key in (common, own):
            return str(common if common in fields and own not in fields else own)
    return key


def _fields(cls: Any) -> dict[str, dataclasses.Field[Any]]:
    return {field.name: field for field in dataclasses.fields(cls)}


def _require_known(cls: Any, changes: Iterable[str], written: Mapping[str, Any]) -> None:
    """Refuse names that the class would take and ignore."""
    fields = _fields(cls)
    unknown = sorted(
        key for key in changes if key not in fields and key not in written and not _has_effect(cls, key)
    )
    if not unknown:
        return
    names = _names(cls)
    hints = [(key, _nearest(key, names)) for key in unknown]
    said = [f"{key} (did you mean {_either(near)}?)" if near else key for key, near in hints]
    raise ConfigError(
        f"A {cls.model_type} model has no setting {', '.join(said)}.",
        code="EADT-223",
        fix="correct or remove it in training.model_config.",
    )


def _has_effect(cls: Any, key: str) -> bool:
    """Whether a class that has no field of that name makes something of it.

    Many take names of earlier versions and of the literature, such as ``rope_theta``; any other name is
    stored as it is. So the question is whether a value that cannot be right disturbs the class.
    """
    try:
        config = cls(**{key: _Probe()}).to_dict()
        plain = cls().to_dict()
    except Exception:  # it was looked at, and is not right
        return True
    return {k: v for k, v in config.items() if k != key} != {k: v for k, v in plain.items() if k != key}


class _Probe:
    """A value that no setting can have."""


def _names(cls: Any) -> list[str]:
    """Names of an architecture's own settings, the common ones for them included."""
    from transformers import PreTrainedConfig

    common = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    return sorted({*(name for name in _fields(cls) if name not in common), *cls.attribute_map})


def _nearest(key: str, names: Iterable[str]) -> list[str]:
    """The few names that are most likely meant: of the same idea, then of like letters."""
    names = list(names)
    same = {name for group in _SAME_IDEA if key in group for name in group}
    found = [name for name in names if name in same]
    found += difflib.get_close_matches(key, names, n=3, cutoff=0.7)
    return list(dict.fromkeys(found))[:3]


def _either(names: Iterable[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} or {last}" if most else last


# -- checks -------------------------------------------------------------------------------------------


def _check_vocabulary(config: Any, vocab_size: int, *, sized: bool) -> None:
    found = getattr(config, "vocab_size", None)
    if not isinstance(found, int):
        from transformers import CONFIG_MAPPING

        text_only = f"{config.model_type}_text"
        hint = f", such as model_type {text_only}" if text_only in CONFIG_MAPPING else ""
        raise ConfigError(
            f"A {config.model_type} model has no vocabulary of its own, so it is no plain language model.",
            code="EADT-223",
            fix=f"choose a causal language model{hint}.",
        )
    if found < vocab_size:
        raise ConfigError(
            f"The model has {found} embedding rows, the tokenizer needs {vocab_size}.",
            code="EADT-226",
            fix="use the model's own tokenizer, or training.model_init: random"
            + (" without training.model_config.vocab_size." if sized else "."),
        )


def _check_length(config: Any, sequence_length: int) -> None:
    longest = getattr(config, _POSITIONS, None)
    if not isinstance(longest, int) or longest < 1 or sequence_length <= longest:
        return  # below 1: without end, as XLNet says it
    key = f"training.model_config.{_own_name(type(config), _POSITIONS)}"
    raise ConfigError(
        f"training.sequence_length is {sequence_length}, the model takes at most {longest} tokens.",
        code="EADT-226",
        fix=f"set training.sequence_length to at most {longest}, or raise {key} where the architecture "
        "allows it.",
    )


def _check_heads(config: Any) -> None:
    """The impossible shape that many classes build without a word, and that fails in training only."""
    heads, shared = (getattr(config, key, None) for key in ("num_attention_heads", "num_key_value_heads"))
    if isinstance(heads, int) and isinstance(shared, int) and (shared < 1 or heads % shared):
        raise ConfigError(
            f"{heads} attention heads cannot share {shared} key and value heads evenly.",
            code="EADT-223",
            fix="set training.model_config.num_key_value_heads to a number that divides num_attention_heads.",
        )
