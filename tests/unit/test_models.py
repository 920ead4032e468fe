"""Models: equal in every process, told apart, and saved so that others can load them."""

import json
import logging
import threading

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from eadt.config.training import TrainingConfig
from eadt.errors import ConfigError, EnvironmentFailure
from eadt.training import hub, models
from eadt.training.model_config import model_configuration
from eadt.training.models import build_model, check_model, save_hf_folder
from eadt.training.tokenizer import ByteTokenizer

VOCAB = ByteTokenizer().vocab_size
NEOX = {
    "model_type": "gpt_neox",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
LLAMA = NEOX | {"model_type": "llama"}
TIED_LLAMA = LLAMA | {"num_key_value_heads": 2, "tie_word_embeddings": True}
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4}
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
FAMILIES = {
    "qwen3": TINY,
    "gemma2": TINY | {"head_dim": 8},
    "llama": TINY,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "gpt_neox": TINY,
    "mistral": TINY,
    "qwen2": TINY,
    "gemma3_text": TINY | {"head_dim": 8},
    "opt": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 64}
    | {"word_embed_proj_dim": 32},
    "phi": TINY,
}
architectures = pytest.mark.parametrize("model_config", [NEOX, TIED_LLAMA, LLAMA, GPT2])


def training(model_config=None, **changes):
    values = {"dataset_path": "x", "tokenizer_name_or_path": "byte", "sequence_length": 16}
    return TrainingConfig.model_validate(
        values | ({"model_config": model_config} if model_config else {}) | changes
    )


def same_weights(one, two):
    ones, twos = dict(one.named_parameters()), dict(two.named_parameters())
    return ones.keys() == twos.keys() and all(torch.equal(ones[name], twos[name]) for name in ones)


def count_parameters(model):
    return sum(param.numel() for param in model.parameters())


def names_and_shapes(model):
    """What two models must have in common for one to take the other's state."""
    return tuple(sorted((name, tuple(param.shape)) for name, param in model.named_parameters()))


@pytest.fixture
def saved(tmp_path):
    """A folder with a trained model (here: of seed 7) and the byte tokenizer."""
    model = build_model(training(TIED_LLAMA), VOCAB, seed=7)
    save_hf_folder(model, ByteTokenizer(), tmp_path / "saved")
    return model, tmp_path / "saved"


