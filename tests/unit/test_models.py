"""Models: equal in every process, told apart, and saved so that others can load them."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from eadt.config.training import TrainingConfig
from eadt.errors import ConfigError, EnvironmentFailure
from eadt.training import hub, models
from eadt.training.models import build_model, save_hf_folder
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
        (LLAMA | {"hiden_size": 3}, "did you mean hidden_size"),
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
