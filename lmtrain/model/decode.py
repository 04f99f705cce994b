"""Reading prompts and continuing them token by token, with the state carried between calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from lmtrain.model.branch import State
from lmtrain.model.context import Context, LocalContext
from lmtrain.ops.documents import Documents

MakeContext = Callable[..., Context]
"""``make(docs=, phase=, carries=)``: LocalContext, or the context of an engine whose experts stand on several ranks."""


def prefill(
    model: nn.Module, tokens: Tensor, lengths: Tensor, make: MakeContext = LocalContext
) -> tuple[Tensor, State]:
    """Prompts padded on the LEFT (right padding would leave its own state): tokens int ``[B, T]``, lengths ``[B]``.

    Returns logits ``[B, T, V]`` and the state to decode from. Padding is document 0, the prompt document 1.
    """
    column = torch.arange(tokens.shape[1])
    ids = (column[None, :] >= tokens.shape[1] - lengths.cpu()[:, None]).to(torch.int32)
    ctx = make(docs=Documents.from_ids(ids).to(tokens.device), phase="prefill", carries=True)
    logits, after = model(tokens, ctx, {})
    return logits, {**after, "length": lengths.to(torch.int32)}


def decode(model: nn.Module, tokens: Tensor, state: State, make: MakeContext = LocalContext) -> tuple[Tensor, State]:
    """Continue every row by ``tokens`` int ``[B, T]``: logits and the state after them.

    ``state["length"]`` int32 ``[B]`` is how many tokens of its document the row holds (``Documents.before``).
    """
    ids = torch.zeros(tokens.shape, dtype=torch.int32)
    docs = Documents.from_ids(ids, state["length"].cpu()).to(tokens.device)
    logits, after = model(tokens, make(docs=docs, phase="decode", carries=True), state)
    return logits, {**after, "length": state["length"] + tokens.shape[1]}


def sample(
    step: Callable[[Tensor, State], tuple[Tensor, State]],
    state: State,
    prompt: list[int],
    *,
    temperature: float,
    seed: int,
) -> Iterator[int]:
    """Tokens that continue ``prompt``, one after another without end; temperature 0 takes the most likely.

    step: ``decode`` of a model, one row. state: ``init_state(1)``. Draws on the host, so every rank draws the same.
    """
    generator = torch.Generator().manual_seed(seed)
    given = torch.tensor([prompt], dtype=torch.int64, device=state["length"].device)
    while True:
        logits, state = step(given, state)
        last = logits[0, -1].float().cpu()
        if temperature:
            token = int(torch.multinomial((last / temperature).softmax(dim=-1), 1, generator=generator))
        else:
            token = int(last.argmax())
        yield token
        given = given.new_tensor([[token]])
