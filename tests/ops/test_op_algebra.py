"""What ranks, segments and decoding rely on: rows cut anywhere, spans that compose, steps, what is forgotten."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lmtrain.ops import Documents, Span, blockdiag_scan
from tests.ops.conftest import RUNNING
from tests.ops.op_case import Case, Outputs, Running, Tensors, documents
from tests.ops.op_cases import AFFINE
from tests.ops.scan_cases import assert_close, layouts, rand, run, shard

WEAK = 0.05  # decay: something of a state is left after a row
cases = pytest.mark.parametrize("case", AFFINE.values(), ids=AFFINE)


def summary(case: Case, tensors: Tensors, docs: Documents | None) -> Span:
    """(gamma, state) of a span: from the pass from zero where that comes first, else by ``span``."""
    assert case.affine is not None and "initial_state" not in tensors
    op, inputs = case.affine.op, case.affine.arguments(tensors)
    if op.needs_state:
        return op.span(*inputs, docs=docs)
    return Span(op.gamma(*inputs, docs=docs), op(*inputs, docs=docs)[1])


def without_state(tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if name != "initial_state"}


def close(case: Case, got: Tensor, expected: Tensor) -> None:
    """Of states; measured, worst: 2e-14."""
    torch.testing.assert_close(case.affine.unique(got), case.affine.unique(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("op", [name for name, op in RUNNING.items() if op.case.resumes], indirect=True)
def test_two_calls_with_a_carried_state_are_one(op: Running) -> None:
    """Outputs, final state and all gradients, through the state, wherever the row is cut."""
    case, docs = op.case, documents("edges", 70)
    tensors = case.inputs(70, WEAK)
    expected = run(case.resumes, tensors, docs)
    for cut in (0, 1, 16, 33, 63, 64, 70):

        def in_two(tensors: Tensors, docs: Documents, cut: int = cut) -> Outputs:
            state, outputs = tensors["initial_state"], []
            for first, last in ((0, cut), (cut, 70)):
                part = case.part(tensors, first, last) | {"initial_state": state}
                y, state = case.resumes(part, shard(docs, first, last))
                outputs.append(y)
            return torch.cat(outputs, dim=1), state

        assert_close(run(in_two, tensors, docs), expected, 1e-14)


@cases
@settings(max_examples=25, deadline=None, derandomize=True)
@given(docs=layouts(), data=st.data())
def test_spans_fold_to_the_row(case: Case, docs: Documents, data: st.DataObject) -> None:
    """Each span runs with the state that enters it, or is corrected by it; spans fold, one by one or two as one."""
    op, length = case.affine.op, docs.shape[1]
    borders = [0, *sorted(data.draw(st.lists(st.integers(0, length), min_size=2, max_size=2))), length]
    tensors = case.inputs(length, WEAK)
    y, final = case.resumes(tensors, docs)
    incoming, outputs = tensors["initial_state"], []
    entering = {0: incoming}
    for first, last in pairwise(borders):
        part, here = case.part(tensors, first, last), shard(docs, first, last)
        if op.needs_state:
            outputs.append(case.resumes(part | {"initial_state": incoming}, here)[0])
        else:
            local, inputs = case.resumes(part, here)[0], case.affine.arguments(part)
            outputs.append(op.correct(local, *inputs, docs=here, incoming=incoming))
        span = summary(case, part, here)
        incoming = entering[last] = op.combine(span.gamma, incoming, span.state)
    torch.testing.assert_close(torch.cat(outputs, dim=1), y, rtol=1e-12, atol=1e-12)
    close(case, incoming, final)
    for first, last in ((0, borders[2]), (borders[1], length), (0, length)):
        span = summary(case, case.part(tensors, first, last), shard(docs, first, last))
        close(case, op.combine(span.gamma, entering[first], span.state), entering[last])


@cases
@pytest.mark.parametrize("kind", ["carried", "edges"])
def test_spans_have_the_gradients_of_the_op(case: Case, kind: str) -> None:
    op, docs = case.affine.op, documents(kind, 40)

    def apart(tensors: Tensors, docs: Documents) -> Outputs:
        row, initial = without_state(tensors), tensors["initial_state"]
        span, inputs = summary(case, row, docs), case.affine.arguments(row)
        if op.needs_state:
            y, _ = case.resumes(tensors, docs)
        else:
            y = op.correct(case.resumes(row, docs)[0], *inputs, docs=docs, incoming=initial)
        return y, case.affine.unique(op.combine(span.gamma, initial, span.state))

    tensors = case.inputs(40, WEAK)
    assert_close(run(apart, tensors, docs), run(case.call, tensors, docs), 1e-13)


@cases
def test_the_reverse_fold_is_the_gradient_of_the_fold(case: Case) -> None:
    span, state = summary(case, without_state(case.inputs(5)), None), case.inputs(5)["initial_state"]
    leaves = [tensor.detach().requires_grad_() for tensor in (span.gamma, state, span.state)]
    out = case.affine.op.combine(*leaves)
    grad = rand(*out.shape, seed=9)
    expected = torch.autograd.grad(out, leaves, grad, materialize_grads=True)
    for got, want in zip(case.affine.op.combine_backward(grad, *leaves), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)


@cases
def test_a_start_of_a_document_forgets_any_state(case: Case) -> None:
    """Of the row, and of the fold: whatever it holds, NaN and infinity included; and it gets no gradient."""
    op, tensors, docs = case.affine.op, case.inputs(20), documents("fresh", 20)
    row = without_state(tensors)
    expected, span = run(case.call, row, docs), summary(case, row, docs)
    folded = op.combine(span.gamma, torch.zeros_like(tensors["initial_state"]), span.state)
    close(case, folded, case.resumes(row, docs)[1])
    assert torch.equal(op.gamma(*case.affine.arguments(row), docs=docs), span.gamma)
    for fill in (1.0, float("inf"), float("nan")):
        state = torch.full_like(tensors["initial_state"], fill)
        found = run(case.call, row | {"initial_state": state}, docs)
        assert (found["grad_initial_state"] == 0).all()
        assert all(torch.equal(found[name], want) for name, want in expected.items())
        assert torch.equal(op.combine(span.gamma, state, span.state), folded)
        assert (op.combine_backward(folded, span.gamma, state, span.state)[1] == 0).all()
        if not op.needs_state:
            corrected = op.correct(expected["y"], *case.affine.arguments(row), docs=docs, incoming=state)
            assert torch.equal(corrected, expected["y"])


@cases
def test_an_empty_span_changes_nothing(case: Case) -> None:
    tensors = case.inputs(0)
    span, state = summary(case, without_state(tensors), None), tensors["initial_state"]
    close(case, case.affine.op.combine(span.gamma, state, span.state), state)
    y, after = case.resumes(tensors, None)
    assert y.shape == next(iter(tensors.values())).shape and torch.equal(after, state)


@cases
def test_steps_are_the_parallel_form(case: Case) -> None:
    tensors = case.inputs(9)
    y, final = case.resumes(tensors, None)
    state, outputs = tensors["initial_state"], []
    for t in range(9):
        out, state = case.affine.op.step(*case.affine.op.at(t, *case.affine.arguments(tensors)), state=state)
        outputs.append(out)
    torch.testing.assert_close(torch.stack(outputs, dim=1), y, rtol=1e-13, atol=1e-13)
    close(case, state, final)


@pytest.mark.parametrize("chunk", [1, 2, 8])
def test_a_transition_of_zeros_has_its_gradient(chunk: int) -> None:
    """It forgets the state, but not what the state would be with a little more of it."""
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(1, 5, 2, 3, dtype=torch.float64, generator=generator)
    leaves = (v, torch.zeros(1, 5, 2, 3, 3, dtype=torch.float64), v[:, 0].clone())
    for leaf in leaves:
        leaf.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda v, matrices, state: blockdiag_scan(v, matrices, initial_state=state, chunk=chunk), leaves
    )
