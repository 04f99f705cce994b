"""What a table of names is made of: rules between lmtrain's tensors and those of a checkpoint on disk, both ways."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lmtrain.errors import DataError
from lmtrain.model.config import ModelConfig

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Transform:
    """``to_disk`` makes the tensors on disk of ours; ``to_ours`` undoes it bit for bit (one exception: ``LESS_ONE``),
    given the shapes of ours."""

    to_disk: Callable[[Sequence[Tensor]], list[Tensor]]
    to_ours: Callable[[Sequence[Tensor], Sequence[Shape]], list[Tensor]]


def _split(whole: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
    return list(whole.split([shape[0] for shape in shapes]))


def _same_twice(copies: Sequence[Tensor], shapes: Sequence[Shape]) -> list[Tensor]:
    if not torch.equal(copies[0], copies[1]):
        raise DataError("embedding and head on disk differ, but the recipe ties them")
    return [copies[0]]


SAME = Transform(lambda ours: list(ours), lambda disk, shapes: list(disk))
CONCAT = Transform(lambda ours: [torch.cat(list(ours))], lambda disk, shapes: _split(disk[0], shapes))
"""Several tensors, rows one after another."""
CONCAT_CONV = Transform(
    lambda ours: [torch.cat(list(ours)).unsqueeze(1)], lambda disk, shapes: _split(disk[0].squeeze(1), shapes)
)
"""Convolutions ``[C_i, W]`` to one ``[C, 1, W]``."""
COPY = Transform(lambda ours: [ours[0], ours[0]], _same_twice)
"""A tied tensor, for a class that cannot tie."""
EXPERTS = Transform(
    lambda ours: [expert.T for expert in ours[0]],
    lambda disk, shapes: [torch.stack([expert.T for expert in disk])],
)
"""``[E, in, out]`` to E linear weights ``[out, in]``."""

LESS_ONE = Transform(lambda ours: [ours[0] - 1], lambda disk, shapes: [disk[0].float() + 1])
"""A norm's weight that the class keeps as w - 1. In fp32 w comes back bit for bit from 1/2 on; a smaller one within
2^-24 (1 + |w|), which is also what the class computes with."""


def by_head(heads: int) -> Transform:
    """Several tensors whose rows belong to heads: of each head the rows of the first tensor, then of the next."""

    def to_disk(ours: Sequence[Tensor]) -> list[Tensor]:
        return [torch.cat([tensor.unflatten(0, (heads, -1)) for tensor in ours], dim=1).flatten(0, 1)]

    def to_ours(disk: Sequence[Tensor], shapes: Sequence[Shape]) -> list[Tensor]:
        rows = [shape[0] // heads for shape in shapes]
        return [part.flatten(0, 1) for part in disk[0].unflatten(0, (heads, -1)).split(rows, dim=1)]

    return Transform(to_disk, to_ours)


def zeros(*shapes: Shape, ours: int = 0) -> Transform:
    """Tensors of zeros on disk; ``ours`` tensors that do not matter to the function come back as zeros."""
    return Transform(
        lambda _: [torch.zeros(shape) for shape in shapes], lambda _, back: [torch.zeros(back[i]) for i in range(ours)]
    )


@dataclass(frozen=True)
class Rule:
    """Names of ours and names on disk, which ``transform`` leads into each other. ``keep_fp32``: whatever the dtype."""

    ours: tuple[str, ...]
    disk: tuple[str, ...]
    transform: Transform = SAME
    keep_fp32: bool = False

    def at(self, ours: str, disk: str) -> Rule:
        """This rule with a prefix before the names of either side."""
        names = tuple(ours + name for name in self.ours), tuple(disk + name for name in self.disk)
        return Rule(*names, self.transform, self.keep_fp32)


def same(ours: str, disk: str) -> Rule:
    """One tensor under two names."""
    return Rule((ours,), (disk,))


def less_one(ours: str, disk: str) -> Rule:
    """A norm kept as w - 1; in fp32, since w - 1 of a rounded w is in general no number of a smaller dtype."""
    return Rule((ours,), (disk,), LESS_ONE, keep_fp32=True)


KNOWN: dict[str, str] = {
    "model": "d_model branches pattern vocab_size vocab_multiple tie_embeddings norm_eps init_std",
    "attention": "kind num_heads num_kv_heads head_dim rope rope_theta qk_norm window",
    "mamba2": "kind d_state head_dim expand num_groups conv_width chunk norm_eps mimetic_length",
    "mlp": "kind d_ff activation",
    "moe": "kind num_experts top_k d_expert num_shared d_shared activation router normalise_weights scale balance "
    "aux_weight bias_rate",
}
"""Settings that every table takes into account. Any other refuses a class unless it has its default, or the class
``knows`` it."""


class HubClass(ABC):
    """A causal language model of transformers: what it can express, its config, its names on disk."""

    name: ClassVar[str]
    model_type: ClassVar[str]
    knows: ClassVar[dict[str, str]] = {}
    """By kind, all settings that the table takes into account, where they are more than ``KNOWN``."""
    side_by_side: ClassVar[bool] = False
    """Whether the table takes branches side by side into account."""
    limits: ClassVar[str] = ""
    """What the class gets wrong in transformers, and what is right, for the model card; empty: nothing known."""

    @property
    def architecture(self) -> str:
        return f"{self.name}ForCausalLM"

    @abstractmethod
    def reasons(self, cfg: ModelConfig) -> list[str]:
        """Why the class cannot be this model, one fact each; empty if it can."""

    @abstractmethod
    def rules(self, cfg: ModelConfig) -> list[Rule]:
        """The table, written out for this model."""

    @abstractmethod
    def config(self, cfg: ModelConfig, vocab_size: int, seq_len: int) -> dict[str, Any]:
        """config.json without what all classes share (architectures, dtype, token ids)."""

    def cached(self, cfg: ModelConfig) -> bool:
        """Whether the class can generate with its cache."""
        return True


def to_disk(rules: Iterable[Rule], ours: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors on disk, one rule's at a time."""
    for rule in rules:
        yield from zip(rule.disk, rule.transform.to_disk([ours[name] for name in rule.ours]), strict=True)


def to_ours(rules: Iterable[Rule], disk: Mapping[str, Tensor], shapes: Mapping[str, Shape]) -> dict[str, Tensor]:
    """lmtrain's tensors. Raises DataError unless every one is filled once and every tensor on disk is used."""
    found: dict[str, Tensor] = {}
    used: list[str] = []
    for rule in rules:
        missing = [name for name in rule.disk if name not in disk]
        if missing:
            raise DataError(f"{missing[0]}: not on disk")
        used += rule.disk
        back = rule.transform.to_ours([disk[name] for name in rule.disk], [shapes[name] for name in rule.ours])
        found |= dict(zip(rule.ours, back, strict=True))
    for what, names in (("not filled", shapes.keys() - found.keys()), ("not used", disk.keys() - set(used))):
        if names:
            raise DataError(f"{min(names)}: {what} by the table")
    return found
