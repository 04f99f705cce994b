"""A pretraining run, assembled from its settings: the one place where all rooms meet."""

from lmtrain.pretrain.command import main

__all__ = ["main"]
