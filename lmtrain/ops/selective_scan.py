"""Selective scan: the input-dependent diagonal scan of Mamba (arXiv 2312.00752) and Longhorn (arXiv 2407.14207).

    exp        h_t[d,n] = exp(dt_t[d] A[d,n]) h_{t-1}[d,n] + dt_t[d] B_t[n] x_t[d]     y_t[d] = sum_n C_t[n] h_t[d,n]
    longhorn   the same with the decay 1 - dt_t[d] B_t[n]^2, and no A

x and dt ``[B, T, D]`` (dt >= 0, after softplus; Longhorn's Delta), A ``[D, N]`` < 0 or None, B and C ``[B, T, G, N]``
(Longhorn's k and q) with channel d reading group ``d // (D / G)``, state ``[B, D, N]``. A document's first token sees
h_{t-1} = 0. dt enters the decay and the input, Longhorn's B too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lmtrain.ops import library
from lmtrain.ops.adapters import mamba_ssm
from lmtrain.ops.compiled import Like, compiled
from lmtrain.ops.documents import Documents
from lmtrain.ops.op import AffineOp, Cost, check_row, check_shape, compute_dtype, scaled

DECAYS = ("exp", "longhorn")
CHUNK = 32  # tokens between the states that the compiled forward keeps for its backward


def recurrence(
    x: Tensor,
    dt: Tensor,
    a: Tensor | None,
    b: Tensor,
    c: Tensor,
    docs: Documents | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The definition, one token after another; also the form that torch runs fastest without a kernel."""
    dtype = compute_dtype(x)
    width = x.shape[2] // b.shape[2]
    deltas, inputs = dt.to(dtype), dt.to(dtype) * x.to(dtype)
    keys, queries = (t.to(dtype).repeat_interleave(width, dim=2) if t.shape[2] > 1 else t.to(dtype) for t in (b, c))
    rates = None if a is None else a.to(dtype)
    state = keys.new_zeros(x.shape[0], x.shape[2], b.shape[3])
    state = state if initial_state is None else initial_state.to(dtype)
    starts = [None] * x.shape[1] if docs is None else docs.starts()[:, :, None, None].unbind(1)
    outputs = []
    for delta, value, key, query, start in zip(
        *(t.unbind(1) for t in (deltas, inputs, keys, queries)), starts, strict=True
    ):
        if start is not None:
            # where, not a product: a NaN of another document must not reach this one
            state = state.masked_fill(start, 0)
        if rates is not None:
            kept = scaled((delta[..., None] * rates).exp(), state)
        else:  # a decay of 0 is as good as any here, and has a gradient
            kept = (1 - delta[..., None] * key.square()) * state
        state = kept + value[..., None] * key
        outputs.append((state * query).sum(dim=-1))
    y = torch.stack(outputs, dim=1) if outputs else inputs
    return y.to(x.dtype), state


