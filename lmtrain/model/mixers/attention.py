"""Softmax attention: MHA, GQA or MQA, with what models add to it.

o_i = sum_j softmax_j(q_i . k_j / sqrt(K)) v_j over the j of i's document, at most ``window`` of them, i included
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lmtrain.model.attention_parts import HeadEmbedding, Persistent, Sinks
from lmtrain.model.branch import Branch, ParamInfo, Place, State, Streams, matrix, named, register
from lmtrain.model.context import Context
from lmtrain.model.init import constant, normal
from lmtrain.model.mixers.attention_settings import AttentionConfig
from lmtrain.model.norm import RMSNorm
from lmtrain.model.rope import rotate


@register("attention")
class Attention(Branch):
    """See the module. State: ``cache``, opaque, what the context keeps of keys and values."""

    Config: ClassVar[type[AttentionConfig]] = AttentionConfig
    sp = "heads"

    def __init__(self, cfg: AttentionConfig, d_model: int, place: Place) -> None:
        super().__init__()
        self.cfg, self.place, self.d_model = cfg, place, d_model
        width = self.head_dim = cfg.width(d_model)
        shared = cfg.head_embedding != "none"
        for name, heads in self._heads().items():
            self.add_module(name, nn.Linear(d_model, (1 if shared else heads) * width, bias=name in cfg.biased))
            if shared:
                self.add_module(f"{name}_heads", HeadEmbedding(heads, width, cfg.head_embedding))
        self.o = nn.Linear(cfg.num_heads * width, d_model, bias="o" in cfg.biased)
        if cfg.output_gate:
            self.gate = nn.Linear(d_model, cfg.num_heads * width, bias=False)
        if cfg.qk_norm:
            every = cfg.qk_norm_over == "all"
            self.q_norm = RMSNorm(width * (cfg.num_heads if every else 1), cfg.qk_norm_eps)
            self.k_norm = RMSNorm(width * (cfg.kv_heads if every else 1), cfg.qk_norm_eps)
        if cfg.sinks:
            self.sinks = Sinks(cfg.num_heads)
        if cfg.persistent:
            self.persistent = Persistent(cfg.kv_heads, cfg.persistent, width)

    def _heads(self) -> dict[str, int]:
        return {"q": self.cfg.num_heads, "k": self.cfg.kv_heads, "v": self.cfg.kv_heads}

    def forward(self, x: Tensor, ctx: Context, state: State, streams: Streams) -> tuple[Tensor, State, Streams]:
        cfg, (batch, length, _) = self.cfg, x.shape
        q, k, v = (self._project(name, x) for name in "qkv")
        if cfg.rope:
            q, k = (self._rotate(t, ctx.positions) for t in (q, k))
        options: dict[str, Any] = {"softcap": cfg.softcap}
        if cfg.sinks:
            options["sinks"] = self.sinks(x)
        if cfg.persistent:
            options["extra_kv"] = self.persistent()
        scale = 1 / math.sqrt(self.head_dim)
        o, cache = ctx.attention(q, k, v, window=cfg.window, scale=scale, cache=state.get("cache"), **options)
        o = o.reshape(batch, length, -1)
        if cfg.output_gate:
            o = o * torch.sigmoid(self.gate(x))
        return self.o(o), {} if cache is None else {"cache": cache}, {}

    def _project(self, name: str, x: Tensor) -> Tensor:
        """Heads ``[B, T, H, K]``, normalised."""
        y = self.get_submodule(name)(x)
        if self.cfg.head_embedding != "none":
            return self.get_submodule(f"{name}_heads")(y)
        normed = self.cfg.qk_norm and name != "v"
        if normed and self.cfg.qk_norm_over == "all":
            y = self.get_submodule(f"{name}_norm")(y)
        y = y.unflatten(-1, (-1, self.head_dim))
        return self.get_submodule(f"{name}_norm")(y) if normed and self.cfg.qk_norm_over == "head" else y

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        cfg = self.cfg
        how: dict[str, Any] = {"fraction": cfg.rope_fraction, "interleaved": cfg.rope_interleaved}
        return rotate(x, positions, cfg.rope_theta, **how, scaling=cfg.rope_scaling)

    def param_info(self) -> dict[str, ParamInfo]:
        cfg, d_model, inner = self.cfg, self.d_model, self.cfg.num_heads * self.head_dim
        std, shared = normal(0.02), cfg.head_embedding != "none"
        info: dict[str, ParamInfo] = {}
        for name, heads in self._heads().items():
            units = None if shared else heads
            info[f"{name}.weight"] = matrix(std, d_model, (1 if shared else heads) * self.head_dim, rows=units)
            if name in cfg.biased:
                info[f"{name}.bias"] = ParamInfo("bias", constant(0.0), tp_dim=0, tp_units=heads)
            if shared:
                info[f"{name}_heads.weight"] = ParamInfo("embedding", std, tp_dim=0, tp_units=heads)
        info["o.weight"] = matrix(normal(0.02 / math.sqrt(self.place.count)), inner, d_model, columns=cfg.num_heads)
        if "o" in cfg.biased:
            info["o.bias"] = ParamInfo("bias", constant(0.0))
        if cfg.output_gate:
            info["gate.weight"] = matrix(std, d_model, inner, rows=cfg.num_heads)
        if cfg.qk_norm:
            info |= named("q_norm", self.q_norm.param_info()) | named("k_norm", self.k_norm.param_info())
        if cfg.sinks:
            info["sinks.logit"] = ParamInfo("scalar", std, fp32=True, tp_dim=0, tp_units=cfg.num_heads)
        if cfg.persistent:
            info |= named("persistent", self.persistent.param_info())
        return info
