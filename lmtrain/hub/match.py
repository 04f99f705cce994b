"""Which transformers class is exactly this model. A near fit would load without a warning and compute another one."""

from __future__ import annotations

import dataclasses

from lmtrain.errors import UsageError
from lmtrain.hub.llama import Llama
from lmtrain.hub.mamba2 import Mamba2
from lmtrain.hub.mistral import Mistral
from lmtrain.hub.nemotron_h import NemotronH
from lmtrain.hub.qwen3 import Qwen3
from lmtrain.hub.settings import distinct
from lmtrain.hub.table import HubClass
from lmtrain.model.config import ModelConfig

CLASSES: tuple[HubClass, ...] = (Llama(), Mistral(), Qwen3(), Mamba2(), NemotronH())
"""In order of preference."""
SHOWN = 3
"""Reasons told per class."""
KNOWN: dict[str, str] = {
    "model": "d_model branches pattern vocab_size vocab_multiple tie_embeddings norm_eps init_std",
    "attention": "kind num_heads num_kv_heads head_dim rope rope_theta qk_norm window",
    "mamba2": "kind d_state head_dim expand num_groups conv_width chunk norm_eps",
    "mlp": "kind d_ff activation",
    "moe": "kind num_experts top_k d_expert num_shared d_shared activation router normalise_weights scale balance "
    "aux_weight bias_rate",
}
"""Every setting the tables take into account; one that is not here refuses all classes unless it has its default."""


def match(cfg: ModelConfig) -> HubClass | dict[str, list[str]]:
    """The class that expresses every setting of ``cfg``, or the reasons against each class by name."""
    unknown = _unknown(cfg)
    reasons = {each.name: unknown + each.reasons(cfg) for each in CLASSES}
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


def _unknown(cfg: ModelConfig) -> list[str]:
    abreast = [" + ".join(names) for names in dict.fromkeys(cfg.blocks()) if len(names) > 1]
    told = [f"{names} stand side by side, which no table here knows" for names in abreast]
    places = [("model", cfg)] + [(kind, one) for kind in KNOWN for one in distinct(cfg, kind)]
    return told + [
        f"{kind}.{field.name} is {getattr(settings, field.name)}, which no table here knows"
        for kind, settings in places
        for field in dataclasses.fields(settings)
        if field.name not in KNOWN[kind].split() and getattr(settings, field.name) != _default(field)
    ]


def _default(field: dataclasses.Field[object]) -> object:
    factory = field.default_factory
    return field.default if factory is dataclasses.MISSING else factory()
