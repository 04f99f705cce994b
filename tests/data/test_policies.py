"""Mixture policies: the published equations by hand, limits that hold for any of them, and exact state."""

from __future__ import annotations

import json
import math
import textwrap
from decimal import Decimal, getcontext
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmtrain.data.policies.ado import Ado
from lmtrain.data.policies.config import PolicyConfig
from lmtrain.data.policies.curve import MAX_BINS, LossCurve
from lmtrain.data.policies.excess import Excess
from lmtrain.data.policies.limits import Limited
from lmtrain.data.policies.make import make
from lmtrain.data.policies.odm_exp3 import OdmExp3
from lmtrain.data.policies.odm_smoothed import OdmSmoothed
from lmtrain.data.policies.policy import MixPolicy, among, shares
from lmtrain.data.policies.power_law import PowerLaw, fit
from lmtrain.data.policies.window import Window
from lmtrain.errors import DataError
from tests.data.three_sources import NAMES, RUN, THIRDS, progress

getcontext().prec = 50
LN2 = math.log(2)


def worked_losses() -> list[tuple[Fraction, ...]]:
    """Nats of three sources over eight updates."""
    return [tuple(Fraction(start - drop * t, 10) for start, drop in ((30, 1), (24, 2), (41, 3))) for t in range(8)]


def odm_by_hand(exp3: bool) -> list[tuple[Decimal, ...]]:
    """pi after each update, in decimal arithmetic from the equations: R, eps, w, pi; pi_0 = 1/3."""
    count = Decimal(3)
    rewards, pi, eps = [Decimal(0)] * 3, [1 / count] * 3, 1 / count
    result = []
    for t, losses in enumerate(worked_losses(), 1):
        nats = [Decimal(loss.numerator) / Decimal(loss.denominator) for loss in losses]
        if exp3:
            rewards = [r + loss / 10 / p for r, loss, p in zip(rewards, nats, pi, strict=True)]
            raised = [(eps * r).exp() for r in rewards]
        else:
            rewards = [Decimal("0.9") * r + Decimal("0.1") * loss.exp() for r, loss in zip(rewards, nats, strict=True)]
            raised = rewards
        eps = min(1 / count, (count.ln() / (count * t)).sqrt())
        weights = [(1 - count * eps) * part / sum(raised) + eps for part in raised]
        pi = [weight / sum(weights) for weight in weights]
        result.append(tuple(pi))
    return result


@pytest.mark.parametrize("kind", [OdmExp3, OdmSmoothed])
def test_odm_by_hand(kind: type[MixPolicy]) -> None:
    policy = kind(PolicyConfig("odm_exp3", every=1), THIRDS, RUN)
    shares = dict(THIRDS)
    for t, (losses, expected) in enumerate(zip(worked_losses(), odm_by_hand(kind is OdmExp3), strict=True), 1):
        policy.observe(t, {name: 6e5 * shares[name] for name in NAMES}, bits_of(losses))
        proposal = policy.propose(t, progress())
        assert proposal is not None
        shares = proposal
        assert list(shares.values()) == pytest.approx([float(value) for value in expected], rel=1e-12)
    assert shares["web"] > 0.34 > 0.33 > shares["docs"], "the hardest source is read most"


def bits_of(nats: tuple[Fraction, ...]) -> dict[str, float]:
    return {name: float(loss) / LN2 for name, loss in zip(NAMES, nats, strict=True)}


def test_odm_takes_the_mean_of_the_steps_in_between() -> None:
    one, four = (OdmExp3(PolicyConfig("odm_exp3", every=every), THIRDS, RUN) for every in (1, 4))
    one.observe(1, {"code": 300, "docs": 100}, {"code": 2.0, "docs": 3.0})
    for step, (count, bits) in enumerate([(150, 1.0), (50, 2.0), (50, 3.0), (50, 4.0)], 1):
        four.observe(step, {"code": count, "docs": 25 * (step > 0)}, {"code": bits, "docs": 3.0})
    mean = one.state_dict()["rewards"] | four.state_dict()["rewards"]
    assert mean["code"] == pytest.approx(0.1 * LN2 * 2.0 / 0.75) and mean["web"] == 0
    assert one.state_dict()["rewards"] == pytest.approx(four.state_dict()["rewards"])


