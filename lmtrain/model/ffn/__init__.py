"""Branches that act on each token alone; importing registers them."""

from lmtrain.model.ffn import mlp

__all__ = ["mlp"]
