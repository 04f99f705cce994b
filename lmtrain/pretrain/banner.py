"""The start of a run in words."""

from __future__ import annotations

from lmtrain import __version__
from lmtrain.config.load import Settings
from lmtrain.data.heldout import Heldout
from lmtrain.data.loader import Loader
from lmtrain.pretrain.plan import Plan, plain


def banner(settings: Settings, plan: Plan, loader: Loader, heldout: Heldout, origin: str) -> list[str]:
    recipe, cluster = settings.recipe, plan.cluster
    model, train = recipe.model, recipe.train
    axes = {axis: size for axis, size in plain(cluster.mesh).items() if size > 1}
    order = model.order()
    kinds = {name: order.count(name) for name in dict.fromkeys(order)}
    tokens = plan.total_steps * train.batch_tokens
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
        f"training: {plan.total_steps:,} steps of {train.batch_tokens:,} tokens = {tokens:,} tokens, "
        f"{model.flops_per_token(plan.vocab_size, recipe.data.seq_len) * tokens:.2e} FLOPs",
        "data: "
        + ", ".join(
            f"{name} {loader.tokens_available[name]:,} tokens (weight {recipe.data.sources[name].weight:g})"
            for name in loader.source_names
        )
        + f"; held out: {heldout_tokens:,} tokens",
    ]
