"""EADT's own training function: Hugging Face causal language models on packed sequences.

Shape legend: B micro batch, T sequence length.
"""

from __future__ import annotations

import numpy as np
import torch

from eadt.training.data import TokenDataset, open_prepared
from eadt.training.models import build_model
from eadt.training.session import TrainingSession


def train(session: TrainingSession) -> None:
    """Train with validation at the start, every ``training.eval_steps`` and at the end."""
    data = open_prepared(session.spec.job.data_path)
    vocab_size, seed = data.prepared.vocab_size, session.spec.job.seed
    engine = session.prepare(
        lambda: build_model(session.training, vocab_size, seed=seed, initialise=not session.weights_follow)
    )
    if session.step == 0:
        validate(session, data)
    for _ in session.steps():
        for rows in session.micro_batches(len(data.train)):
            with session.loading():
                tokens_BT = torch.from_numpy(data.train.batch(rows)).to(session.device)
            loss = engine(input_ids=tokens_BT, labels=tokens_BT).loss
            engine.backward(loss)
            engine.step()
            session.record_loss(loss)
        if session.is_due(session.training.eval_steps):
            validate(session, data)


@torch.no_grad()
def validate(session: TrainingSession, data: TokenDataset) -> None:
    """Record the mean validation loss, over the same sequences whatever the number of ranks."""
    wanted = min(len(data.validation), session.training.eval_batches * session.spec.batch.train_batch_size)
    if not wanted:
        return
    with session.validating():
        session.record_validation(_mean_loss(session, data, wanted))


def _mean_loss(session: TrainingSession, data: TokenDataset, wanted: int) -> float:
    batch = session.spec.batch
    session.engine.eval()
    loss_sum, num_sequences = 0.0, 0
    # Every rank does as many passes as the others: in ZeRO 3 each is a collective.
    per_pass = session.world_size * batch.micro_batch
    for begin in range(0, wanted, per_pass):
        first = begin + session.rank * batch.micro_batch
        rows = np.arange(first, min(first + batch.micro_batch, wanted))
        counted = len(rows)
        if not counted:
            rows = np.zeros(1, dtype=np.int64)  # computed to keep in step, not counted
        tokens_BT = torch.from_numpy(data.validation.batch(rows)).to(session.device)
        loss = session.engine(input_ids=tokens_BT, labels=tokens_BT).loss
        loss_sum += float(loss) * counted
        num_sequences += counted
    session.engine.train()
    total, count = session.sum_over_ranks(loss_sum, num_sequences)
    return total / count