def test_odm_does_not_overflow() -> None:
    policy = OdmExp3(PolicyConfig("odm_exp3", every=1), THIRDS, RUN)
    policy.observe(1, dict.fromkeys(NAMES, 1.0), dict.fromkeys(NAMES, 1.0))
    policy.load_state_dict({**policy.state_dict(), "updates": 9, "rewards": {"code": 1e6, "docs": 0.0, "web": 5e5}})
    proposal = policy.propose(9, progress())
    assert proposal is not None and sum(proposal.values()) == pytest.approx(1)
    floor = math.sqrt(math.log(3) / (3 * 9))
    assert proposal == pytest.approx({"code": 1 - 2 * floor, "docs": floor, "web": floor})


@pytest.mark.parametrize("kind", ["odm_exp3", "odm_smoothed", "ado", "excess"])
@pytest.mark.parametrize("bits", [0.0, 1e-300, 2e3, 1e308, math.inf, math.nan])
def test_no_loss_ends_a_run(kind: Any, bits: float, tmp_path: Path) -> None:
    reference = tmp_path / "reference.json"
    curves = {name: [[1.0, 5.0]] for name in NAMES}
    reference.write_text(json.dumps({"format_version": 1, "sources": curves}), encoding="utf-8")
    policy = make(PolicyConfig(kind, every=1, reference=str(reference) if kind == "excess" else None), THIRDS, RUN)
    for losses in ([bits] * 3, [2.0, bits, bits], [2.0, 3.0, bits]):
        for step in range(1, 22):
            policy.observe(step, dict.fromkeys(NAMES, 10.0), dict(zip(NAMES, losses, strict=True)))
            for weights in (THIRDS, {"web": 1.0}):
                proposal = policy.propose(step, progress(weights))
                assert proposal is None or sum(proposal.values()) == pytest.approx(1)


Laws = dict[str, tuple[float, float, float]]
LAWS: Laws = {"code": (0.5, 4, 1), "docs": (0.25, 2, 0.5), "web": (0.02, 3, 2)}
FLAT: Laws = LAWS | {"web": (0.02, 0.002, 2)}
"""One source hardly falls: its rho is what delta_min leaves it."""
COUNTS = [(4, 2, 2), (1, 5, 2), (0, 4, 4), (3, 3, 2)]


def ado_by_hand(given: Laws) -> list[tuple[Decimal, ...]]:
    """pi after each step, in decimal arithmetic, with given fits and mu = (1/2, 1/4, 1/4)."""
    laws = [[Decimal(str(value)) for value in given[name]] for name in NAMES]
    mu = [Decimal("0.5"), Decimal("0.25"), Decimal("0.25")]
    recent, average, read = list(mu), list(mu), Decimal(0)
    result = []
    for t, counts in enumerate(COUNTS, 1):
        read += 1000 * sum(counts)
        slopes = []
        for alpha, beta, eps in laws:
            loss = eps + beta * (-alpha * read.ln()).exp()
            slopes.append(max(alpha, Decimal("0.05")) * (loss - eps) / read)
        rho = [m * h.sqrt() * slope for m, h, slope in zip(mu, recent, slopes, strict=True)]
        rho = [max(part / sum(rho), Decimal("0.01")) for part in rho]
        rho = [part / sum(rho) for part in rho]
        result.append(tuple(Decimal("0.1") * r + Decimal("0.9") * a for r, a in zip(rho, average, strict=True)))
        step = Decimal(1) / (t + 1)
        average = [(1 - step) * a + step * r for a, r in zip(average, rho, strict=True)]
        realised = [Decimal(count) / sum(counts) for count in counts]
        recent = [Decimal("0.1") * share + Decimal("0.9") * h for share, h in zip(realised, recent, strict=True)]
    return result


@pytest.mark.parametrize("fits", [LAWS, FLAT])
def test_ado_by_hand_with_given_fits(fits: Laws) -> None:
    policy = Ado(PolicyConfig("ado"), {"code": 0.5, "docs": 0.25, "web": 0.25}, RUN)
    laws = {name: list(map(float, law)) for name, law in fits.items()}
    policy.load_state_dict({**policy.state_dict(), "laws": laws})
    for t, (counts, expected) in enumerate(zip(COUNTS, ado_by_hand(fits), strict=True), 1):
        policy.observe(
            t, {name: 1000.0 * count for name, count in zip(NAMES, counts, strict=True)}, dict.fromkeys(NAMES, 1.5)
        )
        assert policy.propose(t, progress()) == pytest.approx(
            dict(zip(NAMES, map(float, expected), strict=True)), rel=1e-12
        )


