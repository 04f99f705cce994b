"""A model of ours as lm-eval's ``LM``: scores continuations, texts, and generates. Registered there as ``lmtrain``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from tqdm import tqdm

from lmtrain.data.tokenizer import Tokenizer
from lmtrain.errors import UsageError
from lmtrain.model.context import LocalContext
from lmtrain.model.decode import decode, prefill
from lmtrain.model.language_model import LanguageModel
from lmtrain.ops.documents import Documents
from lmtrain.ops.op import compute_dtype
from lmtrain.train.hardware import resolve_device
from lmtrain.trained import load_model

Pair = tuple[Any, list[int], list[int]]
"""(what was asked, or None), context ids, continuation ids."""
T = TypeVar("T")


@register_model("lmtrain")
class LMTrainLM(TemplateLM):
    """checkpoint: a run folder or one of its checkpoints. Or pass ``model``, on its device, and ``tokenizer``.

    max_length: most tokens of a row, by default the recipe's seq_len; longer requests lose their left end and are
    counted in ``truncated``. A text without context is scored after the end-of-document token, as other adapters do;
    training never shows that token as an input, so the first token's score says little (``eval/heldout.py`` avoids it).
    """

    def __init__(
        self,
        checkpoint: str | None = None,
        *,
        model: LanguageModel | None = None,
        tokenizer: Tokenizer | None = None,
        max_length: int | None = None,
        batch_size: int | str | None = 8,
        device: Any = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if checkpoint is not None:
            trained = load_model(checkpoint, device=device or resolve_device("auto"))
            model, tokenizer = trained.model, trained.tokenizer
            max_length = max_length or trained.recipe.data.seq_len
        if model is None or tokenizer is None or max_length is None:
            raise UsageError("lmtrain adapter: give checkpoint=, or model=, tokenizer= and max_length=")
        self.model = model
        self.text = tokenizer
        self.max_length = int(max_length)
        self.batch_size = int(batch_size or 8) if batch_size != "auto" else 8
        self.truncated = 0
        self._device = next(model.parameters()).device

    @property
    def eot_token_id(self) -> int:
        return self.text.eod_id

    @property
    def tokenizer_name(self) -> str:
        return self.text.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Never with a special token."""
        ids: list[int] = self.text.encode_batch([string])[0].tolist()
        return ids

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: list[Pair], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Summed log-probability of each continuation, and whether it is what greedy decoding says."""
        scores = [(0.0, True)] * len(requests)
        rows: dict[tuple[int, ...], list[int]] = {}  # what the model reads; A, B, C and D share a row
        for index, (_, context, continuation) in enumerate(requests):
            if len(continuation) > self.max_length:
                raise UsageError(f"a continuation of {len(continuation)} tokens; set max_length= to at least that")
            if continuation:
                self.truncated += len(context) + len(continuation) > self.max_length + 1
                rows.setdefault(tuple((context + continuation)[-(self.max_length + 1) : -1]), []).append(index)
        batches = list(_batches(sorted(rows, key=len, reverse=True), self.batch_size))  # too long for memory: fails now
        for batch in tqdm(batches, desc="scoring", disable=disable_tqdm):
            logits = self._logits(batch)
            for row, line in zip(batch, logits, strict=True):
                for index in rows[row]:
                    asked, _, continuation = requests[index]
                    scores[index] = _score(line[len(row) - len(continuation) : len(row)], continuation)
                    if asked is not None:
                        self.cache_hook.add_partial("loglikelihood", asked, scores[index])
        return scores

    def _logits(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """``[B, T, V]`` of rows padded on the right, where the padding is a document of its own."""
        tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
        padding = torch.ones(tokens.shape, dtype=torch.int32)
        for index, row in enumerate(rows):
            tokens[index, : len(row)] = torch.tensor(row)
            padding[index, : len(row)] = 0
        docs = Documents.from_ids(padding).to(self._device)
        logits: Tensor = self.model(tokens.to(self._device), LocalContext(docs), {})[0]
        return logits

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, in windows of max_length that do not overlap: it depends on max_length."""
        windows: list[Pair] = []
        owners: list[int] = []
        for index, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(index)
        totals = [0.0] * len(requests)
        for owner, (nats, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[owner] += nats
        return totals

    @torch.no_grad()
    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations up to a stop string (left out), the end of the document, or max_gen_toks."""
        texts = [""] * len(requests)
        asked: list[tuple[list[int], int, list[str]]] = []
        for request in requests:
            settings: dict[str, Any] = dict(normalize_gen_kwargs(request.args[1]))
            if settings["do_sample"]:
                raise UsageError("the lmtrain adapter decodes greedily; the task asks for do_sample: true")
            context, limit = self.tok_encode(request.args[0]) or [self.prefix_token_id], settings["max_gen_toks"]
            held = max(self.max_length - limit, self.max_length // 2, 1)
            self.truncated += len(context) > held
            asked.append((context[-held:], limit, [stop for stop in settings["until"] if stop]))
        longest_first = sorted(range(len(asked)), key=lambda index: -len(asked[index][0]))
        for batch in tqdm(list(_batches(longest_first, self.batch_size)), desc="generating", disable=disable_tqdm):
            for index, text in zip(batch, self._generate([asked[index] for index in batch]), strict=True):
                texts[index] = text
                self.cache_hook.add_partial("generate_until", requests[index].args, text)
        return texts

    def _generate(self, asked: Sequence[tuple[list[int], int, list[str]]]) -> list[str]:
        """One batch: the prompts are read at once, padded on the left; then the state is carried on."""
        lengths = torch.tensor([len(context) for context, _, _ in asked])
        tokens = torch.zeros(len(asked), int(lengths.max()), dtype=torch.int64)
        for row, (context, _, _) in zip(tokens, asked, strict=True):
            row[len(row) - len(context) :] = torch.tensor(context)
        logits, state = prefill(self.model, tokens.to(self._device), lengths.to(self._device))
        made: list[list[int]] = [[] for _ in asked]
        texts: list[str | None] = [None] * len(asked)
        while True:
            chosen = logits[:, -1, : self.text.vocab_size].argmax(dim=-1)
            for row, token in enumerate(chosen.tolist()):
                if texts[row] is None:
                    made[row].append(token)
                    texts[row] = self._finished(made[row], *asked[row][1:])
            if all(text is not None for text in texts):
                return [text for text in texts if text is not None]
            logits, state = decode(self.model, chosen[:, None], state)

    def _finished(self, made: list[int], limit: int, stops: list[str]) -> str | None:
        """The text of ``made`` if nothing is to follow, else None."""
        ended = made[-1] == self.eot_token_id
        text = self.text.decode(made[:-1] if ended else made)
        ends = [at for stop in stops if (at := text.find(stop)) >= 0]
        if ends:
            return text[: min(ends)]
        return text if ended or len(made) >= limit else None


def _score(logits: Tensor, continuation: list[int]) -> tuple[float, bool]:
    """Of the logits ``[n, V]`` that predict the continuation."""
    told = torch.tensor(continuation, device=logits.device)
    logprobs = logits.to(compute_dtype(logits)).log_softmax(dim=-1)
    picked = logprobs.gather(-1, told[:, None])
    return float(picked.sum()), bool((logprobs.argmax(dim=-1) == told).all())


def _batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
