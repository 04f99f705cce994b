"""Sources without files: a function from an index to a document, read through the same sampler and loader as text.

    data.sources.recall.synthetic: lmtrain.eval.probes.mqar:mqar
    data.sources.recall.arguments: {pairs: 4, length: 64, num_keys: 32, num_values: 32}

The function is called as ``function(seed, index, **arguments)`` and must be pure. It returns the tokens of a document,
integers ``[n]`` with n >= 2, of which all but the first are targets; or anything with ``tokens`` and ``labels``, both
``[n]``, where ``labels[t]`` is token t + 1 if that is a target and ``IGNORE`` if not.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from lmtrain.data.blocks.blocks import Block
from lmtrain.errors import DataError, UsageError, nearest
from lmtrain.ops.cross_entropy import IGNORE

NUM_BLOCKS = 1 << 32
"""Blocks of an epoch: no run reads a document twice."""


class _Document(NamedTuple):
    tokens: NDArray[np.int32]
    target: NDArray[np.bool_]


@dataclass(frozen=True)
class SyntheticBlocks:
    """Whole documents in blocks of ``length`` inputs, padded on the right.

    Block p begins with document ``p * (length + 1)`` and holds those after it until one does not fit; that one is left
    out, so that any block is made without the others. seed: of the run; documents depend on it and on the source's
    name. Raises UsageError for a function that cannot be found or called, DataError for what it returns.
    """

    name: str
    function: str
    length: int
    seed: int
    arguments: Mapping[str, Any] = field(default_factory=dict)
    num_blocks: int = NUM_BLOCKS

    def __post_init__(self) -> None:
        self.block(0)  # what cannot be called, or does not fit, is told before the run begins

    def block(self, p: int) -> Block:
        width, used, number = self.length + 1, 0, 0
        tokens = np.zeros(width, dtype=np.int32)
        ids = np.empty(width, dtype=np.int32)
        target = np.zeros(width, dtype=bool)
        while used < width:
            document = self._document(p * width + number)
            end = used + len(document.tokens)
            if end > width:
                break
            tokens[used:end], target[used:end], ids[used:end] = document.tokens, document.target, number
            used, number = end, number + 1
        if number == 0:
            self._fail(
                p * width,
                f"it has {len(document.tokens):,} tokens, a block holds {width:,}; make it shorter, or raise "
                "data.block_tokens or data.seq_len",
            )
        ids[used:] = number  # padding comes as one document more
        return Block(tokens, ids, None if used == width else np.arange(width) < used, target)

    def out_of_range(self, p: int, offset: int, vocab_size: int) -> DataError:
        block = self.block(p)
        index = p * (self.length + 1) + int(block.ids[offset])
        return self._error(index, f"token id {block.tokens[offset]} is outside the vocabulary of {vocab_size}")

    def _document(self, index: int) -> _Document:
        key = xxhash.xxh3_64_intdigest(self.name.encode(), seed=self.seed % 2**64)
        try:
            made = _resolve(self.name, self.function)(key, index, **self.arguments)
        except TypeError as error:
            raise UsageError(f"data.sources.{self.name}.arguments: {self.function}: {error}") from error
        tokens, labels = np.asarray(getattr(made, "tokens", made)), getattr(made, "labels", None)
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu" or len(tokens) < 2:
            self._fail(index, f"expected at least two integers, [n], got {tokens.dtype} {list(tokens.shape)}")
        narrow = tokens.astype(np.int32)
        if (narrow != tokens).any():
            self._fail(index, f"token id {tokens[narrow != tokens][0]} does not fit into 32 bits")
        target = np.arange(len(tokens)) > 0
        if labels is not None:
            asked = np.asarray(labels) != IGNORE
            if asked.shape != tokens.shape or asked[-1]:
                self._fail(index, "expected one label for each token, and none for the last")
            wrong = np.flatnonzero(asked[:-1] & (labels[:-1] != tokens[1:]))
            if wrong.size:
                at = int(wrong[0])
                self._fail(index, f"token {at} is asked for {labels[at]}, a source can only ask for the next one")
            target[1:] = asked[:-1]
        return _Document(narrow, target)

    def _fail(self, index: int, message: str) -> None:
        raise self._error(index, message)

    def _error(self, index: int, message: str) -> DataError:
        return DataError(f"data.sources.{self.name}.synthetic: {self.function}: document {index}: {message}")


@cache
def _resolve(source: str, name: str) -> Callable[..., Any]:
    key = f"data.sources.{source}.synthetic"
    module_name, colon, function = name.partition(":")
    if not (module_name and colon and function):
        raise UsageError(f"{key}: expected package.module:function, got {name}")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UsageError(f"{key}: {name}: {error}") from error
    found = getattr(module, function, None)
    if not callable(found):
        known = [each for each in vars(module) if callable(getattr(module, each)) and not each.startswith("_")]
        raise UsageError(f"{key}: {module_name} has no function {function}{nearest(function, known)}")
    return found
