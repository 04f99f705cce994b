"""The linear RNN of regular languages (arXiv 2309.07412): the token picks the matrix that moves the state.

M_t = MLP_A(x_t) less the mean of each column, over the largest l_1.2 norm of its columns; per block ``[b, b]``
a_t = M_t a_{t-1} + MLP_v(x_t)            a_0 is learned            out = a_t

Both MLPs are two layers with ReLU and biases. There is no projection behind the recurrence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmtrain.errors import UsageError
from lmtrain.model.answers import Answers
from lmtrain.model.branch import Branch, ParamInfo, Place, State, Streams, matrix, named, register
from lmtrain.model.context import Context
from lmtrain.model.init import fan_in_uniform, normal
from lmtrain.ops import blockdiag_scan
from lmtrain.ops.op import Cost, compute_dtype

NORM = 1.2
TINY = 1e-12  # a block of equal elements has nothing left after its mean


@dataclass(frozen=True)
class LRNNConfig(Answers):
    """Linear RNN of regular languages."""

    kind: str = "lrnn"
    """lrnn"""
    block_size: int = 8
    """Rows of a block of the state; the cost of composing spans grows with its cube."""

    def __post_init__(self) -> None:
        if self.block_size < 2:
            raise UsageError(f"lrnn: block_size: expected at least 2 (a block of 1 is 0), got {self.block_size}")

    def blocks(self, d_model: int) -> int:
        """Blocks of the state. UsageError unless they divide d_model."""
        if d_model % self.block_size:
            smaller = [size for size in range(2, self.block_size) if d_model % size == 0]
            fits = smaller[-1] if smaller else d_model
            raise UsageError(f"lrnn: block_size {self.block_size} does not divide d_model {d_model}; use {fits}")
        return d_model // self.block_size

    def scan_cost(self, d_model: int, seq_len: int) -> Cost:
        values = (1, seq_len, self.blocks(d_model), self.block_size)
        return blockdiag_scan.cost(values, (*values, self.block_size))


class Perceptron(nn.Module):
    """``W_2 relu(W_1 x + b_1) + b_2``."""

    def __init__(self, d_model: int, d_inner: int) -> None:
        super().__init__()
        self.up = nn.Linear(d_model, d_inner)
        self.out = nn.Linear(d_inner, d_inner)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.up(x)))

    def param_info(self) -> dict[str, ParamInfo]:
        inner, d_model = self.up.weight.shape
        into, within = fan_in_uniform(d_model), fan_in_uniform(inner)
        return {
            "up.weight": matrix(into, d_model, inner),
            "up.bias": ParamInfo("bias", into),
            "out.weight": matrix(within, inner, inner),
            "out.bias": ParamInfo("bias", within),
        }


class Start(nn.Module):
    """The state in front of every document, a_0 ``[h, b]``, always fp32."""

    keeps_fp32 = True

    def __init__(self, blocks: int, size: int) -> None:
        super().__init__()
        self.state = nn.Parameter(torch.empty(blocks, size))

    def forward(self, matrices: Tensor) -> Tensor:
        """What is left of it after one token: matrices ``[B, T, h, b, b]`` to ``[B, T, h, b]``."""
        return (matrices * self.state[:, None]).sum(dim=-1)


def normalised(raw: Tensor) -> Tensor:
    """``[..., b, b]``: every column without its mean, the largest of l_1.2 norm 1."""
    centred = raw - raw.mean(dim=-2, keepdim=True)
    largest = centred.abs().pow(NORM).sum(dim=-2, keepdim=True).amax(dim=-1, keepdim=True)
    return centred / (largest + TINY).pow(1 / NORM)


@register("lrnn")
class LRNN(Branch):
    """See the module. State: ``a`` fp32 ``[B, h, b]``."""

    Config: ClassVar[type[LRNNConfig]] = LRNNConfig
    sp = "scan"

    def __init__(self, cfg: LRNNConfig, d_model: int, place: Place) -> None:
        super().__init__()
        self.place = place
        self.size, self.blocks = cfg.block_size, cfg.blocks(d_model)
        self.matrices = Perceptron(d_model, d_model * self.size)
        self.values = Perceptron(d_model, d_model)
        self.start = Start(self.blocks, self.size)

    def forward(self, x: Tensor, ctx: Context, state: State, streams: Streams) -> tuple[Tensor, State, Streams]:
        raw = self.matrices(x).unflatten(-1, (-1, self.size, self.size))
        matrices = normalised(raw.to(compute_dtype(raw)))
        values = self.values(x).unflatten(-1, (-1, self.size)).to(matrices.dtype)
        opens = (ctx.positions == 0)[..., None, None]
        values = values + torch.where(opens, self.start(matrices), values.new_zeros(()))
        a, after = ctx.scan(blockdiag_scan, values, matrices, initial_state=state.get("a"))
        return a.flatten(2).to(x.dtype), {"a": after} if ctx.carries else {}, {}

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"a": (self.blocks, self.size)}

    def param_info(self) -> dict[str, ParamInfo]:
        return {
            **named("matrices", self.matrices.param_info()),
            **named("values", self.values.param_info()),
            "start.state": ParamInfo("scalar", normal(1.0), fp32=True),
        }
