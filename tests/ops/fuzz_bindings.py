"""Calls every op of the compiled library with seeded random arguments under AddressSanitizer (``make fuzz``).

A call may return or raise; anything else is a fault. The ops and their arguments come from torch's registry. Every call
is written to a file before it is made, so that the last line of the file is the call that ended the process.

    python tests/ops/fuzz_bindings.py [--calls N] [--seed S] [--op NAME]      build, then all ops with every vector unit
    python tests/ops/fuzz_bindings.py ... --unit UNIT                         one process: what the line above starts
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
# two folders below build/: an ordinary run looks for its library one below
BUILD = ROOT / "build" / "asan" / "csrc"
LIBRARY = BUILD / "liblmtrain_ops.so"
LAST_CALL = BUILD / "last_call.txt"
FLAGS = "-O1 -g1 -fsanitize=address -fno-omit-frame-pointer"


def build() -> None:
    """The library with AddressSanitizer, in a folder of its own."""
    tools = Path(sys.executable).parent
    configure: list[str | Path] = [tools / "cmake", "-G", "Ninja", "-S", ROOT / "csrc", "-B", BUILD, "-DLM_CUDA=off"]
    configure += [f"-DCMAKE_CXX_FLAGS_RELEASE={FLAGS}", f"-DPython_EXECUTABLE={sys.executable}"]
    configure += [f"-DCMAKE_MAKE_PROGRAM={tools / 'ninja'}"]
    compile_all: list[str | Path] = [tools / "cmake", "--build", BUILD]
    for command in (configure, compile_all):
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if done.returncode:
            sys.exit(done.stdout)


def units() -> list[str]:
    """The vector units that this machine can run."""
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    return ["generic", *(unit for unit in ("avx2", "avx512") if {"avx2": "avx2", "avx512": "avx512dq"}[unit] in flags)]


def run_in_sanitizer(arguments: list[str], unit: str) -> int:
    """Fuzzes ``unit`` in a process, and the ops after one that ended it in another. Returns how many ended it."""
    # the C++ runtime too: the sanitizer must find it to let exceptions pass
    found = [f"-print-file-name={name}" for name in ("libasan.so", "libstdc++.so")]
    runtimes = [subprocess.run(["g++", name], capture_output=True, text=True, check=True).stdout for name in found]
    settings = {
        "LD_PRELOAD": " ".join(map(str.strip, runtimes)),
        # Python frees little at exit; a request for too much memory must raise as it does without the sanitizer
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=512",
        "LMTRAIN_LIBRARY": str(LIBRARY),
        "LMTRAIN_CPU_UNIT": unit,
        "OMP_NUM_THREADS": "2",
    }
    command = [sys.executable, __file__, *arguments, "--unit", unit]
    LAST_CALL.unlink(missing_ok=True)
    after: list[str] = []
    faults = 0
    while status := subprocess.run([*command, *after], env=os.environ | settings, check=False).returncode:
        faults += 1
        if not LAST_CALL.exists():
            break
        last = LAST_CALL.read_text(encoding="utf-8").splitlines()[-1]
        LAST_CALL.unlink()
        print(f"{unit}: FAULT, exit status {status}, in call\n    {last}", flush=True)
        after = ["--after", last.split()[1].partition("(")[0]]
    return faults


class Arguments:
    """Random arguments for the ops' schemas. Sizes are drawn once per call, so that many calls fit together."""

    def __init__(self, seed: int) -> None:
        import torch

        self.torch = torch
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def call(self, schema: Any) -> list[Any]:
        """One list of arguments for ``schema``."""
        self.wild = self.random.choice((0.0, 0.05, 0.3))  # how often an argument is drawn from anything
        self.sizes = {letter: self.size() for letter in "BTHKVGNDCW"}
        self.dtype = self.random.choice((self.torch.float32, self.torch.float64) * 2 + (self.torch.bfloat16,))
        known = KNOWN.get(schema.name.removeprefix("lmtrain::").removesuffix("_backward"), {})
        return [self.value(argument, known.get(argument.name)) for argument in schema.arguments]

    def size(self) -> int:
        return self.random.choice((0, 1, 1, 2, 2, 3, 4, 5, 7, 8, 16, 17, 33, 64, 65))

    def value(self, argument: Any, shape: str | None) -> Any:
        kind = str(argument.type)
        if kind.startswith("Optional[") and self.random.random() < 0.4:
            return None
        kind = kind.removeprefix("Optional[").removesuffix("]")
        wild = self.random.random() < self.wild
        if kind == "Tensor":
            return self.tensor(argument.name, None if wild else shape)
        if kind == "int":
            tame = self.known_size(shape) if shape else self.random.choice((1, 1, 1, 2, 3, 8, 16, 64))
            return self.random.choice((-(2**63), -1, 0, 2**31, 2**40, 2**62, 2**63 - 1)) if wild else tame
        if kind == "float":
            return self.random.choice((0.0, -1.0, float("nan"), float("inf"), 1e308)) if wild else 1e-5
        if kind == "bool":
            return self.random.random() < 0.5
        if kind == "str":
            return self.random.choice(("", "\0", "SILU", "x" * 10000)) if wild else self.random.choice(("none", "silu"))
        raise TypeError(f"fuzz: {argument.name}: no values for the type {kind}")

    def tensor(self, name: str, shape: str | None) -> Any:
        torch = self.torch
        if shape is None:
            sizes = [self.size() for _ in range(self.random.randrange(6))]
            while len(sizes) > 1 and torch.Size(sizes).numel() > 1 << 16:
                sizes.pop()
        else:
            sizes = self.fitting([self.known_size(part) for part in shape.split()])
        dtype = {"starts": torch.bool, "positions": torch.int32}.get(name, self.dtype)
        if dtype is torch.bfloat16 and name not in NARROW:
            dtype = torch.float32
        if self.random.random() < self.wild / 8:
            return torch.zeros(1, dtype=dtype).expand(self.random.choice((2**20, 2**40)), *sizes[1:])
        if self.random.random() < self.wild:
            dtype = self.random.choice(
                (torch.int64, torch.int32, torch.bool, torch.uint8, torch.float16, torch.complex64, torch.float64)
            )
        return self.layout(self.filled(sizes, dtype))

    def known_size(self, part: str) -> int:
        """Of ``B`` (a letter of this call), ``T/64``, ``T+1/C`` (chunks), ``V/16*16`` (whole chunks) or ``3``."""
        count, _, times = part.partition("*")
        length, _, chunk = count.partition("/")
        length, _, more = length.partition("+")
        whole, step = (self.sizes[n] if n in self.sizes else int(n or 1) for n in (length, chunk))
        return -(-(whole + int(more or 0)) // max(step, 1)) * int(times or 1)

    def fitting(self, sizes: list[int]) -> list[int]:
        """Few enough elements for a call to be quick; the size that was cut is cut for the whole call."""
        if self.torch.Size(sizes).numel() > 1 << 17:
            self.sizes = {letter: min(size, 4) for letter, size in self.sizes.items()}
            return [min(size, 4) for size in sizes]
        return sizes

    def filled(self, sizes: list[int], dtype: Any) -> Any:
        torch = self.torch
        if not dtype.is_floating_point:
            return torch.randint(0, 2, sizes, generator=self.generator).to(dtype)
        values = torch.randn(sizes, generator=self.generator)
        special = self.random.random()
        if special < 0.1 and values.numel():
            values.view(-1)[self.random.randrange(values.numel())] = self.random.choice((float("nan"), float("inf")))
        return (-values.abs() if special < 0.5 else values).to(dtype)

    def layout(self, tensor: Any) -> Any:
        """``tensor`` contiguous, or with other strides over the same values."""
        how = self.random.random()
        if how < 0.6 or not tensor.dim():
            return tensor
        if how < 0.75:
            return tensor.transpose(0, -1).contiguous().transpose(0, -1)
        if how < 0.85:
            return tensor.repeat_interleave(2, dim=-1)[..., ::2]
        if how < 0.95:
            return tensor[:1].expand_as(tensor) if tensor.shape[0] else tensor
        padded = self.torch.cat([tensor.reshape(-1)[:1], tensor.reshape(-1)]) if tensor.numel() else tensor
        return padded[1:].view(tensor.shape) if tensor.numel() else tensor  # off the allocation's alignment


# arguments that an op may take in bf16, where it does; the others are then in the computing dtype
NARROW = frozenset({"x", "gate", "tail", "grad_y", "grad_tail"})
# op -> argument -> its shape, for calls that fit together; an argument without one is drawn freely, so that an op that
# is not here is fuzzed all the same
SCAN = {"starts": "B T", "grad_y": "B T H V", "v": "B T H V", "initial_state": "B H K V", "grad_state": "B H K V"}
SCAN |= {"grad_final": "B H K V"}
KEYED = {name: "B T H K" for name in ("q", "k", "g", "r", "w", "a", "b", "decay")}
KNOWN: dict[str, dict[str, str]] = {
    "gla": SCAN | KEYED | {"u": "H K"},
    "dplr": SCAN | KEYED | {"kept": "B H T/32 K V"},
    "delta": SCAN | KEYED | {"beta": "B T H", "log_decay": "B T H", "wrong": "B T H V", "entering": "B H T+1/32 K V"},
    "ssd": {
        "x": "B T H V", "grad_y": "B T H V", "log_a": "B T H", "b": "B T 1 K", "c": "B T 1 K", "B": "B T 1 K",
        "C": "B T 1 K", "starts": "B T", "initial_state": "B H K V", "grad_final": "B H K V", "chunk": "C",
        "states": "B T/C H K V/16*16",
    },
    "selective_scan": {
        "x": "B T D", "dt": "B T D", "a": "D N", "A": "D N", "b": "B T 1 N", "c": "B T 1 N", "B": "B T 1 N",
        "C": "B T 1 N", "starts": "B T", "initial_state": "B D N", "grad_y": "B T D", "grad_state": "B D N",
        "grad_final": "B D N", "checkpoints": "B T/32 N D",
    },
    "diag_scan": {
        "x": "B T D", "log_a": "B T D", "starts": "B T", "initial_state": "B D", "grad_y": "B T D", "h": "B T D",
        "y": "B T D", "grad_state": "B D", "grad_final": "B D",
    },
    "causal_conv1d": {
        "x": "B T C", "weight": "C 4", "bias": "C", "positions": "B T", "tail": "B 3 C", "grad_y": "B T C",
        "grad_tail": "B 3 C",
    },
    "rmsnorm": {"x": "B D", "weight": "D", "gate": "B D", "grad_y": "B D", "rstd": "B 1", "num_groups": "1"},
    "wkv4": {
        "v": "B T D", "k": "B T D", "w": "D", "u": "D", "starts": "B T", "initial_state": "B 3 D", "grad_y": "B T D",
        "grad_state": "B 3 D", "grad_final": "B 3 D",
    },
}  # fmt: skip


def spell(name: str, arguments: list[Any]) -> str:
    """The call, as text."""
    parts = [
        f"{a.dtype}{list(a.shape)} strides {list(a.stride())} offset {a.storage_offset()}"
        if hasattr(a, "dtype")
        else repr(a)[:80]
        for a in arguments
    ]
    return f"{name}({', '.join(parts)})"


def fuzz(calls: int, seed: int, only: str | None, after: str, last_call: Path) -> None:
    """All calls of this process: of the ops after ``after``, in order. Prints, per op, how many returned."""
    import torch

    torch.ops.load_library(os.environ["LMTRAIN_LIBRARY"])
    schemas = [s for s in torch._C._jit_get_all_schemas() if s.name.startswith("lmtrain::") and s.arguments]
    schemas = sorted((s for s in schemas if only in (None, s.name.removeprefix("lmtrain::"))), key=lambda s: s.name)
    if not schemas:
        sys.exit(f"fuzz: the library has no op {only}")
    schemas = [s for s in schemas if s.name > after]
    with last_call.open("w", encoding="utf-8") as record:
        for schema in schemas:
            # by name: an op that is new does not change the calls of the others
            source, returned = Arguments(random.Random(f"{seed} {schema.name}").getrandbits(32)), 0
            function = getattr(torch.ops.lmtrain, schema.name.removeprefix("lmtrain::"))
            for number in range(calls):
                arguments = source.call(schema)
                record.write(f"#{number} {spell(schema.name, arguments)}\n")
                record.flush()
                try:
                    results = function(*arguments)
                    returned += 1
                except (RuntimeError, TypeError, ValueError):
                    continue
                for result in results if isinstance(results, tuple) else (results,):
                    result.double().sum()  # reads every element
            print(
                f"{os.environ.get('LMTRAIN_CPU_UNIT', ''):8}{schema.name:36}{returned:6} of {calls} returned",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--calls", type=int, default=1000, help="of each op, with each vector unit")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--op", help="this op alone")
    parser.add_argument("--unit", help=argparse.SUPPRESS)
    parser.add_argument("--after", default="", help=argparse.SUPPRESS)
    parser.add_argument("--last-call", type=Path, default=LAST_CALL, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.unit:
        fuzz(asked.calls, asked.seed, asked.op, asked.after, asked.last_call)
        return
    build()
    sys.exit(sum(run_in_sanitizer(sys.argv[1:], unit) for unit in units()) > 0)


if __name__ == "__main__":
    main()
