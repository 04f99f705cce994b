"""Multi-query associative recall (MQAR, arXiv 2312.04927): pairs of key and value, then every key again, once.

    k1 v1 k2 v2 ... kn vn | 0 0 k2 v2 0 0 0 0 k1 v1 ...

The second part consists of slots of two tokens; the keys, in any order, stand in slots drawn without replacement, and
the rest is filled with 0. What is asked is the value after a key's second appearance. Values are drawn WITH replacement
(in the paper without): the answers so far say nothing about those to come. Slots are drawn uniformly (there: near the
pairs more often).
"""

from __future__ import annotations

import numpy as np

from lmtrain.data.blocks.function import document_function
from lmtrain.errors import UsageError
from lmtrain.eval.probes.document import NOT_ASKED, Document, generator

FILLER = 0


def vocab_size(num_keys: int, num_values: int) -> int:
    """Filler 0, keys from 1, values behind them."""
    return 1 + num_keys + num_values


@document_function
def mqar(seed: int, index: int, *, pairs: int, length: int, num_keys: int, num_values: int) -> Document:
    """Document ``index`` of ``length`` tokens. UsageError where that many pairs, or slots, do not fit."""
    slots = (length - 2 * pairs) // 2
    if length % 2 or pairs < 1 or slots < pairs:
        raise UsageError(f"mqar: length: expected an even number, at least 4 times pairs {pairs}, got {length}")
    if pairs > num_keys:
        raise UsageError(f"mqar: pairs: expected at most num_keys {num_keys}, got {pairs}")
    rng = generator(seed, index)
    keys = 1 + rng.permutation(num_keys)[:pairs]
    values = 1 + num_keys + rng.integers(num_values, size=pairs)
    asked = pairs + rng.permutation(slots)[:pairs]
    tokens = np.full((pairs + slots, 2), FILLER, dtype=np.int32)
    tokens[:pairs, 0], tokens[:pairs, 1] = keys, values
    tokens[asked, 0], tokens[asked, 1] = keys, values
    labels = np.full((pairs + slots, 2), NOT_ASKED, dtype=np.int32)
    labels[asked, 0] = values
    return Document(tokens.reshape(-1), labels.reshape(-1))
