"""A training loop of one's own, made elastic by EADT's session: a small network learns to predict bytes.

Run it with ``eadt run examples/own_loop.yaml``. EADT calls :func:`train` anew in every generation, that is
after each change of workers or share; ``session.steps()`` goes on where the last generation stopped.
Shape legend: B micro batch, T bytes of context.
"""

from __future__ import annotations

import argparse
import inspect

import numpy as np
import torch
from torch import nn

from eadt.training.session import TrainingSession


class NextByte(nn.Module):
    """Predicts the byte that follows a few others; calling it gives the loss."""

    def __init__(self, context: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, 32)
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(32 * context, width), nn.ReLU(), nn.Linear(width, 256)
        )

    def forward(self, context_BT: torch.Tensor, next_B: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy over the micro batch."""
        return nn.functional.cross_entropy(self.layers(self.embedding(context_BT)), next_B)


def train(session: TrainingSession, context: int = 8, width: int = 64) -> None:
    """The whole training; keyword arguments come from ``training.train_function_args``."""
    text = torch.from_numpy(np.frombuffer(inspect.getsource(argparse).encode(), dtype=np.uint8).copy()).long()
    windows = text.unfold(0, context + 1, 1)

    engine = session.prepare(
        lambda: NextByte(context, width),
        lambda model: torch.optim.AdamW(model.parameters(), lr=session.training.learning_rate),
    )
    for _ in session.steps():
        for rows in session.micro_batches(len(windows)):  # each sample once an epoch, whatever the workers
            with session.loading():  # counted as waiting for input
                batch = windows[torch.from_numpy(rows)].to(session.device)
            loss = engine(batch[:, :-1], batch[:, -1])
            engine.backward(loss)
            engine.step()
            session.record_loss(loss)
