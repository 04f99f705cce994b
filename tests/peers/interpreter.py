"""Runs the Triton kernels of flash-linear-attention (fla) on a CPU, by Triton's own interpreter (TRITON_INTERPRET=1).

``prepare`` supplies what the interpreter of triton 3.9 lacks for them; it is called before fla is imported.
"""

from __future__ import annotations

import builtins
from collections.abc import Iterator
from typing import Any

import triton.language as tl
from triton.language.extra import libdevice
from triton.runtime import autotuner, interpreter


def prepare() -> None:
    """Tiles are the first of a kernel's list, as there is nothing to time; loops count in tensors, as compiled ones
    do; log1p, a function of the GPU's library, is spelled out."""
    construct, execute = autotuner.Autotuner.__init__, interpreter.GridExecutor.__call__

    def construct_untuned(self: Any, fn: Any, arg_names: Any, configs: Any, *rest: Any, **named: Any) -> None:
        construct(self, fn, arg_names, configs[:1], *rest, **named)

    def execute_with_tensor_loops(self: Any, *args: Any, **named: Any) -> None:
        namespace = self.fn.__globals__
        namespace["range"] = tensor_range
        try:
            execute(self, *args, **named)
        finally:
            del namespace["range"]

    autotuner.Autotuner.__init__ = construct_untuned
    interpreter.GridExecutor.__call__ = execute_with_tensor_loops
    libdevice.log1p = lambda x: tl.log(x + 1.0)


def tensor_range(*bounds: Any) -> Iterator[Any]:
    numbers = (bound.handle.data.item() if isinstance(bound, tl.tensor) else bound for bound in bounds)
    return (interpreter._implicit_cvt(index) for index in builtins.range(*map(int, numbers)))
