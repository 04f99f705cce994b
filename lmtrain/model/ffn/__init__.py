"""Branches that act on each token alone; importing registers them."""

from lmtrain.model.ffn import mlp, moe

__all__ = ["mlp", "moe"]
