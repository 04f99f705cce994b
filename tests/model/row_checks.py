"""What every branch owes about documents and time, written once for a row on one rank and a row cut over several.

``VARIANTS`` is the matrix: a new branch is one entry (or a few, if it has options that change what it looks at).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

import lmtrain.model.mixers  # noqa: F401  (registers the branches)
from lmtrain.model.block import Multipliers
from lmtrain.model.branch import ParamInfo, State, branch_class
from lmtrain.model.config import ModelConfig
from lmtrain.model.context import Context, LocalContext
from lmtrain.model.decode import decode, prefill
from lmtrain.model.ffn.mlp import MLPConfig
from lmtrain.model.ffn.moe_settings import MoEConfig
from lmtrain.model.ffn.rwkv_channel import RWKVChannelConfig
from lmtrain.model.init import draw, normal
from lmtrain.model.language_model import LanguageModel
from lmtrain.model.mixers.attention_settings import AttentionConfig
from lmtrain.model.mixers.deltanet import DeltaNetConfig
from lmtrain.model.mixers.gated_deltanet import GatedDeltaNetConfig
from lmtrain.model.mixers.gla import GLAConfig
from lmtrain.model.mixers.hgrn2 import HGRN2Config
from lmtrain.model.mixers.kda import KDAConfig
from lmtrain.model.mixers.lightnet import LightNetConfig
from lmtrain.model.mixers.linear_attention import LinearAttentionConfig
from lmtrain.model.mixers.longhorn import LonghornConfig
from lmtrain.model.mixers.lrnn import LRNNConfig
from lmtrain.model.mixers.lstm import LSTMConfig
from lmtrain.model.mixers.mamba import MambaConfig
from lmtrain.model.mixers.mamba2 import Mamba2Config
from lmtrain.model.mixers.mla import MLAConfig
from lmtrain.model.mixers.mom_settings import MoMConfig
from lmtrain.model.mixers.retnet import RetNetConfig
from lmtrain.model.mixers.rg_lru import RGLRUConfig
from lmtrain.model.mixers.rwkv4 import RWKV4Config
from lmtrain.model.mixers.rwkv6 import RWKV6Config
from lmtrain.model.mixers.rwkv7 import RWKV7Config
from lmtrain.model.mixers.s4d import S4DConfig
from lmtrain.ops.documents import Documents
from lmtrain.parallel.context import SequenceContext

D_MODEL = 8
BRANCHES: dict[str, Any] = {
    "mamba2": Mamba2Config(d_state=4, head_dim=4, chunk=4),
    "mamba2_groups": Mamba2Config(d_state=3, head_dim=4, num_groups=2, conv_width=2, chunk=5),
    "attention": AttentionConfig(num_heads=2),
    "attention_grouped": AttentionConfig(num_heads=4, num_kv_heads=2, qk_norm=True, rope_theta=100.0),
    "attention_nope": AttentionConfig(num_heads=2, rope=False),
    "attention_window": AttentionConfig(num_heads=4, num_kv_heads=2, window=5, bias="out"),
    "attention_sinks": AttentionConfig(num_heads=2, sinks=True, bias="all", rope_interleaved=True, window=5),
    "attention_gated": AttentionConfig(
        4,
        num_kv_heads=2,
        head_dim=4,
        rope_fraction=0.5,
        qk_norm=True,
        qk_norm_over="all",
        output_gate=True,
        softcap=2.0,
    ),
    "attention_persistent": AttentionConfig(num_heads=2, persistent=3, bias="qkv", sinks=True),
    "attention_embedded": AttentionConfig(num_heads=2, head_embedding="mul"),
    "mla": MLAConfig(num_heads=2, kv_rank=6, nope_dim=4, rope_dim=2, value_dim=3),
    "mla_q_rank": MLAConfig(num_heads=2, kv_rank=5, q_rank=3, nope_dim=3, rope_dim=3, value_dim=4, rope=False),
    "attention_window_1": AttentionConfig(num_heads=2, window=1),
    "gla": GLAConfig(num_heads=2, gate_rank=3, gate_normalizer=2.0),
    "mamba": MambaConfig(d_state=3, dt_rank=2, conv_width=3),
    "mamba_normed": MambaConfig(d_state=3, dt_rank=2, conv_width=3, selection_norm=True),
    "longhorn": LonghornConfig(d_state=3, expand=1, conv_width=3),
    "rg_lru": RGLRUConfig(width=12, num_heads=3, conv_width=3),
    "s4d": S4DConfig(d_state=6),
    "lrnn": LRNNConfig(block_size=4),
    "lstm": LSTMConfig(d_hidden=5),
    "linear_attention": LinearAttentionConfig(num_heads=2, head_dim=3),
    "linear_attention_lightning": LinearAttentionConfig(num_heads=2, head_dim=3, decay="lightning"),
    "retnet": RetNetConfig(num_heads=2, expand_k=0.5, rope_theta=100.0),
    "hgrn2": HGRN2Config(head_dim=4),
    "lightnet": LightNetConfig(head_dim=4, gate_rank=3),
    "deltanet": DeltaNetConfig(num_heads=2, head_dim=3, conv_width=2, negative_eigenvalues=True),
    "gated_deltanet": GatedDeltaNetConfig(num_heads=2, num_value_heads=4, head_dim=3, value_dim=5),
    "kda": KDAConfig(num_heads=2, head_dim=3, conv_width=3),
    # without the balancing loss, as moe below
    "mom": MoMConfig(num_memories=3, num_heads=2, head_dim=3, value_dim=5, conv_width=3, aux_weight=0.0),
    "mom_alone": MoMConfig(
        num_memories=2, top_k=1, shared_memory=False, num_heads=2, head_dim=4, value_dim=2, conv_width=2, aux_weight=0.0
    ),
    "rwkv4": RWKV4Config(),
    "rwkv6": RWKV6Config(head_dim=4, mix_rank=3, decay_rank=2),
    "rwkv7": RWKV7Config(head_dim=4, decay_rank=2, rate_rank=3, value_rank=2, gate_rank=3),
    "rwkv_channel_4": RWKVChannelConfig(d_ff=12, version="4"),
    "rwkv_channel_7": RWKVChannelConfig(d_ff=12),
    "mlp_swiglu": MLPConfig(d_ff=12),
    "mlp_gelu": MLPConfig(d_ff=12, activation="gelu"),
    "mlp_geglu": MLPConfig(d_ff=12, activation="geglu", bias=True),
    "mlp_clamped": MLPConfig(d_ff=12, activation="swiglu_clamped"),
    "mlp_relu2": MLPConfig(d_ff=12, activation="relu2"),
    # without the balancing loss, which belongs to the whole row and is no path from column to column
    "moe": MoEConfig(num_experts=4, top_k=2, d_expert=8, balance="none"),
    "moe_biased": MoEConfig(4, 2, 8, bias=True, activation="swiglu_clamped", balance="none", normalise_weights=False),
    "moe_grouped": MoEConfig(
        6, 2, 8, num_shared=1, shared_gate=True, router="sigmoid", scale=2.5, num_groups=3, top_groups=2, balance="bias"
    ),
    "moe_shared": MoEConfig(
        4, 1, 8, num_shared=1, router="sigmoid", balance="bias", activation="gelu", normalise_weights=False
    ),
}
VARIANTS = {name: f"2 * {name}" for name in BRANCHES} | {
    "hybrid": "mamba2_groups moe attention_window mamba2",
    "side_by_side": "2 * (mamba2 + attention_grouped mlp_gelu + moe)",
    "post_norm": "attention mlp_swiglu",
    "sandwich": "mamba2 mlp_swiglu",
    "through": "mamba2 attention",
}
"""Name to pattern: every branch upon itself, and several together."""
SETTINGS: dict[str, dict[str, Any]] = {
    "side_by_side": {"multipliers": {"mamba2": Multipliers(0.5, 2.0), "moe": Multipliers(output=0.3)}},
    "post_norm": {"norm_place": "post", "embedding_scale": 3.0, "logit_scale": 0.5, "logit_softcap": 2.0},
    "sandwich": {"norm_place": "sandwich", "norm": "layer", "embedding_norm": True},
    "through": {"norm_place": "through", "multipliers": {"attention": Multipliers(skip=0.7, output=1.5)}},
}
"""Settings of the whole model, where a variant has any."""
BLIND = {"attention_window_1"} | {name for name in BRANCHES if name.startswith(("mlp", "moe"))}
"""Variants in which a column sees only itself."""
ROUTED = {"mom_alone"}
"""Variants in which a column does not see the one before unless both chose the same memory."""
SOFTMAX = [name for name in VARIANTS if name.startswith(("attention", "mla"))]

ROWS, LENGTH = 4, 24
EDGE = LENGTH // 2  # of the shards of two ranks; also 6 and 18 are cut, as segments, in the tests
# starts of documents: at, before and after the edge, one-token documents, none at all
STARTS = ((5, EDGE, 20), (EDGE - 1, 18), (EDGE + 1, 16, 17), (1, 2, 11, 12, 13, 23))
BEFORE = (0, 2, 1, 0)


def documents(starts: Sequence[Sequence[int]] = STARTS, before: Sequence[int] = BEFORE) -> Documents:
    """Rows of ``LENGTH`` columns whose documents start at these columns, and hold so many tokens before column 0."""
    ids = torch.zeros(len(starts), LENGTH, dtype=torch.int32)
    for row, columns in enumerate(starts):
        ids[row, list(columns)] = 1
    return Documents.from_ids(ids.cumsum(1), torch.tensor(before))


def between(docs: Documents, first: int, last: int) -> Documents:
    """The segment ``[first, last)`` of every row, what came before it held by the carried state."""
    return Documents.from_ids(docs.ids[:, first:last], docs.positions()[:, first])


def config(variant: str, **settings: Any) -> ModelConfig:
    """The variant's, with more settings if given."""
    return ModelConfig(D_MODEL, BRANCHES, VARIANTS[variant], **SETTINGS.get(variant, {}), **settings)


