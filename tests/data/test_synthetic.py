"""Sources that are functions: blocks of whole documents, what is asked in them, and what a wrong function is told."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from lmtrain.data.blocks.function import SAMPLED, DocumentFunction, document_function
from lmtrain.data.blocks.synthetic import SyntheticBlocks, document_seed
from lmtrain.data.catalog import Catalog
from lmtrain.data.config import DataConfig, SourceConfig
from lmtrain.data.loader import Loader
from lmtrain.data.order.schedule import ScheduleLog
from lmtrain.data.tokenizer import Tokenizer
from lmtrain.errors import DataError, LmtrainError, UsageError
from lmtrain.eval.probes.parity import parity
from lmtrain.ops.cross_entropy import IGNORE

HERE = __name__


@document_function
def ragged(seed: int, index: int, *, longest: int) -> NDArray[np.int64]:
    """2 to ``longest`` tokens, the first of them ``index`` mod 2^31, the second from the seed."""
    rng = np.random.default_rng((seed, index))
    length = rng.integers(2, longest + 1)
    return np.r_[index % 2**31, seed % 1000, rng.integers(0, 99, length - 2)]


@dataclass
class Asked:
    tokens: NDArray[np.int32]
    labels: NDArray[np.int32]


@document_function
def echo(seed: int, index: int) -> Asked:
    """A number, a pause, and the number again, which is the only answer."""
    number = 1 + index % 7
    return Asked(np.array([number, 0, number]), np.array([-100, number, -100]))


@document_function
def floats(seed: int, index: int) -> NDArray[np.float64]:
    return np.ones(3)


@document_function
def huge(seed: int, index: int) -> list[int]:
    return [1, 2**31]


@document_function
def one(seed: int, index: int) -> list[int]:
    return [1]


@document_function
def elsewhere(seed: int, index: int, *, answer: int) -> Asked:
    """The answer is not among the tokens."""
    return Asked(np.array([1, 2, 3]), np.array([answer, -100, -100]))


@document_function
def sometimes(seed: int, index: int) -> Any:
    """Every other document has labels of its own."""
    return elsewhere(seed, index, answer=9) if index % 2 else [5, 6]


@document_function
def breaks(seed: int, index: int) -> list[int]:
    return [1, 10 // (40 - index)]


@document_function
def wanders(seed: int, index: int) -> list[int]:
    """Not a function of seed and index."""
    CALLS.append(index)
    return [1, len(CALLS)]


CALLS: list[int] = []


@document_function
def uneven(seed: int, index: int) -> list[list[int]]:
    return [[1, 2], [3]]


@document_function
def quits(seed: int, index: int) -> list[int]:
    raise SystemExit(3)


@document_function
def late(seed: int, index: int) -> Asked:
    return Asked(np.array([1, 2, 3]), np.array([2, 3, 4]))


def blocks(
    function: str = "ragged", length: int = 63, seed: int = 0, name: str = "made", **arguments: Any
) -> SyntheticBlocks:
    return SyntheticBlocks(DocumentFunction(name, f"{HERE}:{function}", arguments), length, seed)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 64), st.integers(0, 2**31), st.integers(0, 2**64 - 1))
def test_blocks_hold_whole_documents_of_their_own(longest: int, p: int, seed: int) -> None:
    made = blocks(longest=longest, seed=seed)
    block = made.block(p)
    assert [part.shape for part in block if part is not None] == [(64,)] * (2 + (block.real is not None))
    real = np.ones(64, dtype=bool) if block.real is None else block.real
    assert (np.diff(real.astype(int)) <= 0).all() and real[0], "padding is on the right"
    assert (np.diff(block.ids) >= 0).all() and block.ids[0] == 0
    key = None
    for number in np.unique(block.ids[real]):
        document = block.tokens[(block.ids == number) & real]
        key = document[1] if key is None else key
        assert document[0] == (p * 64 + int(number)) % 2**31 and document[1] == key
    left_out = 64 - real.sum()
    assert left_out < longest, "padding only where no further document fits"
    assert not real.all() or block.real is None
    assert block.labels is None


def test_labels_are_the_answers() -> None:
    block = blocks("echo", length=7).block(5)
    assert block.tokens.tolist() == [6, 0, 6, 7, 0, 7, 0, 0]
    assert block.ids.tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
    assert block.real is not None and block.real.tolist() == [True] * 6 + [False] * 2
    assert block.labels is not None and block.labels.tolist() == [-100, 6, -100, -100, 7, -100, -100, -100]


def test_documents_without_labels_beside_those_that_have_some() -> None:
    block = blocks("sometimes", length=7).block(1)
    assert block.tokens.tolist() == [5, 6, 1, 2, 3, 5, 6, 0]
    assert block.labels is not None and block.labels.tolist() == [6, -100, 9, -100, -100, 6, -100, -100]


def test_parity_is_a_source() -> None:
    made = SyntheticBlocks(DocumentFunction("odd", "lmtrain.eval.probes.parity:parity", {"bits": 20}), 63, 11)
    block = made.block(5)
    own = [parity(document_seed("odd", 11), 5 * 64 + number, bits=20) for number in range(3)]
    assert block.tokens.tolist() == [*np.concatenate([one.tokens for one in own]), 0]
    assert block.labels is not None and block.labels.tolist() == [
        *np.concatenate([one.labels for one in own]), IGNORE,
    ]  # fmt: skip


def test_the_same_for_the_same_seed_name_and_index() -> None:
    first = blocks(longest=20)
    again = pickle.loads(pickle.dumps(first))
    assert again == first
    for p in (0, 7, 2**32 - 1):
        assert all(np.array_equal(a, b) for a, b in zip(first.block(p), again.block(p), strict=True))
    assert not np.array_equal(first.block(3).tokens, blocks(longest=20, seed=1).block(3).tokens)
    assert not np.array_equal(first.block(3).tokens, blocks(longest=20, name="other").block(3).tokens)


def test_a_token_outside_the_vocabulary_is_placed() -> None:
    made = blocks("echo", length=7)
    assert str(made.out_of_range(5, 3, 4)) == (
        f"data.sources.made.synthetic: {HERE}:echo: document 41: token id 7 is outside the vocabulary of 4"
    )
    made = blocks("elsewhere", length=7, answer=50)
    assert str(made.out_of_range(5, 3, 50)) == (
        f"data.sources.made.synthetic: {HERE}:elsewhere: document 41: label id 50 is outside the vocabulary of 50"
    )


def test_a_sample_is_held_to_the_vocabulary() -> None:
    DocumentFunction("made", f"{HERE}:elsewhere", {"answer": 49}).check_vocabulary(50)
    for name, arguments, told in [
        ("elsewhere", {"answer": 50}, "document 0: label id 50"),
        ("elsewhere", {"answer": -7}, "document 0: label id -7"),
        ("ragged", {"longest": 9}, r"document \d+: token id \d+"),
    ]:
        with pytest.raises(DataError, match=f"{told} is outside the vocabulary of 50"):
            DocumentFunction("made", f"{HERE}:{name}", arguments).check_vocabulary(50)


def test_a_function_is_named_by_what_it_makes() -> None:
    def digest(name: str, source: str = "made", **arguments: Any) -> str:
        return DocumentFunction(source, f"{HERE}:{name}", arguments).digest()

    assert digest("ragged", longest=9) == digest("ragged", "other", longest=9) != digest("ragged", longest=10)
    assert digest("elsewhere", answer=1) != digest("elsewhere", answer=2), "labels count"
    assert digest("wanders") != digest("wanders") and len(CALLS) == 2 * SAMPLED


@pytest.mark.parametrize(
    ("name", "arguments", "error", "message"),
    [
        ("no colon", {}, UsageError, "expected package.module:function"),
        ("no.such.module:f", {}, UsageError, "No module named 'no'; a module of your own must be installed"),
        ("lmtrain.eval.probes.mqr:mqar", {}, UsageError, "No module named .*; did you mean mqar"),
        ("lmtrain.eval.prob.mqar:mqar", {}, UsageError, "did you mean probes"),
        (f"{HERE}:raged", {}, UsageError, "did you mean ragged"),
        ("os:kill", {}, UsageError, "not a function that makes documents; mark it with @document_function"),
        ("unittest.mock:call", {}, UsageError, "not a function that makes documents"),
        (f"{HERE}:ragged", {}, UsageError, "arguments: .*longest"),
        (f"{HERE}:ragged", {"longest": 9, "lenght": 1}, UsageError, "lenght"),
        (f"{HERE}:floats", {}, DataError, "expected at least two integers"),
        (f"{HERE}:one", {}, DataError, "expected at least two integers"),
        (f"{HERE}:huge", {}, DataError, "2147483648 does not fit into 32 bits"),
        (f"{HERE}:uneven", {}, DataError, "document 0: ValueError: .*inhomogeneous"),
        (f"{HERE}:quits", {}, DataError, "document 0: SystemExit: 3"),
        (f"{HERE}:late", {}, DataError, "expected one label for each token, and -100 for the last"),
    ],
)
def test_wrong_functions_are_refused(
    name: str, arguments: dict[str, Any], error: type[LmtrainError], message: str
) -> None:
    with pytest.raises(error, match=message):
        SyntheticBlocks(DocumentFunction("made", name, arguments), 63, 0)


def test_a_module_that_is_a_script_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a_script.py").write_text("raise SystemExit(3)\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError, match=r"data.sources.made.synthetic: a_script:main: SystemExit: 3"):
        DocumentFunction("made", "a_script:main").digest()


def test_an_error_in_a_function_names_the_document() -> None:
    with pytest.raises(DataError, match=rf"{HERE}:breaks: document 40: ZeroDivisionError"):
        blocks("breaks", length=127)


def test_a_document_longer_than_a_block_is_refused() -> None:
    with pytest.raises(DataError, match="it has 3 tokens, a block holds 2"):
        blocks("echo", length=1)


def test_mqar_is_a_source() -> None:
    arguments = {"pairs": 4, "length": 32, "num_keys": 8, "num_values": 8}
    block = SyntheticBlocks(DocumentFunction("recall", "lmtrain.eval.probes.mqar:mqar", arguments), 127, 0).block(9)
    assert block.labels is not None
    asked = np.flatnonzero(block.labels != IGNORE)
    assert len(asked) == 4 * 4 and (block.labels[asked] == block.tokens[asked + 1]).all()
    assert (block.labels[asked] > 8).all(), "answers are values"


@document_function
def late_label(seed: int, index: int) -> Asked:
    """Right in the documents that are looked at in advance; and beyond them a label that no vocabulary has."""
    return Asked(np.array([1, 2]), np.array([3 if index < SAMPLED else 10**6, -100]))


def test_labels_are_read_alike_by_any_ranks_workers_and_rows(data_config: Callable[..., DataConfig]) -> None:
    mqar = {"pairs": 4, "length": 24, "num_keys": 8, "num_values": 8}
    made = {
        "odd": SourceConfig(synthetic="lmtrain.eval.probes.parity:parity", arguments={"bits": 9}),
        "recall": SourceConfig(synthetic="lmtrain.eval.probes.mqar:mqar", arguments=mqar),
    }
    whole = data_config({"docs": 1.0})
    cfg = replace(whole, sources={**whole.sources, **made})
    expected = read(cfg)
    assert {int(id) for _, _, source in expected for id in source} == {0, 1, 2}
    for changed, sizes in [
        (cfg, {"dp_size": 4}),
        (cfg, {"workers": 1}),
        (replace(cfg, seq_len=16, block_tokens=64), {"microbatch": 4}),
    ]:
        for ours, theirs in zip(read(changed, **sizes), expected, strict=True):
            assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))


def read(cfg: DataConfig, dp_size: int = 1, microbatch: int = 1, workers: int = 0) -> list[tuple[Any, ...]]:
    """Tokens, labels and sources, block by block, of two steps."""
    log = ScheduleLog.fixed({name: source.weight for name, source in cfg.sources.items()})
    blocks: dict[int, tuple[Any, ...]] = {}
    for rank in range(dp_size):
        loader = Loader(
            cfg, seed=1, batch_tokens=768, microbatch=microbatch, dp_rank=rank, dp_size=dp_size, log=log,
            workers=workers,
        )  # fmt: skip
        for data in loader.steps(0, 2):
            for batch in data.micro_batches:
                ignored = batch.labels == IGNORE
                assert batch.num_targets == int((~ignored).sum())
                (k,) = set(batch.block.tolist())
                blocks[k] = tuple(part.numpy().reshape(-1) for part in (batch.tokens, batch.labels, batch.source))
    assert list(sorted(blocks)) == list(range(24))
    return [blocks[k] for k in sorted(blocks)]


@pytest.mark.parametrize(("name", "when"), [("elsewhere", "at once"), ("late_label", "when it is read")])
def test_a_label_outside_the_vocabulary_is_refused(
    data_config: Callable[..., DataConfig], name: str, when: str
) -> None:
    arguments: dict[str, Any] = {"answer": 10**6} if name == "elsewhere" else {}
    made = SourceConfig(synthetic=f"{HERE}:{name}", arguments=arguments)
    cfg = replace(data_config({"docs": 1.0}), sources={"made": made})
    with pytest.raises(DataError, match=rf"{HERE}:{name}: document \d+: label id 1000000 is outside the vocabulary"):
        if when == "at once":
            Catalog(cfg, Tokenizer.load(cfg.tokenizer), 0)
        else:
            read(cfg)
