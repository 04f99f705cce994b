"""The files of an export that transformers reads: config, weights, tokenizer."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import torch

from lmtrain.checkpoint.checkpointer import HASHER
from lmtrain.checkpoint.commit import write_file
from lmtrain.checkpoint.manifest import FileRecord
from lmtrain.checkpoint.storage import LocalStorage
from lmtrain.data.tokenizer import Tokenizer
from lmtrain.hub.table import HubClass
from lmtrain.hub.tokenizer_files import tokenizer_files
from lmtrain.hub.weights import SHARD_BYTES, write_weights
from lmtrain.model.language_model import LanguageModel


def write_folder(
    folder: Path,
    cls: HubClass,
    model: LanguageModel,
    tokenizer: Tokenizer,
    seq_len: int,
    dtype: torch.dtype,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, FileRecord]:
    """Make ``folder`` and write all that from_pretrained needs, each file synced; size and digest of each by name."""
    folder.mkdir(parents=True)
    texts = tokenizer_files(tokenizer, seq_len)
    texts |= {name: as_json(value) for name, value in _configs(cls, model, tokenizer, seq_len, dtype).items()}
    records = write_weights(folder, cls.rules(model.cfg), dict(model.state_dict()), dtype, shard_bytes)
    return records | {name: write_text(folder / name, text) for name, text in texts.items()}


def write_text(path: Path, text: str) -> FileRecord:
    """A new file of UTF-8 text, synced."""
    return write_file(LocalStorage(), path, [text.encode()], HASHER)


def as_json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _configs(
    cls: HubClass, model: LanguageModel, tokenizer: Tokenizer, seq_len: int, dtype: torch.dtype
) -> dict[str, dict[str, Any]]:
    shared = {
        "bos_token_id": None,
        "eos_token_id": tokenizer.eod_id,
        "use_cache": cls.cached(model.cfg),
        "transformers_version": importlib.metadata.version("transformers"),
    }
    config = {
        "architectures": [cls.architecture],
        "model_type": cls.model_type,
        "dtype": str(dtype).removeprefix("torch."),
        **cls.config(model.cfg, model.vocab_size, seq_len),
        **shared,
        "pad_token_id": None,  # a number would be the embedding's padding_idx: a row that fine-tuning does not move
        "lmtrain_tokenizer_sha256": tokenizer.fingerprint,
    }
    return {"config.json": config, "generation_config.json": shared | {"pad_token_id": tokenizer.eod_id}}
