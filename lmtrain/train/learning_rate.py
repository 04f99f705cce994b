"""The learning rate as a pure function of tokens: warm-up, then cosine, or stable and a final decay (WSD)."""

from __future__ import annotations

import math

from lmtrain.errors import UsageError
from lmtrain.train.config import ScheduleConfig


def learning_rate(cfg: ScheduleConfig, peak: float, tokens: int, total: int) -> float:
    """Rate of the step after which ``tokens`` of the run's ``total`` tokens will be consumed.

    Measured at the step's END, so that the first step of a warm-up has a positive rate and the last step of the run has
    the floor, ``min_ratio * peak``. The caller passes ``(step + 1) * batch_tokens`` for the step counted from 0.
    """
    if tokens < cfg.warmup_tokens:
        return peak * tokens / cfg.warmup_tokens
    if cfg.kind == "cosine":
        done = _fraction(tokens - cfg.warmup_tokens, total - cfg.warmup_tokens)
        height = 0.5 * (1 + math.cos(math.pi * done))
    else:
        decay = _decay_tokens(cfg, total)
        height = 1 - _fraction(tokens - (total - decay), decay)
    return peak * (cfg.min_ratio + (1 - cfg.min_ratio) * height)


def phases(cfg: ScheduleConfig, total: int) -> dict[str, int]:
    """The token at which each phase of wsd begins, in a run of ``total``: warmup, stable, decay; cosine has none."""
    if cfg.kind != "wsd":
        return {}
    return {"warmup": 0, "stable": cfg.warmup_tokens, "decay": total - _decay_tokens(cfg, total)}


def check(cfg: ScheduleConfig, total: int) -> None:
    """UsageError if the schedule does not fit a run of ``total`` tokens."""
    if not 0 <= cfg.min_ratio <= 1:
        raise UsageError(f"train.schedule.min_ratio: must be between 0 and 1, got {cfg.min_ratio}")
    if not 0 <= cfg.warmup_tokens <= total:
        raise UsageError(
            f"train.schedule.warmup_tokens: the run has {total:,} tokens, the warm-up {cfg.warmup_tokens:,}; "
            f"lengthen the run (train.tokens, train.steps), or give {_that_fits(cfg, total)}"
        )
    if cfg.kind == "cosine":
        if cfg.decay_tokens is not None:
            raise UsageError("train.schedule.decay_tokens: applies to kind wsd only; remove it or set kind=wsd")
        return
    decay = _decay_tokens(cfg, total)
    if not 0 <= decay <= total - cfg.warmup_tokens:
        raise UsageError(
            f"train.schedule.decay_tokens: warm-up {cfg.warmup_tokens:,} + decay {decay:,} tokens must fit into "
            f"the run's {total:,}; lengthen the run (train.tokens, train.steps), or give {_that_fits(cfg, total)}"
        )


def _that_fits(cfg: ScheduleConfig, total: int) -> str:
    """What to say on the command line for a run of ``total`` tokens: a length that is too long becomes a usual one."""
    warmup, decay = total // 10, total // 5
    words = [] if 0 <= cfg.warmup_tokens <= total - decay else [f"train.schedule.warmup_tokens={warmup}"]
    left = total - (warmup if words else cfg.warmup_tokens)
    if cfg.kind == "wsd" and cfg.decay_tokens is not None and not 0 <= cfg.decay_tokens <= left:
        words.append(f"train.schedule.decay_tokens={decay}")
    return " ".join(words)


def _decay_tokens(cfg: ScheduleConfig, total: int) -> int:
    return total // 5 if cfg.decay_tokens is None else cfg.decay_tokens


def _fraction(part: int, whole: int) -> float:
    """``part / whole`` within 0 and 1; an empty whole is done."""
    return min(max(part / whole, 0.0), 1.0) if whole > 0 else float(part >= 0)