@pytest.mark.parametrize("law", [PowerLaw(0.35, 30, 1.2), PowerLaw(0.5, 20, 0.8), PowerLaw(0.25, 8, 0.6)])
def test_the_fit_recovers_planted_laws_under_noise(law: PowerLaw) -> None:
    n = 2e5 * np.arange(1, 513)
    clean = law.eps + law.beta * (n / 1e3) ** -law.alpha
    for seed in range(3):
        noisy = clean * np.exp(0.005 * np.random.default_rng(seed).standard_normal(len(n)))
        found = fit(n / 1e3, noisy)
        assert found == pytest.approx(law, rel=0.05)
        assert found.eps + found.reducible(n[-1] / 1e3) == pytest.approx(clean[-1], rel=0.003)


def test_ado_prefers_what_still_falls() -> None:
    policy = Ado(PolicyConfig("ado", every=5), THIRDS, RUN)
    assert policy.propose(0, progress()) is None
    for step in range(1, 401):
        n = 1000.0 * step
        bits = {"code": 0.8 + 6 * n**-0.2, "docs": 1.4 + 6 * n**-0.6, "web": 2.0}
        policy.observe(step, dict.fromkeys(NAMES, 333.0), bits)
    proposal = policy.propose(400, progress())
    assert proposal is not None and proposal["code"] > 0.6 > 0.2 > proposal["docs"] > proposal["web"]
    assert proposal["web"] < 0.02 + 0.1, "what does not fall keeps the least share"


def test_curves_stay_small_and_keep_means() -> None:
    curve = LossCurve()
    for step in range(3000):
        curve.add(step + 0.5, {"code": 2.0, "docs": float(step % 7 == 0)}, {"code": 10.0 - step / 1000, "docs": 1.0})
    n, loss = curve.points("code")
    assert MAX_BINS / 2 < len(n) <= MAX_BINS and (np.diff(n) > 0).all()
    assert loss == pytest.approx(10.0 - (n - 0.5) / 1000)
    assert set(curve.points("docs")[1]) == {1.0}


