"""What ranks do together around a checkpoint: a step that fails on one fails on all, with the same error."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from lmtrain.errors import LmtrainError, StorageError

T = TypeVar("T")

logger = logging.getLogger(__name__)


class Ranks:
    """The ranks of ``group``, of a new gloo group if it is None, or this process alone without torch.distributed."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        if group is None and dist.is_available() and dist.is_initialized():
            # own group: a save in the background must not mix with the collectives of training
            self.group = dist.new_group(backend="gloo", timeout=timedelta(hours=1))
        self.rank = dist.get_rank(self.group) if self.group else 0
        self.size = dist.get_world_size(self.group) if self.group else 1

    def together(self, local: Callable[[], T]) -> list[T]:
        """Every rank's result of ``local``; if it raised on any rank, all raise the lowest such rank's error."""
        mine: tuple[LmtrainError | None, T | None] = (None, None)
        try:
            mine = (None, local())
        except Exception as raised:
            mine = (as_error(raised), None)
        everyone: list[Any] = [mine] * self.size
        if self.group:
            dist.all_gather_object(everyone, mine, group=self.group)
        for failure, _ in everyone:
            if failure is not None:
                raise failure
        return [value for _, value in everyone]

    def on_first(self, work: Callable[[], T]) -> T:
        """Rank 0's result of ``work``, or its error, on all ranks."""
        result: Any = self.together(lambda: work() if self.rank == 0 else None)[0]
        return result


@contextmanager
def unwrapped() -> Iterator[None]:
    """Around a call of DCP: raise what the lowest failing rank raised, on all ranks, as an error of this house."""
    try:
        yield
    except CheckpointException as error:
        # a BaseException, which no ``except Exception`` sees
        raise as_error(error.failures[min(error.failures)][0]) from None


def as_error(error: BaseException, what: str = "checkpoint") -> LmtrainError:
    """The one-line error of this house for whatever was raised."""
    if isinstance(error, LmtrainError):
        return error
    if isinstance(error, OSError):
        where = f" ({error.filename})" if error.filename else ""
        return StorageError(f"{what}: {error.strerror or error}{where}")
    logger.error("%s", what, exc_info=error)
    return LmtrainError(f"{what}: {type(error).__name__}: {error}")
