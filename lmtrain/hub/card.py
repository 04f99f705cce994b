"""README.md of an export: the model card, with front matter that the Hugging Face hub reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from lmtrain.hub.table import HubClass
from lmtrain.model.config import ModelConfig

NO_CACHE = (
    "The class cannot use its cache without an attention layer: `use_cache` is false in the configuration, and "
    "generating n tokens costs n passes over all of them."
)


def loading(folder: str | Path) -> str:
    """The three lines of Python that load an export."""
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f'model = AutoModelForCausalLM.from_pretrained("{folder}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{folder}")'
    )


def card(cls: HubClass, cfg: ModelConfig, facts: dict[str, Any]) -> str:
    """The text of README.md; ``facts`` are those of lmtrain_export.json."""
    kinds = sorted({cfg.branches[name].kind for name in cfg.order()})
    front = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["lmtrain", cls.model_type, *(kind for kind in kinds if kind != cls.model_type)],
    }
    sources = ", ".join(f"{name} ({weight:g})" for name, weight in facts["sources"].items())
    parity = facts["parity"]
    cached = parity["cached_equals_uncached"]
    lines = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {facts['name']}",
        f"A base language model trained with lmtrain {facts['lmtrain']}: `{cls.architecture}` of transformers, "
        f"{facts['num_params']:,} parameters ({facts['num_active_params']:,} used per token), step {facts['step']:,}, "
        f"{facts['tokens'] or 0:,} tokens in rows of {facts['seq_len']:,}.",
        f"```python\n{loading('.')}\n```",
        f"- Blocks: `{' '.join(cfg.order())}` ({', '.join(kinds)}), width {cfg.d_model}. "
        "`recipe.yaml` holds every setting of the training run.",
        f"- Data, with weights: {sources or 'not recorded'}.",
        f"- Tokenizer: {facts['tokenizer']['vocab_size']:,} tokens (the embedding has {facts['vocab_size']:,} rows); "
        f"documents end with `{facts['tokenizer']['eod']}`, nothing is put before them. In training, text that spells "
        "this token stayed text; here it becomes the token.",
        f"- Proof: logits of lmtrain and of transformers {facts['transformers']}, loaded in a process without lmtrain, "
        f"in fp32, differ by at most {parity['max_logit_diff']:.1e} (standard deviation {parity['logit_std']:.3g}); "
        f"with every parameter perturbed, by {parity['perturbed_max_logit_diff']:.1e} "
        f"({parity['perturbed_logit_std']:.3g}).",
        f"- Generation: {NO_CACHE if cached is None else 'greedy with the cache equals greedy without it.'}",
    ]
    if cls.limits:
        lines.append(f"- Limits of the class in transformers {facts['transformers']}: {cls.limits}")
    if facts["dtype"] == "bfloat16":
        drift = facts["rounding_logit_diff"]
        lines.append(f"- Rounding the weights to bfloat16 changed the logits by up to {drift:.1e}.")
    lines.append("- A base model: not tuned to follow instructions, and not evaluated for safety.")
    return "\n".join(line if line.startswith("- ") else f"{line}\n" for line in lines) + "\n"
