"""Training one small model on one probe, and its accuracy on documents that it has never seen."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from recall_models import build, state_floats

from lmtrain.data.batch import Batch, make_batch
from lmtrain.engine.optimizer import OptimizerConfig, build_optimizer, set_lr
from lmtrain.eval.probes.document import Document
from lmtrain.eval.probes.mqar import mqar, vocab_size
from lmtrain.eval.probes.parity import VOCAB_SIZE, parity
from lmtrain.model.context import LocalContext
from lmtrain.model.language_model import LanguageModel
from lmtrain.ops.cross_entropy import IGNORE, cross_entropy
from lmtrain.train.config import ScheduleConfig
from lmtrain.train.learning_rate import learning_rate

NUM_KEYS, NUM_VALUES = 64, 32
SOLVED, CHECK_EVERY, CHECKED, AT_ONCE = (
    0.99,
    50,
    64,
    64,
)  # steps between checks, their documents, rows of a test's batch
WARMUP_STEPS, SECONDS = 50, 60.0  # CPU seconds that end a try before its steps are done
TRIES: tuple[dict[str, Any], ...] = ({"sharp": False, "lr": 5e-3}, {"sharp": True, "lr": 3e-3})
"""Initial values and peak learning rate: the next is tried where the one before did not solve the task."""
TRAIN, CHECK, TEST = range(3)  # purposes of documents: no two share a seed


@dataclass(frozen=True)
class Task:
    """draw: (seed, index, size) to a document; size counts pairs, or bits. train: sizes of the documents of a batch,
    ``rows`` rows of each, packed to rows as long as one of the largest. tests: name to size and number of documents.
    last: only the last question of a test's document counts."""

    draw: Callable[[int, int, int], Document]
    vocab_size: int
    steps: int
    train: tuple[int, ...]
    rows: int
    tests: dict[str, tuple[int, int]]
    last: bool

    def documents(self, seed: int, purpose: int, size: int, first: int, count: int) -> list[Document]:
        return [self.draw(1000 * seed + 3 * size + purpose, first + index, size) for index in range(count)]

    def batch(self, seed: int, step: int) -> Batch:
        """The training batch of a step."""
        rows: list[Sequence[Document]] = []
        for size in self.train:
            each = self.train[-1] // size
            drawn = self.documents(seed, TRAIN, size, step * self.rows * each, self.rows * each)
            rows += [drawn[row * each : (row + 1) * each] for row in range(self.rows)]
        return pack(rows)

    def accuracy(self, model: LanguageModel, seed: int, purpose: int, size: int, count: int) -> tuple[int, int]:
        """Right answers and questions."""
        right = asked = 0
        for first in range(0, count, AT_ONCE):
            batch = pack([[one] for one in self.documents(seed, purpose, size, first, min(AT_ONCE, count - first))])
            labels = batch.labels[:, -1:] if self.last else batch.labels
            with torch.no_grad():
                logits, _ = model(batch.tokens, LocalContext(batch.docs), {})
            right += int((logits[:, -labels.shape[1] :].argmax(-1) == labels).sum())
            asked += int((labels != IGNORE).sum())
        return right, asked


TASKS = {
    "mqar": Task(
        lambda seed, index, pairs: mqar(
            seed, index, pairs=pairs, length=4 * pairs, num_keys=NUM_KEYS, num_values=NUM_VALUES
        ),
        vocab_size(NUM_KEYS, NUM_VALUES),
        steps=1000,
        train=(4, 8, 16),
        rows=12,
        tests={"mqar_easy": (4, 512), "mqar_hard": (16, 256)},
        last=False,
    ),
    "parity": Task(
        lambda seed, index, bits: parity(seed, index, bits=bits),
        VOCAB_SIZE,
        steps=600,
        train=(40,),
        rows=64,
        tests={"parity_256": (256, 512)},
        last=True,
    ),
}


