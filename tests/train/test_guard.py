"""The guard of skipped steps."""

import json
import math

import pytest

from lmtrain.errors import EXIT_UNHEALTHY, UnhealthyError
from lmtrain.train.guard import SkipGuard


def test_the_last_of_too_many_in_a_row_ends_the_run() -> None:
    guard = SkipGuard(3)
    guard.observe(1, 3.25, None)
    guard.observe(2, math.nan, "non-finite gradient norm")
    guard.observe(3, math.nan, "non-finite gradient norm")
    with pytest.raises(UnhealthyError, match=r"steps 2, 3, 4 .*non-finite gradient norm.*3\.2500 at step 1") as caught:
        guard.observe(4, math.nan, "non-finite gradient norm")
    assert caught.value.exit_code == EXIT_UNHEALTHY


def test_a_good_step_starts_the_count_again() -> None:
    guard = SkipGuard(2)
    for step in range(20):
        guard.observe(step, 2.0 if step % 2 else math.inf, None if step % 2 else "non-finite gradient norm")
    assert guard.total == 10 and guard.last_loss == 2.0 and guard.last_step == 19


def test_a_non_finite_loss_counts_though_the_step_was_taken() -> None:
    guard = SkipGuard(1)
    with pytest.raises(UnhealthyError, match=r"non-finite loss.*last accepted loss: none"):
        guard.observe(1, math.nan, None)
    assert guard.last_loss is None


def test_the_count_survives_a_checkpoint() -> None:
    guard, resumed = SkipGuard(2), SkipGuard(2)
    guard.observe(1, 2.5, None)
    guard.observe(2, math.nan, "non-finite gradient norm")
    resumed.load_state_dict(json.loads(json.dumps(guard.state_dict(), allow_nan=False)))
    assert resumed.state_dict() == guard.state_dict()
    with pytest.raises(UnhealthyError, match=r"steps 2, 3 .*2\.5000 at step 1"):
        resumed.observe(3, math.nan, "non-finite gradient norm")
