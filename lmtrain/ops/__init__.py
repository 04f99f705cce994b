"""Ops: functions over a row of tokens that know about documents and carry state. Imports torch alone."""

from lmtrain.ops.attention import attention
from lmtrain.ops.blockdiag_scan import blockdiag_scan
from lmtrain.ops.causal_conv1d import causal_conv1d
from lmtrain.ops.delta import delta
from lmtrain.ops.diag_scan import diag_scan
from lmtrain.ops.documents import Documents
from lmtrain.ops.dplr import dplr
from lmtrain.ops.gla import gla
from lmtrain.ops.linear_cross_entropy import linear_cross_entropy
from lmtrain.ops.op import AffineOp, Cost, Op, Span
from lmtrain.ops.rmsnorm import rmsnorm
from lmtrain.ops.routed_conv import routed_conv
from lmtrain.ops.selective_scan import selective_scan
from lmtrain.ops.ssd import ssd
from lmtrain.ops.wkv4 import wkv4

__all__ = [
    "AffineOp",
    "Cost",
    "Documents",
    "Op",
    "Span",
    "attention",
    "blockdiag_scan",
    "causal_conv1d",
    "delta",
    "diag_scan",
    "dplr",
    "gla",
    "linear_cross_entropy",
    "rmsnorm",
    "routed_conv",
    "selective_scan",
    "ssd",
    "wkv4",
]
