"""Which implementation an op runs: finds the compiled library and chooses a backend per op, device and dtype.

Every op registers its backends in a fixed order, best first, ``reference`` (pure torch) last. ``auto`` takes the first
that is present, serves the device and dtype, and keeps the op's whole contract: documents independent to the bit, a
state to start from, every gradient, any head size. So the choice depends on nothing that changes from call to call. A
backend that keeps less is used only if asked for by name, and refuses the calls it cannot serve. A backend asked for by
name is used by every op that has one of that name, or refused: nothing falls back silently from an explicit wish. Ops
without one of that name choose as in ``auto``.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from lmtrain.errors import UsageError, nearest

KERNELS = ("auto", "reference", "torch", "cpu", "cuda", "flash_attn", "mamba_ssm", "causal_conv1d", "fla")
BUILD_COMMAND = "make install"
GPU_COMMAND = ".venv/bin/pip install wheel && .venv/bin/pip install --no-build-isolation -e '.[gpu]'"
_FILE_NAMES = ("liblmtrain_ops.so", "liblmtrain_ops.dylib")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Backend:
    """One implementation of an op.

    device: the device type it serves, None for any. dtypes: the dtypes of the values it serves, None for any.
    missing: returns why it cannot be used here, None if it can. lacks: what of the op's contract it does not keep, for
        which ``auto`` passes it over; None if it keeps all of it. command: builds or installs it, None if torch has it.
    """

    name: str
    device: str | None = None
    dtypes: frozenset[torch.dtype] | None = None
    missing: Callable[[], str | None] = lambda: None
    lacks: str | None = None

    def refusal(self, device: str, dtype: torch.dtype) -> str | None:
        """Why this backend cannot serve ``device`` and ``dtype``; None if it can."""
        if self.device not in (None, device):
            return f"it runs on {self.device}, not on {device}"
        if self.dtypes is not None and dtype not in self.dtypes:
            return f"it does not take {_spell(dtype)}"
        return self.missing()


_backends: dict[str, tuple[Backend, ...]] = {}
_requested = "auto"


def register(op: str, *backends: Backend) -> None:
    """Declare the backends of ``op``, best first; the last must be ``reference``, which serves everything."""
    if not backends or backends[-1].name != "reference":
        raise ValueError(f"{op}: the last backend must be reference")
    _backends[op] = backends


def registered() -> dict[str, tuple[Backend, ...]]:
    """Op -> its backends, best first."""
    return {op: _backends[op] for op in sorted(_backends)}


def set_kernels(name: str) -> None:
    """The recipe's ``kernels:`` key: one of ``KERNELS``. The environment's LMTRAIN_KERNELS overrides it.

    Raises UsageError for an unknown name.
    """
    global _requested
    _requested = _known(name, "kernels")


def kernels() -> str:
    """The name in force: LMTRAIN_KERNELS, else what ``set_kernels`` was given, else auto."""
    named = os.environ.get("LMTRAIN_KERNELS")
    return _known(named, "LMTRAIN_KERNELS") if named else _requested


def backend(op: str, device: str, dtype: torch.dtype) -> str:
    """Name of the backend that ``op`` uses for values of ``dtype`` on a device of type ``device``.

    Raises UsageError if a backend was asked for by name and cannot serve this.
    """
    return _choose(kernels(), op, device, dtype)


# a compiled graph holds one backend, chosen while tracing. This is torch.compiler.assume_constant_result, which would
# import the whole compiler here
backend._dynamo_marked_constant = True  # type: ignore[attr-defined]


def command(name: str) -> str | None:
    """What builds or installs backend ``name``; None if torch has it."""
    if name in ("reference", "torch"):
        return None
    return BUILD_COMMAND if name in ("cpu", "cuda") else GPU_COMMAND


def chosen(device: str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, str]:
    """Op -> backend for values of ``dtype`` on ``device``, for the run's record."""
    return {op: backend(op, device, dtype) for op in sorted(_backends)}


def others(op: str, device: str, dtype: torch.dtype) -> dict[str, str]:
    """Backend -> why ``op`` does not use it for ``dtype`` on ``device``, for every backend but the one chosen."""
    wanted, taken = kernels(), backend(op, device, dtype)
    reasons = {}
    for candidate in _backends[op]:
        if candidate.name == taken:
            continue
        why = candidate.refusal(device, dtype)
        if why is None and wanted != "auto":
            why = f"kernels={wanted} was asked for"
        elif why is None:
            why = candidate.lacks and f"only by kernels={candidate.name}: {candidate.lacks}"
        reasons[candidate.name] = why or f"{taken} comes first"
    return reasons


def unserved(op: str, name: str, values: torch.Tensor, combination: str) -> UsageError:
    """The error of backend ``name``, asked for by name, for a call of ``op`` that it cannot serve."""
    able = _choose("auto", op, values.device.type, values.dtype)
    return UsageError(f"{op}: backend {name} was asked for, but it does not serve {combination}; kernels={able} does")


@cache
def library_path() -> Path | None:
    """The compiled library: LMTRAIN_LIBRARY, else beside the installed package, else under ``build/``.

    Raises UsageError if LMTRAIN_LIBRARY names no file.
    """
    if named := os.environ.get("LMTRAIN_LIBRARY"):
        if not Path(named).is_file():
            raise UsageError(f"LMTRAIN_LIBRARY={named}: no such file; unset it or build with `{BUILD_COMMAND}`")
        return Path(named)
    # an editable install keeps sources and library in two folders: the package's __file__ would find only one
    spec = importlib.util.find_spec("lmtrain")
    folders = [Path(folder) for folder in (spec and spec.submodule_search_locations) or []]
    builds = [build for folder in folders for build in sorted(folder.parent.glob("build/*/"))]
    found = (folder / name for folder in folders + builds for name in _FILE_NAMES)
    return next((path for path in found if path.is_file()), None)


@cache
def load() -> str | None:
    """Load the compiled library once. Returns None, or why it cannot be used (said once, with the build command)."""
    path = library_path()
    reason = f"the compiled library is not built; build it with `{BUILD_COMMAND}`"
    if path is not None:
        try:
            torch.ops.load_library(path)
            return None
        except OSError as error:
            reason = f"{path} does not load ({error}); rebuild it with `{BUILD_COMMAND}`"
    log.warning("%s; ops run their slower pure-torch reference", reason)
    return reason


@cache
def _choose(wanted: str, op: str, device: str, dtype: torch.dtype) -> str:
    candidates = _backends[op]
    named = next((candidate for candidate in candidates if candidate.name == wanted), None)
    if named is not None:
        if why := named.refusal(device, dtype):
            raise UsageError(f"{op}: backend {wanted} was asked for, but {why}; or choose kernels=auto")
        return named.name
    available = {backend.name for backends in _backends.values() for backend in backends}
    if wanted not in available | {"auto"}:
        raise UsageError(f"{op}: backend {wanted} was asked for, but no op has it{nearest(wanted, available)}")
    whole = (candidate for candidate in candidates if candidate.lacks is None)
    return next(candidate.name for candidate in whole if candidate.refusal(device, dtype) is None)


def _known(name: str, origin: str) -> str:
    if name not in KERNELS:
        raise UsageError(f"{origin}={name}: no such backend{nearest(name, KERNELS)}")
    return name


def _spell(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