@architectures
def test_equal_seeds_give_equal_weights_and_leave_the_random_state_alone(model_config):
    torch.manual_seed(11)
    before = torch.get_rng_state()
    first = build_model(training(model_config), VOCAB, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(12)
    assert same_weights(first, build_model(training(model_config), VOCAB, seed=1))
    assert not same_weights(first, build_model(training(model_config), VOCAB, seed=2))
    assert first.training
    assert {p.dtype for p in first.parameters()} == {torch.float32}
    assert first.config.use_cache is False
    assert first.config.vocab_size == VOCAB


@architectures
def test_meta_and_empty_models_are_the_same_model(model_config):
    real = build_model(training(model_config), VOCAB)
    meta = build_model(training(model_config), VOCAB, meta=True)
    empty = build_model(training(model_config), VOCAB, initialise=False)
    assert {p.device.type for p in meta.parameters()} == {"meta"}
    assert [(n, p.shape) for n, p in meta.named_parameters()] == [
        (n, p.shape) for n, p in real.named_parameters()
    ]
    assert len({names_and_shapes(model) for model in (real, meta, empty)}) == 1
    assert len({count_parameters(model) for model in (real, meta, empty)}) == 1
    # Weights copied into an empty model make it the real one: its buffers are right.
    with torch.no_grad():
        for target, source in zip(empty.parameters(), real.parameters(), strict=True):
            target.copy_(source)
    tokens_BT = torch.arange(16).reshape(1, 16)
    empty.eval(), real.eval()
    assert torch.equal(empty(input_ids=tokens_BT).logits, real(input_ids=tokens_BT).logits)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_families_are_built_and_trained(model_type):
    config = training({"model_type": model_type} | FAMILIES[model_type])
    meta = build_model(config, VOCAB, meta=True)
    model = build_model(config, VOCAB)
    empty = build_model(config, VOCAB, initialise=False)
    assert names_and_shapes(meta) == names_and_shapes(model) == names_and_shapes(empty)
    assert count_parameters(model) < 200_000
    assert check_model(config) == count_parameters(model)
    buffers = dict(empty.named_buffers())
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
    assert len(getattr(model.config, "layer_types", None) or "12") == model.config.num_hidden_layers == 2
    tokens_BT = torch.arange(32).reshape(2, 16)
    loss = model(input_ids=tokens_BT, labels=tokens_BT).loss
    loss.backward()
    assert 0 < loss.item() < 10
    assert all(param.grad is not None for param in model.parameters())


def test_values_that_follow_from_others_do():
    def made(**values):
        return model_configuration(training({"model_type": "qwen3"} | TINY | values), VOCAB)

    assert made().layer_types == ["full_attention"] * 2
    sliding = made(use_sliding_window=True, max_window_layers=1, sliding_window=8)
    assert sliding.layer_types == ["full_attention", "sliding_attention"]
    assert sliding.sliding_window == 8
    assert made().sliding_window is None
    assert made().num_key_value_heads == 4  # as many as heads, as the class has it by default
    assert made(num_key_value_heads=2).num_key_value_heads == 2
    llama = model_configuration(training({"model_type": "llama"} | TINY | {"num_attention_heads": 2}), VOCAB)
    assert llama.head_dim == 16


@pytest.mark.parametrize(("heads", "shared"), [(4, 4), (12, 4), (32, 8), (64, 8)])
def test_a_default_number_of_shared_heads_gives_way_to_one_that_fits(heads, shared):
    values = {"model_type": "mistral", "hidden_size": 768, "num_attention_heads": heads}
    assert model_configuration(training(values), VOCAB).num_key_value_heads == shared


def test_common_and_earlier_names_are_taken():
    gpt2 = {"model_type": "gpt2", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = model_configuration(training(gpt2 | {"max_position_embeddings": 64}), VOCAB)
    assert (config.n_embd, config.n_layer, config.n_head, config.n_positions) == (32, 2, 4, 64)
    llama = model_configuration(training(LLAMA | {"rope_theta": 10000.0}), VOCAB)
    assert llama.rope_parameters["rope_theta"] == 10000.0
    for name in ("num_experts", "num_local_experts"):
        moe = {"model_type": "qwen3_moe", name: 4} | TINY
        assert model_configuration(training(moe), VOCAB).num_experts == 4
    gemma = {"model_type": "gemma3_text"} | TINY | {"head_dim": 8, "sliding_window_pattern": 2}
    kinds = model_configuration(training(gemma), VOCAB).layer_types
    assert kinds == ["sliding_attention", "full_attention"]


def test_special_tokens_of_another_vocabulary_are_forgotten():
    def tokens(config):
        return config.pad_token_id, config.bos_token_id, config.eos_token_id

    assert tokens(model_configuration(training(GPT2), VOCAB)) == (None, None, None)
    kept = model_configuration(training(GPT2 | {"vocab_size": 50304}), VOCAB)
    assert tokens(kept) == (None, 50256, 50256)
    assert model_configuration(training(GPT2 | {"bos_token_id": 7}), VOCAB).bos_token_id == 7
    phi3 = {"model_type": "phi3"} | TINY  # whose padding token is 32000
    assert build_model(training(phi3), VOCAB).config.pad_token_id is None


def test_fingerprints_tell_models_apart():
    configs = [NEOX, NEOX | {"hidden_size": 64}, NEOX | {"num_hidden_layers": 3}, LLAMA, TIED_LLAMA]
    assert len({names_and_shapes(build_model(training(c), VOCAB, meta=True)) for c in configs}) == 5


def test_tied_weights_are_one_parameter():
    tied = build_model(training(TIED_LLAMA | {"num_key_value_heads": 4}), VOCAB, meta=True)
    untied = build_model(training(LLAMA), VOCAB, meta=True)
    assert count_parameters(untied) - count_parameters(tied) == VOCAB * 32


@architectures
@pytest.mark.parametrize("given", ["model", "parameters", "state_dict"])
def test_a_saved_folder_loads_elsewhere(tmp_path, model_config, given):
    model = build_model(training(model_config), VOCAB, seed=3)
    weights = {
        "model": None,
        "parameters": {name: p.detach().clone() for name, p in model.named_parameters()},
        "state_dict": model.state_dict(),
    }[given]
    source = model if given == "model" else build_model(training(model_config), VOCAB, meta=True)
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "old.txt").write_text("of an earlier run")
    save_hf_folder(source, ByteTokenizer(), tmp_path / "final", state_dict=weights)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "final", output_loading_info=True)
    assert same_weights(loaded, model)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert loaded.config.use_cache is True
    assert source.config.use_cache is False
    assert loaded.generation_config.eos_token_id == loaded.config.eos_token_id == 256
    assert AutoTokenizer.from_pretrained(tmp_path / "final")("ab")["input_ids"] == [97, 98]
    assert [entry.name for entry in tmp_path.iterdir()] == ["final"]
    assert not (tmp_path / "final" / "old.txt").exists()


