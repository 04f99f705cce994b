"""The learning rate: its landmarks, its continuity, and schedules that do not fit the run."""

from dataclasses import replace
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmtrain.errors import UsageError
from lmtrain.train.config import ScheduleConfig
from lmtrain.train.learning_rate import check, learning_rate

TOTAL = 1000


@st.composite
def schedules(draw: st.DrawFn) -> ScheduleConfig:
    kind: Literal["cosine", "wsd"] = draw(st.sampled_from(["cosine", "wsd"]))
    warmup = draw(st.integers(0, 800))
    decay = draw(st.none() | st.integers(0, TOTAL - warmup)) if kind == "wsd" else None
    return ScheduleConfig(kind=kind, warmup_tokens=warmup, decay_tokens=decay, min_ratio=draw(st.floats(0, 1)))


def test_cosine_landmarks() -> None:
    cfg = ScheduleConfig(warmup_tokens=100, min_ratio=0.1)
    assert learning_rate(cfg, 2.0, 1, TOTAL) == 0.02
    assert learning_rate(cfg, 2.0, 100, TOTAL) == 2.0
    assert learning_rate(cfg, 2.0, 550, TOTAL) == pytest.approx(1.1)
    assert learning_rate(cfg, 2.0, TOTAL, TOTAL) == pytest.approx(0.2)


def test_wsd_landmarks() -> None:
    cfg = ScheduleConfig(kind="wsd", warmup_tokens=100, decay_tokens=400, min_ratio=0.0)
    assert [learning_rate(cfg, 2.0, t, TOTAL) for t in (50, 100, 600, 800, 1000)] == [1.0, 2.0, 2.0, 1.0, 0.0]


def test_wsd_decays_over_a_fifth_by_default() -> None:
    cfg = ScheduleConfig(kind="wsd", min_ratio=0.0)
    assert [learning_rate(cfg, 1.0, t, TOTAL) for t in (800, 900, 1000)] == [1.0, 0.5, 0.0]


@given(schedules(), st.integers(1, TOTAL))
def test_positive_up_to_the_peak_and_at_the_floor_in_the_end(cfg: ScheduleConfig, tokens: int) -> None:
    rate = learning_rate(cfg, 3.0, tokens, TOTAL)
    assert 0 <= rate <= 3.0 * (1 + 1e-12)
    if tokens <= cfg.warmup_tokens:
        assert rate > 0
    if not (cfg.warmup_tokens == TOTAL and cfg.kind == "cosine"):
        assert learning_rate(cfg, 3.0, TOTAL, TOTAL) == pytest.approx(3.0 * cfg.min_ratio)


@given(schedules(), st.integers(1, TOTAL - 1))
def test_no_jumps(cfg: ScheduleConfig, tokens: int) -> None:
    """One token moves the rate by no more than the steepest of the three pieces allows."""
    slopes = [cfg.warmup_tokens, TOTAL - cfg.warmup_tokens, cfg.decay_tokens or TOTAL // 5]
    if cfg.decay_tokens == 0:
        return
    steepest = 2.0 / min(length for length in slopes if length > 0)
    here, after = (learning_rate(cfg, 1.0, t, TOTAL) for t in (tokens, tokens + 1))
    assert abs(after - here) <= steepest + 1e-12


@given(schedules())
def test_every_schedule_that_fits_is_accepted(cfg: ScheduleConfig) -> None:
    check(cfg, TOTAL)


@given(st.sampled_from(["cosine", "wsd"]), st.integers(0, 3000), st.none() | st.integers(0, 3000), st.integers(0, 2000))
def test_what_is_proposed_fits(kind: Any, warmup: int, decay: int | None, total: int) -> None:
    cfg = ScheduleConfig(kind=kind, warmup_tokens=warmup, decay_tokens=decay if kind == "wsd" else None)
    try:
        check(cfg, total)
    except UsageError as error:
        assert str(error).startswith("train.schedule.")
        given = dict(word.split("=") for word in str(error).split(" or give ")[1].split())
        lengths = {key.removeprefix("train.schedule."): int(value) for key, value in given.items()}
        assert lengths
        check(replace(cfg, **lengths), total)


@pytest.mark.parametrize(
    ("cfg", "words"),
    [
        (ScheduleConfig(warmup_tokens=1001), "warmup_tokens: the run has 1,000"),
        (ScheduleConfig(warmup_tokens=-1), "warmup_tokens"),
        (ScheduleConfig(kind="wsd", warmup_tokens=300, decay_tokens=800), r"give train.schedule.decay_tokens=200$"),
        (ScheduleConfig(kind="wsd", warmup_tokens=900), r"give train.schedule.warmup_tokens=100$"),
        (ScheduleConfig(kind="wsd", decay_tokens=-1), "decay_tokens"),
        (ScheduleConfig(decay_tokens=10), "kind wsd only"),
        (ScheduleConfig(min_ratio=1.5), "min_ratio: must be between 0 and 1, got 1.5"),
    ],
)
def test_schedules_that_do_not_fit(cfg: ScheduleConfig, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        check(cfg, TOTAL)
