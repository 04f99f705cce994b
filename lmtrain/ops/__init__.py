"""Ops: functions over a row of tokens that know about documents and carry state. Imports torch alone."""

from lmtrain.ops.attention import attention
from lmtrain.ops.causal_conv1d import causal_conv1d
from lmtrain.ops.documents import Documents
from lmtrain.ops.linear_cross_entropy import linear_cross_entropy
from lmtrain.ops.op import AffineOp, Cost, Op, Span
from lmtrain.ops.rmsnorm import rmsnorm
from lmtrain.ops.ssd import ssd

__all__ = [
    "AffineOp",
    "Cost",
    "Documents",
    "Op",
    "Span",
    "attention",
    "causal_conv1d",
    "linear_cross_entropy",
    "rmsnorm",
    "ssd",
]
