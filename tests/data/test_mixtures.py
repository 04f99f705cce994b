"""Mixtures made in advance, and the limits that hold for the proposals of any policy."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmtrain.data.config import DataConfig, SourceConfig
from lmtrain.data.order.weights import integer_weights
from lmtrain.data.policies.config import Kind, PolicyConfig, StageConfig
from lmtrain.data.policies.epochs import check_epochs, check_supply, effective_tokens
from lmtrain.data.policies.limits import Limited, between
from lmtrain.data.policies.make import POLICIES, make
from lmtrain.data.policies.policy import MixPolicy, Progress, Run, total_variation
from lmtrain.data.policies.staged import Staged
from lmtrain.data.policies.static import unimax
from lmtrain.errors import UsageError
from tests.data.three_sources import AVAILABLE, NAMES, RUN, THIRDS, progress

sizes = st.lists(st.integers(1, 50), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(sizes, st.integers(1, 3), st.floats(0.05, 1))
def test_unimax_is_the_most_even_mixture_within_the_caps(counts: list[int], epochs: int, part: float) -> None:
    names = [f"s{i}" for i in range(len(counts))]
    caps = [epochs * count for count in counts]
    total = max(int(part * sum(caps)), 1)
    budgets = unimax(dict(zip(names, counts, strict=True)), total, epochs)
    assert sum(budgets.values()) == pytest.approx(total)
    assert all(budgets[name] <= cap + 1e-9 for name, cap in zip(names, caps, strict=True))
    # brute force: no transfer of a token's fraction between two sources, within the caps, lowers the sum of squares
    for a, b in itertools.permutations(range(len(names)), 2):
        room = min(budgets[names[a]], caps[b] - budgets[names[b]], 0.01)
        before = budgets[names[a]] ** 2 + budgets[names[b]] ** 2
        after = (budgets[names[a]] - room) ** 2 + (budgets[names[b]] + room) ** 2
        assert after >= before - 1e-9


def test_unimax_against_every_integer_mixture() -> None:
    counts, epochs, total = (2, 5, 11), 2, 18
    caps = [epochs * count for count in counts]
    every = (mix for mix in itertools.product(*(range(cap + 1) for cap in caps)) if sum(mix) == total)
    best = min(every, key=lambda mix: sum(part * part for part in mix))
    assert tuple(unimax({"a": 2, "b": 5, "c": 11}, total, epochs).values()) == best == (4, 7, 7)


def test_unimax_needs_enough_text() -> None:
    with pytest.raises(UsageError, match="2 epochs of all sources are 6 tokens, the run has 7"):
        make(PolicyConfig(first="unimax", epochs=2), {"a": 1.0, "b": 1.0}, Run({"a": 1, "b": 2}, 7))


@pytest.mark.parametrize(
    ("cfg", "expected"),
    [
        (PolicyConfig(), {"a": 0.75, "b": 0.25}),
        (PolicyConfig(first="proportional"), {"a": 0.1, "b": 0.9}),
        (PolicyConfig(first="temperature", tau=2), {"a": 0.25, "b": 0.75}),
        (PolicyConfig(first="unimax", epochs=1), {"a": 0.125, "b": 0.875}),
        (PolicyConfig("odm_exp3", first="temperature", tau=1), {"a": 0.1, "b": 0.9}),
    ],
)
def test_first_mixtures(cfg: PolicyConfig, expected: dict[str, float]) -> None:
    policy = make(cfg, {"a": 3.0, "b": 1.0, "unused": 0.0}, Run({"a": 100, "b": 900, "unused": 5}, 800))
    assert policy.first == pytest.approx(expected)


@st.composite
def bounded(draw: st.DrawFn) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
    count = draw(st.integers(1, 6))
    share = st.floats(0, 1)
    weights = draw(st.lists(st.one_of(st.just(0.0), st.floats(1e-3, 1e3)), min_size=count, max_size=count))
    weights[draw(st.integers(0, count - 1))] = 1.0
    low = [draw(share) / count for _ in range(count)]
    high = [min(part + draw(share), 1.0) for part in low]
    if sum(high) < 1:
        high[draw(st.integers(0, count - 1))] = 1.0
    names = [f"s{i}" for i in range(count)]
    return tuple(dict(zip(names, values, strict=True)) for values in (weights, low, high))  # type: ignore[return-value]


@settings(max_examples=200, deadline=None)
@given(bounded())
def test_bounds_hold_for_any_weights(case: tuple[dict[str, float], dict[str, float], dict[str, float]]) -> None:
    weights, low, high = case
    mixture = between(weights, low, high)
    assert sum(mixture.values()) == pytest.approx(1, abs=1e-9)
    assert all(low[name] <= part <= high[name] for name, part in mixture.items())
    least = 1e-12 * sum(weights.values())  # smaller ones count as this much
    free = [name for name, part in mixture.items() if low[name] < part < high[name] and weights[name] >= least]
    ratios = [mixture[name] / weights[name] for name in free]
    assert ratios == pytest.approx([ratios[0]] * len(ratios), rel=1e-6) if ratios else True


class Fixed(MixPolicy):
    """Proposes what it is told."""

    def __init__(self, proposal: dict[str, float] | None, cfg: PolicyConfig) -> None:
        super().__init__(cfg, THIRDS, RUN)
        self.proposal = proposal

    def observe(self, step: int, tokens: Any, bits: Any) -> None: ...

    def propose(self, step: int, progress: Progress) -> dict[str, float] | None:
        return self.proposal

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Any) -> None: ...


def limited(proposal: dict[str, float] | None, max_epochs: float = 16.0, **changes: Any) -> Limited:
    cfg = PolicyConfig("ado", **changes)
    return Limited(Fixed(proposal, cfg), cfg, Run(AVAILABLE, 10**9, max_epochs=max_epochs))


def test_limits_by_hand() -> None:
    proposal = {"code": 0.0, "docs": 1.0, "web": 3.0}
    assert limited(proposal).propose(100, progress()) == pytest.approx({"code": 0.01, "docs": 0.2475, "web": 0.7425})
    capped = limited(proposal, cap=0.6).propose(100, progress())
    assert capped == pytest.approx({"code": 0.01, "docs": 0.39, "web": 0.6})
    assert limited(None).propose(100, progress()) is None


def test_proposals_keep_their_distance() -> None:
    policy = limited({"code": 2.0, "docs": 1.0, "web": 1.0}, start_tokens=500)
    assert policy.propose(150, progress(done=600)) is None, "between two multiples of every"
    assert policy.propose(100, progress(done=300)) is None, "before start_tokens"
    assert policy.propose(100, progress(done=600)) == pytest.approx({"code": 0.5, "docs": 0.25, "web": 0.25})
    near = integer_weights({"code": 0.5005, "docs": 0.2495, "web": 0.25})
    assert policy.propose(100, progress(done=600, proposed=near)) is None, "less than min_change from the last one"
    assert policy.propose(100, progress(done=10**9 + 2)) is None, "nothing is left to be read"


def test_no_source_is_read_more_often_than_allowed() -> None:
    # 400 of 1000 tokens are read; rare has 100 a pass, of at most 2: 140 are read, so 60 of the 600 that remain
    names = {"code": 1.0, "rare": 1.0}
    sizes, mixture = {"code": 10**6, "rare": 100}, integer_weights(names)
    at = Progress(400, {"code": 260, "rare": 140}, sizes, 1000, mixture, {"code": 1})
    policy = limited({"code": 1.0, "rare": 1.0}, max_epochs=2)
    assert policy.propose(100, at) == pytest.approx({"code": 0.9, "rare": 0.1})
    spent = Progress(400, {"code": 200, "rare": 200}, sizes, 1000, mixture, {"rare": 1})
    assert policy.propose(100, spent) == pytest.approx({"code": 1.0, "rare": 0.0}), "epochs win over the floor"


def test_an_impossible_mixture_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    names = {"code": 1.0, "rare": 1.0}
    at = Progress(0, {"code": 0, "rare": 0}, {"code": 100, "rare": 100}, 1000, integer_weights(names), {"code": 1})
    assert limited(names, max_epochs=2).propose(100, at) is None
    assert "no mixture of code, rare keeps" in caplog.text


def staged(interpolation: str | None, stages: dict[str, StageConfig], phases: dict[str, int] | None = None) -> Staged:
    cfg = PolicyConfig("staged", stages=stages, interpolation=interpolation, every=10)  # type: ignore[arg-type]
    policy = make(cfg, {"code": 1.0, "docs": 1.0}, Run(AVAILABLE, 1000, phases or {}))
    assert isinstance(policy, Staged)
    return policy


def test_stages() -> None:
    stages = {
        "middle": StageConfig(at=0.4, weights={"code": 3.0, "docs": 1.0}),
        "anneal": StageConfig(at="decay", weights={"web": 1.0}),
    }
    step = staged(None, stages, {"decay": 800})
    assert [step.mixture(at) for at in (0, 399, 400, 799, 800, 1000)] == [
        *[{"code": 0.5, "docs": 0.5}] * 2,
        *[{"code": 0.75, "docs": 0.25}] * 2,
        *[{"web": 1.0}] * 2,
    ]
    linear, cosine = (staged(kind, stages, {"decay": 800}) for kind in ("linear", "cosine"))
    assert linear.mixture(100) == pytest.approx({"code": 0.5625, "docs": 0.4375})
    assert cosine.mixture(100) == pytest.approx(
        {"code": 0.5 + 0.25 * (1 - math.sqrt(0.5)) / 2, "docs": 0.5 - 0.0366}, abs=1e-4
    )
    for ramp in (linear, cosine):
        assert ramp.mixture(600) == pytest.approx({"code": 0.375, "docs": 0.125, "web": 0.5})
    assert step.plan() == pytest.approx({"code": 500, "docs": 300, "web": 200})
    for ramp in (linear, cosine):
        steps = np.arange(0.5, 1000)
        read = {name: sum(ramp.mixture(at).get(name, 0) for at in steps) for name in NAMES}
        assert ramp.plan() == pytest.approx(read, rel=1e-4)


def test_a_stage_is_proposed_once_and_leaves_a_person_alone_in_between() -> None:
    policy = staged(None, {"late": StageConfig(at=500, weights={"code": 1.0})})
    first, late, by_hand = ({"code": 1, "docs": 1}, {"code": 4096}, {"web": 7})
    assert policy.propose(1, progress(first, done=498, proposed=first)) is None
    skipped = {"code": 400, "docs": 400}
    assert policy.propose(1, progress(first, done=498, tokens=skipped, proposed=first)) is None, "skips are no progress"
    assert policy.propose(2, progress(first, done=500, proposed=first)) == {"code": 1.0}
    assert policy.propose(3, progress(late, done=502, proposed=late)) is None
    assert policy.propose(3, progress(by_hand, done=502, proposed=late)) is None


def test_the_last_stage_of_ramps_is_proposed_where_it_begins() -> None:
    """Also where the run ends before ``every`` steps have passed."""
    policy = staged("linear", {"late": StageConfig(at=500, weights={"code": 1.0})})
    first = {"code": 1, "docs": 1}
    assert policy.every > 3
    assert policy.propose(1, progress(first, done=499, proposed=first)) is None
    assert policy.propose(2, progress(first, done=500, proposed=first)) == {"code": 1.0}
    assert policy.propose(3, progress(first, done=502, proposed={"code": 4096})) is None


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_what_stages_will_propose_is_known(data: st.DataObject) -> None:
    """Against a run that asks after every token: the same tokens of every source from any place on."""
    weights = st.fixed_dictionaries({"code": st.integers(1, 3), "docs": st.integers(0, 3)})
    places = data.draw(st.lists(st.integers(10, 990), min_size=1, max_size=3, unique=True))
    stages = {f"s{at}": StageConfig(at=at, weights=data.draw(weights)) for at in places}
    policy = staged(data.draw(st.sampled_from([None, "linear", "cosine"])), stages)
    done = data.draw(st.integers(0, 999))
    expected = {name: sum(policy.mixture(at + 0.5).get(name, 0.0) for at in range(done, 1000)) for name in NAMES}
    changes = [(done, policy.mixture(done + 0.5)), *policy.ahead(done)]
    assert all(done < at for at, _ in changes[1:])
    found = dict.fromkeys(NAMES, 0.0)
    for (at, mixture), (end, _) in itertools.pairwise([*changes, (1000, {})]):
        assert at <= end
        for name, share in mixture.items():
            found[name] += share * (end - at)
    assert found == pytest.approx(expected, abs=2.5 if policy.every > 1 else 1e-6)


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (StageConfig(at="decay", weights={"code": 1.0}), "no phase of the learning rate is named decay"),
        (StageConfig(at=1000, weights={"code": 1.0}), "inside the run"),
        (StageConfig(at=300, weights={"cod": 1.0}), "did you mean code"),
    ],
)
def test_bad_stages_are_refused(stage: StageConfig, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        staged(None, {"late": stage})


def with_synthetic(policy: PolicyConfig, weight: float = 0.1) -> DataConfig:
    sources = {"text": SourceConfig("text"), "recall": SourceConfig(synthetic="package.module:recall", weight=weight)}
    return DataConfig("tokenizer.json", 32, sources, policy=policy)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: PolicyConfig(tau=2.0), "tau: does not apply to first: weights"),
        (lambda: PolicyConfig(first="temperature"), "tau: missing"),
        (lambda: PolicyConfig("excess"), "reference: missing"),
        (lambda: PolicyConfig("staged"), "stages: missing"),
        (lambda: PolicyConfig("ado", interpolation="linear"), "interpolation: does not apply"),
        (lambda: PolicyConfig(floor=0.5, cap=0.5), "floor: must be"),
        (lambda: PolicyConfig(every=0), "every: must be"),
        (lambda: StageConfig(at=1, weights={"a": 1.0}), "at: must be"),
        (lambda: StageConfig(at=1.5, weights={"a": 1.0}), "at: must be whole tokens"),
        (lambda: StageConfig(at=math.nan, weights={"a": 1.0}), "at: must be"),
        (lambda: StageConfig(at=5, weights={"a": 0.0}), "weights: every weight is 0"),
        (lambda: make(PolicyConfig("ado", floor=0.4), THIRDS, RUN), "at most 0.3333"),
        (lambda: make(PolicyConfig(), {"a": 0.0}, RUN), "every weight is 0"),
        (lambda: with_synthetic(PolicyConfig(first="proportional")), r"policy.first: .* source recall is synthetic"),
        (lambda: with_synthetic(PolicyConfig(first="temperature", tau=2.0)), "temperature goes by the tokens"),
    ],
)
def test_settings_that_cannot_work(build: Callable[[], Any], message: str) -> None:
    with pytest.raises((ValueError, UsageError), match=message):
        build()


def test_a_synthetic_source_has_no_size_to_go_by() -> None:
    with_synthetic(PolicyConfig(first="unimax"))
    with_synthetic(PolicyConfig(first="proportional"), weight=0.0)


def test_epochs() -> None:
    assert effective_tokens(100, 80) == 80
    assert effective_tokens(100, 400) == pytest.approx(100 + 1539 * (1 - math.exp(-3 / 15.39)))
    assert check_epochs({"a": 400, "b": 500, "c": 0}, {"a": 100, "b": 100, "c": 0}, 16) == [
        "b is read 5.0 times: 500 tokens worth about 452 new ones"
    ]
    with pytest.raises(UsageError, match=r"data.sources.a: the run needs 1,700 tokens, it has 100 \(17.0 epochs"):
        check_epochs({"a": 1700}, {"a": 100}, 16)


def test_epochs_of_a_mixture_that_is_not_known() -> None:
    have = {"a": 100, "b": 300}
    assert [check_supply(total, have, 16) for total in (0, 1600)] == [[], []]
    worth = effective_tokens(400, 6400)
    assert check_supply(6400, have, 16) == [
        f"all sources are read 16.0 times: 6,400 tokens worth about {worth:,.0f} new ones"
    ]
    with pytest.raises(UsageError, match=r"needs 6,401 tokens, a, b have 400 together \(16.0 epochs, .* is 16\)"):
        check_supply(6401, have, 16)
    with pytest.raises(UsageError, match=r"a have 0 together \(inf epochs"):
        check_supply(1, {"a": 0}, 1e9)


def test_every_kind_has_its_policy() -> None:
    assert set(POLICIES) == set(get_args(Kind))
    assert total_variation({"a": 1.0}, {"b": 1.0}) == 1
