"""attention: the definition against torch's with an explicit mask, its log-sum-exp, and the fused form against it."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lmtrain.ops import Documents, attention, library
from lmtrain.ops.attention import visible

BATCH, LENGTH, HEADS, KEY_HEADS, WIDTH, VALUE_WIDTH = 2, 13, 4, 2, 6, 5
SCALE = 1 / math.sqrt(WIDTH)
WINDOWS = (None, 1, 3, 100)
# one document, several (one token each in places), and rows that go on from columns held to their left
LAYOUTS = {
    "one": ([0] * LENGTH, 0),
    "several": ([0, 0, 0, 1, 2, 3, 3, 3, 3, 4, 4, 4, 5], 0),
    "carried": ([0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1], 4),
}
HELD = 7  # columns of earlier keys in the tests with a cache


def rand(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def inputs(held: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    return (
        rand(BATCH, LENGTH, HEADS, WIDTH, seed=1, dtype=dtype).requires_grad_(),
        rand(BATCH, held + LENGTH, KEY_HEADS, WIDTH, seed=2, dtype=dtype).requires_grad_(),
        rand(BATCH, held + LENGTH, KEY_HEADS, VALUE_WIDTH, seed=3, dtype=dtype).requires_grad_(),
    )


def documents(layout: str) -> Documents:
    """Row 0 as the layout says, row 1 one document from its start."""
    ids, before = LAYOUTS[layout]
    return Documents.from_ids(torch.tensor([ids, [0] * LENGTH]), torch.tensor([before, 0]))


def mask_by_hand(docs: Documents, held: int, window: int | None) -> Tensor:
    """bool ``[B, T, held + T]``: query i stands at key column ``held + i``."""
    mask = torch.zeros(BATCH, LENGTH, held + LENGTH, dtype=torch.bool)
    for row, positions in enumerate(docs.positions().tolist()):
        for query, position in enumerate(positions):
            reach = position if window is None else min(position, window - 1)
            for distance in range(min(reach, held + query) + 1):
                mask[row, query, held + query - distance] = True
    return mask


def definition(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None], scale=SCALE, enable_gqa=True)
    scores = torch.einsum("bhik,bhjk->bhij", q, k.repeat_interleave(HEADS // KEY_HEADS, dim=1)) * SCALE
    lse = scores.masked_fill(~mask[:, None], -math.inf).logsumexp(-1)
    return o.transpose(1, 2), lse.transpose(1, 2)


@pytest.mark.parametrize("held", [0, HELD])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_matches_torch_with_an_explicit_mask(layout: str, window: int | None, held: int) -> None:
    docs, tensors = documents(layout), inputs(held)
    mask = mask_by_hand(docs, held, window)
    assert torch.equal(visible(docs.positions(), held + LENGTH, held, window), mask)
    found = attention(*tensors, positions=docs.positions(), window=window, scale=SCALE)
    expected = definition(*tensors, mask)
    weights = [rand(*out.shape, seed=4 + i) for i, out in enumerate(expected)]
    grads = [torch.autograd.grad(out, tensors, weights) for out in (found, expected)]
    for got, want in zip((*found, *grads[0]), (*expected, *grads[1]), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_offset_places_the_queries() -> None:
    """A shard's queries among the keys of the whole row: later keys are not seen."""
    docs, (q, k, v) = documents("several"), inputs()
    whole, whole_lse = attention(q, k, v, positions=docs.positions(), scale=SCALE)
    for first, last in ((0, 4), (4, 9), (9, LENGTH)):
        positions = docs.positions()[:, first:last]
        o, lse = attention(q[:, first:last], k, v, positions=positions, scale=SCALE, offset=first)
        torch.testing.assert_close(o, whole[:, first:last], rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(lse, whole_lse[:, first:last], rtol=1e-13, atol=1e-13)


def test_partial_results_merge_by_lse() -> None:
    """What two blocks of keys give apart, weighted by their log-sum-exp, is what they give together."""
    _, (q, k, v) = documents("one"), inputs()
    cut = 5
    positions = documents("one").positions()
    o, lse = attention(q[:, cut:], k, v, positions=positions[:, cut:], scale=SCALE)
    near = attention(q[:, cut:], k[:, cut:], v[:, cut:], positions=positions[:, cut:], scale=SCALE)
    far_positions = torch.full_like(positions[:, cut:], LENGTH)
    far = attention(q[:, cut:], k[:, :cut], v[:, :cut], positions=far_positions, scale=SCALE, offset=cut)
    together = torch.logaddexp(near[1], far[1])
    torch.testing.assert_close(together, lse, rtol=1e-13, atol=1e-13)
    merged = sum(part * torch.exp(own - together)[..., None] for part, own in (near, far))
    torch.testing.assert_close(merged, o, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fused_form_with_a_cache(layout: str, window: int | None) -> None:
    """Keys to the left of the row; without them the fused form is a backend of test_op_matrix.py."""
    docs, tensors = documents(layout), inputs(HELD, torch.float32)
    static = {"positions": docs.positions(), "window": window, "scale": SCALE}
    found = attention.output(*tensors, **static)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    expected, _ = attention(*exact, **static)
    weight = rand(*expected.shape, seed=4)
    grads = torch.autograd.grad(found, tensors, weight.float()), torch.autograd.grad(expected, exact, weight)
    for got, want in zip((found, *grads[0]), (expected, *grads[1]), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_fused_form_where_the_mask_is_known() -> None:
    docs, tensors = documents("one"), inputs(dtype=torch.float32)
    static = {"positions": docs.positions(), "scale": SCALE}
    torch.testing.assert_close(attention.output(*tensors, causal=True, **static), attention.output(*tensors, **static))


def test_fp64_is_the_definition() -> None:
    assert library.backend("attention", "cpu", torch.float64) == "reference"
    docs, tensors = documents("several"), inputs()
    static = {"positions": docs.positions(), "scale": SCALE}
    assert torch.equal(attention.output(*tensors, **static), attention(*tensors, **static)[0])


def test_bf16_keeps_its_statistics_in_fp32() -> None:
    tensors = inputs(dtype=torch.bfloat16)
    o, lse = attention(*tensors, positions=documents("one").positions(), scale=SCALE)
    assert (o.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    exact, exact_lse = attention(*(t.double() for t in tensors), positions=documents("one").positions(), scale=SCALE)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(o.double(), exact, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("argument", "shape", "says"),
    [
        ("k", (BATCH, LENGTH, KEY_HEADS, WIDTH + 1), r"k: expected shape \[2, \*, \*, 6\], got \[2, 13, 2, 7\]"),
        ("v", (BATCH, LENGTH, 1, VALUE_WIDTH), r"v: expected shape \[2, 13, 2, \*\], got \[2, 13, 1, 5\]"),
        ("positions", (BATCH, LENGTH + 1), r"positions: expected shape \[2, 13\], got \[2, 14\]"),
    ],
)
def test_bad_shape_is_one_line(argument: str, shape: tuple[int, ...], says: str) -> None:
    good = dict(zip("qkv", inputs(), strict=True)) | {"positions": documents("one").positions()}
    with pytest.raises(ValueError, match=f"^attention: {says}$"):
        attention(**(good | {argument: torch.zeros(shape)}), scale=SCALE)


def test_heads_must_divide() -> None:
    q, k, v = inputs()
    with pytest.raises(ValueError, match=r"^attention: q: expected heads in multiples of the 3 key heads, got 4$"):
        attention(q, k[:, :, [0, 1, 1]], v[:, :, [0, 1, 1]], positions=documents("one").positions(), scale=SCALE)


def test_cost() -> None:
    cost = attention.cost((1, 8, 4, 6), (1, 8, 2, 6), (1, 8, 2, 5))
    assert cost.executed_flops == 2 * 4 * 8 * 8 * (6 + 5) and cost.model_flops * 2 == cost.executed_flops