def test_the_saved_dtype_is_that_of_the_weights(tmp_path):
    model = build_model(training(NEOX), VOCAB)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    save_hf_folder(model.to(torch.bfloat16), None, tmp_path / "final", state_dict=weights)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    assert all(torch.equal(p, weights[name]) for name, p in loaded.named_parameters())


def test_incomplete_weights_are_not_saved(tmp_path):
    model = build_model(training(NEOX), VOCAB)
    weights = dict(list(model.named_parameters())[1:])
    with pytest.raises(ValueError, match="lacks 1 parameters"):
        save_hf_folder(model, None, tmp_path / "final", state_dict=weights)
    assert not list(tmp_path.iterdir())


def test_a_failed_save_keeps_the_folder_before(tmp_path, monkeypatch, saved):
    model, folder = saved
    other = build_model(training(TIED_LLAMA), VOCAB, seed=8)

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ByteTokenizer, "save", fail)
    with pytest.raises(EnvironmentFailure, match="No space left"):
        save_hf_folder(other, ByteTokenizer(), folder)
    assert same_weights(AutoModelForCausalLM.from_pretrained(folder), model)
    assert [entry.name for entry in folder.parent.iterdir()] == [folder.name]


def test_pretrained_weights_and_random_ones_from_a_folder(saved):
    model, folder = saved
    config = training(model_name_or_path=str(folder), tokenizer_name_or_path=None)
    loaded = build_model(config, VOCAB)
    assert same_weights(loaded, model)
    assert loaded.training
    assert loaded.config.use_cache is False
    random = build_model(config.model_copy(update={"model_init": "random"}), VOCAB, seed=1)
    assert names_and_shapes(random) == names_and_shapes(model)
    assert not same_weights(random, model)


def test_settings_of_a_folder_can_be_changed(saved):
    model, folder = saved
    config = training({"num_hidden_layers": 1}, model_name_or_path=str(folder), model_init="random")
    smaller = build_model(config, 512)
    assert smaller.config.num_hidden_layers == 1
    assert smaller.config.vocab_size == 512  # another tokenizer was named
    assert smaller.config.num_key_value_heads == model.config.num_key_value_heads


@pytest.fixture
def qwen(tmp_path):
    """A folder of a model with values that follow from others written out, as published ones have them."""
    values = TINY | {"num_hidden_layers": 4, "num_key_value_heads": 2, "head_dim": 8}
    values |= {"use_sliding_window": True, "max_window_layers": 2, "sliding_window": 8}
    model = build_model(training({"model_type": "qwen3"} | values), VOCAB, seed=7)
    save_hf_folder(model, ByteTokenizer(), tmp_path / "qwen")
    written = json.loads((tmp_path / "qwen" / "config.json").read_text())
    assert len(written["layer_types"]) == 4
    return model, tmp_path / "qwen"


