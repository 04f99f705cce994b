"""A policy with a mistake is given up once, with what it had learnt, and nothing it does reaches the run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

from lmtrain.data.policies.config import PolicyConfig
from lmtrain.data.policies.guarded import Guarded
from lmtrain.data.policies.policy import MixPolicy, Progress
from tests.data.three_sources import RUN, THIRDS, progress


class Counting(MixPolicy):
    """Learns how many steps it saw; makes the mistake ``where`` at step 3."""

    def __init__(self, where: str) -> None:
        super().__init__(PolicyConfig("ado"), THIRDS, RUN)
        self.where, self.seen = where, 0

    def observe(self, step: int, tokens: Mapping[str, float], bits: Mapping[str, float]) -> None:
        self.seen += 1
        self._slip("observe")

    def propose(self, step: int, progress: Progress) -> dict[str, float] | None:
        self._slip("propose")
        return {"code": 1.0}

    def state_dict(self) -> dict[str, Any]:
        self._slip("state_dict")
        return {"seen": self.seen} | ({"what": {1, 2}} if self.where == "json" and self.seen == 3 else {})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seen = state["seen"]

    def _slip(self, where: str) -> None:
        if self.where == where and self.seen == 3:
            raise ZeroDivisionError("two\nlines")


@pytest.mark.parametrize("where", ["observe", "propose", "state_dict", "json"])
def test_a_mistake_is_told_once_and_ends_the_policy(where: str) -> None:
    told: list[str] = []
    policy = Guarded(Counting(where), "mine", told.append)
    for step in (1, 2):
        policy.observe(step, {}, {})
        assert policy.propose(step, progress()) == {"code": 1.0} and policy.state_dict() == {"seen": step}
    for step in (3, 4, 5):
        policy.observe(step, {}, {})
        proposal = policy.propose(step, progress())
        assert proposal == ({"code": 1.0} if step == 3 and where in ("state_dict", "json") else None)
        assert json.loads(json.dumps(policy.state_dict())) == {"seen": 2}, "half a lesson is not kept"
    assert policy.failed and policy.ahead(0) == [] and len(told) == 1 and "\n" not in told[0]
    assert (
        told[0].startswith("policy mine failed ") and "; it proposes nothing more until the run is resumed" in told[0]
    )
    slip = (
        "TypeError: Object of type set is not JSON" if where == "json" else "ZeroDivisionError: two lines (test_guard"
    )
    assert slip in told[0] and ("after step 3" in told[0] or where in ("state_dict", "json"))


def test_a_state_that_is_not_json_is_loud_at_the_start() -> None:
    broken = Counting("json")
    broken.seen = 3
    with pytest.raises(TypeError, match="not JSON serializable"):
        Guarded(broken, "mine", print)


def test_a_policy_that_exits_is_given_up_too() -> None:
    class Quitting(Counting):
        def observe(self, step: int, tokens: Mapping[str, float], bits: Mapping[str, float]) -> None:
            raise SystemExit(3)

    told: list[str] = []
    policy = Guarded(Quitting(""), "mine", told.append)
    policy.observe(1, {}, {})
    assert policy.failed and "SystemExit: 3" in told[0]
