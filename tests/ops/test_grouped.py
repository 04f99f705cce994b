"""Rows sorted into groups: permuted and put back, and one matrix product per group, with all gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lmtrain.ops.grouped import grouped_mm, inverse_of, permute
from tests.ops.scan_cases import assert_close, rand, run

ROWS, WIDTH = 37, 12


def shuffled(rows: int = ROWS) -> tuple[Tensor, Tensor]:
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(0))
    return order, inverse_of(order)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_permute_is_indexing(dtype: torch.dtype) -> None:
    """To the bit, gradients too: a gather adds nothing up."""
    order, inverse = shuffled()
    tensors = {"x": rand(ROWS, WIDTH, seed=1, dtype=dtype)}
    found = run(lambda t, _: (permute(t["x"], order, inverse),), tensors, None, ("y",))
    expected = run(lambda t, _: (t["x"][order],), tensors, None, ("y",))
    assert all(torch.equal(found[name], want) for name, want in expected.items())


def test_the_inverse_puts_rows_back() -> None:
    order, inverse = shuffled()
    x = rand(ROWS, WIDTH, seed=1).requires_grad_()
    assert torch.equal(permute(permute(x, order, inverse), inverse, order), x)
    assert torch.equal(order[inverse], torch.arange(ROWS)) and torch.equal(inverse_of(inverse), order)
    assert torch.autograd.gradcheck(lambda x: permute(x, order, inverse), x, fast_mode=True)


def test_strides_of_0_and_no_rows() -> None:
    order, inverse = shuffled()
    x = rand(ROWS, WIDTH, seed=1).t().contiguous().t().requires_grad_()
    (grad,) = torch.autograd.grad(permute(x, order, inverse).sum(), x)
    assert torch.equal(grad, torch.ones_like(grad))
    assert permute(x[:0], order[:0], inverse[:0]).shape == (0, WIDTH)


# widths of whole 16 bytes go to torch's product, the others to a loop; groups may be empty, the first and the last too
@pytest.mark.parametrize(("width", "out"), [(12, 8), (13, 7)])
@pytest.mark.parametrize("ends", [[0, 10, 10, 37], [37, 37, 37, 37], [0, 0, 0, 0]], ids=str)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)]
)
def test_grouped_mm_is_a_product_per_group(
    width: int, out: int, ends: list[int], dtype: torch.dtype, tolerance: float
) -> None:
    """Measured, worst: fp32 2e-7, bf16 3e-3."""
    rows = ends[-1]
    tensors = {"x": rand(rows, width, seed=1, dtype=dtype), "weight": rand(4, width, out, seed=2, dtype=dtype)}
    offsets = torch.tensor(ends, dtype=torch.int32)

    def each_row(t: dict[str, Tensor], docs: None) -> tuple[Tensor]:
        group = torch.searchsorted(offsets, torch.arange(rows), right=True)
        return (torch.einsum("nd,ndf->nf", t["x"], t["weight"][group]),)

    found = run(lambda t, _: (grouped_mm(t["x"], t["weight"], offsets),), tensors, None, ("y",))
    exact = {name: tensor.double() for name, tensor in tensors.items()}
    assert_close(found, run(each_row, exact, None, ("y",)), tolerance)
    assert all(tensor.dtype == dtype for tensor in found.values())


def test_rows_that_do_not_fit_are_refused() -> None:
    x, weight = torch.zeros(5, 8), torch.zeros(2, 8, 4)
    faults = {
        r"grouped_mm: weight: expected shape \[\*, 8, \*\], got \[2, 4, 8\]": (x, weight.mT, [2, 5]),
        r"grouped_mm: offsets: expected shape \[2\], got \[3\]": (x, weight, [2, 4, 5]),
        "grouped_mm: weight: expected dtype torch.float32 as x, got torch.bfloat16": (x, weight.bfloat16(), [2, 5]),
        # of the loop, which reads them; torch's product is not asked, for that would wait for the device
        r"grouped_mm: offsets: expected a rise to the 5 rows of x, got \[2, 4\]": (x.double(), weight.double(), [2, 4]),
        r"grouped_mm: offsets: expected a rise to the 5 rows of x, got \[6, 5\]": (x.double(), weight.double(), [6, 5]),
    }
    for says, (rows, matrices, ends) in faults.items():
        with pytest.raises(ValueError, match=f"^{says}$"):
            grouped_mm(rows, matrices, torch.tensor(ends, dtype=torch.int32))
    order, inverse = shuffled()
    with pytest.raises(ValueError, match=r"^permute: inverse: expected shape \[37\], got \[36\]$"):
        permute(torch.zeros(ROWS, 2), order, inverse[1:])
