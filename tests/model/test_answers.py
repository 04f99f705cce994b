"""What settings say about their branch (parameters, FLOPs, state) holds for the branch that is built."""

from __future__ import annotations

from dataclasses import astuple
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from lmtrain.errors import UsageError
from lmtrain.model.answers import Answers
from lmtrain.model.branch import Branch, Place, branch_class, register
from lmtrain.model.config import ModelConfig
from lmtrain.model.context import LocalContext
from lmtrain.model.ffn.mlp import MLPConfig
from lmtrain.model.ffn.moe_settings import MoEConfig
from lmtrain.model.language_model import LanguageModel
from lmtrain.model.mixers.attention_settings import AttentionConfig
from lmtrain.model.mixers.mamba2 import Mamba2Config
from lmtrain.ops import AffineOp, Documents
from lmtrain.ops.op import Cost
from tests.model.row_checks import BRANCHES, D_MODEL, VARIANTS, build, config

BATCH, LENGTH, VOCAB = 3, 20, 16
every_branch = pytest.mark.parametrize("name", BRANCHES)


def branch(name: str, of_kind: int = 1) -> Branch:
    place = Place(of_kind, 2, of_kind, 2)
    built = branch_class(BRANCHES[name].kind)(BRANCHES[name], D_MODEL, place).double()
    for parameter in built.parameters():
        nn.init.normal_(parameter, std=0.1)
    return built


def context(carries: bool = False) -> LocalContext:
    return LocalContext(Documents.from_ids(torch.zeros(BATCH, LENGTH, dtype=torch.int32)), carries=carries)


