"""How a function of fla is called with the inputs of an op of ours."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lmtrain.ops import delta, dplr, gla, ssd, wkv4
from tests.ops import op_inputs
from tests.peers.pair import Named, Outputs, Pair, cast, outcome

Make = Callable[..., Named]


@dataclass(frozen=True)
class Function:
    """A function under ``fla.ops``, and how both are called.

    make: ``(draw, batch, length, decay)`` to inputs by name. ours: inputs to outputs; theirs: ``(function, inputs)`` to
    the same. length: 70 columns are more than a chunk of the kernels; naive chunk forms take whole chunks only.
    """

    op: str
    name: str
    make: Make
    ours: Callable[[Named], Outputs]
    theirs: Callable[[Callable[..., Any], Named], Outputs]
    length: int = 70
    tolerance: float = 1e-4
    note: str = ""

    def pair(self) -> Pair:
        draw = partial(torch.randn, generator=torch.Generator().manual_seed(0))
        inputs = cast(self.make(draw, 2, self.length, 1.0), torch.float32)

        def theirs() -> Named:
            module, name = self.name.rsplit(".", 1)
            function = getattr(importlib.import_module(f"fla.ops.{module}"), name)
            return outcome(partial(self.theirs, function), inputs)

        def ours(dtype: torch.dtype) -> Named:
            return outcome(self.ours, cast(inputs, dtype))

        return Pair(self.op, self.name, theirs, ours, self.tolerance, self.note)


def scaled(t: Named, name: str) -> Tensor:
    """Queries as fla reads them: times K^-1/2. Our mixers do that before the op."""
    return t[name] * t[name].shape[-1] ** -0.5


def run_ssd(t: Named, constant: Tensor | None = None) -> Outputs:
    """constant: log decay of every head, where it is no input."""
    log_a = t["log_a"] if constant is None else constant.to(t["x"]).expand(t["x"].shape[:3])
    return ssd(t["x"], log_a, t["B"], scaled(t, "C"), initial_state=t.get("initial_state"))


def run_gla(t: Named) -> Outputs:
    """Scaled, but for RWKV-6, which has the bonus u."""
    q = t["q"] if "u" in t else scaled(t, "q")
    return gla(t["v"], q, t["k"], t["g"], t.get("u"), initial_state=t.get("initial_state"))


def run_delta(t: Named) -> Outputs:
    return delta(t["v"], scaled(t, "q"), t["k"], t["beta"], t.get("g"), initial_state=t.get("initial_state"))


def run_dplr(t: Named) -> Outputs:
    return dplr(t["v"], scaled(t, "r"), t["w"], t["k"], t["a"], t["b"], initial_state=t["initial_state"])


def run_rwkv7(t: Named) -> Outputs:
    return dplr(t["v"], t["r"], t["w"], t["k"], t["a"], t["b"], initial_state=t["initial_state"])


def run_wkv4(t: Named) -> Outputs:
    y, state = wkv4(t["v"], t["k"], t["w"], t["u"], initial_state=t["initial_state"])
    return y, op_inputs.wkv4_unique(state)


def called(
    names: str, *, heads_first: bool = False, stateless: bool = False, **static: Any
) -> Callable[[Callable[..., Any], Named], Outputs]:
    """``function(argument=input, ...)``; names: such pairs, or a name that both have: ``q k v gk=g``.

    heads_first: it takes ``[B, H, T, *]``. stateless: it takes and returns no state.
    """
    pairs = [(name.split("=") * 2)[:2] for name in names.split()]

    def call(function: Callable[..., Any], t: Named) -> Outputs:
        arguments = {theirs: t[ours] for theirs, ours in pairs}
        if heads_first:
            arguments = {name: x if name == "u" else x.transpose(1, 2) for name, x in arguments.items()}
        if not stateless:
            arguments |= {"initial_state": t["initial_state"], "output_final_state": True}
        told = function(**arguments, **static)
        y, *state = told if isinstance(told, tuple) else (told,)
        return (y.transpose(1, 2) if heads_first else y, *([] if stateless else state[:1]))

    return call


def call_rwkv4(function: Callable[..., Any], t: Named) -> Outputs:
    """fla's w is the logarithm of minus ours, its state ``[B, 3, 1, D]``."""
    y, state = function((-t["w"]).log(), t["u"], t["k"], t["v"], t["initial_state"][:, :, None])
    return y, op_inputs.wkv4_unique(state[:, :, 0])


def without(make: Make, *names: str) -> Make:
    """Inputs but for some: a state, or a decay that is a constant of the function."""
    return lambda *args: {name: tensor for name, tensor in make(*args).items() if name not in names}


def output_only(run: Callable[..., Outputs]) -> Callable[..., Outputs]:
    return lambda *args: run(*args)[:1]
