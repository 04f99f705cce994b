"""A function from an index to a document: found by its name, called, checked, and named by what it makes."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple, TypeVar

import numpy as np
import xxhash
from numpy.typing import NDArray

from lmtrain.errors import DataError, LmtrainError, UsageError, nearest
from lmtrain.ops.cross_entropy import IGNORE

SAMPLED = 64
"""Documents, the first ones for seed 0, that stand for all when a function is checked or named by what it makes."""


MARK = "makes_documents"
Marked = TypeVar("Marked", bound=Callable[..., Any])


def document_function(function: Marked) -> Marked:
    """Mark ``function(seed, index, **arguments)`` as one that makes documents.

    Only what bears the mark is ever called: a name in a request or in somebody's checkpoint reaches nothing else.
    """
    setattr(function, MARK, True)
    return function


class Made(NamedTuple):
    """A document: tokens int32 ``[n]``; labels int32 ``[n]``, what is asked after each token, ``IGNORE`` where nothing
    is; None: the next token."""

    tokens: NDArray[np.int32]
    labels: NDArray[np.int32] | None


@dataclass(frozen=True)
class DocumentFunction:
    """The function ``name`` (package.module:function) behind the source ``source``.

    Raises UsageError for one that cannot be found or called, DataError for what it makes.
    """

    source: str
    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def document(self, seed: int, index: int) -> Made:
        """Document ``index``, checked."""
        function = _resolve(self.source, self.name)
        try:
            made = function(seed, index, **self.arguments)
            tokens = np.asarray(getattr(made, "tokens", made))
            labels = np.asarray(made.labels) if hasattr(made, "labels") else None
        except LmtrainError:
            raise
        except TypeError as error:
            raise UsageError(f"data.sources.{self.source}.arguments: {self.name}: {error}") from error
        except (Exception, SystemExit) as error:
            raise self.error(index, f"{type(error).__name__}: {error}") from error
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu" or len(tokens) < 2:
            raise self.error(index, f"expected at least two integers, [n], got {tokens.dtype} {list(tokens.shape)}")
        if labels is None:
            return Made(self._narrow(index, tokens), None)
        if labels.shape != tokens.shape or labels.dtype.kind not in "iu" or labels[-1] != IGNORE:
            raise self.error(index, f"expected one label for each token, and {IGNORE} for the last")
        return Made(self._narrow(index, tokens), self._narrow(index, labels))

    def digest(self) -> str:
        """xxh3-128, hex, of the sampled documents, labels included: the same in every run, whatever its seed."""
        found = xxhash.xxh3_128()
        for index in range(SAMPLED):
            for part in self.document(0, index):
                numbers = np.empty(0) if part is None else part
                found.update(f"{'none' if part is None else len(part)}:".encode())
                found.update(numbers.astype("<i4").tobytes())
        return found.hexdigest()

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise DataError if a token or a label of the sampled documents is outside the vocabulary."""
        for index in range(SAMPLED):
            made = self.document(0, index)
            for what, part in (("token", made.tokens), ("label", asked(made.labels))):
                wrong = part[(part < 0) | (part >= vocab_size)]
                if wrong.size:
                    raise self.outside(index, what, int(wrong[0]), vocab_size)

    def outside(self, index: int, what: str, value: int, vocab_size: int) -> DataError:
        """The error for a token or label of document ``index`` that the vocabulary lacks."""
        return self.error(index, f"{what} id {value} is outside the vocabulary of {vocab_size}")

    def error(self, index: int, message: str) -> DataError:
        return DataError(f"data.sources.{self.source}.synthetic: {self.name}: document {index}: {message}")

    def _narrow(self, index: int, values: NDArray[Any]) -> NDArray[np.int32]:
        if values.dtype == np.int32:
            return values
        narrow = values.astype(np.int32)
        if (narrow != values).any():
            raise self.error(index, f"token id {values[narrow != values][0]} does not fit into 32 bits")
        return narrow


def asked(labels: NDArray[np.int32] | None) -> NDArray[np.int32]:
    """Those of ``labels`` that are asked for."""
    return np.empty(0, dtype=np.int32) if labels is None else labels[labels != IGNORE]


@cache
def _resolve(source: str, name: str) -> Callable[..., Any]:
    key = f"data.sources.{source}.synthetic"
    module_name, colon, function = name.partition(":")
    if not (module_name and colon and function):
        raise UsageError(f"{key}: expected package.module:function, got {name}")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UsageError(f"{key}: {name}: {error}{_nearest_module(error.name or '')}") from error
    except (Exception, SystemExit) as error:  # whatever a module does when it is imported; a script may exit
        raise UsageError(f"{key}: {name}: {type(error).__name__}: {error}") from error
    found = getattr(module, function, None)
    if not callable(found):
        known = [each for each, value in vars(module).items() if _marked(value)]
        raise UsageError(f"{key}: {module_name} has no function {function}{nearest(function, known)}")
    if not _marked(found):
        raise UsageError(
            f"{key}: {name}: not a function that makes documents; mark it with @document_function of {__name__}"
        )
    return found


def _marked(value: object) -> bool:
    return getattr(value, MARK, None) is True  # a mock has any attribute


def _nearest_module(missing: str) -> str:
    """What the package around a module that is missing has instead."""
    package, _, name = missing.rpartition(".")
    if not package:
        return "; a module of your own must be installed, or its folder in PYTHONPATH"
    around = getattr(importlib.import_module(package), "__path__", [])
    return nearest(name, [module.name for module in pkgutil.iter_modules(around)])
