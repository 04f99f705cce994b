"""Other projects' kernels as backends: each op, run through its adapter, is the op; and what an adapter refuses."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lmtrain.errors import UsageError
from lmtrain.ops import Documents, attention, causal_conv1d, delta, dplr, gla, library, selective_scan, ssd
from lmtrain.ops.op import Op
from tests.ops import library_fakes
from tests.ops.scan_cases import assert_close, documents, rand, run

B, H, K, V = 2, 4, 5, 3


def logs(*shape: int, seed: int) -> Tensor:
    return -rand(*shape, seed=seed).exp() / 4


def unit(*shape: int, seed: int) -> Tensor:
    return torch.nn.functional.normalize(rand(*shape, seed=seed), dim=-1)


def gla_inputs(length: int) -> dict[str, Tensor]:
    q, k = (rand(B, length, H, K, seed=seed) for seed in (1, 2))
    return {"v": rand(B, length, H, V, seed=0), "q": q, "k": k, "g": logs(B, length, H, K, seed=3)}


def delta_inputs(length: int) -> dict[str, Tensor]:
    q, k = (unit(B, length, H // 2, K, seed=seed) for seed in (1, 2))
    return {"v": rand(B, length, H, V, seed=0), "q": q, "k": k, "beta": 2 * rand(B, length, H, seed=3).sigmoid()}


def ssd_inputs(length: int) -> dict[str, Tensor]:
    b, c = (rand(B, length, 2, K, seed=seed) for seed in (1, 2))
    # a log decay of 0 is a token that forgets nothing
    return {"x": rand(B, length, H, V, seed=0), "log_a": logs(B, length, H, seed=3).where(b[..., :1, 0] > 0, 0)} | {
        "B": b,
        "C": c,
    }


def dplr_inputs(length: int) -> dict[str, Tensor]:
    a = unit(B, length, H, K, seed=4)
    tensors = {name: rand(B, length, H, K, seed=seed) for seed, name in enumerate("rk")}
    v, w = rand(B, length, H, V, seed=2), logs(B, length, H, K, seed=3)
    return {"v": v, "r": tensors["r"], "w": w, "k": tensors["k"], "a": -a, "b": a * 0.5}


# name of the case: op, backend, library's function, inputs, the shape of a state
CASES: dict[str, tuple[Op, str, str, Callable[[int], dict[str, Tensor]], tuple[int, ...]]] = {
    "gla": (gla, "fla", "chunk_gla", lambda n: gla_inputs(n), (B, H, K, V)),
    "rwkv6": (gla, "fla", "chunk_rwkv6", lambda n: gla_inputs(n) | {"u": rand(H, K, seed=5)}, (B, H, K, V)),
    "ssd": (ssd, "fla", "chunk_simple_gla", ssd_inputs, (B, H, K, V)),
    "deltanet": (delta, "fla", "chunk_delta_rule", delta_inputs, (B, H, K, V)),
    "gdn": (
        delta,
        "fla",
        "chunk_gated_delta_rule",
        lambda n: delta_inputs(n) | {"g": logs(B, n, H, seed=5)},
        (B, H, K, V),
    ),
    "kda": (delta, "fla", "chunk_kda", lambda n: delta_inputs(n) | {"g": logs(B, n, H, K, seed=5)}, (B, H, K, V)),
    "dplr": (dplr, "fla", "chunk_rwkv7", dplr_inputs, (B, H, K, V)),
    "conv": (
        causal_conv1d,
        "causal_conv1d",
        "causal_conv1d_fn",
        lambda n: {"x": rand(B, n, 8, seed=0), "weight": rand(8, 4, seed=1), "bias": rand(8, seed=2)},
        (B, 3, 8),
    ),
}
OPTIONAL = {gla: 5, delta: 5}  # ops whose last input may be None: how many there are


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return library_fakes.install(monkeypatch)


def use(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Every op runs backend ``name``, which the CPU would refuse."""
    monkeypatch.setattr(library, "backend", lambda op, device, dtype: name)


def call(op: Op, tensors: dict[str, Tensor], docs: Documents | None) -> tuple[Tensor, Tensor]:
    inputs = [tensor for name, tensor in tensors.items() if name != "state"]
    inputs += [None] * (OPTIONAL.get(op, len(inputs)) - len(inputs))
    return op(*inputs, docs=docs, initial_state=tensors.get("state"))