def build(variant: str, vocab_size: int, dtype: torch.dtype = torch.float64) -> LanguageModel:
    """The variant, every parameter far from its initial value: at 0, 1 or nearly 0 some errors do not show."""
    model = LanguageModel(config(variant), vocab_size).to(dtype)
    model.initialise(seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += draw(name, ParamInfo("scalar", normal(0.3)), tuple(parameter.shape), seed=1)
    return model


def distinct_tokens(docs: Documents) -> Tensor:
    """Every column its own token: the gradient of the embedding's rows is that of the columns."""
    return torch.arange(docs.ids.numel(), dtype=torch.int32).view(docs.shape)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@dataclass
class Row:
    """Where the rows are: on this process (group None), or cut over the ranks of a group; method: of softmax."""

    group: dist.ProcessGroup | None = None
    method: str = "gather"

    @property
    def size(self) -> int:
        return 1 if self.group is None else self.group.size()

    @property
    def rank(self) -> int:
        return 0 if self.group is None else self.group.rank()

    def cut(self, tensor: Tensor) -> Tensor:
        """This rank's columns."""
        return tensor.chunk(self.size, dim=1)[self.rank]

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks of the row, without gradient."""
        tensor = tensor.detach().clone()
        if self.group is not None:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def context(self, docs: Documents, carries: bool = False) -> Context:
        if self.group is None:
            return LocalContext(docs, carries=carries)
        return SequenceContext(docs.cut(self.rank, self.size), self.group, self.method, carries=carries)

    def run(
        self, model: LanguageModel, tokens: Tensor, docs: Documents, state: State | None = None, carries: bool = False
    ) -> tuple[Tensor, State]:
        """Logits of this rank's columns and the state after the row."""
        return model(self.cut(tokens), self.context(docs, carries), state or {})

    def column(self, values: Tensor, index: int) -> Tensor:
        """The sum of column ``index`` of the whole row where it lies on this rank, else 0 with a gradient."""
        width = values.shape[1]
        mine = index // width == self.rank
        return values[:, index % width].sum() if mine else (values[:, 0] * 0).sum()


def check_influence(
    row: Row,
    variant: str,
    docs: Documents,
    columns: Iterable[int] = range(LENGTH),
    dtype: torch.dtype = torch.float64,
) -> None:
    """Column t depends on column j only if ``0 <= t - j <= positions[t]``: elsewhere the gradient is exactly 0.

    That is: no other document, nothing later. And it does depend on itself and, where it mixes, on the column before.
    """
    model, tokens = build(variant, docs.ids.numel(), dtype), distinct_tokens(docs)
    logits, _ = row.run(model, tokens, docs)
    scored = logits * row.cut(random(*docs.shape, logits.shape[-1], seed=2))
    positions = docs.positions()
    for t in columns:
        (grad,) = torch.autograd.grad(row.column(scored, t), model.embed.weight, retain_graph=True)
        reached = (row.total(grad) != 0).any(dim=-1).view(docs.shape)
        distance = t - torch.arange(docs.shape[1])
        allowed = (distance >= 0) & (distance <= positions[:, t, None])
        assert not (reached & ~allowed).any(), f"column {t} is reached from {(reached & ~allowed).nonzero().tolist()}"
        assert reached[:, t].all()
        if t and variant not in BLIND | ROUTED:
            assert torch.equal(reached[:, t - 1], positions[:, t] > 0), f"column {t} does not see the one before"


def leaves_of(state: State) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(state) if leaf.is_floating_point() and leaf.numel()]


