"""Evaluation: the lm-eval adapter, tasks, probes and statistics; imports as ``lmtrain.eval``."""
