"""Entry points: one file per verb, run as ``python launch/<verb>.py`` or ``lmtrain <verb>``."""
