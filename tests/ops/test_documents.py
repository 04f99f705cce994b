"""Documents: starts, positions and cuts follow from the ids and from what is held left of column 0."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lmtrain.ops import Documents

quick = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def layouts(draw: st.DrawFn, multiple_of: int = 1) -> Documents:
    """Up to three rows of up to 12 columns (a multiple of ``multiple_of``), ids not starting at 0 and with gaps."""
    rows = draw(st.integers(1, 3))
    length = multiple_of * draw(st.integers(1, 12 // multiple_of))
    steps = [draw(st.lists(st.sampled_from([0, 0, 0, 1, 4]), min_size=length, max_size=length)) for _ in range(rows)]
    before = [draw(st.integers(0, 5)) for _ in range(rows)]
    return Documents.from_ids(torch.tensor(steps).cumsum(1), torch.tensor(before))


def positions_by_hand(docs: Documents) -> Tensor:
    found = torch.zeros(docs.shape, dtype=torch.int32)
    for row, ids in enumerate(docs.ids.tolist()):
        for column, document in enumerate(ids):
            held = int(docs.before[row]) if document == ids[0] else 0
            found[row, column] = column - ids.index(document) + held
    return found


@quick
@given(docs=layouts())
def test_positions_and_starts(docs: Documents) -> None:
    expected = positions_by_hand(docs)
    assert docs.positions().dtype == torch.int32
    assert torch.equal(docs.positions(), expected)
    assert torch.equal(docs.starts(), expected == 0)


@quick
@given(docs=layouts())
def test_spans_tile_the_flattened_rows(docs: Documents) -> None:
    """For varlen kernels: every span is within one row and one document, none could be longer."""
    borders = docs.cu_seqlens.tolist()
    spans = list(pairwise(borders))
    assert borders[0] == 0 and borders[-1] == docs.ids.numel() and docs.cu_seqlens.dtype == torch.int32
    assert docs.max_len == max(last - first for first, last in spans)
    owner = [(row, document) for row, ids in enumerate(docs.ids.tolist()) for document in ids]
    assert all(len(set(owner[first:last])) == 1 for first, last in spans)
    assert all(owner[last - 1] != owner[last] for _, last in spans[:-1])


@quick
@given(docs=layouts(multiple_of=4), size=st.sampled_from([1, 2, 4]))
def test_shards_know_what_lies_left_of_them(docs: Documents, size: int) -> None:
    shards = [docs.cut(rank, size) for rank in range(size)]
    for name in ("positions", "starts"):
        joined = torch.cat([getattr(shard, name)() for shard in shards], dim=1)
        assert torch.equal(joined, getattr(docs, name)())
    assert torch.equal(torch.cat([shard.ids for shard in shards], dim=1), docs.ids)
    assert all(shard.whole is (docs if size > 1 else None) for shard in shards)


@quick
@given(docs=layouts(multiple_of=4))
def test_a_shard_of_a_shard(docs: Documents) -> None:
    """``whole`` is what was cut; ``before`` reaches past it, to the start of the document."""
    twice = [docs.cut(rank // 2, 2).cut(rank % 2, 2) for rank in range(4)]
    for rank, shard in enumerate(twice):
        once = docs.cut(rank, 4)
        assert torch.equal(shard.ids, once.ids) and torch.equal(shard.before, once.before)
        assert torch.equal(shard.cu_seqlens, once.cu_seqlens) and shard.max_len == once.max_len
        assert shard.whole is not None and torch.equal(shard.whole.ids, docs.cut(rank // 2, 2).ids)


def test_moving_takes_the_whole_along() -> None:
    docs = Documents.from_ids(torch.zeros(1, 4, dtype=torch.int32)).cut(1, 2).to("meta")
    assert docs.whole is not None
    assert {t.device.type for t in (docs.ids, docs.before, docs.cu_seqlens, docs.whole.ids)} == {"meta"}


def test_no_columns() -> None:
    docs = Documents.from_ids(torch.zeros(2, 0, dtype=torch.int32))
    assert docs.max_len == 0 and docs.positions().shape == docs.starts().shape == (2, 0)


@pytest.mark.parametrize(
    ("ids", "says"),
    [
        (torch.tensor([0, 1]), r"documents: ids must be \[B, T\], got shape \(2,\)"),
        (torch.tensor([[0, 1, 0]]), "documents: ids must not decrease along a row"),
    ],
)
def test_refused_ids(ids: Tensor, says: str) -> None:
    with pytest.raises(ValueError, match=f"^{says}$"):
        Documents.from_ids(ids)


def test_refused_cut() -> None:
    with pytest.raises(ValueError, match=r"^documents: 4 columns do not divide into 3 shards$"):
        Documents.from_ids(torch.zeros(1, 4, dtype=torch.int32)).cut(0, 3)
