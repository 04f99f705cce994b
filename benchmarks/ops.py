"""Every op, forward and backward, against plain torch and transformers in the same run: time, memory, error.

    make bench-ops                                   all, about six minutes; writes benchmarks/results/ops.json
    python benchmarks/ops.py --only ssd delta        some; prints, writes nothing
    python benchmarks/ops.py --unit avx2             this CPU as if it had no AVX-512, torch too; writes ops-avx2.json
    python benchmarks/ops.py --docs                  rewrites the tables of docs/ops.md from the results

fp32, wall milliseconds. The forms of op_forms.py run in turn, round after round, with the same threads; the best round
of each counts. Of the torch forms (chunk sizes, or the loop over tokens) the fastest is found first, and of
transformers' too, whose default is measured besides. A form that would take over LIMIT seconds is not run: null, and
named in ``too_slow``. Time is expected to grow with T, and with its square where transformers' loops index tokens.

Memory is the growth of the resident set at its highest over one forward and backward, in a process of its own that has
run a shorter row before and whose freed memory returns to the system at once: outputs, what is kept for the backward,
all gradients and scratch, not the inputs (Linux). ``max_error`` is the largest difference to the torch form in fp64
over y and all gradients, relative to the largest element of each. ``roofline_parts_ms``: in torch.mm of 512^3 the FLOPs
that ``op.cost`` counts for the chunked form (the backward: twice the forward's), as many torch.exp (the backward: as
many), or a copy of as many bytes. For ssd, whose kernel skips half of what the chunked form multiplies: its unavoidable
work in parts, as op_roofline.py counts it. ``roofline_ms`` is the largest part, ``roofline_sum_ms`` their sum; the
table gives the share of the sum without reading cold inputs, and with it.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import json
import math
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from op_forms import ENTRIES, Entry, Form
from op_roofline import COLD, timers
from source_digest import digest
from torch import Tensor

from lmtrain.ops import library
from lmtrain.train.hardware import describe

LENGTHS, LIMIT, SECONDS = (256, 1024, 4096), 20.0, 3.0  # a cell is timed for about SECONDS, in 3 rounds at least
HOPELESS = 3  # a torch form this many times slower than the fastest is not tried at the next T
PEERS = ("torch", "transformers", "transformers_default")
M_MMAP_THRESHOLD = -3
ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
AVX2 = {"LMTRAIN_CPU_UNIT": "avx2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}

Times = dict[str, tuple[float, float]]  # form -> seconds of the forward, and of forward and backward


def leaves_of(entry: Entry, length: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    inputs = entry.inputs(T=length, **entry.sizes)
    return [t.to(dtype).requires_grad_() if t.is_floating_point() else t for t in inputs]


def forward_backward(form: Form, leaves: list[Tensor]) -> tuple[tuple[float, float], list[Tensor]]:
    """Seconds of the forward, and of both; y and the gradients."""
    start = time.perf_counter()
    y = form(*leaves)
    middle = time.perf_counter()
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    begun = time.perf_counter()
    grads = torch.autograd.grad(y, [t for t in leaves if t.requires_grad], upstream)
    return (middle - start, middle - start + time.perf_counter() - begun), [y.detach(), *grads]


def error(form: Form, exact: Form, entry: Entry, length: int) -> float:
    _, found = forward_backward(form, leaves_of(entry, length))
    _, wanted = forward_backward(exact, leaves_of(entry, length, torch.float64))
    return max(float((got - want).abs().max() / want.abs().max()) for got, want in zip(found, wanted, strict=True))


def time_cell(name: str, length: int, before: Times, growth: float) -> dict[str, Any]:
    """``before``: the times of every form at the T before, which was ``growth`` times shorter."""
    entry = ENTRIES[name]
    leaves = leaves_of(entry, length)
    times: Times = {}
    rounds: dict[str, int] = {}
    slow: list[str] = []

    def run(form_name: str, form: Callable[[], tuple[float, float]]) -> float:
        forward, both = form()
        best = times.get(form_name, (math.inf, math.inf))
        times[form_name] = min(best[0], forward), min(best[1], both)
        rounds[form_name] = rounds.get(form_name, 0) + 1
        return both

    def runner(form: Form) -> Callable[[], tuple[float, float]]:
        return lambda: forward_backward(form, leaves)[0]

    def fastest(origin: str, forms: dict[str, Form]) -> str | None:
        names = {f"{origin} {form}": form for form in forms}
        least = min((before[n][1] for n in names if n in before), default=math.inf)
        for full, form in names.items():
            earlier = before.get(full, (0.0, 0.0))[1]
            skipped = before and (full not in before or (earlier > HOPELESS * least and form != entry.default))
            if not skipped and earlier * growth ** (2 if origin == "transformers" else 1) >= LIMIT:
                slow.append(full)
            elif not skipped and run(full, runner(forms[form])) < 1:
                run(full, runner(forms[form]))
        return min((n for n in names if n in times), key=lambda n: times[n][1], default=None)

    y = entry.ours(*leaves)
    parts = timers(entry, length, leaves, y)
    del y
    best_torch, best_peer = fastest("torch", entry.torch), fastest("transformers", entry.transformers)
    default = f"transformers {entry.default}" if entry.default else best_peer
    default = default if default in times else None
    contenders = {"ours": runner(entry.ours)}
    for full in dict.fromkeys((best_torch, best_peer, default)):
        if full is not None:
            origin, form = full.split(" ", 1)
            contenders[full] = runner(getattr(entry, origin)[form])
        if full == best_torch and COLD in parts:
            contenders[COLD] = parts[COLD]
    contenders |= parts
    spent = {full: times.get(full, (0.0, 0.0))[1] for full in contenders}
    end, turn = time.perf_counter() + SECONDS, 0
    while turn < 3 or time.perf_counter() < end:
        for full, contender in contenders.items():
            if spent[full] < SECONDS:
                spent[full] += run(full, contender)
        turn += 1
    if default and best_peer and times[default][1] < times[best_peer][1]:  # found otherwise by chance
        best_peer = default
    exact = entry.torch[best_torch.split(" ", 1)[1]] if best_torch and times[best_torch][1] < SECONDS else None
    return {
        "times": times,
        "rounds": rounds,
        "torch": best_torch,
        "transformers": best_peer,
        "transformers_default": default,
        "too_slow": slow,
        "roofline": list(parts),
        "max_error": error(entry.ours, exact, entry, length) if exact else None,
    }


def peaks(name: str, length: int, origin: str, form: str | None) -> tuple[float, float] | None:
    """MB of the forward, and of forward and backward; None where the system does not tell."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, 1 << 16)  # each larger block is mapped, and unmapped when freed
    entry = ENTRIES[name]
    function = getattr(entry, origin)[form] if form else entry.ours
    forward_backward(function, leaves_of(entry, LENGTHS[0]))  # what libraries set up once
    leaves = leaves_of(entry, length)
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the highest is now what is held
    held = _status("VmRSS")
    y = function(*leaves)
    forward = _status("VmHWM") - held
    torch.autograd.grad(y, [t for t in leaves if t.requires_grad], torch.ones_like(y))
    return forward, _status("VmHWM") - held


