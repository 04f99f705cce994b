"""The tokenizer of an export, in two files, so that AutoTokenizer makes the ids of training.

Both are needed: without tokenizer_config.json, transformers picks a class by model_type, which rebuilds the pipeline.
"""

from __future__ import annotations

import json
from typing import Any

from lmtrain.data.tokenizer import HFTokenizer, Tokenizer
from lmtrain.errors import UsageError


def tokenizer_files(tokenizer: Tokenizer, seq_len: int) -> dict[str, str]:
    """File name to content. Raises UsageError for a tokenizer that has no faithful form there."""
    if not isinstance(tokenizer, HFTokenizer):
        raise UsageError(
            f"{tokenizer.path}: a sentencepiece model cannot be exported: what transformers makes of such a "
            "file encodes some text differently; only a tokenizer.json can"
        )
    spec: dict[str, Any] = json.loads(tokenizer.engine.to_str())
    if len(tokenizer.engine.encode("").ids):
        spec["post_processor"] = None  # it adds tokens to every text; training never saw them
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # transformers 4 knows no other general one, 5 reads it
        "eos_token": tokenizer.eod,
        "pad_token": tokenizer.eod,
        "model_max_length": seq_len,
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
    }
    return {"tokenizer.json": json.dumps(spec, ensure_ascii=False), "tokenizer_config.json": _text(config)}


def _text(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
