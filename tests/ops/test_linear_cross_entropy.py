"""The loss in chunks against cross_entropy of all logits: values, all gradients, ignored targets, memory."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lmtrain.ops.cross_entropy import IGNORE, cross_entropy
from lmtrain.ops.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_sum

module = sys.modules[linear_cross_entropy.__module__]  # of the same name as the function, which hides it
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-2}
CHUNKS = (1, 7, 64, 1000)  # the rows are 2 x 65
Z_LOSS = 0.3


def case(dtype: torch.dtype = torch.float64, length: int = 65, vocab: int = 33, dim: int = 12) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*s, generator=generator).to(dtype) for s in ((2, length, dim), (vocab, dim)))
    labels = torch.randint(0, vocab, (2, length), generator=generator, dtype=torch.int32)
    labels[:, 1::5] = IGNORE
    return {"hidden": hidden.requires_grad_(), "weight": weight.requires_grad_(), "labels": labels}


def weights_like(labels: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.rand(labels.shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def gradients(tensors: dict[str, Tensor], *outputs: Tensor, grads: list[Tensor] | None = None) -> dict[str, Tensor]:
    leaves = {name: tensors[name] for name in ("hidden", "weight")}
    found = torch.autograd.grad(outputs, list(leaves.values()), grads)
    return dict(zip(leaves, found, strict=True))


def full(tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return cross_entropy(tensors["hidden"] @ tensors["weight"].t(), tensors["labels"])


def fp64(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    wide = {name: tensors[name].detach().double().requires_grad_() for name in ("hidden", "weight")}
    return tensors | wide


def assert_close(got: Tensor, want: Tensor, tolerance: float) -> None:
    """Relative RMS below ``tolerance``."""
    assert got.shape == want.shape
    error, scale = (t.double().square().mean().sqrt() for t in (got.double() - want, want))
    assert error <= tolerance * scale.clamp(min=1e-3), f"relative RMS {float(error / scale):.2e}"


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_per_target_matches_the_full_form(dtype: torch.dtype, chunk: int) -> None:
    tensors = case(dtype)
    wide = fp64(tensors)
    nll, lse = linear_cross_entropy(**tensors, chunk=chunk)
    expected = full(wide)
    assert nll.dtype == lse.dtype == torch.promote_types(dtype, torch.float32)
    for got, want in zip((nll, lse), expected, strict=True):
        assert_close(got, want, TOLERANCE[dtype])
        assert got[tensors["labels"] == IGNORE].count_nonzero() == 0
    grads = [weights_like(tensors["labels"], nll.dtype) - 0.5, weights_like(tensors["labels"], nll.dtype)]
    found = gradients(tensors, nll, lse, grads=grads)
    for name, want in gradients(wide, *expected, grads=[grad.double() for grad in grads]).items():
        assert found[name].dtype == dtype
        assert_close(found[name], want, TOLERANCE[dtype])


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("weighted", "z_loss"), [(False, 0.0), (True, Z_LOSS)])
def test_sum_matches_the_full_form(dtype: torch.dtype, chunk: int, weighted: bool, z_loss: float) -> None:
    tensors = case(dtype)
    wide = fp64(tensors)
    loss_weights = weights_like(tensors["labels"], torch.float32) if weighted else None
    total, nll, lse = linear_cross_entropy_sum(**tensors, loss_weights=loss_weights, z_loss=z_loss, chunk=chunk)
    expected = full(wide)
    want_total = expected[0] + z_loss * expected[1].square()
    want_total = (want_total if loss_weights is None else want_total * loss_weights).sum()
    for got, want in zip((total, nll, lse), (want_total, *expected), strict=True):
        assert_close(got, want, TOLERANCE[dtype])
    assert not nll.requires_grad and not lse.requires_grad
    found = gradients(tensors, total / 7)
    for name, want in gradients(wide, want_total / 7).items():
        assert found[name].dtype == dtype
        assert_close(found[name], want, TOLERANCE[dtype])


def test_values_have_the_bits_of_the_full_form() -> None:
    """One chunk is the same arithmetic."""
    tensors = case(torch.float32)
    tensors["hidden"] = tensors["hidden"].detach().flatten(0, 1)
    tensors["labels"] = tensors["labels"].flatten()
    for got, want in zip(linear_cross_entropy(**tensors), full(tensors), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_pieces_do_not_change_the_results(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    def results() -> list[Tensor]:
        tensors = case(dtype)
        per_target, summed = linear_cross_entropy(**tensors)[0], linear_cross_entropy_sum(**tensors)
        found = [gradients(tensors, loss).values() for loss in (per_target.sum(), summed[0])]
        return [*summed, per_target, *(grad for grads in found for grad in grads)]

    whole = results()
    monkeypatch.setattr(module, "SLAB", 3)
    monkeypatch.setattr(module, "VOCAB_BLOCK", 10)
    for got, want in zip(results(), whole, strict=True):
        assert_close(got, want, TOLERANCE[dtype])


def test_gradcheck() -> None:
    tensors = case(length=3, vocab=5, dim=4)
    leaves = (tensors["hidden"], tensors["weight"])
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, tensors["labels"], chunk=4), leaves)


@pytest.mark.parametrize("length", [0, 4])
def test_nothing_to_predict(length: int) -> None:
    tensors = case(torch.float32, length)
    tensors["labels"] = torch.full_like(tensors["labels"], IGNORE)
    nll, lse = linear_cross_entropy(**tensors)
    total, *_ = linear_cross_entropy_sum(**tensors, z_loss=Z_LOSS)
    assert nll.count_nonzero() == lse.count_nonzero() == total.count_nonzero() == 0
    for outputs in ((nll.sum() + lse.sum(),), (total,)):
        assert all(grad.count_nonzero() == 0 for grad in gradients(tensors, *outputs).values())


def test_one_leaf_alone_and_no_gradient_at_all() -> None:
    tensors = case()
    both = gradients(tensors, linear_cross_entropy_sum(**tensors)[0])
    for name in both:
        alone = {key: tensor.detach() for key, tensor in tensors.items()}
        alone[name].requires_grad_()
        for total in (linear_cross_entropy_sum(**alone)[0], linear_cross_entropy(**alone)[0].sum()):
            torch.testing.assert_close(torch.autograd.grad(total, alone[name])[0], both[name])
    with torch.no_grad():
        total, nll, _ = linear_cross_entropy_sum(**tensors)
    assert not total.requires_grad
    torch.testing.assert_close(total, nll.sum())


def test_a_second_backward_of_the_sum_is_refused() -> None:
    tensors = case()
    total, *_ = linear_cross_entropy_sum(**tensors)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="runs once"):
        total.backward()


def test_strided_inputs_and_gradients() -> None:
    tensors = case()
    strided = tensors | {
        "hidden": tensors["hidden"].transpose(0, 1).contiguous().transpose(0, 1),
        "weight": tensors["weight"].t().contiguous().t(),
        "labels": tensors["labels"].t().contiguous().t(),
    }
    for form in (linear_cross_entropy, linear_cross_entropy_sum):
        got, want = (gradients(tensors, form(**each, chunk=16)[0].sum()) for each in (strided, tensors))
        for name in want:
            torch.testing.assert_close(got[name], want[name], rtol=1e-12, atol=1e-12)


class _Largest(TorchDispatchMode):
    """The elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", [linear_cross_entropy, linear_cross_entropy_sum])
