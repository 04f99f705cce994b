"""Whole training steps on one CPU thread: ours against transformers' class of the same model, weights and batch.

    OMP_NUM_THREADS=1 python benchmarks/train_cpu.py [nemotron_h mamba2 llama] [512 2048]

A step is forward, loss, backward, clip, fused AdamW. Steps of the two alternate; the figure is the median of process
CPU seconds, which does not count waiting. The peer runs at its fastest chunk size of CHUNKS, found first: the chunk
does not change the function. ``bound`` is the ratio that would remain if our own ops (scan, convolution) cost nothing:
the rest is mostly GEMMs, the same library on both sides. Writes benchmarks/results/train_cpu.json.
"""

from __future__ import annotations

import datetime
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from source_digest import digest
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from lmtrain.config.load import load
from lmtrain.data.batch import Batch, make_batch
from lmtrain.hub.match import require
from lmtrain.hub.table import to_disk
from lmtrain.model.config import ModelConfig
from lmtrain.model.context import LocalContext
from lmtrain.model.ffn.mlp import MLPConfig
from lmtrain.model.language_model import LanguageModel
from lmtrain.model.mixers.attention_settings import AttentionConfig
from lmtrain.model.mixers.mamba2 import Mamba2Config
from lmtrain.ops.cross_entropy import cross_entropy
from lmtrain.ops.library import chosen
from lmtrain.train.hardware import describe

VOCAB, TOKENS, ROUNDS, CHUNKS = 2048, 2048, 7, (32, 64, 128, 256)
RESULTS = Path(__file__).parent / "results" / "train_cpu.json"


def models() -> dict[str, ModelConfig]:
    """The demo's own model, eight Mamba-2 layers, and six Llama layers of the same width."""
    mamba = Mamba2Config(head_dim=64, d_state=64)
    llama = {"attn": AttentionConfig(num_heads=6, num_kv_heads=2), "mlp": MLPConfig(d_ff=512)}
    return {
        "nemotron_h": load(["recipe=demo"]).recipe.model,
        "mamba2": ModelConfig(d_model=256, branches={"ssm": mamba}, pattern="8 * ssm"),
        "llama": ModelConfig(d_model=192, branches=llama, pattern="6 * (attn mlp)"),
    }


def peer_of(cfg: ModelConfig, ours: LanguageModel, seq_len: int) -> nn.Module:
    """transformers' class with our weights."""
    table = require(cfg)
    settings = table.config(cfg, VOCAB, seq_len)
    config = transformers.AutoConfig.for_model(table.model_type, **settings)
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    disk = dict(to_disk(table.rules(cfg), dict(ours.state_dict())))
    known = set(model.state_dict())
    renamed = {name if name in known else _in_memory(name): tensor for name, tensor in disk.items()}
    missing, unexpected = model.load_state_dict(_fuse_experts(renamed, known), strict=False)
    if missing or unexpected:
        raise SystemExit(f"weights do not fit: missing {missing[:3]}, unexpected {unexpected[:3]}")
    return model


def _in_memory(name: str) -> str:
    return name.replace("backbone.", "model.", 1)


def _fuse_experts(disk: dict[str, Tensor], known: set[str]) -> dict[str, Tensor]:
    """One tensor per expert on disk, one stacked tensor in memory."""
    fused = {name: tensor for name, tensor in disk.items() if name in known}
    stacks: dict[str, list[Tensor]] = {}
    for name, tensor in disk.items():
        if name not in known:
            before, _, after = name.partition(".experts.")
            stacks.setdefault(f"{before}.experts.{after.split('.', 1)[1].removesuffix('.weight')}", []).append(tensor)
    return fused | {name: torch.stack(parts) for name, parts in stacks.items()}