@pytest.mark.parametrize("carried", [False, True], ids=["zero", "state"])
@pytest.mark.parametrize("kind", ["none", "fresh", "carried", "edges"])
@pytest.mark.parametrize("case", CASES)
def test_an_op_through_its_adapter_is_the_op(
    case: str, kind: str, carried: bool, called: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    op, backend, function, inputs, state = CASES[case]
    docs, tensors = documents(kind, 17, chunk=8), inputs(17)
    tensors |= {"state": rand(*state, seed=7)} if carried else {}

    use(monkeypatch, "reference")
    expected = run(lambda t, docs: call(op, t, docs), tensors, docs)
    use(monkeypatch, backend)
    got = run(lambda t, docs: call(op, t, docs), tensors, docs)
    assert called == [function]
    assert_close(got, expected, 1e-10)


@pytest.mark.parametrize("case", CASES)
def test_another_document_does_not_leak(case: str, called: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    op, backend, _, inputs, state = CASES[case]
    docs = Documents.from_ids(torch.tensor([[0] * 5 + [1] * 4] * B), torch.tensor([0, 2]))
    tensors = inputs(9) | {"state": rand(*state, seed=7)}
    use(monkeypatch, backend)
    y, final = call(op, tensors, docs)
    for name, tensor in tensors.items():
        if name not in ("weight", "bias", "u", "state"):
            tensor[:, :5] = float("nan")
    tensors["state"].fill_(float("nan"))
    y_beside, final_beside = call(op, tensors, docs)
    assert torch.equal(y[:, 5:], y_beside[:, 5:]) and torch.equal(final, final_beside)


@pytest.mark.parametrize("case", CASES)
def test_an_empty_row_keeps_its_state(case: str, called: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    op, backend, _, inputs, state = CASES[case]
    tensors = inputs(0) | {"state": rand(*state, seed=7)}
    use(monkeypatch, backend)
    y, final = call(op, tensors, None)
    assert y.shape[:2] == (B, 0) and torch.equal(final, tensors["state"]) and not called


def scan_inputs(length: int) -> dict[str, Tensor | None]:
    dt, a = rand(B, length, 6, seed=1).exp() / 4, -rand(6, K, seed=2).exp()
    b, c = (rand(B, length, 2, K, seed=seed) for seed in (3, 4))
    return {"x": rand(B, length, 6, seed=0), "dt": dt, "A": a, "B": b, "C": c}


def test_selective_scan_of_mamba_ssm(called: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {name: tensor for name, tensor in scan_inputs(17).items() if tensor is not None}
    docs = documents("fresh", 17)

    def scan(t: dict[str, Tensor], docs: Documents | None) -> tuple[Tensor, Tensor]:
        y, state = selective_scan(*t.values(), docs=docs)
        return y, state.detach()

    use(monkeypatch, "reference")
    expected = run(scan, tensors, docs)
    use(monkeypatch, "mamba_ssm")
    assert_close(run(scan, tensors, docs), expected, 1e-10)
    assert called == ["selective_scan_fn"]


REFUSED = {
    "decay=longhorn": ({"A": None}, None),
    "documents within a row": ({}, Documents.from_ids(torch.tensor([[0, 0, 1, 1]] * B))),
    "an initial state": ({"state": torch.zeros(B, 6, K)}, None),
    "an empty row": ({name: t for name, t in scan_inputs(0).items() if name != "A"}, None),
}


@pytest.mark.parametrize("combination", REFUSED)
def test_what_mamba_ssm_refuses(combination: str, called: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    changed, docs = REFUSED[combination]
    tensors = scan_inputs(4) | changed
    use(monkeypatch, "mamba_ssm")
    with pytest.raises(
        UsageError, match=f"selective_scan: backend mamba_ssm .* not serve {combination}; kernels=.* does"
    ):
        selective_scan(
            *(tensors[name] for name in ("x", "dt", "A", "B", "C")), docs=docs, initial_state=tensors.get("state")
        )
    assert not called


def test_mamba_ssm_refuses_the_gradient_of_the_final_state(called: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, "mamba_ssm")
    x, *others = scan_inputs(4).values()
    y, state = selective_scan(x.requires_grad_(), *others)
    y.sum().backward(retain_graph=True)
    with pytest.raises(UsageError, match=r"does not serve the gradient of the final state; kernels=.* does"):
        state.sum().backward()


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("kind", ["none", "fresh", "carried", "edges"])
def test_attention_of_flash_attn(
    kind: str, window: int | None, called: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    docs = documents("fresh" if kind == "none" else kind, 17, chunk=8)
    assert docs is not None
    tensors = {"q": rand(B, 17, H, 8, seed=0)} | {name: rand(B, 17, 2, 8, seed=1 + (name == "v")) for name in "kv"}
    settings = {"positions": docs.positions(), "window": window, "scale": 0.3}

    def attend(t: dict[str, Tensor], _: Documents | None) -> tuple[Tensor, Tensor]:
        o = attention.output(**t, **settings, docs=docs)
        return o, o.detach()[:, :0]

    use(monkeypatch, "reference")
    expected = run(attend, tensors, None)
    use(monkeypatch, "flash_attn")
    assert_close(run(attend, tensors, None), expected, 1e-10)
    assert called == ["flash_attn_varlen_func"]


@pytest.mark.parametrize(
    ("queries", "key_dim", "value_dim", "combination"),
    [
        (2, 8, 8, "keys other than the row's own"),
        (4, 12, 12, r"heads of 12 \(eights up to 256\)"),
        (4, 264, 264, r"heads of 264 \(eights up to 256\)"),
        (4, 16, 8, "values of 8 beside keys of 16"),
        (0, 8, 8, "an empty row"),
    ],
)
def test_what_flash_attn_refuses(
    queries: int, key_dim: int, value_dim: int, combination: str, called: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = queries and 4
    docs = Documents.from_ids(torch.zeros(B, queries, dtype=torch.int32))
    q, k, v = (torch.zeros(B, n, 2, w) for n, w in ((queries, key_dim), (keys, key_dim), (keys, value_dim)))
    use(monkeypatch, "flash_attn")
    with pytest.raises(UsageError, match=rf"attention: backend flash_attn .* {combination}; kernels=torch does"):
        attention.output(q, k, v, positions=docs.positions(), scale=1.0, docs=docs)
    assert not called


@pytest.mark.parametrize("op", [delta, dplr])
def test_fla_refuses_wide_keys(op: Op, called: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    v, key = torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 1, 264)
    inputs = (v, key, key, torch.zeros(1, 2, 1), None) if op is delta else (v, key, key, key, key, key)
    use(monkeypatch, "fla")
    with pytest.raises(UsageError, match=rf"{op.name}: backend fla .* key heads of 264 \(up to 256\); kernels=.* does"):
        op(*inputs)


@pytest.mark.parametrize(
    ("channels", "width", "combination"), [(8, 5, r"5 taps \(2 to 4\)"), (12, 4, r"12 channels \(multiples of 8\)")]
)
def test_what_causal_conv1d_refuses(
    channels: int, width: int, combination: str, called: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, "causal_conv1d")
    with pytest.raises(UsageError, match=rf"causal_conv1d: backend causal_conv1d .* {combination}; kernels=.* does"):
        causal_conv1d(torch.zeros(1, 3, channels), torch.zeros(channels, width))


@pytest.mark.parametrize("activation", ["none", "silu"])
@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("biased", [False, True])
def test_widths_and_activations_of_causal_conv1d(
    activation: str, width: int, biased: bool, called: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight, bias = rand(B, 2, 8, seed=0), rand(8, width, seed=1), rand(8, seed=2) if biased else None
    outputs = []
    for name in ("reference", "causal_conv1d"):
        use(monkeypatch, name)
        outputs.append(causal_conv1d(x, weight, bias, activation=activation))
    assert_close(*({"y": y, "tail": tail} for y, tail in reversed(outputs)), 1e-12)


SERVED = {
    "fla": {"gla", "ssd", "delta", "dplr"},
    "flash_attn": {"attention"},
    "mamba_ssm": {"selective_scan"},
    "causal_conv1d": {"causal_conv1d"},
}


@pytest.mark.parametrize("name", SERVED)
def test_who_serves_what_and_when(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for there in (False, True):
        monkeypatch.setattr("lmtrain.ops.adapters.find_spec", lambda package, there=there: package if there else None)
        named = [(op, b) for op, backends in library.registered().items() for b in backends if b.name == name]
        found = dict(named)
        assert set(found) == SERVED[name]
        for backend in found.values():
            why = backend.refusal("cuda", torch.bfloat16)
            assert why is None if there else f"{name} is not installed" in why and library.GPU_COMMAND in why
            assert backend.refusal("cpu", torch.bfloat16) == "it runs on cuda, not on cpu"
            assert backend.refusal("cuda", torch.float64) == "it does not take float64"


def test_without_a_device_a_library_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmtrain.ops.adapters.find_spec", lambda package: package)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (backend,) = (b for b in library.registered()["gla"] if b.name == "fla")
    assert backend.refusal("cuda", torch.bfloat16) == "torch sees no CUDA device"


def test_auto_takes_a_library_only_for_the_whole_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LMTRAIN_KERNELS", raising=False)
    monkeypatch.setattr("lmtrain.ops.adapters.find_spec", lambda package: package)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    library._choose.cache_clear()
    try:
        chosen = library.chosen("cuda", torch.bfloat16)
        assert {op for op, name in chosen.items() if name == "fla"} == {"gla", "ssd"}
        assert not set(chosen.values()) & {"flash_attn", "mamba_ssm", "causal_conv1d"}
        library.set_kernels("fla")
        chosen = library.chosen("cuda", torch.bfloat16)
        assert {op for op, name in chosen.items() if name == "fla"} == SERVED["fla"]
    finally:
        library._choose.cache_clear()


@pytest.mark.parametrize(
    ("path", "fake"), [(path, fake) for path, fakes in library_fakes.MODULES.items() for fake in fakes]
)
def test_fakes_have_the_signature_of_what_is_installed(path: str, fake: Callable[..., object]) -> None:
    try:
        real = getattr(importlib.import_module(path), fake.__name__)
    except ImportError as missing:
        pytest.skip(str(missing))
    assert path not in sys.modules or not isinstance(sys.modules[path], library_fakes.Fake)
    ours, theirs = (dict(inspect.signature(function).parameters) for function in (fake, real))
    for name, parameter in ours.items():
        if parameter.kind is not parameter.VAR_KEYWORD:
            assert theirs[name].default == parameter.default, name
    assert list(ours) == list(theirs)
