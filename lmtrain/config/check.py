"""Rules between rooms, which no dataclass can see alone.

What needs the world (``lmtrain.parallel.supported``) or the data is checked where that is known.
"""

from __future__ import annotations

import torch

from lmtrain.config.files import COMMAND_LINE, Tree
from lmtrain.config.recipe import Launch, Recipe
from lmtrain.data.order.steps import nearest_multiple
from lmtrain.errors import UsageError
from lmtrain.model.branch import Place, branch_class
from lmtrain.train.learning_rate import check as check_schedule


def check(recipe: Recipe, launch: Launch, tree: Tree) -> None:
    """Raises UsageError for settings that are each right and together wrong."""
    _length(recipe, tree)
    _model(recipe, tree)
    if not recipe.data.sources:
        raise tree.error("data.sources", "no sources; name at least one, e.g. data.sources.code.path=data/demo/code")
    if launch.init_from and launch.branch_from:
        raise UsageError(f"{COMMAND_LINE}: init_from and branch_from: give one (weights only, or the whole state)")


def _length(recipe: Recipe, tree: Tree) -> None:
    train, data = recipe.train, recipe.data
    if (train.steps is None) == (train.tokens is None):
        if train.steps is None:
            raise tree.error("train", "how long? give one of steps (optimizer steps) and tokens")
        last = "steps" if tree.origin("train.tokens") == COMMAND_LINE else "tokens"
        raise tree.error("train", f"steps and tokens are both set; keep one (e.g. train.{last}=null)")
    for key, value in (("train.steps", train.steps), ("checkpoint.every", recipe.checkpoint.every)):
        if value is not None and value % data.run_blocks:
            works = nearest_multiple(value, data.run_blocks)
            message = f"{value} steps are no whole groups of {data.run_blocks} (data.run_blocks); nearest: {works}"
            raise tree.error(key, message)
    if train.batch_tokens % data.seq_len:
        rows = max(1, round(train.batch_tokens / data.seq_len))
        message = f"{train.batch_tokens} is no multiple of data.seq_len {data.seq_len} (nearest: {rows * data.seq_len})"
        raise tree.error("train.batch_tokens", message)
    try:
        check_schedule(train.schedule, train.schedule_of(data).tokens(train.num_steps(data)))
    except UsageError as error:
        key, _, message = str(error).partition(": ")
        raise tree.error(key, message) from error


def _model(recipe: Recipe, tree: Tree) -> None:
    model = recipe.model
    try:
        order = model.order()
    except UsageError as error:
        raise tree.error("model.pattern", str(error).removeprefix("model.pattern: ")) from error
    with torch.device("meta"):  # built without memory: a branch knows best whether it fits this width
        for name in sorted(set(order)):
            settings = model.branches[name]
            try:
                branch_class(settings.kind)(settings, model.d_model, Place(0, len(order)))
            except (UsageError, RuntimeError) as error:  # torch: a size that is negative or overflows
                message = str(error).removeprefix(f"{settings.kind}: ")
                raise tree.error(f"model.branches.{name}", message) from error
