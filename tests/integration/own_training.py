"""A user's own training function, as a test runs it in engines."""

from __future__ import annotations

import torch

from eadt.training.data import open_prepared
from eadt.training.models import build_model
from eadt.training.session import TrainingSession


def train_with_sgd(session: TrainingSession, momentum: float) -> None:
    """A plain loop with an optimizer of its own, that counts what it did in the state that travels."""
    data = open_prepared(session.spec.job.data_path)
    engine = session.prepare(
        lambda: build_model(session.training, data.prepared.vocab_size, seed=session.spec.job.seed),
        lambda model: torch.optim.SGD(model.parameters(), lr=0.3, momentum=momentum),
    )
    for step in session.steps():
        for rows in session.micro_batches(len(data.train)):
            tokens_BT = torch.from_numpy(data.train.batch(rows)).to(session.device)
            loss = engine(input_ids=tokens_BT, labels=tokens_BT).loss
            engine.backward(loss)
            engine.step()
            session.record_loss(loss)
        assert session.state.setdefault("counted", 0) == step
        session.state["counted"] += 1
