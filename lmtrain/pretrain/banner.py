"""The start of a run in words."""

from __future__ import annotations

from lmtrain import __version__
from lmtrain.config.load import Settings
from lmtrain.data.heldout import Heldout
from lmtrain.data.loader import Loader
from lmtrain.data.policies.epochs import effective_tokens
from lmtrain.pretrain.plan import Plan, plain


def banner(settings: Settings, plan: Plan, loader: Loader, heldout: Heldout, origin: str, step: int) -> list[str]:
    """step: where the attempt begins."""
    recipe, cluster = settings.recipe, plan.cluster
    model = recipe.model
    axes = {axis: size for axis, size in plain(cluster.mesh).items() if size > 1}
    order = model.order()
    kinds = {name: order.count(name) for name in dict.fromkeys(order)}
    tokens = loader.schedule.tokens(plan.total_steps)
    heldout_tokens = sum(heldout.num_tokens.values())
    unverified = "" if plan.device.type == "cpu" else "  (GPU runs are not verified by the project's tests)"
    return [
        f"lmtrain {__version__}: {settings.launch.recipe} in {recipe.run.dir}, {origin}",
        f"model: {model.num_params(plan.vocab_size):,} parameters, d_model {model.d_model}, "
        + ", ".join(f"{count} x {name} ({model.branches[name].kind})" for name, count in kinds.items()),
        f"compute: {plan.world} {plan.device.type} process{'es' if plan.world > 1 else ''}"
        + (f", mesh {', '.join(f'{axis} {size}' for axis, size in axes.items())}" if axes else "")
        + f", {str(plan.dtype).removeprefix('torch.')}, kernels "
        + ", ".join(f"{op} {backend}" for op, backend in plan.kernels.items())
        + unverified,
        f"training: {plan.total_steps:,} steps of {_range(loader.schedule.sizes, loader.block_tokens)} tokens = "
        f"{tokens:,} tokens in rows of {_range(loader.schedule.lengths)}, "
        f"{model.flops_per_token(plan.vocab_size, recipe.data.seq_len) * tokens:.2e} FLOPs",
        f"data: policy {recipe.data.policy.kind}; held out: {heldout_tokens:,} tokens",
        *table(loader, plan.total_steps, step),
        *(f"WARNING: {warning}" for warning in plan.warnings),
    ]


def table(loader: Loader, total_steps: int, step: int) -> list[str]:
    """Every source: its tokens, its share of the blocks at ``step``, and what the run reads if no share changes."""
    shares = loader.sampler.shares(loader.schedule.first_block(step))
    rows = [("source", "tokens", "share", "epochs at it", "effective tokens")]
    for name, planned in loader.tokens_read(total_steps).items():
        unique = loader.tokens_available[name]
        worth = f"{effective_tokens(unique, planned):,.0f}"
        rows.append((name, f"{unique:,}", f"{shares[name]:.4g}", f"{planned / max(unique, 1):.2f}", worth))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(cells))
        for cells in (zip(row, widths, strict=True) for row in rows)
    ]


def _range(values: list[int], unit: int = 1) -> str:
    """The one value, or the first and the last of several."""
    ends = [f"{value * unit:,}" for value in (values[0], values[-1])]
    return ends[0] if len(values) == 1 else " to ".join(ends)
