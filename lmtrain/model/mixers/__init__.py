"""Branches that mix tokens along the row; importing registers them."""

from lmtrain.model.mixers import attention, gla, mamba2

__all__ = ["attention", "gla", "mamba2"]
