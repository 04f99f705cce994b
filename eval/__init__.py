"""Judging a model: what it is compared with and by which measure (installed as ``lmtrain.eval``)."""