def test_settings_of_a_folder_are_merged_and_what_follows_from_them_is_made_anew(qwen):
    model, folder = qwen

    def made(**values):
        config = training(values or None, model_name_or_path=str(folder), model_init="random")
        return build_model(config, VOCAB).config

    assert (
        made().layer_types == model.config.layer_types == ["full_attention"] * 2 + ["sliding_attention"] * 2
    )
    assert made(num_hidden_layers=3).layer_types == model.config.layer_types[:3]
    assert made(max_window_layers=1).layer_types[1] == "sliding_attention"
    changed = made(hidden_size=64)
    assert (changed.hidden_size, changed.head_dim, changed.num_key_value_heads) == (64, 8, 2)
    assert changed.intermediate_size == 64
    assert changed.rope_parameters == model.config.rope_parameters
    assert changed.architectures == ["Qwen3ForCausalLM"]


def test_settings_of_a_folder_that_touch_no_weight_keep_its_weights(qwen):
    model, folder = qwen
    config = training({"attention_dropout": 0.1}, model_name_or_path=str(folder))
    changed = build_model(config, VOCAB)
    assert changed.config.attention_dropout == 0.1
    assert same_weights(changed, model)
    expected = AutoConfig.from_pretrained(folder).to_dict() | {"attention_dropout": 0.1, "use_cache": False}
    found = changed.config.to_dict()
    assert {key for key in expected if found.get(key) != expected[key]} <= {"dtype"}


def test_attention_and_positions_are_chosen():
    model = build_model(training(NEOX, sequence_length=5000), VOCAB, meta=True)
    assert model.config._attn_implementation == models.ATTENTION
    assert model.config.max_position_embeddings == 5000
    eager = build_model(training(NEOX | {"attn_implementation": "eager"}), VOCAB, meta=True)
    assert eager.config._attn_implementation == "eager"


def test_gradient_checkpointing_changes_no_gradient():
    tokens_BT = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(0))
    gradients = []
    for on in (False, True):
        model = build_model(training(NEOX, gradient_checkpointing=on), VOCAB, seed=1)
        assert model.is_gradient_checkpointing is on
        model(input_ids=tokens_BT, labels=tokens_BT).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    ("model_config", "message"),
    [
        ({"model_type": "gpt_noex"}, "knows no model_type"),
        (LLAMA | {"hiden_size": 3}, "hiden_size .did you mean hidden_size"),
        (LLAMA | {"n_layer": 3}, "n_layer .did you mean num_hidden_layers"),
        (GPT2 | {"intermediate_size": 64}, "intermediate_size .did you mean n_inner"),
        (LLAMA | {"temperature": 0.5, "anything": 1}, "no setting anything, temperature"),
        (GPT2 | {"dropout": 0.1}, "dropout .did you mean resid_pdrop"),
        (LLAMA | {"num_key_value_heads": 3}, "4 attention heads cannot share 3"),
        (LLAMA | {"num_attention_heads": 0}, "does not make a llama model"),
        (LLAMA | {"hidden_act": "nonsense"}, "it knows no 'nonsense'"),
        (GPT2 | {"n_embd": 33}, "`embed_dim` must be divisible by num_heads"),
        (
            {"model_type": "qwen3", "layer_types": ["full_attention"]} | TINY,
            r"^EADT-223: training.model_config does not make a qwen3 model: .num_hidden_layers. .2. must",
        ),
        ({"model_type": "fuyu"}, "no vocabulary of its own"),
        (LLAMA | {"hidden_size": "x"}, "hidden_size"),
        (LLAMA | {"hidden_size": 33}, "does not make a llama model"),
        (LLAMA | {"vocab_size": 10}, "10 embedding rows"),
        ({"model_type": "t5"}, "No causal language model"),
        (GPT2 | {"n_positions": 8}, "at most 8 tokens"),
        (LLAMA | {"attn_implementation": "nonsense"}, "No causal language model"),
    ],
)
def test_impossible_models_are_refused(model_config, message):
    with pytest.raises(ConfigError, match=message) as caught:
        build_model(training(model_config), VOCAB, meta=True)
    assert caught.value.fix
    assert "\n" not in caught.value.what