def stepper(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], float]:
    """CPU seconds of one training step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> float:
        begun = time.process_time()
        loss().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return time.process_time() - begun

    return step


def our_loss(model: LanguageModel, batch: Batch) -> Tensor:
    logits, _ = model(batch.tokens, LocalContext(batch.docs), {})
    return cross_entropy(logits, batch.labels)[0].sum() / batch.num_targets


def peer_loss(model: nn.Module, batch: Batch) -> Tensor:
    logits = model(batch.tokens.long(), use_cache=False).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.long().flatten())


def own_share(step: Callable[[], float]) -> float:
    """Share of a step's CPU time inside our compiled ops."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        step()
    events = profiled.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    own = sum(event.cpu_time_total for event in events if event.key.startswith("lmtrain::"))
    return own / total


def measure(name: str, cfg: ModelConfig, seq_len: int) -> dict[str, Any]:
    """One line of the table."""
    ours = LanguageModel(cfg, VOCAB)
    ours.initialise(0)
    peer = peer_of(cfg, ours, seq_len)
    generator = torch.Generator().manual_seed(0)
    rows = TOKENS // seq_len
    tokens = torch.randint(0, VOCAB, (rows, seq_len + 1), generator=generator)
    ids = torch.zeros(rows, seq_len + 1, dtype=torch.int32)
    batch = make_batch(tokens, ids, source=torch.zeros(rows, seq_len), block=torch.arange(rows))
    with torch.no_grad():
        mine, theirs = our_loss(ours, batch), peer_loss(peer, batch)
    if abs(float(mine - theirs)) > 1e-4:
        raise SystemExit(f"{name}: not the same model: losses {float(mine):.6f} and {float(theirs):.6f}")
    our_step = stepper(ours, lambda: our_loss(ours, batch))
    peer_step = stepper(peer, lambda: peer_loss(peer, batch))
    chunk = best_chunk(peer, peer_step)
    our_step()
    times = [(our_step(), peer_step()) for _ in range(ROUNDS)]
    our_time, peer_time = (statistics.median(column) for column in zip(*times, strict=True))
    share = own_share(our_step)
    return {
        "model": name,
        "T": seq_len,
        "ours_tokens_per_cpu_second": TOKENS / our_time,
        "transformers_tokens_per_cpu_second": TOKENS / peer_time,
        "ratio": peer_time / our_time,
        "bound": peer_time / (our_time * (1 - share)),
        "peer_chunk_size": chunk,
        "loss_difference": abs(float(mine - theirs)),
    }


def best_chunk(peer: nn.Module, step: Callable[[], float]) -> int | None:
    """Set the peer's chunk size to its fastest; None if it has none."""
    mixers = [module for module in peer.modules() if hasattr(module, "chunk_size")]
    if not mixers:
        step()
        return None

    def timed(chunk: int) -> float:
        for mixer in mixers:
            mixer.chunk_size = chunk
        return min(step() for _ in range(3))

    best = min(CHUNKS, key=timed)
    timed(best)
    return best


def main() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    asked = [word for word in sys.argv[1:] if not word.isdigit()] or list(models())
    lengths = [int(word) for word in sys.argv[1:] if word.isdigit()] or [512, 2048]
    rows = []
    print(f"{'model':<12}{'T':>6}{'ours tok/cpu-s':>16}{'transformers':>14}{'ratio':>8}{'bound':>8}  peer chunk")
    for name in asked:
        for seq_len in lengths:
            row = measure(name, models()[name], seq_len)
            rows.append(row)
            print(
                f"{name:<12}{seq_len:>6}{row['ours_tokens_per_cpu_second']:>16,.0f}"
                f"{row['transformers_tokens_per_cpu_second']:>14,.0f}{row['ratio']:>8.2f}{row['bound']:>8.2f}"
                f"  {row['peer_chunk_size']}",
                flush=True,
            )
    record = {
        "format_version": 1,
        "date": datetime.date.today().isoformat(),
        "hardware": describe(torch.device("cpu")),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "kernels": chosen(),
        "threads": 1,
        "tokens_per_step": TOKENS,
        "sources": digest("csrc/*", "lmtrain/ops/*.py", "lmtrain/model/*.py", "benchmarks/train_cpu.py"),
        "rows": rows,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
