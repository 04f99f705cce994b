"""``python -m lmtrain.model [--json | --docs]``: every branch kind, what it costs, where it runs, how it leaves.

A program, not a part of the room: it asks the rooms above for every kind, for the hub's classes and for words.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lmtrain.config.recipe import branch_kinds
from lmtrain.hub.match import CLASSES
from lmtrain.model.branch import branch_class
from lmtrain.model.config import ModelConfig
from lmtrain.model.table import D_MODEL, SEQ_LEN, SIZES, Row, rows
from lmtrain.ops import library
from lmtrain.ops.__main__ import table
from lmtrain.plan.text import count, size
from lmtrain.train.hardware import resolve_device, resolve_dtype

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- begin: python -m lmtrain.model --docs -->", "<!-- end -->"


def survey() -> dict[str, Any]:
    """What ``--json`` prints: ``kinds`` holds kind -> its row, the backends of its ops here, classes that have it."""
    device, dtype = here()
    found = rows(branch_kinds())
    kinds = {row.kind: asdict(row) | {"backends": backends(row), "classes": classes(row)} for row in found}
    place = {"device": device, "dtype": str(dtype).removeprefix("torch.")}
    return {"d_model": D_MODEL, "seq_len": SEQ_LEN, "kernels": library.kernels(), **place, "kinds": kinds}


def here() -> tuple[str, torch.dtype]:
    """Where and in what a run would compute by default on this machine."""
    device = resolve_device("auto")
    return device.type, resolve_dtype("auto", device)


def backends(row: Row) -> dict[str, str]:
    """Op -> the backend it uses on this machine; reference where it has no other."""
    known = library.registered()
    return {op: library.backend(op, *here()) if op in known else "reference" for op in row.ops}


def known_backends(row: Row) -> str:
    """All that its ops have, whatever is installed: op after op, best first."""
    known = library.registered()
    return "; ".join(", ".join(one.name for one in known[op]) if op in known else "reference" for op in row.ops)


def classes(row: Row) -> list[str]:
    """Classes of transformers that have the kind. With which settings, in which order: ``lmtrain.hub.match``."""
    model = ModelConfig(D_MODEL, {row.kind: branch_class(row.kind).Config(**row.settings)}, row.kind)
    return [each.name for each in CLASSES if f"no {row.kind}" not in each.reasons(model)]


def page(found: dict[str, Any]) -> str:
    """The survey for a terminal."""
    lines = [["kind", "op", "backend", "over sp", "parameters", "FLOPs/token", "state", "in transformers"]]
    for kind, row in found["kinds"].items():
        uses = ", ".join(dict.fromkeys(row["backends"].values()))
        lines.append([kind, ", ".join(row["ops"]), uses, row["sp"], *_sizes(row), ", ".join(row["classes"])])
    where = f"Backends for {found['dtype']} on {found['device']}, kernels={found['kernels']}: python -m lmtrain.ops."
    return "\n".join([table(lines), "", textwrap.fill(_for_what(), 110), where])


def markdown(found: list[Row]) -> str:
    """The table of docs/models.md; the same on every machine."""
    lines = ["| kind | what it is | op | backends | over sp | parameters | FLOPs per token | state | in transformers |"]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for row in found:
        what = [f"`{row.kind}`", row.about.replace("``", "`"), ", ".join(row.ops), known_backends(row)]
        lines.append(f"| {' | '.join([*what, row.sp, *_sizes(asdict(row)), ', '.join(classes(row))])} |")
    return "\n".join([*lines, "", _for_what()])


def _sizes(row: dict[str, Any]) -> list[str]:
    state = size(row["state_bytes"]) if row["state_bytes"] else ""
    return [count(row["num_params"]), count(row["flops_per_token"]), state]


def _for_what() -> str:
    given = "; ".join(f"{kind} {', '.join(f'{k}={v}' for k, v in sizes.items())}" for kind, sizes in SIZES.items())
    return f"For d_model {D_MODEL}, {SEQ_LEN} tokens and default settings; where there are none: {given}."


def write(path: Path) -> None:
    """Put the table between the markers of the page. SystemExit if there is no such page."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{path}: expected a page with the markers {BEGIN} and {END}")
    path.write_text(f"{before}{BEGIN}\n{markdown(rows(branch_kinds()))}\n{END}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lmtrain.model", description=__doc__)
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument("--docs", action="store_true", help="rewrite the table of docs/models.md")
    asked = parser.parse_args()
    if asked.docs:
        write(PAGE)
    else:
        print(json.dumps(survey(), indent=2) if asked.json else page(survey()))


if __name__ == "__main__":
    main()
