"""FalconMamba: Mamba whose B, C and inner projection of the step size are normalised, without weights.

Names, packing and what the cache cannot: as Mamba's, in transformers 5.23.
"""

from __future__ import annotations

from typing import Any, ClassVar

from lmtrain.hub.layers import unless
from lmtrain.hub.mamba import Mamba
from lmtrain.hub.settings import distinct
from lmtrain.model.config import ModelConfig
from lmtrain.model.mixers.mamba import SELECTION_EPS


class FalconMamba(Mamba):
    """See the module."""

    name = "FalconMamba"
    model_type = "falcon_mamba"
    knows: ClassVar[dict[str, str]] = {"mamba": Mamba.knows["mamba"] + " selection_norm"}

    def reasons(self, cfg: ModelConfig) -> list[str]:
        return super().reasons(cfg) + unless("mamba", distinct(cfg, "mamba"), selection_norm=True)

    def config(self, cfg: ModelConfig, vocab_size: int, seq_len: int) -> dict[str, Any]:
        return super().config(cfg, vocab_size, seq_len) | {"mixer_rms_eps": SELECTION_EPS}
