"""The loss against torch's own and by gradcheck, ignored targets included."""

import torch
import torch.nn.functional as F

from lmtrain.ops.cross_entropy import IGNORE, cross_entropy


def _case(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(2, 5, 7, generator=generator)).to(dtype).requires_grad_()
    labels = torch.randint(0, 7, (2, 5), generator=generator, dtype=torch.int32)
    labels[0, 1] = labels[1, 4] = IGNORE
    return logits, labels


def test_values_and_gradients_equal_torch() -> None:
    logits, labels = _case(torch.float64)
    nll, lse = cross_entropy(logits, labels)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.long().flatten(), reduction="none").view_as(nll)
    expected_lse = torch.where(labels != IGNORE, torch.logsumexp(logits, -1), 0.0)
    torch.testing.assert_close(nll, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-12, atol=1e-12)
    ours = torch.autograd.grad(nll.sum() + 0.3 * lse.square().sum(), logits)[0]
    theirs = torch.autograd.grad(expected.sum() + 0.3 * expected_lse.square().sum(), logits)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert ours[0, 1].count_nonzero() == 0


def test_gradcheck() -> None:
    logits, labels = _case(torch.float64)
    assert torch.autograd.gradcheck(lambda x: cross_entropy(x, labels), (logits,))


def test_bf16_logits_are_scored_in_fp32_and_nothing_valid_is_zero() -> None:
    logits, labels = _case(torch.bfloat16)
    nll, _ = cross_entropy(logits, labels)
    assert nll.dtype == torch.float32
    nothing, _ = cross_entropy(logits, torch.full_like(labels, IGNORE))
    grad = torch.autograd.grad(nothing.sum(), logits)[0]
    assert nothing.count_nonzero() == 0 and grad.count_nonzero() == 0 and grad.dtype == torch.bfloat16
