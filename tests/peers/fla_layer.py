"""How a layer of fla gets the weights of a mixer of ours, and is told documents."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lmtrain.model.branch import Branch, Place
from lmtrain.model.context import LocalContext
from lmtrain.ops.documents import Documents
from tests.model.parity import perturbed
from tests.peers.pair import Named, Outputs, Pair, cast, outcome

D_MODEL = 24
FIRST, LATER = Place(0, 4, 0, 2), Place(2, 4, 1, 2)
STARTS, PACKED = (0, 1, 3, 20, 21), 40  # of the documents packed into one row, and its columns


def run_plain(layer: nn.Module, p: Named, x: Tensor, **told: Any) -> Tensor:
    return functional_call(layer, p, (x,), told)[0]


@dataclass(frozen=True)
class Layer:
    """A layer of fla, and our settings of the same.

    name: its class, in ``fla.layers`` or in a module under fla; built with ``arguments``. packed: our parameters, or
    their gradients, under its names. run: ``(layer, parameters, x, **cu_seqlens)`` to its output. streams: what comes
    in beside x, made from x. packs: whether it takes several documents in a row. length: of rows of one document; 70
    is more than a chunk of the kernels.
    """

    settings: Any
    name: str
    arguments: dict[str, Any]
    packed: Callable[[Named], Named]
    run: Callable[..., Tensor] = run_plain
    place: Place = LATER
    streams: Callable[[Tensor], Named] = field(default=lambda x: {})
    packs: bool = True
    length: int = 70
    note: str = ""

    def pairs(self) -> Iterator[Pair]:
        """On rows of one document, and on a row of several."""
        rows = Documents.from_ids(torch.zeros(2, self.length, dtype=torch.int32))
        yield self._pair("", rows, {})
        if self.packs:
            ids = torch.zeros(1, PACKED, dtype=torch.int32)
            ids[0, list(STARTS[1:])] = 1
            yield self._pair(
                ", packed", Documents.from_ids(ids.cumsum(1)), {"cu_seqlens": torch.tensor([*STARTS, PACKED])}
            )

    def _pair(self, layout: str, docs: Documents, told: Named) -> Pair:
        branch = perturbed(self.settings, D_MODEL, torch.float32, self.place)
        weights = {name: parameter.detach() for name, parameter in branch.named_parameters()}
        x = torch.randn(*docs.shape, D_MODEL, generator=torch.Generator().manual_seed(2))

        def theirs() -> Named:
            layer = self._build()
            return outcome(lambda p: (self.run(layer, weights_of(p), p["x"], **told),), {"x": x} | self.packed(weights))

        def ours(dtype: torch.dtype) -> Named:
            found = outcome(partial(self._ours, branch, docs), cast({"x": x} | weights, dtype))
            grads = self.packed({name: found.pop(f"gradient of {name}") for name in weights})
            return found | {f"gradient of {name}": grad for name, grad in grads.items()}

        return Pair(self.settings.kind, self.name.split(".")[-1] + layout, theirs, ours, note=self.note)

    def _build(self) -> nn.Module:
        module, _, name = self.name.rpartition(".")
        layer: nn.Module = getattr(importlib.import_module(f"fla.{module or 'layers'}"), name)(**self.arguments).eval()
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)  # those that ours lacks; the others are given
        return layer

    def _ours(self, branch: Branch, docs: Documents, p: Named) -> Outputs:
        inputs = (p["x"], LocalContext(docs), {}, self.streams(p["x"]))
        y, _, written = functional_call(branch, weights_of(p), inputs)
        return (torch.cat([y, *written.values()], dim=-1),)


def weights_of(leaves: Named) -> Named:
    return {name: tensor for name, tensor in leaves.items() if name != "x"}


def renamed(**names: str) -> Callable[[Named], Named]:
    """Parameters as fla names them: ``theirs=ours``, __ for a dot, both without ``.weight``."""

    def packed(p: Named) -> Named:
        found = {}
        for theirs, ours in names.items():
            key = theirs.replace("__", ".")
            if ours in p:
                found[key] = p[ours]
            else:
                weight = p[f"{ours}.weight"]
                found[f"{key}.weight"] = weight[:, None] if key.endswith("_conv1d") else weight
        return found

    return packed
