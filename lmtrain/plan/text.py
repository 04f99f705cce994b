"""The dry run in words."""

from __future__ import annotations

from typing import Any

NAMES = {"name": "branch", "kind": "kind"}
"""Keys of a row that name it, and the titles above them."""


def text(summary: dict[str, Any]) -> str:
    """What ``dry_run=true`` prints."""
    rows = summary["branches"]
    name, kind = (2 + max([len(title), *(len(row[key]) for row in rows)]) for key, title in NAMES.items())
    lines = [f"{'branch':<{name}}{'kind':<{kind}}{'count':>6}{'parameters':>14}{'FLOPs/token':>14}{'state':>12}"]
    for row in rows:
        state = size(row["state_bytes"])
        lines.append(
            f"{row['name']:<{name}}{row['kind']:<{kind}}{row['count']:>6}{count(row['num_params']):>14}"
            f"{count(row['flops_per_token']):>14}{state:>12}"
        )
    lines.append("")
    if summary["num_params"] is None:
        lines.append("parameters, FLOPs and memory need the vocabulary: make the tokenizer, or set model.vocab_size")
    else:
        active = summary["num_active_params"]
        used = "" if active == summary["num_params"] else f", {count(active)} used per token"
        lines.append(f"parameters   {count(summary['num_params'])}{used} (vocabulary {summary['vocab_size']:,})")
        lines.append(f"FLOPs        {count(summary['flops_per_token'])} per token, forward and backward")
    tokens = summary["steps"] * summary["tokens_per_step"]
    lines.append(
        f"run          {summary['steps']:,} steps x {summary['tokens_per_step']:,} tokens = {count(tokens)} tokens"
    )
    mesh = " x ".join(f"{axis} {n}" for axis, n in summary["mesh"].items() if n > 1) or "one rank"
    lines.append(f"mesh         {mesh}; {summary['microbatch']} rows per forward pass")
    if summary["memory"] is not None:
        parts = ", ".join(f"{name} {size(n)}" for name, n in summary["memory"].items())
        lines.append(f"memory       about {size(summary['peak_bytes'])} per rank ({parts}); an estimate")
    lines += [f"missing      {problem}" for problem in summary["missing"]]
    lines += [f"WARNING      {warning}" for warning in summary["warnings"]]
    return "\n".join(lines)


def count(number: int) -> str:
    """1670000 -> 1.67 M."""
    for scale, unit in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if number >= scale:
            return f"{number / scale:.3g}{unit}" if number < 1000 * scale else f"{number / scale:,.0f}{unit}"
    return str(number)


def size(number: int) -> str:
    """Bytes in powers of 1024."""
    for scale, unit in ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if number >= scale:
            return f"{number / scale:.1f} {unit}"
    return f"{number} B"