GPTJ = {"model_type": "gptj", "n_embd": 32, "n_layer": 2, "n_head": 4}
MOE = {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


class TestCheckModel:
    def test_parts_that_do_not_fit_are_found_though_the_model_can_be_built(self):
        build_model(training(GPTJ), VOCAB, meta=True)
        with pytest.raises(ConfigError, match=r"do not fit together.*64") as caught:
            check_model(training(GPTJ))
        assert "\n" not in caught.value.what
        assert check_model(training(GPTJ | {"rotary_dim": 4})) > 0

    def test_parts_that_depend_on_values_are_no_fault(self, caplog):
        with caplog.at_level(logging.INFO):
            assert check_model(training(MOE | TINY)) == count_parameters(
                build_model(training(MOE | TINY), VOCAB, meta=True)
            )
        assert caplog.text == ""

    def test_a_model_larger_than_any_memory_is_checked_without_it(self):
        assert (
            check_model(training({"model_type": "llama", "hidden_size": 8192, "num_hidden_layers": 80}))
            > 4e10
        )

    def test_weights_of_a_folder_are_not_read(self, saved):
        model, folder = saved
        (folder / "model.safetensors").unlink()
        config = training(model_name_or_path=str(folder), tokenizer_name_or_path=None)
        assert check_model(config) == count_parameters(model)

    def test_sequences_longer_than_the_model_takes_are_refused(self, saved):
        _, folder = saved
        config = training(model_name_or_path=str(folder), tokenizer_name_or_path=None, sequence_length=5000)
        with pytest.raises(ConfigError, match="takes at most 2048 tokens"):
            check_model(config)

    def test_the_users_own_code_is_left_alone(self):
        assert check_model(training(train_function="nowhere:train")) is None

    def test_models_without_positions_take_any_length(self):
        bloom = {"model_type": "bloom", "hidden_size": 32, "n_layer": 2, "n_head": 4}
        assert check_model(training(bloom, sequence_length=100_000)) > 0


def test_folders_that_are_no_model_are_refused(tmp_path, saved):
    _, folder = saved
    with pytest.raises(ConfigError, match=r"no config\.json"):
        build_model(training(model_name_or_path=str(tmp_path)), VOCAB)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="cannot be used"):
        build_model(training(model_name_or_path=str(folder)), VOCAB)
    build_model(training(model_name_or_path=str(folder), model_init="random"), VOCAB)


def test_a_larger_tokenizer_than_the_pretrained_model_is_refused(saved):
    _, folder = saved
    with pytest.raises(ConfigError, match="embedding rows"):
        build_model(training(model_name_or_path=str(folder)), VOCAB + 1)


def test_pretrained_weights_that_do_not_fit_the_settings_are_refused(saved):
    _, folder = saved
    with pytest.raises(ConfigError, match="are incomplete"):
        build_model(training({"num_hidden_layers": 3}, model_name_or_path=str(folder)), VOCAB)
    with pytest.raises(ConfigError, match=r"cannot be used: .*mismatch"):
        build_model(training({"intermediate_size": 48}, model_name_or_path=str(folder)), VOCAB)


def test_without_network_a_hub_model_is_given_up_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "hub_reachable", lambda: False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(EnvironmentFailure, match="cannot be reached") as caught:
        build_model(training(model_name_or_path="EleutherAI/pythia-410m"), VOCAB)
    assert "model_name_or_path" in caught.value.fix


def test_models_that_are_built_in_two_threads_at_once_leave_torchs_initialisers_in_place() -> None:
    """transformers takes them away for all threads while it builds a model without initial weights."""
    before = torch.nn.init.normal_
    threads = [
        threading.Thread(
            target=lambda: [build_model(training(NEOX), VOCAB, initialise=False) for _ in range(30)],
            daemon=True,
        )
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60.0)
        assert not thread.is_alive()
    assert torch.nn.init.normal_ is before
