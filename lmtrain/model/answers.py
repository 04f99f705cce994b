"""What a branch's settings answer, read off the branch itself, which is built on the meta device: without memory."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch

from lmtrain.model.branch import Branch, Place, branch_class
from lmtrain.ops.op import Cost


class Answers:
    """Base of the settings of a branch in which every token passes every matrix once and whose state is of one size."""

    kind: str

    def scan_cost(self, d_model: int, seq_len: int) -> Cost:
        """Cost of the branch's op over one row of ``seq_len`` tokens; none unless overridden."""
        return Cost(0, 0, 0)

    def num_params(self, d_model: int, active: bool = False, of_kind: int = 1) -> int:
        return sum(parameter.numel() for parameter in _built(self, d_model, min(of_kind, 1)).parameters())

    def flops_per_token(self, d_model: int, seq_len: int, executed: bool = False) -> int:
        branch = _built(self, d_model)
        info = branch.param_info()
        weights = sum(p.numel() for name, p in branch.named_parameters() if info[name].role in ("matrix", "conv"))
        cost = self.scan_cost(d_model, seq_len)
        return 2 * weights + (cost.executed_flops if executed else cost.model_flops) // max(seq_len, 1)

    def kept_values(self, d_model: int) -> int | None:
        """Values kept per token for the backward pass; None: as its projections let expect (``lmtrain.plan``)."""
        return None

    def state_bytes(self, d_model: int, batch: int, seq_len: int) -> int:
        return 4 * batch * sum(math.prod(shape) for shape in _built(self, d_model).state_shapes().values())


@cache
def _built(settings: Any, d_model: int, of_kind: int = 1) -> Branch:
    with torch.device("meta"):
        return branch_class(settings.kind)(settings, d_model, Place(of_kind, 2, of_kind, 2))
