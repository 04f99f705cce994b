"""It is really sharded: what sequence parallelism sends, and what a rank holds."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lmtrain.engine.fsdp import FSDPEngine
from lmtrain.engine.optimizer import OptimizerConfig
from lmtrain.model.branch import Place, branch_class
from lmtrain.model.config import ModelConfig
from lmtrain.model.ffn.mlp import MLPConfig
from lmtrain.model.ffn.moe_settings import MoEConfig
from lmtrain.model.mixers.attention_settings import AttentionConfig
from lmtrain.model.mixers.mamba2 import Mamba2Config
from lmtrain.ops.documents import Documents
from lmtrain.parallel.config import ClusterConfig, MeshConfig
from lmtrain.parallel.context import SequenceContext
from lmtrain.parallel.mesh import build_mesh
from tests.distributed.ranks import Ranks

pytestmark = pytest.mark.distributed

D_MODEL = 16
BRANCHES: dict[str, Any] = {
    "mamba2": Mamba2Config(d_state=4, head_dim=8),
    "attention": AttentionConfig(num_heads=4, num_kv_heads=2),
    "mlp": MLPConfig(d_ff=32),
    "moe": MoEConfig(num_experts=4, top_k=2, d_expert=8, num_shared=1),
}


class Sent(TorchDispatchMode):
    """Bytes of the largest tensor of every collective, by its name: what it gathers, scatters or exchanges."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
            size = max((t.numel() * t.element_size() for t in tensors), default=0)
            self.bytes[func._schema.name.partition("::")[2]] += size
        return func(*args, **(kwargs or {}))


def bytes_sent(name: str, length: int) -> dict[str, int]:
    """What one branch sends, forward and backward, for rows of this length."""
    torch.manual_seed(0)
    group = dist.group.WORLD
    assert group is not None
    settings = BRANCHES[name]
    branch = branch_class(settings.kind)(settings, D_MODEL, Place(0, 1))
    for parameter in branch.parameters():
        nn.init.normal_(parameter, std=0.1)
    docs = Documents.from_ids(torch.zeros(2, length, dtype=torch.int32)).cut(group.rank(), group.size())
    x = torch.randn(2, length // group.size(), D_MODEL, requires_grad=True)
    with Sent() as sent:
        y, _, _ = branch(x, SequenceContext(docs, group, "gather"), {}, {})
        y.square().sum().backward()
    assert x.grad is not None
    return dict(sent.bytes)


def test_the_state_exchange_does_not_grow_with_the_sequence(ranks: Ranks) -> None:
    short, long = (ranks.run(2, bytes_sent, "mamba2", length) for length in (512, 4096))
    assert short == long
    cfg = BRANCHES["mamba2"]
    inner, heads, keys = cfg.sizes(D_MODEL)
    halo = 2 * (cfg.conv_width - 1) * (inner + keys)
    state = 2 * heads * cfg.d_state * cfg.head_dim
    forward, backward = halo + state + 2 * heads, 2 * halo + 2 * state  # backward: of what came in and of the row's end
    assert short[0] == {"_allgather_base_": 2 * 4 * (forward + backward)}


def test_the_measurement_sees_what_grows(ranks: Ranks) -> None:
    short, long = (ranks.run(2, bytes_sent, "attention", length)[0] for length in (64, 512))
    assert long == {name: 8 * size for name, size in short.items()} and len(short) == 2
    assert ranks.run(2, bytes_sent, "mlp", 512)[0] == {}


def held(mesh: MeshConfig) -> dict[str, tuple[int, int]]:
    """Elements of every parameter and moment on this rank, and in all."""
    model = ModelConfig(D_MODEL, BRANCHES, "2 * (mamba2 mlp attention moe)")
    engine = FSDPEngine(
        model,
        64,
        mesh=build_mesh(mesh, "cpu"),
        cluster=ClusterConfig(),
        optimizer=OptimizerConfig(),
        device=torch.device("cpu"),
        dtype=torch.float32,
        seed=0,
    )
    tensors, _ = engine.state_dict()
    own = sum(t.numel() for name, t in tensors.items() if name.startswith("model.") and "router_bias" not in name)
    assert own == model.num_params(64)
    return {name: (t.to_local().numel(), t.numel()) for name, t in tensors.items() if isinstance(t, DTensor)}


@pytest.mark.parametrize("axes", [{"dp_shard": 2}, {"dp_shard": 1, "sp": 2}], ids=str)
def test_parameters_and_moments_are_halved(ranks: Ranks, axes: dict[str, int]) -> None:
    first, second = ranks.run(2, held, MeshConfig(**axes))
    for name, (local, whole) in first.items():
        assert local + second[name][0] == whole, name
    local, whole = (sum(values) for values in zip(*first.values(), strict=True))
    assert abs(local / whole - 0.5) < 0.01


def test_replicas_hold_everything(ranks: Ranks) -> None:
    for rank in ranks.run(2, held, MeshConfig(dp_replicate=2, dp_shard=1)):
        assert all(local == whole for local, whole in rank.values())


@pytest.mark.parametrize("axes", [{"dp_shard": 2, "ep": 2}, {"dp_shard": 1, "sp": 2, "ep": 2}], ids=str)
def test_a_rank_holds_its_part_of_the_experts(ranks: Ranks, axes: dict[str, int]) -> None:
    """ep=2 of two ranks: half of the experts each, whole; the rest is sharded as without ep."""
    for rank in ranks.run(2, held, MeshConfig(**axes)):
        experts = {name: sizes for name, sizes in rank.items() if ".experts." in name}
        assert len(experts) == 2 * 3 * 3  # branches x matrices x (weight and two moments)
        assert all(2 * local == whole for local, whole in experts.values())
        others = [sizes for name, sizes in rank.items() if ".experts." not in name]
        local, whole = (sum(values) for values in zip(*others, strict=True))
        assert abs(local / whole - 0.5) < 0.01
