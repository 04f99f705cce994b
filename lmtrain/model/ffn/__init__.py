"""Branches that act on each token alone, or with the one before it; importing registers them."""

from lmtrain.model.ffn import mlp, moe, rwkv_channel

__all__ = ["mlp", "moe", "rwkv_channel"]
