"""What builds an engine's model: a user's factory as it is, EADT's without weights that are not needed."""

from __future__ import annotations

import multiprocessing
from typing import Any

import pytest
import torch
from torch import nn

from eadt.config.training import TrainingConfig
from eadt.control.batch import BatchPlan
from eadt.training import causal_lm
from eadt.training.channel import EngineChannel
from eadt.training.engine_spec import ComputeShare, EngineSpec, TrainingJob
from eadt.training.session import TrainingSession

TRAINING = TrainingConfig.model_validate(
    {
        "model_config": {
            "model_type": "gpt_neox",
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 64,
        },
        "tokenizer_name_or_path": "byte",
        "dataset_path": "x",
        "sequence_length": 16,
    }
)


def make_session(*, resume: bool) -> TrainingSession:
    ours, _ = multiprocessing.Pipe()
    spec = EngineSpec(
        engine_id="e",
        generation=1,
        rank=0,
        node_id="n",
        node_ip="127.0.0.1",
        job=TrainingJob(training=TRAINING, deepspeed={}, seed=3, precision="fp32", max_steps=1),
        batch=BatchPlan(1, 1, 1, 1),
        share=ComputeShare(),
        resume=resume,
    )
    return TrainingSession(spec, EngineChannel(ours))


class Fourier(nn.Module):
    """Random features: frequencies are drawn once, belong to no state, and follow from the seed."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", nn.init.normal_(torch.empty(4, 8)), persistent=False)
        self.layer = nn.Linear(8, 1)
        nn.init.zeros_(self.layer.weight)
        self.register_buffer("sign", torch.where(self.layer.weight == 0, 1.0, -1.0), persistent=False)


def built_by(session: TrainingSession, factory: Any) -> Any:
    torch.manual_seed(session.spec.job.seed)
    session._model_factory = factory
    return session._build_model()


@pytest.mark.parametrize("resume", [False, True])
def test_a_users_model_is_whole_whether_or_not_a_state_follows(resume: bool) -> None:
    """What its constructor computes with initialisers is in no state, so that nothing brings it back."""
    model = built_by(make_session(resume=resume), Fourier)
    torch.manual_seed(3)
    assert torch.equal(model.frequencies, torch.empty(4, 8).normal_())
    assert torch.equal(model.sign, torch.ones(1, 8))


class _Prepared(Exception):
    pass


@pytest.mark.parametrize("resume", [False, True])
def test_eadts_own_factory_leaves_weights_out_that_follow(
    resume: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The initialisers are counted, since weights that were left out may have any value."""
    session = make_session(resume=resume)
    factories: list[Any] = []

    def take(factory: Any) -> None:
        factories.append(factory)
        raise _Prepared

    monkeypatch.setattr(session, "prepare", take)
    monkeypatch.setattr(causal_lm, "open_prepared", lambda _: _Data())
    with pytest.raises(_Prepared):
        causal_lm.train(session)
    drawn: list[torch.Size] = []
    draw = torch.Tensor.normal_

    def count(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        drawn.append(tensor.shape)
        return draw(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "normal_", count)
    model = built_by(session, factories[0])
    assert bool(drawn) is not resume
    assert model.gpt_neox.rotary_emb.inv_freq[0] == 1


class _Data:
    class prepared:
        vocab_size = 264
