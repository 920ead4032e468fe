"""Text to token ids: EADT's byte tokenizer, or any Hugging Face tokenizer.

Owns the one interface behind which both stand. Must not read data or know the model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from eadt.config.training import BYTE_TOKENIZER
from eadt.errors import ConfigError
from eadt.training.hub import load_by_name, quiet_transformers

if TYPE_CHECKING:
    from eadt.config.training import TrainingConfig

_MARKER = "eadt_byte_tokenizer.json"
_NUM_BYTES = 256
_VOCAB_MULTIPLE = 8
"""Rows of the embedding are rounded up to this: tensor cores want multiples of 8."""


class Tokenizer(Protocol):
    """What turns text into token ids. Deterministic; adds no special tokens by itself.

    Attributes:
        name: For people.
        vocab_size: Number of embedding rows that a model needs for it.
        eos_token_id: Put between documents; ``None`` where the tokenizer has none.
    """

    name: str
    vocab_size: int
    eos_token_id: int | None

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        """Token ids of each text."""
        ...

    def decode(self, token_ids: Sequence[int] | NDArray[Any]) -> str:
        """Text of token ids."""
        ...

    def fingerprint(self) -> str:
        """Equal for tokenizers that give equal ids."""
        ...

    def save(self, folder: Path) -> None:
        """Write the files from which ``AutoTokenizer.from_pretrained(folder)`` makes an equal one."""
        ...


class ByteTokenizer:
    """One token per byte of UTF-8, then ``<|endoftext|>`` (256) and ``<|pad|>`` (257).

    Needs no download and can hold any text. Implements :class:`Tokenizer`.
    """

    eos_token_id: int | None = _NUM_BYTES
    pad_token_id = _NUM_BYTES + 1

    def __init__(self) -> None:
        self.name = "byte"
        self.vocab_size = -(-(_NUM_BYTES + 2) // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        """See :class:`Tokenizer`. Halves of surrogate pairs, which UTF-8 cannot hold, become ``?``."""
        return [
            np.frombuffer(text.encode("utf-8", "replace"), dtype=np.uint8).astype(np.int64) for text in texts
        ]

    def decode(self, token_ids: Sequence[int] | NDArray[Any]) -> str:
        """See :class:`Tokenizer`. Special tokens are left out; broken UTF-8 becomes U+FFFD."""
        return bytes(int(token) for token in token_ids if token < _NUM_BYTES).decode("utf-8", "replace")

    def fingerprint(self) -> str:
        """See :class:`Tokenizer`."""
        return f"byte-{self.vocab_size}"

    def save(self, folder: Path) -> None:
        """See :class:`Tokenizer`. Writes Hugging Face's files, and a note of what the tokenizer is."""
        folder.mkdir(parents=True, exist_ok=True)
        _byte_level_equivalent().save_pretrained(folder)
        note = {
            "tokenizer": "EADT byte tokenizer: one token per byte of UTF-8",
            "vocab_size": self.vocab_size,
            "eos_token_id": self.eos_token_id,
            "pad_token_id": self.pad_token_id,
        }
        (folder / _MARKER).write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")


def _byte_level_equivalent() -> Any:
    """A ``PreTrainedTokenizerFast`` with the same ids: byte-level BPE without a single merge."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    quiet_transformers()
    vocabulary = {letter: byte for byte, letter in enumerate(_byte_letters())}
    backend = Backend(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<|pad|>", add_prefix_space=False
    )


def _byte_letters() -> list[str]:
    """The printable letter that byte-level BPE writes for each byte (GPT-2's ``bytes_to_unicode``)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    letters, next_letter = [], _NUM_BYTES
    for byte in range(_NUM_BYTES):
        if byte in printable:
            letters.append(chr(byte))
        else:
            letters.append(chr(next_letter))
            next_letter += 1
    return letters


class HfTokenizer:
    """A Hugging Face tokenizer behind :class:`Tokenizer`.

    Args:
        tokenizer: What ``AutoTokenizer.from_pretrained`` gave.
        name: Folder or hub name.
    """

    def __init__(self, tokenizer: Any, name: str) -> None:
        self.name = name
        self.tokenizer = tokenizer
        self.vocab_size = len(tokenizer)
        self.eos_token_id: int | None = tokenizer.eos_token_id

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        """See :class:`Tokenizer`."""
        encoded = self.tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        return [np.asarray(token_ids, dtype=np.int64) for token_ids in encoded["input_ids"]]

    def decode(self, token_ids: Sequence[int] | NDArray[Any]) -> str:
        """See :class:`Tokenizer`."""
        return str(self.tokenizer.decode([int(token) for token in token_ids], skip_special_tokens=True))

    def fingerprint(self) -> str:
        """See :class:`Tokenizer`."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is not None:
            described = backend.to_str()
        else:
            described = json.dumps(
                [type(self.tokenizer).__name__, sorted(self.tokenizer.get_vocab().items())]
            )
        digest = hashlib.sha256(f"{self.eos_token_id}\n{described}".encode())
        return f"hf-{digest.hexdigest()[:24]}"

    def save(self, folder: Path) -> None:
        """See :class:`Tokenizer`."""
        self.tokenizer.save_pretrained(folder)


def load_tokenizer(training: TrainingConfig) -> Tokenizer:
    """The tokenizer of a run: ``tokenizer_name_or_path``, else the model's own.

    A folder that :meth:`ByteTokenizer.save` wrote gives the byte tokenizer again.

    Raises:
        ConfigError: There is none, or it cannot be used.
        EnvironmentFailure: It would have to come from the hub, which cannot be reached.
    """
    key = "training.tokenizer_name_or_path"
    name = training.tokenizer_name_or_path or training.model_name_or_path
    if name is None:
        raise ConfigError("No tokenizer is set.", code="EADT-224", fix=f"set {key}, for example to byte.")
    if name == BYTE_TOKENIZER or (Path(name) / _MARKER).is_file():
        return ByteTokenizer()

    from transformers import AutoTokenizer

    quiet_transformers()

    def load(local_only: bool) -> Tokenizer:
        return HfTokenizer(AutoTokenizer.from_pretrained(name, local_files_only=local_only), name)

    return load_by_name(load, what="tokenizer", name=name, key=key)
