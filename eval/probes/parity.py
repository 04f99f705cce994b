"""Parity of a stream of bits: whether the ones so far are odd, asked after every bit.

The smallest task that needs a state to turn round: a diagonal transition in [0, 1] cannot follow it over long rows, one
that reaches -1 can (arXiv 2411.12537). Bits are tokens 0 and 1; the answers are EVEN and ODD, never among the inputs.
"""

from __future__ import annotations

import numpy as np

from lmtrain.data.blocks.function import document_function
from lmtrain.errors import UsageError
from lmtrain.eval.probes.document import NOT_ASKED, Document, generator

EVEN, ODD = 2, 3
VOCAB_SIZE = 4


@document_function
def parity(seed: int, index: int, *, bits: int) -> Document:
    """``bits`` independent fair bits and the last answer: ``bits + 1`` tokens. UsageError unless bits is positive."""
    if bits < 1:
        raise UsageError(f"parity: bits: expected at least 1, got {bits}")
    stream = generator(seed, index).integers(2, size=bits, dtype=np.int32)
    answers = EVEN + (np.cumsum(stream) % 2).astype(np.int32)
    return Document(np.append(stream, answers[-1]), np.append(answers, np.int32(NOT_ASKED)))
