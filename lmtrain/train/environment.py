"""What environment.json says of an attempt: versions, code, hardware, command line; and how secrets stay out of it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PACKAGES = ("lmtrain", "torch", "triton", "numpy", "datasets", "tokenizers", "sentencepiece", "omegaconf", "pydantic")
VARIABLES = re.compile(r"(CUDA|NCCL|GLOO|TORCH|OMP|MKL|SLURM_JOB|PYTORCH)\w*|LOCAL_RANK|RANK|WORLD_SIZE")
SECRET_WORDS = frozenset(
    {"key", "apikey", "token", "secret", "password", "passwd", "credential", "credentials", "webhook"}
)
USER_INFO = re.compile(r"(?<=://)[^/@\s]+@")
HIDDEN = "***"
SHORTEST_SECRET = 8


def describe_run(argv: Sequence[str], hardware: Mapping[str, Any]) -> dict[str, Any]:
    """The content of environment.json, without the attempt: JSON-ready and free of secrets."""
    return {
        "command": shlex.join(redact_argv(argv)),
        "directory": redact(os.getcwd()),
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name)) is not None},
        "code": _code(),
        "hardware": dict(hardware),
        "variables": {
            name: HIDDEN if _is_secret(name) else redact(value)
            for name, value in sorted(os.environ.items())
            if VARIABLES.fullmatch(name)
        },
    }


def redact(text: str) -> str:
    """``text`` without user info in URLs and without the value of any environment variable that names a secret."""
    for name, value in os.environ.items():
        if _is_secret(name) and len(value) >= SHORTEST_SECRET:
            text = text.replace(value, HIDDEN)
    return USER_INFO.sub(f"{HIDDEN}@", text)


def redact_argv(argv: Sequence[str]) -> list[str]:
    """Arguments with the values of ``name=value`` and ``--name value`` hidden where the name says secret."""
    result, hide_next = [], False
    for argument in argv:
        name, equals, _ = argument.partition("=")
        if hide_next or (equals and _is_secret(name)):
            result.append(f"{name}={HIDDEN}" if equals and not hide_next else HIDDEN)
            hide_next = False
        else:
            hide_next = argument.startswith("-") and not equals and _is_secret(argument)
            result.append(redact(argument))
    return result


def _is_secret(name: str) -> bool:
    """Whole words only: ``train.tokens`` and ``data.tokenizer`` are no secrets, ``HF_TOKEN`` and ``api-key`` are."""
    return not SECRET_WORDS.isdisjoint(re.split(r"[^a-z]+", name.lower()))


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _code() -> dict[str, Any]:
    """sha256 over the package's Python sources, and the git commit if they are part of a checkout."""
    package = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes() + b"\0")
    tracked = _git(package, "ls-files", "__init__.py")
    commit = _git(package, "rev-parse", "HEAD") if tracked else None
    changed = bool(_git(package, "status", "--porcelain", "--untracked-files=no")) if commit else None
    return {"sha256": digest.hexdigest(), "git_commit": commit, "git_changed": changed}


def _git(folder: Path, *arguments: str) -> str | None:
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