class SelectiveScan(AffineOp):
    """See the module. ``docs`` resets the state; ``initial_state`` ``[B, D, N]`` in the computing dtype."""

    name = "selective_scan"
    kind = "diag"
    needs_state = False
    timeless = frozenset({2})  # A

    def __call__(
        self,
        *inputs: Tensor | None,
        docs: Documents | None = None,
        initial_state: Tensor | None = None,
        decay: str | None = None,
    ) -> tuple[Tensor, Tensor]:
        """``(x, dt, A, B, C)`` to y ``[B, T, D]`` in x's dtype and the state after the last column.

        decay: "exp", or "longhorn" with A None; by default as A says. Raises ValueError naming the argument, what was
        expected and what was got.
        """
        x, dt, a, b, c = self._check(inputs, docs, initial_state, decay)
        if docs is not None and initial_state is not None and x.shape[1]:
            initial_state = self.drop(initial_state, docs.before)  # whatever it holds, NaN included
        backend = library.backend(self.name, x.device.type, x.dtype)
        if backend == "mamba_ssm":
            return mamba_ssm.selective_scan(x, dt, a, b, c, docs, initial_state)
        if backend == "reference":
            return recurrence(x, dt, a, b, c, docs, initial_state)
        starts = None if docs is None else docs.starts()
        values, dt, b, c = (t.to(compute_dtype(x)) for t in (x, dt, b, c))
        a, initial_state = (None if t is None else t.to(values.dtype) for t in (a, initial_state))
        y, state, _ = torch.ops.lmtrain.selective_scan(values, dt, a, b, c, starts, initial_state)
        return y.to(x.dtype), state

    def gamma(self, *inputs: Tensor | None, docs: Documents | None = None) -> Tensor:
        """``[B, D, N]``: e^(A sum dt), or what a state of ones becomes."""
        x, dt, a, b, c = inputs
        assert x is not None and dt is not None and b is not None
        dtype = compute_dtype(x)
        if a is None:
            ones = torch.ones(x.shape[0], x.shape[2], b.shape[3], dtype=dtype, device=x.device)
            return self(torch.zeros_like(x, dtype=dtype), dt, a, b, c, docs=docs, initial_state=ones)[1]
        dt, a = dt.to(dtype), a.to(dtype)
        if docs is None:
            return (dt.sum(dim=1)[..., None] * a).exp()
        opens = docs.starts().any(dim=1)[:, None, None]
        zero = dt.new_zeros(())
        return torch.where(opens, zero, (torch.where(opens, zero, dt).sum(dim=1)[..., None] * a).exp())

    def apply(self, gamma: Tensor, state: Tensor) -> Tensor:
        return scaled(gamma, state)

    def transpose(self, gamma: Tensor, grad: Tensor) -> Tensor:
        return scaled(gamma, grad)

    def outer(self, grad: Tensor, state: Tensor) -> Tensor:
        return grad * state

    def correct(self, y: Tensor, *inputs: Tensor | None, docs: Documents | None, incoming: Tensor) -> Tensor:
        x, *others = inputs
        assert x is not None
        # y is linear in (x, state): what the state adds is the scan of nothing that starts from it
        added, _ = self(torch.zeros_like(x, dtype=incoming.dtype), *others, docs=docs, initial_state=incoming)
        return (y.to(incoming.dtype) + added).to(y.dtype)

    def step(self, *inputs: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
        """x and dt ``[B, D]``, A ``[D, N]`` or None, B and C ``[B, G, N]``."""
        x, dt, a, b, c = inputs
        assert x is not None and dt is not None and b is not None and c is not None
        y, state = recurrence(x[:, None], dt[:, None], a, b[:, None], c[:, None], None, state)
        return y[:, 0], state

    def cost(self, *shapes: tuple[int, ...]) -> Cost:
        """Of ``(x, dt, A, B, C)`` shapes, A's ``()`` for Longhorn; bytes for fp32."""
        batch, length, channels = shapes[0]
        groups, d_state = shapes[3][2:]
        values = batch * length * channels
        flops = 7 * values * d_state + values  # decay 2, input 1, update 2, read 2; dt x once
        return Cost(flops, flops, bytes=4 * (3 * values + 2 * batch * length * groups * d_state))

    def _check(
        self,
        inputs: tuple[Tensor | None, ...],
        docs: Documents | None,
        initial_state: Tensor | None,
        decay: str | None,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
        if len(inputs) != 5 or any(t is None for i, t in enumerate(inputs) if i != 2):
            raise ValueError("selective_scan: inputs: expected (x, dt, A, B, C), of which A may be None")
        x, dt, a, b, c = inputs
        assert x is not None and dt is not None and b is not None and c is not None
        if decay not in (None, *DECAYS):
            raise ValueError(f"selective_scan: decay: expected one of {', '.join(DECAYS)}, got {decay!r}")
        if decay is not None and (decay == "longhorn") != (a is None):
            expected, got = ("None", "a tensor") if a is not None else ("[D, N]", "None")
            raise ValueError(f"selective_scan: A: expected {expected} with decay={decay}, got {got}")
        check_shape(self.name, "x", x, (None, None, None))
        batch, length, channels = x.shape
        check_shape(self.name, "dt", dt, (batch, length, channels))
        check_shape(self.name, "B", b, (batch, length, None, None))
        check_shape(self.name, "C", c, tuple(b.shape))
        if b.shape[2] == 0 or channels % b.shape[2]:
            raise ValueError(
                f"selective_scan: B: expected groups that divide the {channels} channels, got {b.shape[2]}"
            )
        if a is not None:
            check_shape(self.name, "A", a, (channels, b.shape[3]))
        if initial_state is not None:
            check_shape(self.name, "initial_state", initial_state, (batch, channels, b.shape[3]))
        check_row(self.name, "x", x, docs, dt=dt, A=a, B=b, C=c, initial_state=initial_state)
        return x, dt, a, b, c


selective_scan = SelectiveScan()


def _outputs(x: Tensor, dt: Tensor, a: Tensor | None, b: Tensor, c: Tensor, *_: Tensor | None) -> tuple[Like, ...]:
    (batch, length, channels), d_state = x.shape, b.shape[3]
    return x, (x, (batch, channels, d_state)), (x, (batch, -(-length // CHUNK), d_state, channels))


def _saved(inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> tuple[Any, ...]:
    return *inputs, outputs[2]


def _gradients(
    x: Tensor, dt: Tensor, a: Tensor | None, b: Tensor, c: Tensor, *_: Tensor | None
) -> tuple[Like | None, ...]:
    return x, dt, (x, (x.shape[2], b.shape[3])), b, c, None, _outputs(x, dt, a, b, c)[1]


library.register(
    SelectiveScan.name,
    compiled(SelectiveScan.name, _outputs, _gradients, saved=_saved),
    mamba_ssm.BACKEND,
    library.Backend("reference"),
)
