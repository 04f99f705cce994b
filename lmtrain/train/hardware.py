"""The device of this process: choosing it, its dtype, its peak, its memory, and a description for the record."""

from __future__ import annotations

import os
import platform
import resource
import sys
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

from lmtrain.errors import UsageError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
# Dense bf16 FLOP/s of the SXM boards, from the vendor's data sheets; other boards of the family differ.
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}
OTHER_BOARDS = ("PCIe", "NVL")


def resolve_device(device: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """The device of this rank (GPU number LOCAL_RANK); UsageError if cuda is asked for and torch sees none."""
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UsageError(f"device=cuda: torch {torch.__version__} sees no GPU; install a CUDA build or use device=cpu")
    local_rank, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    # By the number of processes, not by the rank: all refuse alike, instead of one in silence while others wait for it.
    processes = max(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), local_rank + 1)
    if processes > count:
        raise UsageError(
            f"device={device}: {processes} processes on this machine, but torch sees {count} "
            f"GPU{'s' if count > 1 else ''}; use --nproc-per-node {count} or device=cpu"
        )
    return torch.device("cuda", local_rank)


def resolve_dtype(dtype: Literal["auto", "float32", "bfloat16", "float64"], device: torch.device) -> torch.dtype:
    """The compute dtype; auto: bfloat16 on GPUs and on CPUs that multiply it fast (AVX512-BF16, AMX), else float32."""
    if dtype != "auto":
        return DTYPES[dtype]
    fast = device.type == "cuda" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Dense peak of the device in FLOP/s, None where it is not known (CPUs, other boards, other dtypes)."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    return _board_peak(torch.cuda.get_device_name(device))


def _board_peak(name: str) -> float | None:
    words = name.replace("-", " ").split()
    if any(board in words for board in OTHER_BOARDS):
        return None
    return next((peak for board, peak in PEAK_FLOPS.items() if board in words), None)


def memory_bytes(device: torch.device) -> int:
    """Peak so far: bytes torch allocated on a GPU, or this process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts KiB, macOS bytes.
    return peak if sys.platform == "darwin" else peak * 1024


def describe(device: torch.device) -> dict[str, Any]:
    """Host, processor, memory, threads and GPU, ready for environment.json. Thread counts can change result bits."""
    gpu = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        gpu = {
            "name": properties.name,
            "count": torch.cuda.device_count(),
            "memory_bytes": properties.total_memory,
            "capability": f"{properties.major}.{properties.minor}",
        }
    return {
        "host": platform.node(),
        "system": platform.platform(),
        "cpu": _cpu_name(),
        "cores": psutil.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "threads": {"intra_op": torch.get_num_threads(), "inter_op": torch.get_num_interop_threads()},
        "gpu": gpu,
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