def _status(key: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024 / 1e6


def in_child(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of ``function`` in a child of this process, which itself never computes and so stays small."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=lambda: sender.send(function(*arguments)))
    child.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError as lost:
        raise SystemExit(f"ops: {function.__name__}{arguments[:2]} failed, see above") from lost
    finally:
        child.join()


def measure(name: str, threads: int) -> list[dict[str, Any]]:
    """The records of one op."""
    records: list[dict[str, Any]] = []
    times: Times = {}
    for last, length in zip((LENGTHS[0], *LENGTHS), LENGTHS, strict=False):
        cell = in_child(time_cell, name, length, times, length / last)
        times = cell["times"]
        entry = ENTRIES[name]
        own = in_child(peaks, name, length, "ours", None)
        theirs = in_child(peaks, name, length, *cell["torch"].split(" ", 1)) if cell["torch"] else None
        for index, phase in enumerate(("fwd", "fwd_bwd")):
            milliseconds = {key: 1e3 * value[index] for key, value in times.items()}
            parts = {part: milliseconds[part] for part in cell["roofline"]}
            records.append(
                {
                    "op": name,
                    "pass": phase,
                    "T": length,
                    "shape": entry.sizes | {"T": length},
                    "threads": threads,
                    "ours_ms": milliseconds["ours"],
                    **{f"{peer}_ms": milliseconds.get(cell[peer]) for peer in PEERS},
                    **{f"{peer}_form": cell[peer] for peer in PEERS},
                    "too_slow": cell["too_slow"],
                    "rounds": {"ours": cell["rounds"]["ours"]} | {p: cell["rounds"].get(cell[p]) for p in PEERS},
                    "max_error": cell["max_error"],
                    "peak_mb_ours": own and own[index],
                    "peak_mb_torch": theirs and theirs[index],
                    "roofline_ms": max(parts.values()),
                    "roofline_kind": max(parts, key=parts.__getitem__),
                    "roofline_sum_ms": sum(parts.values()),
                    "roofline_parts_ms": parts,
                }
            )
            records[-1]["bars"] = bars(entry, records[-1])
    return records


def bars(entry: Entry, record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What was wanted at T = 1024, forward and backward, what was found, and whether it holds."""
    found: dict[str, dict[str, Any]] = {}
    if record["T"] != 1024 or record["pass"] != "fwd_bwd":
        return found
    for peer, wanted in zip(("torch", "transformers"), entry.faster, strict=True):
        if wanted is not None:
            ratio = ratio_to(record, f"{peer}_ms")
            found[peer] = {"wanted": wanted, "found": ratio, "holds": ratio is not None and ratio >= wanted}
    if entry.memory is not None and record["peak_mb_torch"]:
        share = record["peak_mb_ours"] / record["peak_mb_torch"]
        found["memory"] = {"wanted": entry.memory, "found": share, "holds": share <= entry.memory}
    return found


def ratio_to(record: dict[str, Any], key: str) -> float | None:
    return record[key] and record[key] / record["ours_ms"]


def roofline(record: dict[str, Any]) -> str:
    """The share of the largest part that is reached, and of the sum if there are several, without and with COLD."""
    parts = record["roofline_parts_ms"]
    reached = [f"{record['roofline_ms'] / record['ours_ms']:.0%} of {record['roofline_kind']}"]
    if len(parts) > 1:
        warm = record["roofline_sum_ms"] - parts.get(COLD, 0.0)
        reached.append(f"{warm / record['ours_ms']:.0%} of the sum")
    if COLD in parts:
        reached.append(f"{record['roofline_sum_ms'] / record['ours_ms']:.0%} with {COLD}")
    return ", ".join(reached)


def spell(value: float | None, missing: str = "-") -> str:
    """Two or three digits."""
    return missing if value is None else f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def cells(forward: dict[str, Any], both: dict[str, Any]) -> list[str]:
    """One row of the table, from the records of the two passes."""
    claims = [
        f"{peer} {spell(bar['found'])} ({spell(bar['wanted'])}): {'holds' if bar['holds'] else '**missed**'}"
        for peer, bar in both["bars"].items()
    ]
    slow = "not run" if any(form.startswith("transformers") for form in both["too_slow"]) else "-"
    return [
        both["op"],
        str(both["T"]),
        f"{forward['ours_ms']:.2f}",
        f"{both['ours_ms']:.2f}",
        spell(ratio_to(forward, "torch_ms")),
        spell(ratio_to(both, "torch_ms")),
        (both["torch_form"] or "-").removeprefix("torch "),
        spell(ratio_to(both, "transformers_ms"), slow),
        spell(ratio_to(both, "transformers_default_ms"), slow),
        roofline(both),
        "-" if both["max_error"] is None else f"{both['max_error']:.0e}",
        f"{spell(both['peak_mb_ours'])} : {spell(both['peak_mb_torch'])}",
        ", ".join(claims),
    ]


HEADER = (
    *("op", "T", "fwd ms", "both ms", "x torch fwd", "x torch", "its form", "x transformers", "x its default"),
    *("roofline", "error", "MB ours : torch", "wanted at T = 1024"),
)


def table(records: list[dict[str, Any]]) -> list[str]:
    """In Markdown, columns aligned."""
    rows = [list(HEADER), *(cells(*pair) for pair in zip(records[::2], records[1::2], strict=True))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    rows.insert(1, ["-" * width for width in widths])
    return [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]


def costs() -> list[str]:
    """Of the definition and of the chunked form per token, at the sizes measured; in Markdown."""
    lines = [
        "| op | sizes | FLOPs of the definition | FLOPs executed | bytes, fp32 |",
        "|---|---|---|---|---|",
    ]
    for name, entry in ENTRIES.items():
        tokens, cost = entry.sizes["B"] * 1024, entry.cost(T=1024, **entry.sizes)
        sizes = " ".join(f"{dim}={size}" for dim, size in entry.sizes.items() if dim != "B")
        numbers = (f"{n / tokens:,.0f}" for n in (cost.model_flops, cost.executed_flops, cost.bytes))
        lines.append(f"| {name} | {sizes} | {' | '.join(numbers)} |")
    return lines


def heading(record: dict[str, Any]) -> str:
    hardware, versions = record["hardware"], ", ".join(f"{k} {v}" for k, v in record["versions"].items())
    machine = f"{hardware['cpu']}, {record['threads']} threads, unit {record['unit']}, load {record['load']:.1f}"
    return f"{machine}; {versions}; {record['date']}; sources {record['sources'][:12]}"


def write_docs() -> None:
    """Replace what lies between the markers of docs/ops.md."""
    path = ROOT / "docs" / "ops.md"
    lines = ["", *costs()]
    for file in (RESULTS / "ops.json", RESULTS / "ops-avx2.json"):
        if file.exists():
            record = json.loads(file.read_text(encoding="utf-8"))
            lines += ["", f"`benchmarks/results/{file.name}`: {heading(record)}.", "", *table(record["records"])]
    begin, end = "<!-- begin: python benchmarks/ops.py --docs -->", "<!-- end -->"
    before, _, rest = path.read_text(encoding="utf-8").partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"{path}: expected the markers {begin} and {end}")
    path.write_text(before + begin + "\n".join(lines) + "\n\n" + end + after, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="OP", choices=ENTRIES, help="these alone; writes nothing")
    parser.add_argument("--unit", choices=("avx2",), help="as on a CPU without AVX-512, torch included")
    parser.add_argument("--docs", action="store_true", help="write the results into docs/ops.md, measure nothing")
    options = parser.parse_args()
    if options.docs:
        return write_docs()
    if options.unit and any(os.environ.get(key) != value for key, value in AVX2.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | AVX2)  # torch reads them when it loads
    if library.kernels() != "auto" or library.load():  # the torch forms are chosen by name
        raise SystemExit(f"ops: needs the compiled library (`{library.BUILD_COMMAND}`) and LMTRAIN_KERNELS unset")
    transformers.logging.set_verbosity_error()
    threads, begun = torch.get_num_threads(), time.perf_counter()
    hardware = {key: value for key, value in describe(torch.device("cpu")).items() if key != "host"}
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    record = {
        "format_version": 1,
        "date": str(datetime.date.today()),
        "hardware": hardware,
        "versions": versions,
        "unit": torch.ops.lmtrain.cpu_unit(),
        "torch_unit": torch.backends.cpu.get_cpu_capability(),
        "threads": threads,
        "dtype": "float32",
        "load": os.getloadavg()[0],
        "sources": digest("csrc/*", "lmtrain/ops/*.py", "benchmarks/op*.py"),
    }
    print(heading(record), flush=True)
    records: list[dict[str, Any]] = []
    for name in options.only or ENTRIES:
        started = time.perf_counter()
        records += measure(name, threads)
        print(f"{name}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    print("\n".join(table(records)))
    if not options.only:
        record |= {"seconds": round(time.perf_counter() - begun), "records": records}
        RESULTS.mkdir(exist_ok=True)
        name = "ops-avx2.json" if options.unit else "ops.json"
        (RESULTS / name).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
