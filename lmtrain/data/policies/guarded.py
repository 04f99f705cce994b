"""A policy that cannot end a run: after its first exception it is told and asked nothing more.

Weeks of training must not hang on a mistake in a policy. What it does wrong when it is built, or when it takes a
state, is raised: nothing is lost then.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from lmtrain.data.policies.policy import MixPolicy, Progress

T = TypeVar("T")


class Guarded:
    """``policy``, named ``kind``. tell: called once, with the reason in a line, when it is given up.

    Raises what its first ``state_dict`` raises, and TypeError or ValueError if that is not JSON.
    """

    def __init__(self, policy: MixPolicy, kind: str, tell: Callable[[str], None]) -> None:
        self.policy = policy
        self.failed = False
        self._kind, self._tell = kind, tell
        self._state = _copied(policy.state_dict())

    def observe(self, step: int, tokens: Mapping[str, float], bits: Mapping[str, float]) -> None:
        """As of ``MixPolicy``; nothing once it failed."""
        self._attempt(f"after step {step}", lambda: self.policy.observe(step, tokens, bits))

    def propose(self, step: int, progress: Progress) -> dict[str, float] | None:
        """As of ``MixPolicy``; None once it failed."""
        return self._attempt(f"after step {step}", lambda: self.policy.propose(step, progress))

    def ahead(self, done: int) -> list[tuple[int, dict[str, float]]] | None:
        """As of ``MixPolicy``; no more changes once it failed."""
        return [] if self.failed else self._attempt("on what it will propose", lambda: self.policy.ahead(done))

    def state_dict(self) -> dict[str, Any]:
        """What was learnt; once it failed, what the last call gave: half of a lesson may be wrong."""
        state = self._attempt("for a checkpoint", lambda: _copied(self.policy.state_dict()))
        if state is not None:
            self._state = state
        return self._state

    def _attempt(self, when: str, call: Callable[[], T]) -> T | None:
        if self.failed:
            return None
        try:
            return call()
        except (Exception, SystemExit) as error:  # whatever a policy's file does
            self.failed = True
            place = traceback.extract_tb(error.__traceback__)[-1]
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            self._tell(
                f"policy {self._kind} failed {when}: {reason} ({Path(place.filename).name}, line {place.lineno}, "
                f"in {place.name}); it proposes nothing more until the run is resumed"
            )
            return None


def _copied(state: Mapping[str, Any]) -> dict[str, Any]:
    """``state`` as a checkpoint will give it back. TypeError or ValueError if it is not JSON."""
    copy: dict[str, Any] = json.loads(json.dumps(state))
    return copy
