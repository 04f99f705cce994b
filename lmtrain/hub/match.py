"""Which transformers class is exactly this model. A near fit would load without a warning and compute another one."""

from __future__ import annotations

import dataclasses

from lmtrain.errors import UsageError
from lmtrain.hub.deepseek_v3 import DeepseekV3
from lmtrain.hub.falcon_h1 import FalconH1
from lmtrain.hub.falcon_mamba import FalconMamba
from lmtrain.hub.gpt_oss import GptOss
from lmtrain.hub.granite_moe_hybrid import GraniteMoeHybrid
from lmtrain.hub.kimi_linear import KimiLinear
from lmtrain.hub.llama import Llama
from lmtrain.hub.mamba import Mamba
from lmtrain.hub.mamba2 import Mamba2
from lmtrain.hub.minimax import MiniMax
from lmtrain.hub.mistral import Mistral
from lmtrain.hub.mixtral import Mixtral
from lmtrain.hub.nemotron_h import NemotronH
from lmtrain.hub.olmo2 import Olmo2
from lmtrain.hub.qwen3 import Qwen3
from lmtrain.hub.qwen3_moe import Qwen3Moe
from lmtrain.hub.qwen3_next import Qwen3Next
from lmtrain.hub.recurrent_gemma import RecurrentGemma
from lmtrain.hub.rwkv import Rwkv
from lmtrain.hub.settings import distinct
from lmtrain.hub.table import KNOWN, HubClass
from lmtrain.model.config import ModelConfig

CLASSES: tuple[HubClass, ...] = (
    Llama(),
    Mistral(),
    Qwen3(),
    Olmo2(),
    Mixtral(),
    Qwen3Moe(),
    Mamba(),
    FalconMamba(),
    Mamba2(),
    Rwkv(),
    RecurrentGemma(),
    NemotronH(),
    Qwen3Next(),
    DeepseekV3(),
    GptOss(),
    KimiLinear(),
    MiniMax(),
    FalconH1(),
    GraniteMoeHybrid(),
)
"""In order of preference."""
SHOWN = 3
"""Reasons told per class."""


def match(cfg: ModelConfig) -> HubClass | dict[str, list[str]]:
    """The class that expresses every setting of ``cfg``, or the reasons against each class by name."""
    reasons = {each.name: _unknown(cfg, each) + each.reasons(cfg) for each in CLASSES}
    return next((each for each in CLASSES if not reasons[each.name]), reasons)


def require(cfg: ModelConfig) -> HubClass:
    """``match``, or UsageError with the reasons."""
    found = match(cfg)
    if isinstance(found, HubClass):
        return found
    told = "; ".join(
        f"{name}: {', '.join(why[:SHOWN])}{f' and {len(why) - SHOWN} more' if len(why) > SHOWN else ''}"
        for name, why in sorted(found.items(), key=lambda item: len(item[1]))
    )
    raise UsageError(f"no transformers class computes exactly this model. {told}")


def _unknown(cfg: ModelConfig, cls: HubClass) -> list[str]:
    """A reason per setting that is not at its default and that the table of the class does not take into account."""
    abreast = [" + ".join(names) for names in dict.fromkeys(cfg.blocks()) if len(names) > 1]
    told = [] if cls.side_by_side else [f"{names} stand side by side" for names in abreast]
    known = KNOWN | cls.knows
    places = [("model", cfg)] + [(kind, one) for kind in known for one in distinct(cfg, kind)]
    return told + [
        f"{kind}.{field.name} is {getattr(settings, field.name)}, which its table does not know"
        for kind, settings in places
        for field in dataclasses.fields(settings)
        if field.name not in known[kind].split() and getattr(settings, field.name) != _default(field)
    ]


def _default(field: dataclasses.Field[object]) -> object:
    factory = field.default_factory
    return field.default if factory is dataclasses.MISSING else factory()
