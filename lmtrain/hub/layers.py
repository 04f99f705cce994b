"""Models of layers of two blocks, a mixer and then a feed-forward: what most classes of transformers are."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar

from lmtrain.hub.llama import HEAD, OUTSIDE
from lmtrain.hub.settings import distinct
from lmtrain.hub.table import COPY, HubClass, Rule
from lmtrain.model.block import Multipliers
from lmtrain.model.config import ModelConfig


class Layered(HubClass):
    """A class whose layers are chosen one by one among kinds of mixers and of feed-forwards."""

    mixers: ClassVar[tuple[str, ...]]
    feed_forwards: ClassVar[tuple[str, ...]]
    outside: ClassVar[list[Rule]] = OUTSIDE
    """Of the embedding, which is the first, and the last norm."""
    ties: ClassVar[bool] = True
    """Whether the class heeds ``tie_word_embeddings``; else a tied tensor is written twice."""

    @abstractmethod
    def block(self, cfg: ModelConfig, settings: Any) -> list[Rule]:
        """The table of one block: ``norm.`` and ``branch.`` to names within a layer."""

    def layers(self, cfg: ModelConfig) -> list[tuple[Any, Any]]:
        """Settings of the mixer and the feed-forward of each layer."""
        settings = [cfg.branches[name] for name in cfg.order()]
        return list(zip(settings[::2], settings[1::2], strict=True))

    def order_reasons(self, cfg: ModelConfig) -> list[str]:
        """Why the order of blocks is not that of such layers."""
        kinds = [cfg.branches[name].kind for name in cfg.order()]
        others = sorted(set(kinds) - {*self.mixers, *self.feed_forwards})
        if others:
            return [f"no {kind}" for kind in others]
        places = (self.mixers, self.feed_forwards)
        layered = len(kinds) % 2 == 0 and all(kind in places[index % 2] for index, kind in enumerate(kinds))
        order = f"({' or '.join(self.mixers)}) then ({' or '.join(self.feed_forwards)})"
        return [] if layered else [f"the order is not {order} in every layer"]

    def rules(self, cfg: ModelConfig) -> list[Rule]:
        found = list(self.outside)
        if not cfg.tie_embeddings:
            found.append(HEAD)
        elif not self.ties:
            found[0] = Rule(found[0].ours, found[0].disk + HEAD.disk, COPY)
        for index, name in enumerate(cfg.order()):
            table = self.block(cfg, cfg.branches[name])
            found += [rule.at(f"blocks.{index}.", f"model.layers.{index // 2}.") for rule in table]
        return found


def unless(kind: str, settings: list[Any], **has: Any) -> list[str]:
    """A reason per value of these fields that is not the one that the class has."""
    return [
        f"{kind}.{field} is {_shown(value)}, it has {_shown(wanted)}"
        for field, wanted in has.items()
        for value in dict.fromkeys(getattr(one, field) for one in settings)
        if value != wanted
    ]


def other_eps(cfg: ModelConfig, kind: str, settings: list[Any], field: str = "norm_eps") -> list[str]:
    """A reason per epsilon of a branch's norm that is not that of the residual stream's norms: a class has one."""
    found = dict.fromkeys(getattr(one, field) for one in settings)
    return [
        f"{kind}.{field} is {eps:g} and model.norm_eps {cfg.norm_eps:g}, it has one"
        for eps in found
        if eps != cfg.norm_eps
    ]


def own_head_dim(cfg: ModelConfig) -> list[str]:
    """Reasons for a class whose heads share d_model among them."""
    widths = {(one.num_heads, one.head_dim or cfg.d_model // one.num_heads) for one in distinct(cfg, "attention")}
    return [
        f"attention.head_dim is {width}, it has d_model {cfg.d_model} / num_heads {heads}"
        for heads, width in sorted(widths)
        if heads * width != cfg.d_model
    ]


def multipliers(cfg: ModelConfig, *kinds: str) -> list[Multipliers]:
    """The different multipliers around the branches of these kinds."""
    names = [name for name in cfg.order() if cfg.branches[name].kind in kinds]
    return list(dict.fromkeys(cfg.multipliers.get(name, Multipliers()) for name in names))


def moved(rules: Iterable[Rule], ours: tuple[str, str], disk: tuple[str, str]) -> list[Rule]:
    """The rules with the first prefix replaced by the second, on either side."""

    def named(names: tuple[str, ...], prefix: tuple[str, str]) -> tuple[str, ...]:
        return tuple(prefix[1] + name.removeprefix(prefix[0]) for name in names)

    return [Rule(named(r.ours, ours), named(r.disk, disk), r.transform, r.keep_fp32) for r in rules]


def _shown(value: Any) -> str:
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
