"""The language model: embedding, residual branches, norm, head."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmtrain.model.block import Block, Multipliers, SideBySide
from lmtrain.model.branch import Branch, ParamInfo, Place, State, Streams, branch_class, named
from lmtrain.model.config import ModelConfig
from lmtrain.model.context import Context
from lmtrain.model.init import draw, normal
from lmtrain.model.norm import NORMS, Norm


class Read(Protocol):
    """What to make of the last hidden ``[B, T, D]`` and the head's weight ``[V, D]``."""

    def __call__(self, hidden: Tensor, weight: Tensor, *, softcap: float | None) -> Any: ...


def logits(hidden: Tensor, weight: Tensor, *, softcap: float | None) -> Tensor:
    """``[B, T, V]``."""
    z = F.linear(hidden, weight)
    return z if softcap is None else softcap * torch.tanh(z / softcap)


class LanguageModel(nn.Module):
    """Called as ``model(tokens, ctx, state)``; parameters are left uninitialised (``initialise``, or the engine).

    Raises ValueError if a branch's ``param_info`` does not name exactly its parameters.
    """

    def __init__(self, cfg: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.cfg, self.vocab_size = cfg, vocab_size
        self.embed = nn.Embedding(vocab_size, cfg.d_model)
        if cfg.embedding_norm:
            self.embed_norm = self._norm()
        self.blocks = nn.ModuleList(self._build())
        self.final_norm = self._norm()
        self.head = None if cfg.tie_embeddings else nn.Linear(cfg.d_model, vocab_size, bias=False)
        differing = self.param_info().keys() ^ dict(self.named_parameters()).keys()
        if differing:
            raise ValueError(f"param_info does not name exactly the parameters: {', '.join(sorted(differing))}")

    def _norm(self) -> Norm:
        return NORMS[self.cfg.norm](self.cfg.d_model, self.cfg.norm_eps)

    def _build(self) -> Iterator[Block]:
        cfg, seen, index = self.cfg, Counter[str](), 0
        count, one = len(cfg.order()), Multipliers()
        kinds = Counter(cfg.branches[name].kind for name in cfg.order())
        for names in cfg.blocks():
            branches = []
            for name in names:
                settings = cfg.branches[name]
                place = Place(index, count, seen[settings.kind], kinds[settings.kind])
                branches.append(branch_class(settings.kind)(settings, cfg.d_model, place))
                seen[settings.kind] += 1
                index += 1
            scales = [cfg.multipliers.get(name, one) for name in names]
            branch = branches[0] if len(names) == 1 else SideBySide(branches, scales)
            norms = [self._norm() for _ in range(2 if cfg.norm_place == "sandwich" else 1)]
            yield Block(branch, norms, cfg.norm_place, scales[0] if len(names) == 1 else one)

    def forward(self, tokens: Tensor, ctx: Context, state: State, read: Read = logits) -> tuple[Any, State]:
        """int ``[B, T]`` to logits ``[B, T, vocab_size]`` and the state after the row (``{}`` unless carried).

        read: what to return of the last hidden and the head's weight, by default the logits. A loss that never holds
            them all is taken here, where a sharded weight is whole.
        """
        x = self.embed(tokens)
        if self.cfg.embedding_scale != 1.0:
            x = x * self.cfg.embedding_scale
        if self.cfg.embedding_norm:
            x = self.embed_norm(x)
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
        if self.cfg.logit_scale != 1.0:
            x = x * self.cfg.logit_scale
        weight = self.embed.weight if self.head is None else self.head.weight
        return read(x, weight, softcap=self.cfg.logit_softcap), {"blocks": after} if ctx.carries else {}

    @property
    def stack(self) -> list[Block]:
        """The blocks, first to last."""
        return cast("list[Block]", list(self.blocks))

    @property
    def branches(self) -> list[Branch]:
        """The branches, first to last: their order is that of ``place.index``."""
        found: list[Branch] = []
        for block in self.stack:
            found += block.branch.members if isinstance(block.branch, SideBySide) else [block.branch]
        return found

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
        if self.cfg.embedding_norm:
            info |= named("embed_norm", self.embed_norm.param_info())
        for index, block in enumerate(self.stack):
            info |= named(f"blocks.{index}", block.param_info())
        info |= named("final_norm", self.final_norm.param_info())
        if self.head is not None:
            info["head.weight"] = ParamInfo("head", normal(std), True, fan_in=d_model, fan_out=self.vocab_size)
        return info

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Draw every parameter of an unsharded model (``init.draw``)."""
        info = self.param_info()
        for name, parameter in self.named_parameters():
            parameter.copy_(draw(name, info[name], tuple(parameter.shape), seed))
