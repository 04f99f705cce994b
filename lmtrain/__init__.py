"""lmtrain: pretrain hybrids of attention, state-space, recurrent and mixture-of-experts layers from one recipe."""

__version__ = "0.1.0"
