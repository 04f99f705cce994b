"""What the delta rule reads, in every mixer that has one: unit keys and queries, values, and how far to correct."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lmtrain.model.answers import Answers
from lmtrain.model.branch import Init, ParamInfo, matrix, named
from lmtrain.model.context import Context
from lmtrain.model.settings import at_least, positive, taps
from lmtrain.model.short_conv import ShortConv
from lmtrain.ops.op import compute_dtype


@dataclass(frozen=True)
class DeltaConfig(Answers):
    """Settings that DeltaNet and KDA share."""

    num_heads: int = 16
    """Heads."""
    head_dim: int = 128
    """Channels per head, of keys and of values; in KDA also the inner width of its low-rank projections."""
    conv_width: int = 4
    """Taps of the short convolutions."""
    negative_eigenvalues: bool = False
    """beta in (0, 2) instead of (0, 1): a transition may turn a key's sign (arXiv 2411.12537)."""
    norm_eps: float = 1e-5
    """Added to the mean square of the norm over each head."""

    def __post_init__(self) -> None:
        at_least(self, 1, "num_heads", "head_dim")
        taps(self)
        positive(self, "norm_eps")


def unit(x: Tensor) -> Tensor:
    """``x / sqrt(|x|^2 + 1e-6)`` over the last dim, in the computing dtype: longer keys would make the rule diverge."""
    x = x.to(compute_dtype(x))
    return x * torch.rsqrt(x.square().sum(dim=-1, keepdim=True) + 1e-6)


class DeltaInputs(nn.Module):
    """``k = unit(silu(conv(W_k x)))``, q alike and over sqrt(K), ``v = silu(conv(W_v x))``, beta = sigmoid(W_b x).

    max_beta: beta is in (0, max_beta); with 2, a transition ``I - beta k k^T`` has eigenvalues in (-1, 1].
    """

    def __init__(
        self,
        d_model: int,
        key_heads: int,
        key_dim: int,
        value_heads: int,
        value_dim: int,
        conv_width: int,
        max_beta: float,
    ) -> None:
        super().__init__()
        self.key_heads, self.key_dim, self.value_heads, self.value_dim = key_heads, key_dim, value_heads, value_dim
        self.max_beta = max_beta
        keys, values = key_heads * key_dim, value_heads * value_dim
        self.q = nn.Linear(d_model, keys, bias=False)
        self.k = nn.Linear(d_model, keys, bias=False)
        self.v = nn.Linear(d_model, values, bias=False)
        self.q_conv = ShortConv(keys, conv_width, bias=False)
        self.k_conv = ShortConv(keys, conv_width, bias=False)
        self.v_conv = ShortConv(values, conv_width, bias=False)
        self.beta = nn.Linear(d_model, value_heads, bias=False)

    def forward(
        self, x: Tensor, ctx: Context, tails: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """``[B, T, d_model]`` to v ``[B, T, Hv, V]``, q and k ``[B, T, H, K]``, beta ``[B, T, Hv]``, and the tails to
        carry: those of the segment before are read from ``tails``."""
        batch, length, _ = x.shape
        q, q_tail = self.q_conv(self.q(x), ctx, tails.get("q_conv"))
        k, k_tail = self.k_conv(self.k(x), ctx, tails.get("k_conv"))
        v, v_tail = self.v_conv(self.v(x), ctx, tails.get("v_conv"))
        q, k = (unit(t.view(batch, length, -1, self.key_dim)) for t in (q, k))
        rates = self.beta(x)
        beta = self.max_beta * torch.sigmoid(rates.to(compute_dtype(rates)))
        v = v.view(batch, length, -1, self.value_dim)
        return v, q * self.key_dim**-0.5, k, beta, {"q_conv": q_tail, "k_conv": k_tail, "v_conv": v_tail}

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the tails, and of the rule's state ``delta``."""
        columns = self.q_conv.weight.shape[1] - 1
        keys, values = self.k.out_features, self.v.out_features
        tails = {"q_conv": (columns, keys), "k_conv": (columns, keys), "v_conv": (columns, values)}
        return {**tails, "delta": (self.value_heads, self.key_dim, self.value_dim)}

    def param_info(self, init: Init) -> dict[str, ParamInfo]:
        """init: initial values of matrices and convolutions."""
        d_model, heads, value_heads = self.q.in_features, self.key_heads, self.value_heads
        return {
            "q.weight": matrix(init, d_model, self.q.out_features, rows=heads),
            "k.weight": matrix(init, d_model, self.k.out_features, rows=heads),
            "v.weight": matrix(init, d_model, self.v.out_features, rows=value_heads),
            **named("q_conv", self.q_conv.param_info(init, heads)),
            **named("k_conv", self.k_conv.param_info(init, heads)),
            **named("v_conv", self.v_conv.param_info(init, value_heads)),
            "beta.weight": matrix(init, d_model, value_heads, rows=value_heads),
        }
