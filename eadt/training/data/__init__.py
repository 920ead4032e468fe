"""Training data: text is tokenised once, packed into fixed-length sequences and memory-mapped."""

from eadt.training.data.prepare import check_dataset, default_cache_dir, prepare_dataset
from eadt.training.data.store import PreparedData, Sequences, TokenDataset, open_prepared

__all__ = [
    "PreparedData",
    "Sequences",
    "TokenDataset",
    "check_dataset",
    "default_cache_dir",
    "open_prepared",
    "prepare_dataset",
]