def test_never_holds_more_logits_than_a_chunk(form: Any, dtype: torch.dtype) -> None:
    tensors = case(dtype, length=200, vocab=300, dim=2)
    with _Largest() as seen:
        form(**tensors, chunk=16)[0].sum().backward()
    assert seen.elements == 16 * 300


@pytest.mark.parametrize(
    ("argument", "value", "says"),
    [
        ("hidden", torch.zeros(2, 3, 4, dtype=torch.int32), "hidden: expected a floating dtype, got torch.int32"),
        ("hidden", torch.zeros(4), r"hidden: expected shape \[..., D\] with at least 2 dims, got \[4\]"),
        ("weight", torch.zeros(5, 3), r"weight: expected shape \[\*, 4\], got \[5, 3\]"),
        ("weight", torch.zeros(5, 4).double(), "weight: expected dtype torch.float32 as hidden, got torch.float64"),
        ("labels", torch.zeros(2, 2), r"labels: expected shape \[2, 3\], got \[2, 2\]"),
        ("labels", torch.zeros(2, 3, device="meta").int(), "labels: expected device cpu as hidden, got meta"),
        ("loss_weights", torch.zeros(2, 2), r"loss_weights: expected shape \[2, 3\], got \[2, 2\]"),
        ("chunk", 0, "chunk: expected at least 1, got 0"),
    ],
)
def test_bad_input_is_named(argument: str, value: Any, says: str) -> None:
    arguments: dict[str, Any] = {
        "hidden": torch.zeros(2, 3, 4),
        "weight": torch.zeros(5, 4),
        "labels": torch.zeros(2, 3, dtype=torch.int32),
    } | {argument: value}
    with pytest.raises(ValueError, match=f"linear_cross_entropy_sum: {says}"):
        linear_cross_entropy_sum(**arguments)


@pytest.mark.parametrize("chunk", [7, 1000])
def test_a_softcap_bounds_the_logits(chunk: int) -> None:
    cap, tensors = 1.5, case()
    scale = weights_like(tensors["labels"], torch.float64)
    logits = cap * torch.tanh(tensors["hidden"] @ tensors["weight"].t() / cap)
    nll, lse = cross_entropy(logits, tensors["labels"])
    want = gradients(tensors, (scale * (nll + Z_LOSS * lse.square())).sum())
    total, *_ = linear_cross_entropy_sum(**tensors, loss_weights=scale, z_loss=Z_LOSS, softcap=cap, chunk=chunk)
    each = linear_cross_entropy(**tensors, softcap=cap, chunk=chunk)
    for got in (gradients(tensors, total), gradients(tensors, (scale * (each[0] + Z_LOSS * each[1].square())).sum())):
        for name, expected in want.items():
            assert_close(got[name], expected, TOLERANCE[torch.float64])
    assert_close(each[0], nll, 1e-13)
