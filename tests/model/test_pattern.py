"""Patterns: what they expand to, and errors that point at the character."""

from __future__ import annotations

import pytest

from lmtrain.errors import UsageError
from lmtrain.model.pattern import expand

KNOWN = ["ssm", "mlp", "local"]


@pytest.mark.parametrize(
    ("pattern", "order"),
    [
        ("ssm", "ssm"),
        ("  ssm\n mlp ", "ssm mlp"),
        ("2 * ssm mlp", "ssm ssm mlp"),
        ("2*(ssm mlp) local", "ssm mlp ssm mlp local"),
        ("2 * (ssm 2 * (mlp local))", "ssm mlp local mlp local ssm mlp local mlp local"),
        ("(ssm) 0 * mlp", "ssm"),
        (["ssm", "mlp"], "ssm mlp"),
        ("2 * (ssm+ local mlp)", "ssm+local mlp ssm+local mlp"),
        (["ssm + local", "mlp"], "ssm+local mlp"),
    ],
)
def test_expands(pattern: str | list[str], order: str) -> None:
    assert expand(pattern, KNOWN) == [tuple(block.split("+")) for block in order.split()]


@pytest.mark.parametrize(
    ("pattern", "character", "why"),
    [
        ("ssm smm", 5, "no branch is named 'smm'; did you mean ssm?"),
        ("2 * (ssm mlp", 5, "this ( is not closed"),
        ("ssm) mlp", 4, "unmatched )"),
        ("(ssm) )", 7, "unmatched )"),
        ("ssm 2 *", 5, "nothing to repeat"),
        ("(2 *) ssm", 2, "nothing to repeat"),
        ("2 * 3 * ssm", 5, "a repetition of a repetition"),
        ("ssm + + mlp", 5, "expected a name, 'n *' or '('"),
        ("mlp ssm + smm", 11, "no branch is named 'smm'; did you mean ssm?"),
        ("ssm 2 mlp", 5, "expected a name, 'n *' or '('"),
    ],
)
def test_errors_point_at_the_character(pattern: str, character: int, why: str) -> None:
    with pytest.raises(UsageError) as caught:
        expand(pattern, KNOWN)
    first, shown, pointer = str(caught.value).split("\n")
    assert first == f"model.pattern: character {character}: {why}"
    assert shown == f"  {pattern}" and pointer == " " * (character + 1) + "^"


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("", "model.pattern: no branches; expected names from model.branches, e.g. '2 * (ssm mlp)'"),
        ([], "model.pattern: no branches; expected names from model.branches, e.g. '2 * (ssm mlp)'"),
        ("0 * ssm", "model.pattern: no branches; expected names from model.branches, e.g. '2 * (ssm mlp)'"),
        (["ssm", "smm"], "model.pattern: entry 1: no branch is named 'smm'; did you mean ssm?"),
    ],
)
def test_other_errors(pattern: str | list[str], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        expand(pattern, KNOWN)
    assert str(caught.value) == says
