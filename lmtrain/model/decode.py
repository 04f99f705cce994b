"""Reading prompts and continuing them token by token, with the state carried between calls."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lmtrain.model.branch import State
from lmtrain.model.context import LocalContext
from lmtrain.ops.documents import Documents


def prefill(model: nn.Module, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, State]:
    """Prompts padded on the LEFT (right padding would leave the padding's state): tokens int ``[B, T]``, lengths ``[B]``.

    Returns logits ``[B, T, V]`` and the state to decode from. Padding is document 0, the prompt document 1.
    """
    column = torch.arange(tokens.shape[1])
    ids = (column[None, :] >= tokens.shape[1] - lengths.cpu()[:, None]).to(torch.int32)
    ctx = LocalContext(Documents.from_ids(ids).to(tokens.device), "prefill", carries=True)
    logits, after = model(tokens, ctx, {})
    return logits, {**after, "length": lengths.to(torch.int32)}


def decode(model: nn.Module, tokens: Tensor, state: State) -> tuple[Tensor, State]:
    """Continue every row by ``tokens`` int ``[B, T]``: logits and the state after them.

    ``state["length"]`` int32 ``[B]`` is how many tokens of its document the row holds (``Documents.before``).
    """
    ids = torch.zeros(tokens.shape, dtype=torch.int32)
    docs = Documents.from_ids(ids, state["length"].cpu()).to(tokens.device)
    logits, after = model(tokens, LocalContext(docs, "decode", carries=True), state)
    return logits, {**after, "length": state["length"] + tokens.shape[1]}
