"""``python -m lmtrain.ops``: what it says of every op, device and dtype."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from lmtrain.ops import library
from lmtrain.ops.__main__ import DEVICES, DTYPES, page, survey


@pytest.fixture(autouse=True)
def auto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LMTRAIN_KERNELS", raising=False)


def test_every_backend_is_used_or_said_why_not() -> None:
    found = survey()["ops"]
    for op, backends in library.registered().items():
        for device in DEVICES:
            for name, dtype in DTYPES.items():
                choice = found[op][device][name]
                assert choice["used"] == library.backend(op, device, dtype)
                assert {choice["used"], *choice["not"]} == {backend.name for backend in backends}
                assert choice["used"] not in choice["not"] and all(choice["not"].values())


def test_reasons() -> None:
    found = survey()["ops"]
    assert found["causal_conv1d"]["cpu"]["fp32"]["not"]["reference"] == "cpu comes first"
    assert found["causal_conv1d"]["cuda"]["fp32"]["not"]["cpu"] == "it runs on cpu, not on cuda"
    assert found["attention"]["cpu"]["fp64"]["not"]["torch"] == "it does not take float64"


def test_a_present_backend_that_keeps_less_says_what(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmtrain.ops.adapters.find_spec", lambda package: package)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    why = library.others("causal_conv1d", "cuda", torch.float32)["causal_conv1d"]
    assert why.startswith("only by kernels=causal_conv1d: kernels of other than 2 to 4 taps")


def test_a_page_for_a_person() -> None:
    text = page(survey())
    lines = text.splitlines()
    assert f"cpu unit: {torch.ops.lmtrain.cpu_unit()}" in lines[0] and "kernels=auto" in lines[0]
    heading = next(line.split("  ") for line in lines if line.startswith("op "))
    assert [cell.strip() for cell in heading if cell] == ["op", *(f"{d} {t}" for d in DEVICES for t in DTYPES)]
    assert any(line.split()[:2] == ["causal_conv1d", "cpu"] for line in lines)
    assert any(line.split(maxsplit=1) == ["fla", library.GPU_COMMAND] for line in lines)
    assert any(line.split(maxsplit=1) == ["cpu", library.BUILD_COMMAND] for line in lines)
    assert max(map(len, lines)) <= 110


@pytest.mark.parametrize("kernels", ["cpu", "reference"])
def test_it_runs_and_its_json_is_the_survey(kernels: str) -> None:
    done = [
        subprocess.run(
            [sys.executable, "-m", "lmtrain.ops", *arguments],
            env=os.environ | {"LMTRAIN_KERNELS": kernels},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for arguments in ([], ["--json"])
    ]
    assert f"kernels={kernels}" in done[0]
    found = json.loads(done[1])
    assert found["kernels"] == kernels and set(found["ops"]) == set(library.registered())
    cuda = found["ops"]["causal_conv1d"]["cuda"]["fp32"]
    if kernels == "cpu":
        assert cuda["used"] is None and "it runs on cpu, not on cuda" in cuda["not"]["cpu"]
        assert "refused" in done[0]
    else:
        assert cuda["used"] == "reference" and cuda["not"]["cpu"] == "it runs on cpu, not on cuda"
