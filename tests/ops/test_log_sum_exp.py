"""The running log-sum-exp against its definition: documents, carried state, gradients, spans, steps."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lmtrain.ops.documents import Documents
from lmtrain.ops.log_sum_exp import log_sum_exp, recurrence

ROWS, CHANNELS = 3, 2
NAN = float("nan")


def case(length: int, scale: float = 1.0) -> tuple[Tensor, Documents, Tensor]:
    """Keys, documents that start at, before and after powers of two, and a state: of two rows it is entered."""
    generator = torch.Generator().manual_seed(length)
    k = scale * torch.randn(ROWS, length, CHANNELS, generator=generator, dtype=torch.float64)
    starts = torch.zeros(ROWS, length, dtype=torch.int32)
    for row, columns in enumerate(((4, 15, 16, 17, 18), (1, 2, 31, 33), ())):
        starts[row, [column for column in columns if column < length]] = 1
    state = torch.stack([torch.randn(ROWS, CHANNELS, generator=generator).double(), torch.ones(ROWS, CHANNELS)], 1)
    return k, Documents.from_ids(starts.cumsum(1), torch.tensor([0, 3, 1])), state


def defined(k: Tensor, docs: Documents, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """Every sum over its own list of terms, and the one over the last document of each row."""
    starts, rows, ends = docs.starts(), [], []
    for row in range(k.shape[0]):
        entered = [] if state is None or not docs.before[row] else [state[row, 0]]
        terms, sums = list(entered), []
        for t in range(k.shape[1]):
            terms = [] if starts[row, t] else terms
            sums.append(torch.stack(terms).logsumexp(0) if terms else k.new_full((k.shape[2],), -math.inf))
            terms = [*terms, k[row, t]]
        rows.append(torch.stack(sums))
        ends.append(torch.stack(terms).logsumexp(0))
    return torch.stack(rows), torch.stack(ends)


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("length", [1, 2, 3, 16, 17, 40])
@pytest.mark.parametrize("form", [log_sum_exp, lambda k, docs, initial_state: recurrence(k, docs, initial_state)])
def test_values_and_gradients(form, length: int, with_state: bool) -> None:  # type: ignore[no-untyped-def]
    k, docs, held = case(length, scale=5)
    leaves = [k.requires_grad_(), held.requires_grad_()]
    if form is not log_sum_exp and with_state:
        docs = Documents.from_ids(
            docs.ids, torch.tensor([1, 3, 1])
        )  # to drop a state is the op's, not the definition's
    state = held if with_state else None

    def told(y: Tensor, last: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        seen = torch.where(y.isneginf(), 0, y)
        scored = (seen * torch.linspace(-1, 1, seen.numel()).view_as(seen)).sum() + (last * last).sum()
        return y, last, torch.autograd.grad(scored, leaves[: 1 + with_state])

    got = form(k, docs=docs, initial_state=state)
    assert (got[1][:, 1] == 1).all()
    torch.testing.assert_close(told(got[0], got[1][:, 0]), told(*defined(k, docs, state)), rtol=1e-12, atol=1e-12)


def test_no_tokens_keep_the_state() -> None:
    k, _, state = case(0)
    y, after = log_sum_exp(k, initial_state=state)
    assert y.shape == k.shape and torch.equal(after, state)
    assert (log_sum_exp(k)[1] == 0).all()


@pytest.mark.parametrize("cut", [1, 16, 18, 39])
def test_spans_and_steps_are_one_pass(cut: int) -> None:
    k, docs, state = case(40)
    state = log_sum_exp.drop(state, docs.before)
    expected, final = log_sum_exp(k, docs=docs, initial_state=state)
    parts = [
        (k[:, lo:hi], Documents.from_ids(docs.ids[:, lo:hi], docs.positions()[:, lo]))
        for lo, hi in ((0, cut), (cut, 40))
    ]
    first, entering = log_sum_exp(parts[0][0], docs=parts[0][1], initial_state=state)
    second, last = log_sum_exp(parts[1][0], docs=parts[1][1], initial_state=entering)
    torch.testing.assert_close(torch.cat([first, second], 1), expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(last, final, rtol=1e-13, atol=1e-13)
    spans = [log_sum_exp.span(part, docs=of) for part, of in parts]
    folded = state
    for span in spans:
        folded = log_sum_exp.combine(span.gamma, folded, span.state)
    torch.testing.assert_close(folded, final, rtol=1e-13, atol=1e-13)
    starts, stepped = docs.starts(), state
    for t in range(40):
        y, stepped = log_sum_exp.step(k[:, t], state=log_sum_exp.drop(stepped, (~starts[:, t]).int()))
        torch.testing.assert_close(y, expected[:, t], rtol=1e-13, atol=1e-13)


def test_the_gradient_of_combine() -> None:
    """Of rows that join two states, take one of them, and lose theirs to a document's start."""
    z = torch.randn(2, 4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    seen = torch.tensor([[1, 0, 1, 1], [1, 1, 0, 1]])[..., None].expand(2, 4, 2)
    state, added = torch.stack([torch.where(seen == 1, z, 0), seen], dim=2).double().requires_grad_()
    gamma, grad = torch.tensor([1.0, 1, 1, 0]).double(), torch.randn(4, 2, 2).double()
    expected = torch.autograd.grad(log_sum_exp.combine(gamma, state, added)[:, 0], (state, added), grad[:, 0])
    got = log_sum_exp.combine_backward(grad, gamma, state.detach(), added.detach())
    assert (got[0] == 0).all()
    torch.testing.assert_close(got[1:], expected)


def test_nan_stays_in_its_document() -> None:
    k, docs, state = case(40)
    with torch.no_grad():
        k[0, 4:15], state[0] = NAN, NAN
    k.requires_grad_()
    y, _ = log_sum_exp(k, docs=docs, initial_state=state)
    clean = torch.ones(40, dtype=torch.bool)
    clean[5:15] = False
    assert not y[0, clean].isnan().any() and not y[1:].isnan().any()
    (grad,) = torch.autograd.grad(torch.where(y.isneginf(), 0, y)[0, clean].sum() + y[2].sum(), k)
    clean[4] = False
    assert not grad[0, clean].isnan().any() and not grad[1:].isnan().any()
    without = k.detach().clone()
    without[0, 4:15] = 0
    assert torch.equal(log_sum_exp(without, docs=docs)[0][0, clean], log_sum_exp(k, docs=docs)[0][0, clean])


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_keys_of_any_size(scale: float) -> None:
    k = (scale * torch.linspace(-1, 1, 40))[None, :, None].clone().requires_grad_()
    y, _ = log_sum_exp(k)
    (grad,) = torch.autograd.grad(y[:, 1:].sum(), k)
    assert y[:, 1:].isfinite().all() and grad.isfinite().all() and (grad[0, :-1, 0].sum() - 39).abs() < 1e-3


@pytest.mark.parametrize("slope", [0.0, 0.01, -0.01])
def test_long_rows_in_fp32(slope: float) -> None:
    """Level, rising and falling keys: what rounding adds up to over 8192 terms, and every gradient of it."""
    k = torch.randn(2, 8192, 3, generator=torch.Generator().manual_seed(0)) + slope * torch.arange(8192)[:, None]
    ids = (torch.arange(8192) >= torch.tensor([[5000], [8192]])).int()
    docs, weights = Documents.from_ids(ids), torch.linspace(-1, 1, k.numel()).view_as(k)

    def told(keys: Tensor) -> tuple[Tensor, Tensor]:
        keys = keys.requires_grad_()
        y, state = log_sum_exp(keys, docs=docs)
        y = torch.where(y.isneginf(), 0, y)
        return y.detach(), torch.autograd.grad((y * weights.to(y)).sum() + state[:, 0].sum(), keys)[0]

    (y, grad), (exact, gradient) = told(k.clone()), told(k.double())
    torch.testing.assert_close(y.double(), exact, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(grad.double(), gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: log_sum_exp(), "log_sum_exp: inputs: expected (k,)"),
        (lambda: log_sum_exp(torch.zeros(2, 3)), "log_sum_exp: k: expected shape [*, *, *], got [2, 3]"),
        (
            lambda: log_sum_exp(torch.zeros(1, 2, 3), initial_state=torch.zeros(1, 3)),
            "log_sum_exp: initial_state: expected shape [1, 2, 3], got [1, 3]",
        ),
    ],
)
def test_errors(call, says: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError) as caught:
        call()
    assert str(caught.value) == says
