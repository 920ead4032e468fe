"""Writes a trained model from a saved state as a folder that ``from_pretrained`` loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from eadt.config import TrainingConfig
from eadt.training.state import StateLayout, StateReader


@torch.no_grad()
def export_model(
    model: torch.nn.Module, layout: StateLayout, reader: StateReader, training: TrainingConfig, path: str
) -> None:
    """Fill ``model`` with the fp32 weights of a saved state and write it to ``path``.

    A Hugging Face model becomes a Hugging Face folder with its tokenizer; any other becomes
    ``model.pt``, its ``state_dict``.
    """
    tensors: dict[str, torch.Tensor] = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, shape in zip(layout.names, layout.shapes, strict=True):
        values = torch.empty(shape, dtype=torch.float32)
        reader.read("fp32", layout.offsets[name], values.view(-1).numpy())
        tensors[name].copy_(values)
    save_pretrained: Any = getattr(model, "save_pretrained", None)
    if save_pretrained is None:
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), folder / "model.pt")
        return
    from eadt.training.models import save_hf_folder
    from eadt.training.tokenizer import load_tokenizer

    save_hf_folder(model, load_tokenizer(training), path)
