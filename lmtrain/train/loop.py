"""The training loop: read, step, record, evaluate, save, stop."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch

from lmtrain.checkpoint.checkpointer import Checkpointer
from lmtrain.data.heldout import Heldout
from lmtrain.data.loader import Loader
from lmtrain.data.policies.epochs import effective_tokens
from lmtrain.data.reader import StepData, token_hash
from lmtrain.data.tokenizer import Tokenizer
from lmtrain.engine.protocol import Engine, StepInfo
from lmtrain.errors import EXIT_DONE, EXIT_STOPPED, LmtrainError
from lmtrain.model.decode import sample
from lmtrain.parallel.mesh import Mesh
from lmtrain.train.config import EvalConfig, TrainConfig
from lmtrain.train.guard import SkipGuard
from lmtrain.train.hardware import memory_bytes
from lmtrain.train.heldout_score import bits_per_byte
from lmtrain.train.learning_rate import learning_rate
from lmtrain.train.mixture import Mixture
from lmtrain.train.recorder import Recorder
from lmtrain.train.signals import StopRequest

SAMPLE_TEMPERATURE = 0.7


@dataclass
class Progress:
    """Where a run stands; with the tensors of the engine and the schedule log, all that a resumed run needs."""

    step: int = 0
    tokens: int = 0
    guard: dict[str, Any] = field(default_factory=dict)
    mixture: dict[str, Any] = field(default_factory=dict)
    evaluated: int = -1


@dataclass
class Trainer:
    """Everything a run is made of, assembled by ``lmtrain.pretrain``. ``train`` returns the exit code.

    recorder: rank 0's records and console; None on the other ranks. flops_per_token: by length of a row. peak: FLOP/s
    of all devices together, or None. unsaved: why there is no checkpoint of the newest save, if there is none.
    """

    train_cfg: TrainConfig
    eval_cfg: EvalConfig
    save_every: int
    total_steps: int
    flops_per_token: Mapping[int, int]
    peak: float | None
    engine: Engine
    loader: Loader
    heldout: Heldout | None
    tokenizer: Tokenizer
    rows: int
    checkpointer: Checkpointer
    mixture: Mixture
    mesh: Mesh
    device: torch.device
    stop: StopRequest
    recorder: Recorder | None
    progress: Progress
    unsaved: LmtrainError | None = None

    def train(self) -> int:
        """Run to the last step, or to an agreed stop. Raises UnhealthyError, StorageError."""
        guard = SkipGuard(self.train_cfg.max_skipped)
        if self.progress.guard:
            guard.load_state_dict(self.progress.guard)
        if self.progress.step == 0 and self.eval_cfg.every:
            self._evaluate()
        stopped = postponed = False
        waiting = time.perf_counter()
        for data in self.loader.steps(self.progress.step, self.total_steps):
            wait = time.perf_counter() - waiting
            schedule = self.loader.schedule
            lr = learning_rate(
                self.train_cfg.schedule,
                self.train_cfg.lr,
                schedule.tokens(data.step + 1),
                schedule.tokens(self.total_steps),
            )
            info = self._step(data, lr)
            if info.flags[2]:
                self.mixture.share()
                self.engine.num_sources = len(self.loader.source_names)
            self.progress.step = data.step + 1
            self.progress.tokens += info.num_targets
            # in this order: a step that is on record was asked about, and its event is in the log
            self.mixture.observe(self.progress.step, info)
            self._record(info, lr, wait)
            guard.observe(self.progress.step, info.loss, info.skipped)
            self.progress.guard = guard.state_dict()
            stopped, save = bool(info.flags[0]), bool(info.flags[1])
            if (stopped or save) and self.progress.step % schedule.run_blocks:
                if self.recorder and not postponed:
                    self.recorder.console.note(self._postponed("stop" if stopped else "save"))
                stopped, save, postponed = False, False, True
            else:
                postponed = False
            last = self.progress.step == self.total_steps
            if last or (self.eval_cfg.every and self.progress.step % self.eval_cfg.every == 0):
                self._evaluate()
            if last or stopped or save or (self.save_every and self.progress.step % self.save_every == 0):
                self._save("save" if save else None)
            self._poll()
            if stopped:
                break
            waiting = time.perf_counter()
        self.checkpointer.wait()
        self._poll()
        if self.recorder and stopped:
            self.recorder.folder.honoured("stop")
        if self.unsaved is not None:
            raise self.unsaved  # a run that ends without its last checkpoint is neither done nor resumable from here
        return EXIT_STOPPED if stopped and self.progress.step < self.total_steps else EXIT_DONE

    def _postponed(self, request: str) -> str:
        """A checkpoint holds no state of runs, so that another world size can go on from it."""
        group = self.loader.schedule.run_blocks
        end = -(-self.progress.step // group) * group
        return f"{request}: waits for step {end}, the end of a group of {group} steps (data.run_blocks)"

    def _step(self, data: StepData, lr: float) -> StepInfo:
        stop = self.stop.requested
        save = False
        if self.recorder:
            stop, save = stop or self.recorder.folder.requested_stop(), self.recorder.folder.requested_save()
        mine = self.mesh.sequence_rank == 0  # all ranks of a row read the same blocks: one of them tells their hashes
        hashes = data.hashes if mine else torch.zeros_like(data.hashes)
        flags = torch.cat([torch.tensor([int(stop), int(save), int(self.mixture.grew)]), hashes.flatten()])
        batches = [batch.cut(self.mesh.sequence_rank, self.mesh.sp) for batch in data.micro_batches]
        return self.engine.train_step(batches, lr, flags)

    def _record(self, info: StepInfo, lr: float, wait: float) -> None:
        if self.recorder is None:
            return
        seconds = wait + info.seconds
        step, schedule = self.progress.step, self.loader.schedule
        speed = (schedule.tokens(step) - schedule.tokens(step - 1)) / seconds
        flops = self.flops_per_token[schedule.seq_len(step - 1)]
        values: dict[str, Any] = {
            "loss": info.loss,
            "grad_norm": info.grad_norm,
            "lr": lr,
            "tokens_per_second": speed,
            "mfu": None if self.peak is None else speed * flops / self.peak,
            "memory_bytes": memory_bytes(self.device),
            "data_wait_seconds": wait,
            "token_hash": token_hash(info.flags[3:].view(-1, 2)),
        }
        for name, (nats, targets) in self.mixture.losses(info).items():
            values[f"source_loss.{name}"] = nats / targets
        available = self.loader.tokens_available
        for name, tokens in self.loader.tokens_read(step).items():
            values[f"source_tokens.{name}"] = tokens
            values[f"source_epochs.{name}"] = tokens / available[name] if available[name] else 0.0
            values[f"source_effective_tokens.{name}"] = effective_tokens(available[name], tokens)
        if info.router_load:
            values["branch_loss"] = info.branch_loss
            values |= {f"router_load.{place}": load.tolist() for place, load in info.router_load.items()}
        if info.skipped:
            values["skipped"] = info.skipped
        if self.mixture.policy_error:
            values["policy_error"], self.mixture.policy_error = self.mixture.policy_error, ""
        self.recorder.step(step, self.progress.tokens, values, seconds)

    def _evaluate(self) -> None:
        if self.heldout is not None:
            self.heldout.follow(self.loader.catalog)
        if self.heldout is None or not self.heldout.source_names or self.progress.evaluated == self.progress.step:
            return
        self.progress.evaluated = self.progress.step
        values = bits_per_byte(self.engine, self.heldout, self.mesh, self.rows, self.device)
        text = self._sample()
        if self.recorder:
            self.recorder.evaluation(self.progress.step, self.progress.tokens, values, text)

    def _sample(self) -> dict[str, str]:
        """The continuation of ``eval.sample_prompt``, drawn alike on every rank."""
        cfg = self.eval_cfg
        if cfg.sample_prompt is None:
            return {}
        prompt = self.tokenizer.encode_batch([cfg.sample_prompt])[0].tolist()
        drawn = sample(
            self.engine.decode,
            self.engine.init_state(1),
            prompt,
            temperature=SAMPLE_TEMPERATURE,
            seed=self.progress.step,
        )
        text = self.tokenizer.decode(list(islice(drawn, cfg.sample_tokens)))
        return {"sample_prompt": cfg.sample_prompt, "sample": text}

    def _save(self, request: str | None) -> None:
        if self.recorder:
            self.recorder.metrics.fsync()
        tensors, counters = self.engine.state_dict()
        loop = {"step": self.progress.step, "tokens": self.progress.tokens, "guard": self.progress.guard, **counters}
        documents = {"loop": loop, "schedule": self.mixture.state()}
        self.checkpointer.save(self.progress.step, tensors, documents)
        if request and self.recorder:
            self.checkpointer.wait()
            self.recorder.folder.honoured("save")

    def _poll(self) -> None:
        while (result := self.checkpointer.poll()) is not None:
            self.unsaved = result.error
            if self.recorder:
                self.recorder.saved(result)