def pack(rows: Sequence[Sequence[Document]]) -> Batch:
    """Documents side by side in rows of one length; the labels are their answers."""
    tokens = np.stack([np.concatenate([one.tokens for one in row]) for row in rows])
    labels = np.stack([np.concatenate([one.labels for one in row]) for row in rows])[:, :-1]
    ids = np.stack([np.concatenate([np.full(len(one.tokens), at) for at, one in enumerate(row)]) for row in rows])
    nowhere = torch.zeros(tokens.shape[0], tokens.shape[1] - 1)
    batch = make_batch(torch.from_numpy(tokens), torch.from_numpy(ids), source=nowhere, block=nowhere[:, 0])
    answers = torch.from_numpy(np.ascontiguousarray(labels))
    return replace(batch, labels=answers, num_targets=int((answers != IGNORE).sum()))


def fit(task: Task, name: str, seed: int, sharp: bool, lr: float) -> tuple[LanguageModel, dict[str, Any]]:
    """Train until the checks are solved, or the steps or CPU seconds are spent: the model, and what came of it."""
    begun, model = time.process_time(), build(name, task.vocab_size, seed, sharp)
    optimizer = build_optimizer(
        dict(model.named_parameters()), model.param_info(), OptimizerConfig(weight_decay=0.0, betas=(0.9, 0.95))
    )
    schedule, checks = ScheduleConfig(warmup_tokens=WARMUP_STEPS), dict.fromkeys(task.tests, 0.0)
    for step in range(1, task.steps + 1):
        batch = task.batch(seed, step)
        ctx = LocalContext(batch.docs)
        ctx.tokens = torch.tensor(float(batch.num_targets))
        logits, _ = model(batch.tokens, ctx, {})
        (cross_entropy(logits, batch.labels)[0].sum() / ctx.tokens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        set_lr(optimizer, learning_rate(schedule, lr, step, task.steps))
        optimizer.step()
        optimizer.zero_grad()
        spent = time.process_time() - begun
        if step % CHECK_EVERY == 0 or step == task.steps or spent > SECONDS:
            for test, (size, _) in task.tests.items():
                right, asked = task.accuracy(model, seed, CHECK, size, CHECKED)
                checks[test] = right / asked
            if min(checks.values()) >= SOLVED or spent > SECONDS:
                break
    ended = "solved" if min(checks.values()) >= SOLVED else "seconds" if spent > SECONDS else "steps"
    rounded = {test: round(value, 4) for test, value in checks.items()}
    told = {"steps": step, "ended": ended, "cpu_seconds": round(time.process_time() - begun, 1), "checks": rounded}
    return model, {"sharp": sharp, "lr": lr} | told


def measure(name: str, task_name: str, seed: int) -> dict[str, Any]:
    """The row of one model, task and seed: every try, and the tests of the one whose checks were best."""
    torch.set_num_threads(1)
    task, tried = TASKS[task_name], []
    for settings in TRIES:
        tried.append(fit(task, name, seed, **settings))
        if tried[-1][1]["ended"] == "solved":
            break
    model, _ = max(tried, key=lambda one: sum(one[1]["checks"].values()))
    results = {}
    for test, (size, count) in task.tests.items():
        right, asked = task.accuracy(model, seed, TEST, size, count)
        low, high = wilson(right, asked)
        results[test] = {"accuracy": right / asked, "low": low, "high": high, "questions": asked}
    row = {"model": name, "task": task_name, "seed": seed, "state_floats": state_floats(name)}
    row["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    return row | {"results": results, "tries": [told for _, told in tried]}


def wilson(right: int, asked: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % binomial interval of a share (Wilson 1927); answers within a document count as independent."""
    share, widen = right / asked, z * z / asked
    middle, half = share + widen / 2, z * math.sqrt(share * (1 - share) / asked + widen / (4 * asked))
    return (middle - half) / (1 + widen), (middle + half) / (1 + widen)
