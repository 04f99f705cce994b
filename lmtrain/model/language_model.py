"""The language model: embedding, residual branches, norm, head."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lmtrain.model.branch import Branch, ParamInfo, Place, State, Streams, branch_class
from lmtrain.model.config import ModelConfig
from lmtrain.model.context import Context
from lmtrain.model.init import draw, normal
from lmtrain.model.norm import RMSNorm

Read = Callable[[Tensor, Tensor], Any]


class Block(nn.Module):
    """``x + branch(norm(x))``, the branch recomputed in the backward pass if ``recompute``."""

    def __init__(self, branch: Branch, d_model: int, eps: float) -> None:
        super().__init__()
        self.norm = RMSNorm(d_model, eps)
        self.branch = branch
        self.recompute = False

    def forward(self, x: Tensor, ctx: Context, state: State, streams: Streams) -> tuple[Tensor, State, Streams]:
        if self.recompute and torch.is_grad_enabled():
            run: Any = checkpoint(self._run, x, ctx, state, streams, use_reentrant=False, preserve_rng_state=False)
            y, state, streams = run
        else:
            y, state, streams = self._run(x, ctx, state, streams)
        return x + y, state, streams

    def _run(self, x: Tensor, ctx: Context, state: State, streams: Streams) -> tuple[Tensor, State, Streams]:
        return self.branch(self.norm(x), ctx, state, streams)


class LanguageModel(nn.Module):
    """Called as ``model(tokens, ctx, state)``; parameters are left uninitialised (``initialise``, or the engine).

    Raises ValueError if a branch's ``param_info`` does not name exactly its parameters.
    """

    def __init__(self, cfg: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.cfg, self.vocab_size = cfg, vocab_size
        self.embed = nn.Embedding(vocab_size, cfg.d_model)
        self.blocks = nn.ModuleList()
        order, seen = cfg.order(), Counter[str]()
        for index, name in enumerate(order):
            settings = cfg.branches[name]
            place = Place(index, len(order), seen[settings.kind])
            seen[settings.kind] += 1
            self.blocks.append(
                Block(branch_class(settings.kind)(settings, cfg.d_model, place), cfg.d_model, cfg.norm_eps)
            )
        self.final_norm = RMSNorm(cfg.d_model, cfg.norm_eps)
        self.head = None if cfg.tie_embeddings else nn.Linear(cfg.d_model, vocab_size, bias=False)
        differing = self.param_info().keys() ^ dict(self.named_parameters()).keys()
        if differing:
            raise ValueError(f"param_info does not name exactly the parameters: {', '.join(sorted(differing))}")

    def forward(self, tokens: Tensor, ctx: Context, state: State, read: Read = F.linear) -> tuple[Any, State]:
        """int ``[B, T]`` to logits ``[B, T, vocab_size]`` and the state after the row (``{}`` unless carried).

        read: what to make of the last hidden ``[B, T, d_model]`` and the head's weight ``[vocab_size, d_model]``; the
        logits by default. A loss that never holds them all is taken here, where a sharded weight is whole.
        """
        x = self.embed(tokens)
        before = state.get("blocks", {})
        after: State = {}
        streams: Streams = {}
        for index, block in enumerate(self.stack):
            reads = block.branch.reads
            x, new, written = block(
                x, ctx, before.get(str(index), {}), {name: streams[name] for name in streams if name in reads}
            )
            streams.update(written)
            if new:
                after[str(index)] = new
        x = self.final_norm(x)
        weight = self.embed.weight if self.head is None else self.head.weight
        return read(x, weight), {"blocks": after} if ctx.carries else {}

    @property
    def stack(self) -> list[Block]:
        """The blocks, first to last."""
        return cast("list[Block]", list(self.blocks))

    def init_state(self, batch: int, device: torch.device | str) -> State:
        """The state of ``batch`` sequences before their first token; ``length`` int32 ``[B]`` counts tokens held."""
        blocks = {str(i): block.branch.init_state(batch, device) for i, block in enumerate(self.stack)}
        return {
            "blocks": {name: state for name, state in blocks.items() if state},
            "length": torch.zeros(batch, dtype=torch.int32, device=device),
        }

    def param_info(self) -> dict[str, ParamInfo]:
        std, d_model = self.cfg.init_std, self.cfg.d_model
        info = {"embed.weight": ParamInfo("embedding", normal(std), fan_in=self.vocab_size, fan_out=d_model)}
        for index, block in enumerate(self.stack):
            info[f"blocks.{index}.norm.weight"] = block.norm.param_info()["weight"]
            info |= {f"blocks.{index}.branch.{name}": one for name, one in block.branch.param_info().items()}
        info["final_norm.weight"] = self.final_norm.param_info()["weight"]
        if self.head is not None:
            info["head.weight"] = ParamInfo("head", normal(std), True, fan_in=d_model, fan_out=self.vocab_size)
        return info

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Draw every parameter of an unsharded model (``init.draw``)."""
        info = self.param_info()
        for name, parameter in self.named_parameters():
            parameter.copy_(draw(name, info[name], tuple(parameter.shape), seed))
