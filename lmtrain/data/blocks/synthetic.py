"""Sources without files: a function from an index to a document, read through the same sampler and loader as text.

    data.sources.recall.synthetic: lmtrain.eval.probes.mqar:mqar
    data.sources.recall.arguments: {pairs: 4, length: 64, num_keys: 32, num_values: 32}

The function is called as ``function(seed, index, **arguments)`` and must be pure. It returns the tokens of a document,
integers ``[n]`` with n >= 2, of which all but the first are targets; or anything with ``tokens`` and ``labels``, both
``[n]``, where ``labels[t]`` is the right answer once ``tokens[: t + 1]`` were read, and ``IGNORE`` where nothing is
asked, after the last token in any case. An answer need not be the next token, nor among the tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xxhash

from lmtrain.data.blocks.blocks import Block
from lmtrain.data.blocks.function import DocumentFunction
from lmtrain.errors import DataError
from lmtrain.ops.cross_entropy import IGNORE

NUM_BLOCKS = 1 << 32
"""Blocks of an epoch: no run reads a document twice."""


@dataclass(frozen=True)
class SyntheticBlocks:
    """Whole documents in blocks of ``length`` inputs, padded on the right.

    Block p begins with document ``p * (length + 1)`` and holds those after it until one does not fit; that one is left
    out, so that any block is made without the others. seed: of the run; documents depend on it and on the source's
    name. Raises UsageError for a function that cannot be found or called, DataError for what it returns.
    """

    function: DocumentFunction
    length: int
    seed: int
    num_blocks: int = NUM_BLOCKS

    def __post_init__(self) -> None:
        self.block(0)  # what cannot be called, or does not fit, is told before the run begins

    def block(self, p: int) -> Block:
        width, used, number = self.length + 1, 0, 0
        tokens = np.zeros(width, dtype=np.int32)
        ids = np.empty(width, dtype=np.int32)
        labels = np.full(width, IGNORE, dtype=np.int32)
        own, key = False, document_seed(self.function.source, self.seed)
        while used < width:
            made = self.function.document(key, p * width + number)
            end = used + len(made.tokens)
            if end > width:
                break
            tokens[used:end], ids[used:end] = made.tokens, number
            if made.labels is None:
                labels[used : end - 1] = made.tokens[1:]
            else:
                labels[used:end], own = made.labels, True
            used, number = end, number + 1
        if number == 0:
            raise self.function.error(
                p * width,
                f"it has {len(made.tokens):,} tokens, a block holds {width:,}; make it shorter, or raise "
                "data.block_tokens or data.seq_len",
            )
        ids[used:] = number  # padding comes as one document more
        real = None if used == width else np.arange(width) < used
        return Block(tokens, ids, real, labels if own else None)

    def out_of_range(self, p: int, offset: int, vocab_size: int) -> DataError:
        block = self.block(p)
        index, token = p * (self.length + 1) + int(block.ids[offset]), int(block.tokens[offset])
        if block.labels is None or not 0 <= token < vocab_size:
            return self.function.outside(index, "token", token, vocab_size)
        return self.function.outside(index, "label", int(block.labels[offset]), vocab_size)


def document_seed(source: str, seed: int) -> int:
    """What the function of ``source`` is called with in a run of ``seed``."""
    return xxhash.xxh3_64_intdigest(source.encode(), seed=seed % 2**64)
