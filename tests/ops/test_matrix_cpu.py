"""The compiled kernels of delta and dplr, beyond what test_op_matrix.py asks of every op: sizes, packed bits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lmtrain.ops import Documents, library
from tests.ops.op_case import Tensors
from tests.ops.op_cases import CASES
from tests.ops.scan_cases import assert_close, run

NAMES = ("delta", "delta_gated", "kda", "dplr")
BORDERS = (1, 5, 31, 32, 33, 63, 64, 97)  # a chunk is of 32 tokens
SIZES = ((70, 16, 32), (65, 17, 33), (40, 5, 64), (100, 32, 80), (131, 96, 16), (64, 64, 130), (33, 2, 1))


@pytest.fixture(autouse=True)
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMTRAIN_KERNELS", "cpu")
    for op in ("delta", "dplr"):
        assert library.backend(op, "cpu", torch.float32) == "cpu", "run `make install`"


def inputs(name: str, length: int, keys: int, width: int, decay: float = 0.1, batch: int = 2) -> Tensors:
    """Of heads of these sizes, in fp64, of values that fp32 has."""
    heads = 2
    generator = torch.Generator().manual_seed(length + 7 * keys + width)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(batch, length, heads, *size, generator=generator, dtype=torch.float64)

    unit = F.normalize(draw(keys), dim=-1)
    if name == "dplr":
        tensors = {"r": draw(keys), "w": -decay * draw(keys).abs(), "k": draw(keys), "a": -unit}
        tensors |= {"b": unit * draw(keys).sigmoid()}
    else:
        gates = {"delta": {}, "delta_gated": {"g": -decay * draw().abs()}, "kda": {"g": -decay * draw(keys).abs()}}
        tensors = {"q": draw(keys), "k": unit, "beta": 2 * draw().sigmoid()} | gates[name]
    state = torch.randn(batch, heads, keys, width, generator=generator, dtype=torch.float64)
    tensors = {"v": draw(width)} | tensors | {"initial_state": state}
    return {n: t.float().double() for n, t in tensors.items()}


def documents(length: int, batch: int = 2) -> Documents:
    """A document starts at every border; the last row continues one from before its column 0, the others none."""
    ids = torch.zeros(batch, length, dtype=torch.int32)
    ids[:, [border for border in BORDERS if border < length]] = 1
    return Documents.from_ids(ids.cumsum(1), torch.tensor([0] * (batch - 1) + [3]))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sizes(name: str, sizes: tuple[int, int, int], poisoned: None) -> None:
    case = CASES[name]
    for docs in (None, documents(sizes[0])):
        for decay in (0.1, 20.0):
            tensors = inputs(name, *sizes, decay)
            expected = run(case.definition, tensors, docs, case.outputs)
            for dtype, tolerance in ((torch.float64, 1e-14), (torch.float32, case.tolerance)):
                cast = {n: t.to(dtype) for n, t in tensors.items()}
                assert_close(run(case.call, cast, docs, case.outputs), expected, tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_a_packed_document_has_the_bits_of_one_alone(name: str) -> None:
    case = CASES[name]
    tensors = {n: t.float() for n, t in inputs(name, 120, 16, 32, batch=1).items()}
    docs = documents(120, batch=1)
    packed = case.call(tensors, docs)[0]
    for begin, end in zip((0, *BORDERS), (*BORDERS, 120), strict=True):
        part = case.part(tensors, begin, end) | ({} if begin else {"initial_state": tensors["initial_state"]})
        assert torch.equal(case.call(part, None)[0], packed[:, begin:end])
