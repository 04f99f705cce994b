"""What held-out text costs without a model: token counts, and a general compressor."""

from __future__ import annotations

import lzma

import numpy as np
from numpy.typing import NDArray

from lmtrain.data.config import DataConfig
from lmtrain.data.sources import open_sources
from lmtrain.data.tokenizer import Tokenizer


def baselines(cfg: DataConfig) -> dict[str, float]:
    """Bits per byte of all held-out text under models counted on the training text, and under ``xz -9`` alone.

    ``token_unigram_bpb``: counts plus one. ``token_bigram_bpb``: pair counts, backed off to the unigram by absolute
    discounting (0.75). Both code every token, document ends included. Needs memory for the pairs of the training text.
    """
    tokenizer = Tokenizer.load(cfg.tokenizer)
    vocab = tokenizer.vocab_size
    train, heldout, num_bytes = [], [], 0
    for source in open_sources(cfg, tokenizer):
        train.append(source.train.tokens(0, source.train.num_tokens))
        if source.heldout is not None and source.manifest is not None:
            heldout.append(source.heldout.tokens(0, source.heldout.num_tokens))
            num_bytes += sum(source.manifest.heldout.bytes)
    text = b"".join(tokenizer.decode(tokens[tokens != tokenizer.eod_id]).encode() for tokens in heldout)
    seen, told = np.concatenate(train).astype(np.int64), np.concatenate(heldout).astype(np.int64)
    counts = np.bincount(seen, minlength=vocab).astype(np.float64) + 1
    unigram = counts / counts.sum()
    return {
        "token_unigram_bpb": float(-np.log2(unigram[told]).sum()) / num_bytes,
        "token_bigram_bpb": _bigram_bits(seen, told, unigram) / num_bytes,
        "xz_alone_bpb": 8 * len(lzma.compress(text, preset=9)) / num_bytes,
    }


def _bigram_bits(seen: NDArray[np.int64], told: NDArray[np.int64], unigram: NDArray[np.float64]) -> float:
    """Interpolated absolute discounting: ``p(b|a) = max(n_ab - d, 0) / n_a + d * kinds(a) / n_a * p(b)``."""
    vocab, discount = len(unigram), 0.75
    pairs, counts = np.unique(seen[:-1] * vocab + seen[1:], return_counts=True)
    total = np.bincount(pairs // vocab, weights=counts, minlength=vocab)
    kinds = np.bincount(pairs // vocab, minlength=vocab)
    first, second = told[:-1], told[1:]
    asked = first * vocab + second
    at = np.minimum(np.searchsorted(pairs, asked), len(pairs) - 1)
    found = np.where(pairs[at] == asked, counts[at], 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        mixed = (
            np.maximum(found - discount, 0) / total[first] + discount * kinds[first] / total[first] * unigram[second]
        )
    probability = np.where(total[first] > 0, mixed, unigram[second])
    return float(-np.log2(probability).sum() - np.log2(unigram[told[0]]))
