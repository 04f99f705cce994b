"""LSTM (Hochreiter and Schmidhuber 1997; forget gate: Gers 2000), the recurrence that is not affine in its state.

i, f, g, o = W x_t + b + U h_{t-1} + b'
c_t = sigmoid(f) c_{t-1} + sigmoid(i) tanh(g)      h_t = sigmoid(o) tanh(c_t)      out = W_o h_t

Spans do not compose, so it runs token by token on whole rows: a row cut over ranks (mesh.sp > 1) is refused at start
(``lmtrain.parallel.supported``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lmtrain.model.answers import Answers
from lmtrain.model.branch import Branch, ParamInfo, Place, State, Streams, matrix, register
from lmtrain.model.context import Context
from lmtrain.model.init import fan_in_uniform
from lmtrain.model.settings import at_least
from lmtrain.ops.op import compute_dtype


@dataclass(frozen=True)
class LSTMConfig(Answers):
    """LSTM mixer: the serial baseline."""

    kind: str = "lstm"
    """lstm"""
    d_hidden: int | None = None
    """Units; default: d_model."""

    def __post_init__(self) -> None:
        at_least(self, 1, "d_hidden")


class Recurrence(nn.Module):
    """torch's cell over a row, always fp32; called once per row, since a sharded module gathers at every call."""

    keeps_fp32 = True

    def __init__(self, d_model: int, d_hidden: int) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(d_model, d_hidden)

    def forward(self, x: Tensor, starts: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x ``[B, T, d_model]``, document starts ``[B, T]``, h and c ``[B, d_hidden]``: every h, the last h and c."""
        outputs = []
        for token, start in zip(x.unbind(1), starts[..., None].unbind(1), strict=True):
            h, c = self.cell(token, (h.masked_fill(start, 0), c.masked_fill(start, 0)))
            outputs.append(h)
        return torch.stack(outputs, dim=1), h, c


@register("lstm")
class LSTM(Branch):
    """See the module. State: ``h`` and ``c`` fp32 ``[B, d_hidden]``."""

    Config: ClassVar[type[LSTMConfig]] = LSTMConfig
    sp = "serial"

    def __init__(self, cfg: LSTMConfig, d_model: int, place: Place) -> None:
        super().__init__()
        self.place, self.d_model = place, d_model
        self.d_hidden = cfg.d_hidden or d_model
        self.recurrence = Recurrence(d_model, self.d_hidden)
        self.o = nn.Linear(self.d_hidden, d_model, bias=False)

    def forward(self, x: Tensor, ctx: Context, state: State, streams: Streams) -> tuple[Tensor, State, Streams]:
        inputs = x.to(compute_dtype(x))
        zeros = inputs.new_zeros(x.shape[0], self.d_hidden)
        h, c = (state.get(name, zeros) for name in ("h", "c"))
        y, h, c = self.recurrence(inputs, ctx.docs.starts(), h, c)
        return self.o(y.to(x.dtype)), {"h": h, "c": c} if ctx.carries else {}, {}

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"h": (self.d_hidden,), "c": (self.d_hidden,)}

    def param_info(self) -> dict[str, ParamInfo]:
        d_model, hidden = self.d_model, self.d_hidden
        init = fan_in_uniform(hidden)  # torch's, for all four
        bias = ParamInfo("bias", init, fp32=True)
        return {
            "recurrence.cell.weight_ih": ParamInfo("matrix", init, True, True, d_model, 4 * hidden),
            "recurrence.cell.weight_hh": ParamInfo("matrix", init, True, True, hidden, 4 * hidden),
            "recurrence.cell.bias_ih": bias,
            "recurrence.cell.bias_hh": bias,
            "o.weight": matrix(init, hidden, d_model),
        }
