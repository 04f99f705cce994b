"""``control/mix.yaml``: read once, and given the name of its outcome."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

import xxhash

from lmtrain.data.order.request_text import MAX_LENGTH
from lmtrain.errors import UsageError

REQUEST = "mix.yaml"


@dataclass(frozen=True)
class Request:
    """data: the bytes, no more of them than a request may have and one. mark: names this very file in the log."""

    data: bytes
    mark: str

    def text(self) -> str:
        """Raises UsageError."""
        try:
            return self.data.decode("utf-8")
        except UnicodeDecodeError:
            raise UsageError("not UTF-8 text") from None


class RequestFile:
    """The request in ``control``, of which there may be one at a time."""

    def __init__(self, control: Path) -> None:
        self._control = control

    def read(self) -> Request | None:
        """None if there is none. OSError if it cannot be read, UsageError if it is no plain file."""
        try:
            handle = os.open(self._control / REQUEST, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would make us wait
        except FileNotFoundError:
            return None
        with open(handle, "rb") as file:
            about = os.fstat(handle)
            if not stat.S_ISREG(about.st_mode):
                raise UsageError("not a plain file")
            data = file.read(4 * MAX_LENGTH + 1)  # 4 bytes make a character, at most
        seed = about.st_mtime_ns % 2**64
        return Request(data, f"control/{REQUEST} {xxhash.xxh3_64_hexdigest(data, seed=seed)}")

    def settle(self, step: int, outcome: str, reason: str = "") -> None:
        """Give the request the name of its outcome, with the reason in a file beside it. Raises OSError."""
        target = self._control / f"mix.{outcome}-{step}.yaml"
        number = 1
        while target.exists():
            number += 1
            target = self._control / f"mix.{outcome}-{step}-{number}.yaml"
        if reason:
            target.with_suffix(".txt").write_text(reason + "\n", encoding="utf-8")
        (self._control / REQUEST).rename(target)
