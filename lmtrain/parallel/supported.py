"""Which combinations work. Everything else is refused here, before anything is allocated, with what works instead.

``COMBINATIONS`` is the only statement of it: ``check`` asks its rows, and ``python -m lmtrain.parallel`` prints them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from lmtrain.errors import UsageError
from lmtrain.model.branch import branch_class
from lmtrain.model.config import ModelConfig
from lmtrain.parallel.config import ClusterConfig, MeshConfig


@dataclass(frozen=True)
class Setup:
    """What a run wants: everything ``check`` looks at. ``mesh`` is resolved."""

    model: ModelConfig
    seq_len: int
    cluster: ClusterConfig
    mesh: MeshConfig
    run_blocks: int = 1

    def branches(self) -> Iterator[tuple[str, Any]]:
        """Name and settings of every branch the pattern uses, each once."""
        for name in dict.fromkeys(self.model.order()):
            yield name, self.model.branches[name]


@dataclass(frozen=True)
class Combination:
    """One row of the table.

    setting: as the user writes it. works: "yes", "no", or the condition. note: what to know, or what to use instead.
    refusal: why a setup breaks this row, with the nearest thing that works; None if it does not.
    """

    setting: str
    works: str
    note: str
    refusal: Callable[[Setup], str | None] | None = None


def _pipeline(setup: Setup) -> str | None:
    return _folded(setup.mesh, "pp", "pipeline parallelism")


def _tensor(setup: Setup) -> str | None:
    return _folded(setup.mesh, "tp", "tensor parallelism")


def _folded(mesh: MeshConfig, axis: str, what: str) -> str | None:
    size = getattr(mesh, axis)
    if size == 1:
        return None
    return f"mesh.{axis}={size}: {what} is not built yet; use mesh.{axis}=1 mesh.dp_shard={mesh.dp_shard * size}"


def _expert(setup: Setup) -> str | None:
    ep = setup.mesh.ep
    if ep == 1:
        return None
    experts = {name: settings.num_experts for name, settings in setup.branches() if hasattr(settings, "num_experts")}
    if not experts:
        return f"mesh.ep={ep}: no branch of model.pattern has experts; use mesh.ep=1"
    for name, count in experts.items():
        if count % ep:
            fits = max(size for size in range(1, ep) if count % size == 0)
            return f"mesh.ep={ep}: does not divide the {count} experts of model.branches.{name}; use mesh.ep={fits}"
    shards = setup.mesh.dp_shard * setup.mesh.sp // ep
    for name, settings in setup.branches():
        for key, width in (("d_expert", getattr(settings, "d_expert", shards)), ("d_model", setup.model.d_model)):
            if hasattr(settings, "num_experts") and width % shards:
                return (
                    f"mesh.ep={ep}: each expert of model.branches.{name} is cut over {shards} ranks, which do not "
                    f"divide its {key} {width}; use mesh.ep={setup.mesh.dp_shard * setup.mesh.sp}, or another {key}"
                )
    return None


def _equal_shards(setup: Setup) -> str | None:
    sp, length = setup.mesh.sp, setup.seq_len
    if length % sp == 0:
        return None
    nearest = max(1, round(length / sp)) * sp
    smaller = max(size for size in range(1, sp) if length % size == 0)
    return (
        f"mesh.sp={sp}: {sp} ranks cannot cut data.seq_len {length} into equal parts; "
        f"use data.seq_len={nearest}, or mesh.sp={smaller}"
    )


def _whole_rows(setup: Setup) -> str | None:
    sp = setup.mesh.sp
    if sp == 1:
        return None
    for name, settings in setup.branches():
        if branch_class(settings.kind).sp == "serial":
            return (
                f"mesh.sp={sp}: model.branches.{name} ({settings.kind}) runs token by token over whole rows; "
                f"use mesh.sp=1 mesh.dp_shard={setup.mesh.dp_shard * sp}"
            )
    return None


def _reach(settings: Any) -> int:
    return getattr(settings, "conv_width", 1) - 1


def _long_shards(setup: Setup) -> str | None:
    sp, length = setup.mesh.sp, setup.seq_len
    name, settings = max(setup.branches(), key=lambda branch: _reach(branch[1]))
    reach = _reach(settings)
    if sp == 1 or length // sp >= reach:
        return None
    smaller = max(size for size in range(1, sp) if size == 1 or (length % size == 0 and length // size >= reach))
    return (
        f"mesh.sp={sp}: model.branches.{name} looks back over {reach} columns, but a shard of data.seq_len {length} "
        f"has {length // sp}; use mesh.sp={smaller}, or data.seq_len={reach * sp}"
    )


def _whole_heads(setup: Setup) -> str | None:
    sp = setup.mesh.sp
    if setup.cluster.sp_attention != "heads" or sp == 1:
        return None
    for name, settings in setup.branches():
        if branch_class(settings.kind).sp == "heads" and settings.kv_heads % sp:
            return (
                f"sp_attention=heads: mesh.sp={sp} does not divide the {settings.kv_heads} key/value heads of "
                f"model.branches.{name}; use sp_attention=auto (gathers keys and values there)"
            )
    return None


def _bounded_state(setup: Setup) -> str | None:
    if setup.run_blocks == 1:
        return None
    for name, settings in setup.branches():
        if branch_class(settings.kind).sp == "heads" and getattr(settings, "window", None) is None:
            window = f"model.branches.{name}.window={setup.seq_len}, or " if hasattr(settings, "window") else ""
            return (
                f"data.run_blocks={setup.run_blocks}: model.branches.{name} ({settings.kind}) sees its whole document, "
                f"so its state would grow with the run; use {window}data.run_blocks=1"
            )
    return None


def _state_by_heads(setup: Setup) -> str | None:
    if setup.run_blocks == 1 or setup.cluster.sp_attention != "heads" or setup.mesh.sp == 1:
        return None
    for name, settings in setup.branches():
        if branch_class(settings.kind).sp == "heads":
            return (
                f"sp_attention=heads: model.branches.{name} cannot carry its state there (data.run_blocks="
                f"{setup.run_blocks}); use sp_attention=auto (gathers keys and values)"
            )
    return None


COMBINATIONS: tuple[Combination, ...] = (
    Combination("mesh.dp_shard", "yes", "any size; parameters, gradients and moments are sharded over dp_shard x sp"),
    Combination("mesh.dp_replicate", "yes", "any size, with every other axis that works (HSDP)"),
    Combination(
        "mesh.sp", "where sp divides data.seq_len", "contiguous shards; documents may lie anywhere", _equal_shards
    ),
    Combination(
        "mesh.sp with a serial branch (lstm)", "no", "its state is not affine: spans do not compose", _whole_rows
    ),
    Combination(
        "mesh.sp with a short convolution",
        "where a shard has at least conv_width - 1 columns",
        "data.seq_len / sp >= conv_width - 1",
        _long_shards,
    ),
    Combination("sp_attention=auto", "yes", "heads where sp divides a branch's key/value heads, else gather"),
    Combination(
        "sp_attention=heads",
        "where sp divides the key/value heads of every attention branch",
        "not with carried state: use gather or auto",
        _whole_heads,
    ),
    Combination("sp_attention=gather", "yes", "every rank holds the keys and values of the whole row"),
    Combination(
        "data.run_blocks > 1",
        "where every attention branch has a window",
        "rows go on with the state of the block before; recurrent branches carry it on every mesh",
        _bounded_state,
    ),
    Combination("data.run_blocks > 1 with sp_attention=heads", "no", "use gather or auto", _state_by_heads),
    Combination("activation_checkpointing, fsdp_units", "yes", "with every mesh; the same numbers"),
    Combination("microbatch", "yes", "with every mesh; gradients are summed, so accumulation changes no number"),
    Combination("mesh.pp > 1", "no", "not built yet; use dp_shard", _pipeline),
    Combination("mesh.tp > 1", "no", "not built yet; use dp_shard", _tensor),
    Combination(
        "mesh.ep", "where ep divides dp_shard x sp and every branch's experts", "re-cuts dp_shard x sp", _expert
    ),
    Combination("engine=fsdp", "yes", "on CPU (gloo) and GPU (NCCL)"),
    Combination("engine=deepspeed", "no", "not built yet; use engine=fsdp"),
)


def check(model: ModelConfig, *, seq_len: int, cluster: ClusterConfig, mesh: MeshConfig, run_blocks: int = 1) -> None:
    """Raises UsageError with the reason and the nearest thing that works. ``mesh`` is resolved (``mesh.resolve``)."""
    setup = Setup(model, seq_len, cluster, mesh, run_blocks)
    for combination in COMBINATIONS:
        if combination.refusal is not None and (why := combination.refusal(setup)):
            raise UsageError(why)


def table() -> str:
    """``COMBINATIONS`` in Markdown."""
    lines = ["| setting | works | note |", "|---|---|---|"]
    return "\n".join(lines + [f"| `{row.setting}` | {row.works} | {row.note} |" for row in COMBINATIONS])
