"""Choosing device and dtype, and what is said when that cannot be."""

import pytest
import torch

from lmtrain.errors import UsageError
from lmtrain.train import hardware

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)


def test_cuda_asked_and_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match=r"torch \d+\.\d+.*device=cpu") as caught:
        hardware.resolve_device("cuda")
    assert torch.__version__ in str(caught.value)
    assert hardware.resolve_device("auto") == CPU


def test_each_rank_takes_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert hardware.resolve_device("auto") == torch.device("cuda", 1) and hardware.resolve_device("cpu") == CPU
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UsageError, match=r"3 processes .*sees 2 GPUs; use --nproc-per-node 2"):
        hardware.resolve_device("cuda")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")  # the first of them refuses too, instead of waiting for the third
    with pytest.raises(UsageError, match=r"3 processes"):
        hardware.resolve_device("auto")


@pytest.mark.parametrize(
    ("avx512", "amx", "expected"), [(0, 0, torch.float32), (1, 0, torch.bfloat16), (0, 1, torch.bfloat16)]
)
def test_auto_dtype(monkeypatch: pytest.MonkeyPatch, avx512: bool, amx: bool, expected: torch.dtype) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bool(avx512))
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: bool(amx))
    assert hardware.resolve_dtype("auto", CPU) == expected
    assert hardware.resolve_dtype("auto", CUDA) == torch.bfloat16
    assert hardware.resolve_dtype("float64", CPU) == torch.float64


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", None),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA A10", None),
    ],
)
def test_peaks(monkeypatch: pytest.MonkeyPatch, name: str, peak: float | None) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert hardware.peak_flops(CUDA, torch.bfloat16) == peak
    assert hardware.peak_flops(CUDA, torch.float32) is None and hardware.peak_flops(CPU, torch.bfloat16) is None


def test_memory_is_a_peak_in_bytes() -> None:
    before = hardware.memory_bytes(CPU)
    block = torch.ones(64 * 2**20, dtype=torch.uint8)
    del block
    assert 50 * 2**20 < before <= hardware.memory_bytes(CPU) < 2**40