def count(parameters: dict[str, Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters.values())


@every_branch
def test_num_params(name: str) -> None:
    """The first of a kind may be another (RWKV-7's has no values of the first to mix in)."""
    for of_kind in (0, 1):
        built = dict(branch(name, of_kind).named_parameters())
        assert BRANCHES[name].num_params(D_MODEL, of_kind=of_kind) == count(built)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_num_params_of_the_model_on_the_meta_device(variant: str, tied: bool) -> None:
    cfg = config(variant, tie_embeddings=tied)
    with torch.device("meta"):
        model = LanguageModel(cfg, VOCAB)
    named = dict(model.named_parameters())
    assert {parameter.device.type for parameter in named.values()} == {"meta"}
    assert cfg.num_params(VOCAB) == count(named)


@pytest.mark.parametrize("name", [name for name in BRANCHES if name.startswith("moe")])
def test_active_params_leave_out_experts_not_chosen(name: str) -> None:
    cfg, built = BRANCHES[name], dict(branch(name).named_parameters())
    experts = count({key: parameter for key, parameter in built.items() if key.startswith("experts.")})
    idle = experts // cfg.num_experts * (cfg.num_experts - cfg.top_k)
    assert cfg.num_params(D_MODEL, active=True) == count(built) - idle


class UncountedScans(LocalContext):
    """Keeps apart the matrix products that torch sees within ops."""

    flops = 0

    def scan(
        self, op: AffineOp, *inputs: Tensor | None, initial_state: Tensor | None, **static: Any
    ) -> tuple[Tensor, Tensor]:
        with FlopCounterMode(display=False) as counter:
            result = super().scan(op, *inputs, initial_state=initial_state, **static)
        self.flops += counter.get_total_flops()
        return result

    def attention(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Any]:
        with FlopCounterMode(display=False) as counter:
            result = super().attention(q, k, v, **options)
        self.flops += counter.get_total_flops()
        return result


@every_branch
def test_flops_per_token(name: str) -> None:
    """Exact for what multiplies matrices outside ops; the op's part is its own ``cost``, and convolutions are no matrix
    products to torch's counter."""
    cfg, built = BRANCHES[name], branch(name)
    ctx = UncountedScans(context().docs)
    with FlopCounterMode(display=False) as counter:
        streams = {key: torch.zeros(BATCH, LENGTH, D_MODEL, dtype=torch.float64) for key in built.reads}
        built(torch.randn(BATCH, LENGTH, D_MODEL, dtype=torch.float64), ctx, {}, streams)
    info = built.param_info()
    taps = sum(p.numel() for key, p in built.named_parameters() if info[key].role == "conv")
    taps = 0 if cfg.kind == "mom" else taps  # its convolutions are an op, whose cost is told
    for executed in (False, True):
        if isinstance(cfg, Answers):
            cost = cfg.scan_cost(D_MODEL, LENGTH)
            rest = 2 * taps + (cost.executed_flops if executed else cost.model_flops) // LENGTH
            if built.sp == "heads" and executed:
                assert ctx.flops == BATCH * cost.executed_flops, "torch's counter sees every pair of columns"
        else:
            rest = 0
        products = cfg.flops_per_token(D_MODEL, LENGTH, executed) - rest
        assert products * BATCH * LENGTH == counter.get_total_flops() - ctx.flops


class CountedScans(LocalContext):
    """Adds up what each op says that it costs on the shapes it is called with."""

    cost = Cost(0, 0, 0)

    def scan(
        self, op: AffineOp, *inputs: Tensor | None, initial_state: Tensor | None, **static: Any
    ) -> tuple[Tensor, Tensor]:
        if op.name != "log_sum_exp":  # LightNet leaves out the few operations of z
            shapes = [() if t is None else tuple(t.shape) for t in inputs]
            while shapes[-1] == ():
                shapes.pop()
            told = op.cost(*shapes, **static)
            self.cost = Cost(*(mine + more for mine, more in zip(astuple(self.cost), astuple(told), strict=True)))
        return super().scan(op, *inputs, initial_state=initial_state, **static)


@pytest.mark.parametrize("name", [name for name in BRANCHES if branch_class(BRANCHES[name].kind).sp == "scan"])
def test_scan_cost_is_that_of_the_ops_called(name: str) -> None:
    cfg, built, ctx = BRANCHES[name], branch(name), CountedScans(context().docs)
    streams = {key: torch.zeros(BATCH, LENGTH, D_MODEL, dtype=torch.float64) for key in built.reads}
    built(torch.randn(BATCH, LENGTH, D_MODEL, dtype=torch.float64), ctx, {}, streams)
    said = cfg.scan_cost(D_MODEL, LENGTH)
    assert BATCH * said.executed_flops == ctx.cost.executed_flops
    if cfg.kind != "mom":  # of whose memories the model's FLOPs count those used
        assert BATCH * said.model_flops == ctx.cost.model_flops


@pytest.mark.parametrize(("window", "expected"), [(None, 10.5), (1, 1), (5, 4.5), (99, 10.5)])
def test_model_flops_of_attention_count_visible_keys(window: int | None, expected: float) -> None:
    """A query of 20 causal columns sees 10.5 of them on average; with a window of 5: (1 + 2 + 3 + 4 + 16 * 5) / 20."""
    cfg = AttentionConfig(num_heads=2, window=window)
    projections = 2 * cfg.num_params(D_MODEL)
    assert cfg.flops_per_token(D_MODEL, LENGTH) - projections == int(4 * D_MODEL * expected)


def test_training_flops_of_a_model_are_three_forward_passes() -> None:
    cfg = ModelConfig(D_MODEL, BRANCHES, "2 * (attention_grouped mlp_swiglu moe)")
    model = LanguageModel(cfg, VOCAB).double()
    model.initialise(0)
    tokens = torch.randint(0, VOCAB, (BATCH, LENGTH))
    with FlopCounterMode(display=False) as counter:
        model(tokens, context(), {})[0].sum().backward()
    assert cfg.flops_per_token(VOCAB, LENGTH, executed=True) * BATCH * LENGTH == counter.get_total_flops()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("length", [3, LENGTH])
def test_state_bytes(variant: str, length: int) -> None:
    model = build(variant, VOCAB).float()
    docs = Documents.from_ids(torch.zeros(BATCH, length, dtype=torch.int32))
    _, state = model(torch.zeros(BATCH, length, dtype=torch.int32), LocalContext(docs, carries=True), {})
    held = sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(state) if leaf.is_floating_point())
    assert model.cfg.state_bytes(BATCH, length) == held


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_is_carried_unless_asked(variant: str) -> None:
    _, state = build(variant, VOCAB)(torch.zeros(BATCH, LENGTH, dtype=torch.int32), context(), {})
    assert state == {}


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: AttentionConfig(num_heads=0), "attention: num_heads: expected at least 1, got 0"),
        (lambda: AttentionConfig(4, num_kv_heads=3), "attention: num_kv_heads 3 does not divide num_heads 4"),
        (
            lambda: AttentionConfig(3).width(8),
            "attention: d_model 8 does not divide by num_heads 3; set head_dim, or num_heads 2",
        ),
        (lambda: AttentionConfig(8).width(8), "attention: rope needs an even head_dim, got 1"),
        (lambda: Mamba2Config(chunk=0), "mamba2: chunk: expected at least 1, got 0"),
        (lambda: Mamba2Config(conv_width=1), "mamba2: conv_width: expected 2 to 16, got 1"),
        (lambda: Mamba2Config(head_dim=5).check(8), "mamba2: head_dim 5 does not divide the inner width 16"),
        (lambda: Mamba2Config(head_dim=4, num_groups=3).check(8), "mamba2: num_groups 3 does not divide the 4 heads"),
        (lambda: MLPConfig(0), "mlp: d_ff: expected at least 1, got 0"),
        (lambda: MoEConfig(2, 3, 8), "moe: top_k: expected at most num_experts 2, got 3"),
        (lambda: branch_class("manba2"), "model.branches: kind manba2 is unknown; did you mean mamba2?"),
    ],
)
def test_settings_that_cannot_work(make, says: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UsageError) as caught:
        make()
    assert str(caught.value) == says


def test_a_kind_is_registered_once() -> None:
    with pytest.raises(ValueError, match=r"^branch kind mlp is registered twice$"):
        register("mlp")(Branch)
