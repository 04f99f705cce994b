"""Selective scan: the input-dependent diagonal scan of Mamba (arXiv 2312.00752) and Longhorn (arXiv 2407.14207).

    exp        h_t[d,n] = exp(dt_t[d] A[d,n]) h_{t-1}[d,n] + dt_t[d] B_t[n] x_t[d]     y_t[d] = sum_n C_t[n] h_t[d,n]
    longhorn   the same with the decay 1 - dt_t[d] B_t[n]^2, and no A

x and dt ``[B, T, D]`` (dt >= 0, after softplus; Longhorn's Delta), A ``[D, N]`` < 0 or None, B and C ``[B, T, G, N]``
(Longhorn's k and q) with channel d reading group ``d // (D / G)``, state ``[B, D, N]``. A document's first token sees
h_{t-1} = 0. dt enters the decay and the input, Longhorn's B too.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from lmtrain.ops import library
from lmtrain.ops.adapters import mamba_ssm
from lmtrain.ops.documents import Documents
from lmtrain.ops.op import AffineOp, Cost, check_shape, compute_dtype

DECAYS = ("exp", "longhorn")
CHUNK = 32  # tokens between the states that the compiled forward keeps for its backward


def _scale(factor: Tensor, state: Tensor) -> Tensor:
    """``factor * state``, 0 where the factor is 0, even of infinities."""
    kept = torch.where(factor == 0, state.new_zeros(()), state)
    return factor * kept


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
        decay = (delta[..., None] * rates).exp() if rates is not None else 1 - delta[..., None] * key.square()
        if start is not None:
            # where, not a product: a NaN of another document must not reach this one
            state = state.masked_fill(start, 0)
        state = _scale(decay, state) + value[..., None] * key
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
        return _scale(gamma, state)

    def transpose(self, gamma: Tensor, grad: Tensor) -> Tensor:
        return _scale(gamma, grad)

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
        if not x.is_floating_point():
            raise ValueError(f"selective_scan: x: expected a floating dtype, got {x.dtype}")
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
        if docs is not None:
            check_shape(self.name, "docs.ids", docs.ids, (batch, length))
        others = {"dt": dt, "A": a, "B": b, "C": c, "initial_state": initial_state}
        others |= {} if docs is None else {"docs": docs.ids}
        for argument, other in others.items():
            if other is not None and other.device != x.device:
                raise ValueError(f"selective_scan: {argument}: expected device {x.device} as x, got {other.device}")
        return x, dt, a, b, c


selective_scan = SelectiveScan()


# --- the compiled backend: shapes for tracing and the backward, registered when the library first loads ---


def _native_missing() -> str | None:
    reason = library.load()
    if reason is None and not hasattr(torch.ops.lmtrain, SelectiveScan.name):
        reason = f"the compiled library is older than it; rebuild it with `{library.BUILD_COMMAND}`"
    if reason is None:
        _register_native()
    return reason


@cache
def _register_native() -> None:
    torch.library.register_fake("lmtrain::selective_scan", _fake_forward)
    torch.library.register_fake("lmtrain::selective_scan_backward", _fake_backward)
    torch.library.register_autograd("lmtrain::selective_scan", _backward, setup_context=_save)


def _fake_forward(
    x: Tensor, dt: Tensor, a: Tensor | None, b: Tensor, c: Tensor, starts: Tensor | None, initial_state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    (batch, length, channels), d_state = x.shape, b.shape[3]
    chunks = (length + CHUNK - 1) // CHUNK
    state = x.new_empty(batch, channels, d_state)
    return x.new_empty(x.shape), state, x.new_empty(batch, chunks, d_state, channels)


def _fake_backward(
    grad_y: Tensor,
    grad_state: Tensor,
    x: Tensor,
    dt: Tensor,
    a: Tensor | None,
    b: Tensor,
    c: Tensor,
    starts: Tensor | None,
    initial_state: Tensor | None,
    checkpoints: Tensor,
) -> tuple[Tensor, ...]:
    (batch, _, channels), d_state = x.shape, b.shape[3]
    shapes = (x.shape, x.shape, (channels, d_state), b.shape, b.shape, (batch, channels, d_state))
    return tuple(x.new_empty(shape) for shape in shapes)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(*inputs, output[2])


def _backward(ctx: Any, grad_y: Tensor, grad_state: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # read once: activation checkpointing recomputes them, and refuses a second time
    a, initial_state = saved[2], saved[6]
    grads = torch.ops.lmtrain.selective_scan_backward(grad_y, grad_state, *saved)
    grad_x, grad_dt, grad_a, grad_b, grad_c, grad_initial = grads
    kept = None if initial_state is None else grad_initial
    return grad_x, grad_dt, None if a is None else grad_a, grad_b, grad_c, None, kept


library.register(
    SelectiveScan.name,
    library.Backend("cpu", "cpu", frozenset({torch.float32, torch.float64, torch.bfloat16}), _native_missing),
    mamba_ssm.BACKEND,
    library.Backend("reference"),
)
