"""``python -m lmtrain.ops [--json]``: which backend every op uses on this machine, and why not the others."""

from __future__ import annotations

import argparse
import json
import textwrap
from typing import Any

import torch

import lmtrain.ops  # noqa: F401  (registers the ops)
from lmtrain.errors import UsageError
from lmtrain.ops import library

DEVICES = ("cpu", "cuda")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
PLACES = [(device, dtype) for device in DEVICES for dtype in DTYPES]
INDENT = 48  # columns of a reason's backend and places


def survey() -> dict[str, Any]:
    """What ``--json`` prints: ``ops`` holds op -> device -> dtype -> the backend used, and why not each other one."""
    missing = library.load()
    ops = {
        op: {device: {name: _choice(op, device, dtype) for name, dtype in DTYPES.items()} for device in DEVICES}
        for op in library.registered()
    }
    return {
        "kernels": library.kernels(),
        "library": str(missing or library.library_path()),
        "cpu_unit": None if missing else torch.ops.lmtrain.cpu_unit(),
        "torch": torch.__version__,
        "cuda_device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "ops": ops,
        "commands": {name: library.command(name) for name in _names() if library.command(name)},
    }


def _choice(op: str, device: str, dtype: torch.dtype) -> dict[str, Any]:
    try:
        return {"used": library.backend(op, device, dtype), "not": library.others(op, device, dtype)}
    except UsageError as refused:  # asked for by name
        return {"used": None, "not": {library.kernels(): str(refused)}}


def _names() -> list[str]:
    """Every backend that some op has, in the order of ``KERNELS``."""
    present = {backend.name for backends in library.registered().values() for backend in backends}
    return [name for name in library.KERNELS if name in present]


def table(rows: list[list[str]]) -> str:
    """Rows in columns, the first row a heading."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def reasons(ops: dict[str, Any]) -> str:
    """Per backend: where, which ops do not use it, and why."""
    found: dict[str, dict[tuple[str, str], list[str]]] = {}
    for op, devices in ops.items():
        places: dict[tuple[str, str], list[tuple[str, str]]] = {}
        for device, dtype in PLACES:
            for name, why in devices[device][dtype]["not"].items():
                places.setdefault((name, why), []).append((device, dtype))
        for (name, why), at in places.items():
            found.setdefault(name, {}).setdefault((_spell(at), why), []).append(op)
    lines = []
    for name in filter(found.__contains__, library.KERNELS):
        for (where, why), group in found[name].items():
            # the commands have a table of their own
            text = f"{why.partition('; install it with')[0]}: {', '.join(group)}"
            wrapped = textwrap.wrap(text, 100 - INDENT) or [""]
            lines.append(f"{name:15}{where:{INDENT - 15}}{wrapped[0]}".rstrip())
            lines += [" " * INDENT + line for line in wrapped[1:]]
            name = ""
    return "\n".join(lines)


def _spell(places: list[tuple[str, str]]) -> str:
    """``cpu, cuda fp32/bf16``: the device alone where all dtypes are meant."""
    spelled = []
    for device in DEVICES:
        dtypes = [dtype for of, dtype in places if of == device]
        if dtypes:
            spelled.append(device if len(dtypes) == len(DTYPES) else f"{device} {'/'.join(dtypes)}")
    return ", ".join(spelled)


def page(found: dict[str, Any]) -> str:
    """The survey for a person to read."""
    ops = found["ops"]
    used = [[op, *(at[device][dtype]["used"] or "refused" for device, dtype in PLACES)] for op, at in ops.items()]
    device = found["cuda_device"] or "no CUDA device: the cuda columns say what one would run with what is installed"
    return "\n".join(
        [
            f"kernels={found['kernels']}   torch {found['torch']}   cpu unit: {found['cpu_unit'] or 'none'}",
            f"library: {found['library']}",
            f"cuda: {device}",
            "",
            table([["op", *(" ".join(place) for place in PLACES)], *used]),
            "",
            "Why not another backend:",
            reasons(ops),
            "",
            "Built or installed by:",
            table([["backend", "command"], *([name, command] for name, command in found["commands"].items())]),
            "",
            "A backend is asked for with cluster.kernels=NAME, or LMTRAIN_KERNELS=NAME in the environment.",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lmtrain.ops", description=__doc__)
    parser.add_argument("--json", action="store_true", help="for programs")
    found = survey()
    print(json.dumps(found, indent=2) if parser.parse_args().json else page(found))


if __name__ == "__main__":
    main()