def test_excess_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "reference.json"
    curves = {"code": [[100, 2.0], [10000, 1.0]], "docs": [[100, 1.0]], "web": [[1, 3.0], [2, 2.5]]}
    path.write_text(json.dumps({"format_version": 1, "sources": curves}))
    policy = Excess(PolicyConfig("excess", every=2, reference=str(path)), THIRDS, RUN)
    for step in (1, 2):
        policy.observe(step, {"code": 200, "docs": 200, "web": 100}, {"code": 2.0, "docs": 1.3, "web": 2.0})
    # at 1000 tokens the reference of code is 1.5 (half way in log tokens); web is better than its own
    alpha = [math.exp(0.5 * LN2), math.exp(0.3 * LN2), 1.0]
    expected = [(1 - 1e-3) * part / sum(alpha) + 1e-3 / 3 for part in alpha]
    assert policy.propose(2, progress()) == pytest.approx(dict(zip(NAMES, expected, strict=True)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "not a reference curve"),
        ('{"format_version": 2, "sources": {}}', "format 2"),
        ('{"format_version": 1, "sources": {"cod": [[1, 2]], "docs": [[1, 2]], "web": [[1, 2]]}}', "did you mean cod"),
        ('{"format_version": 1, "sources": {"code": [[2, 2], [1, 2]]}}', "rising"),
        ('{"format_version": 1, "sources": {"code": []}}', "rising"),
        (None, "No such file"),
    ],
)
def test_bad_references_are_refused(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "reference.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=message):
        make(PolicyConfig("excess", reference=str(path)), THIRDS, RUN)


def adaptive(tmp_path: Path) -> list[PolicyConfig]:
    path = tmp_path / "reference.json"
    path.write_text(json.dumps({"format_version": 1, "sources": {name: [[1, 0.5]] for name in NAMES}}))
    kinds = [PolicyConfig(kind, every=2) for kind in ("odm_exp3", "odm_smoothed", "ado")]  # type: ignore[arg-type]
    return [*kinds, PolicyConfig("excess", every=2, reference=str(path))]


def feed(policy: MixPolicy, first: int, stop: int, names: tuple[str, ...] = NAMES) -> list[dict[str, float] | None]:
    """Steps ``[first, stop)``, a function of their numbers; what is proposed."""
    proposals = []
    for step in range(first, stop):
        rng = np.random.default_rng(step)
        tokens = {name: float(count) for name, count in zip(names, rng.integers(0, 500, len(names)), strict=True)}
        bits = {
            name: float(0.5 + 3 * (10 + step) ** -0.3 + rng.random() * (i + 1) / 10) for i, name in enumerate(names)
        }
        policy.observe(step, tokens, bits)
        proposals.append(
            policy.propose(step, progress(dict.fromkeys(names, 1.0), available=dict.fromkeys(names, 10**9)))
        )
    return proposals


def test_state_is_exact_json(tmp_path: Path) -> None:
    for cfg in adaptive(tmp_path):
        whole, stopped, resumed = (make(cfg, THIRDS, RUN) for _ in range(3))
        expected = feed(whole, 1, 75)
        feed(stopped, 1, 48)
        resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
        feed(stopped, 48, 75)  # a state that was handed out is not changed afterwards
        assert feed(resumed, 48, 75) == expected[47:]
        assert resumed.state_dict() == whole.state_dict()
        assert any(expected), cfg.kind


def test_asking_changes_nothing(tmp_path: Path) -> None:
    for cfg in adaptive(tmp_path):
        asked, not_asked = make(cfg, THIRDS, RUN), make(cfg, THIRDS, RUN)
        feed(asked, 1, 45)
        not_asked.propose = lambda step, progress: None  # type: ignore[method-assign]
        feed(not_asked, 1, 45)
        assert asked.state_dict() == not_asked.state_dict()


def test_sources_come_and_go(tmp_path: Path) -> None:
    for cfg in adaptive(tmp_path):
        policy = make(cfg, THIRDS, RUN)
        feed(policy, 1, 41)
        grown = ("code", "docs", "web", "new")
        unseen = policy.propose(40, progress(dict.fromkeys(grown, 1.0), available=dict.fromkeys(grown, 10**9)))
        assert unseen is not None and unseen["new"] > 0.05, "a source not yet seen is in the middle of the others"
        later = [proposal for proposal in feed(policy, 41, 90, grown) if proposal]
        assert later and all(set(proposal) == set(grown) for proposal in later)
        fewer = policy.propose(90, progress({"code": 1.0, "new": 1.0}, available=dict.fromkeys(grown, 10**9)))
        assert fewer is not None and set(fewer) == {"code", "new"}, "a source that was taken out is not proposed"


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_losses_give_a_mixture_within_the_limits(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["odm_exp3", "odm_smoothed", "ado"]))
    cfg = PolicyConfig(kind, every=1, floor=0.05, cap=0.8, min_change=0)
    policy = make(cfg, THIRDS, RUN)
    loss = st.one_of(st.floats(1e-3, 30), st.just(math.nan), st.just(math.inf))
    for step in range(1, 25):
        tokens = {name: data.draw(st.sampled_from([0.0, 1.0, 1e6])) for name in NAMES}
        policy.observe(step, tokens, {name: data.draw(loss) for name in NAMES if tokens[name]})
        proposal = policy.propose(step, progress())
        if proposal is not None:
            assert sum(proposal.values()) == pytest.approx(1)
            assert all(0.05 <= share <= 0.8 for share in proposal.values())


def test_the_example_of_the_docs() -> None:
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    start = text.index("    class LossShare")
    source = textwrap.dedent(text[start : text.index("`tests/data/test_policies.py`", start)])
    room: dict[str, Any] = {"MixPolicy": MixPolicy, "Window": Window, "among": among, "shares": shares}
    exec(source, room)
    cfg = PolicyConfig("ado", every=2)
    policy, resumed = (Limited(room["LossShare"](cfg, THIRDS, RUN), cfg, RUN) for _ in range(2))
    assert any(feed(policy, 1, 9))
    resumed.load_state_dict(json.loads(json.dumps(policy.state_dict())))
    assert feed(resumed, 9, 20) == feed(policy, 9, 20)
