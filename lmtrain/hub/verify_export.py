"""Loads exported folders with transformers alone and writes down what they compute. A script, never imported.

    python -P verify_export.py JOBS.json RESULTS.json

JOBS.json: a list of ``{folder, tokens [[int]], logits: path to write, greedy: tokens to generate, prompts: [str],
new_tokens: int}``. RESULTS.json: per job ``{error}`` or ``{architecture, loading, unknown_keys, elements, vocab, eos,
cached: {equal, max_diff} or null, texts}``. Logits are fp32 ``[B, T, V]`` under the name "logits" in safetensors.
"""

from __future__ import annotations

import dataclasses
import importlib.abc
import json
import sys
import traceback
from typing import Any

BLOCKED = ("lmtrain", "fla", "mamba_ssm", "causal_conv1d")
"""lmtrain, since the export must not need it; libraries whose kernels transformers would call on a CPU, and crash."""
NOT_FIELDS = {"model_type", "rope_theta", "rope_scaling", "head_dim", "pad_token_id", "lmtrain_tokenizer_sha256"}
"""Keys of config.json that not every config class declares, written on purpose: Qwen3Moe reads head_dim anyway."""


class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"{name} is blocked here", name=name)


def verify(job: dict[str, Any]) -> dict[str, Any]:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = job["folder"]
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, local_files_only=True
    )
    model, loading = loaded
    model.eval()
    tokens = torch.tensor(job["tokens"])
    with torch.no_grad():
        logits = model(tokens, use_cache=False).logits.float()
    save_file({"logits": logits.contiguous()}, job["logits"])
    with open(f"{folder}/config.json", encoding="utf-8") as file:
        written = json.load(file)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    held = {id(t): t.numel() for t in [*model.parameters(), *(model.state_dict(keep_vars=True).values())]}
    return {
        "architecture": type(model).__name__,
        "loading": {key: sorted(map(str, value)) for key, value in loading.items() if value},
        "unknown_keys": unknown_keys(written, model.config),
        "elements": sum(held.values()),
        "vocab": len(tokenizer),
        "eos": tokenizer.eos_token_id,
        "cached": greedy(model, tokens[:1, :32], job["greedy"], float(logits.std())),
        "texts": [continued(model, tokenizer, prompt, job["new_tokens"]) for prompt in job["prompts"]],
    }


def unknown_keys(written: dict[str, Any], config: Any) -> list[str]:
    fields = {field.name for field in dataclasses.fields(config)} | NOT_FIELDS
    return sorted(key for key in written if key not in fields and not hasattr(type(config), key))


def greedy(model: Any, prompt: Any, length: int, std: float) -> dict[str, Any] | None:
    """Greedy generation with the cache against without: equal tokens, or logits equal up to the first difference."""
    if not length or not model.config.use_cache:
        return None
    import torch

    steps = {"max_new_tokens": length, "min_new_tokens": length, "do_sample": False}
    runs = [
        model.generate(prompt, **steps, use_cache=cache, return_dict_in_generate=True, output_logits=True)
        for cache in (True, False)
    ]
    tokens = [run.sequences[0, prompt.shape[1] :] for run in runs]
    logits = [torch.stack(run.logits).float() for run in runs]
    differing = (tokens[0] != tokens[1]).nonzero()
    end = int(differing[0]) + 1 if len(differing) else length
    diff = float((logits[0][:end] - logits[1][:end]).abs().max())
    return {"equal": not len(differing) or diff < 1e-4 * std, "max_diff": diff}


def continued(model: Any, tokenizer: Any, prompt: str, length: int) -> str:
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=length, do_sample=False)[0]
    return str(tokenizer.decode(out, skip_special_tokens=True))


def main(jobs_path: str, results_path: str) -> None:
    sys.meta_path.insert(0, Blocker())
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with open(jobs_path, encoding="utf-8") as file:
        jobs = json.load(file)
    results = []
    for job in jobs:
        try:
            results.append(verify(job))
        except Exception as error:
            traceback.print_exc()
            results.append({"error": f"{type(error).__name__}: {error}"})
    assert "lmtrain" not in sys.modules
    with open(results_path, "w", encoding="utf-8") as file:
        json.dump(results, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