def check_initial_state(row: Row, variant: str) -> None:
    """A row whose first column starts a document has no gradient to its initial state; another row has."""
    docs, before = documents(), torch.tensor(BEFORE)
    model, tokens = build(variant, docs.ids.numel()), distinct_tokens(docs)
    _, state = row.run(model, tokens.flip(1), docs, carries=True)
    state = tree_map(lambda leaf: leaf.detach().requires_grad_(), state)
    logits, after = row.run(model, tokens, docs, state, carries=True)
    assert not any(leaf.isnan().any() for leaf in leaves_of(after))
    leaves = leaves_of(state)
    assert bool(leaves) == (variant not in BLIND)
    if not leaves:
        return
    scored = (logits * row.cut(random(*docs.shape, logits.shape[-1], seed=2))).sum()
    grads = torch.autograd.grad(scored, leaves)
    for grad in map(row.total, grads):
        assert (grad[before == 0] == 0).all()
    reached = torch.stack([(row.total(grad) != 0).flatten(1).any(1) for grad in grads]).any(0)
    assert torch.equal(reached, before > 0)


def check_segments(row: Row, variant: str, docs: Documents, cuts: Sequence[int]) -> None:
    """Segments with the state carried are one pass: logits, final state, and every gradient, through the state."""
    model, tokens = build(variant, docs.ids.numel()), distinct_tokens(docs)
    _, before = row.run(model, tokens.flip(1), docs, carries=True)  # a state to start from
    before = tree_map(lambda leaf: leaf.detach(), before)
    weights = random(*docs.shape, docs.ids.numel(), seed=2)

    def follow(borders: Sequence[int]) -> tuple[dict[str, Tensor], State]:
        state, total, seen = before, torch.zeros((), dtype=torch.float64), []
        for first, last in pairwise(borders):
            logits, state = row.run(model, tokens[:, first:last], between(docs, first, last), state, carries=True)
            total = total + (logits * row.cut(weights[:, first:last])).sum()
            whole = torch.zeros(docs.shape[0], last - first, logits.shape[-1], dtype=torch.float64)
            row.cut(whole).copy_(logits.detach())
            seen.append(row.total(whole))
        for index, leaf in enumerate(leaves_of(state)):  # the same on all ranks: each counts its part
            total = total + (leaf * random(*leaf.shape, seed=index)).sum() / row.size
        named = dict(model.named_parameters())
        grads = torch.autograd.grad(total, list(named.values()))
        told = {name: row.total(grad) for name, grad in zip(named, grads, strict=True)}
        return told | {"logits": torch.cat(seen, dim=1)}, state

    one, final = follow((0, docs.shape[1]))
    several, final_of_several = follow((0, *cuts, docs.shape[1]))
    for name, expected in one.items():
        torch.testing.assert_close(several[name], expected, rtol=1e-11, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
    for got, expected in zip(tree_leaves(final_of_several), tree_leaves(final), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)
        if got.is_floating_point():
            assert torch.equal(row.total(got / row.size), got), "the state must be the same on every rank of the row"


def check_decode(
    variant: str, lengths: Sequence[int], steps: int, at_once: int, dtype: torch.dtype, tolerance: float
) -> None:
    """Prompts of several lengths, then ``steps`` calls of ``at_once`` tokens, are each row read in parallel."""
    vocab_size, prompt, total = 16, max(lengths), steps * at_once
    model = build(variant, vocab_size, dtype)
    generator = torch.Generator().manual_seed(3)
    rows = torch.randint(0, vocab_size, (len(lengths), prompt + total), generator=generator)
    with torch.no_grad():
        logits, state = prefill(model, rows[:, :prompt], torch.tensor(lengths))
        parts = [logits]
        for first in range(prompt, prompt + total, at_once):
            logits, state = decode(model, rows[:, first : first + at_once], state)
            parts.append(logits)
        got = torch.cat(parts, dim=1)
        assert state["length"].tolist() == [length + total for length in lengths]
        for index, length in enumerate(lengths):
            tokens = rows[index : index + 1, prompt - length :]  # padding stands on the left
            expected, _ = model(tokens, LocalContext(Documents.from_ids(torch.zeros_like(tokens))), {})
            found = got[index : index + 1, prompt - length :]
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def whole_heads(variant: str, ranks: int) -> bool:
    """Whether every softmax branch of the variant has key heads for so many ranks."""
    used = config(variant).order()
    softmax = [BRANCHES[name] for name in used if branch_class(BRANCHES[name].kind).sp == "heads"]
    return bool(softmax) and all(settings.kv_heads % ranks == 0 for settings in softmax)


def needs_whole_rows(variant: str) -> bool:
    """Whether a branch is not affine in its state: a row cut over ranks is refused at start (parallel.supported)."""
    return any(branch_class(BRANCHES[name].kind).sp == "serial" for name in config(variant).order())
