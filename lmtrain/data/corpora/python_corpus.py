"""A corpus every machine has: the text that comes with Python, as JSON lines per domain. Licence: PSF.

The ids are paths, so that a module and its docstrings fall on the same side of the held-out split; docstrings are
train-only, since a held-out module already holds them.
"""

from __future__ import annotations

import ast
import logging
import os
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lmtrain.data.corpora.jsonl import write_corpus
from lmtrain.errors import DataError

MAX_BYTES = 200_000
"""Larger files are generated tables."""
GENERATED = re.compile(rb"\bgenerated\b", re.IGNORECASE)
"""What a file that a program wrote says of itself in its first lines: codec tables, build settings."""
MIN_DOCSTRING = 64
SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}

log = logging.getLogger(__name__)


def write_python_corpus(out: str | Path) -> dict[str, Any]:
    """Write ``out/{code,reference,cheaders}.jsonl`` and ``out/SOURCES.json``; returns the content of the latter."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    library = Path(sysconfig.get_path("stdlib"))
    modules = dict(_files(library, ".py"))
    if not modules:
        raise DataError(f"{library}: no Python sources there; this Python comes without its library's text")
    code = [{"id": name, "text": text} for name, text in modules.items()]
    docstrings = [
        {"id": name, "text": text, "train_only": True}
        for name, module in modules.items()
        for text in _docstrings(module)
    ]
    include = Path(sysconfig.get_path("include"))
    headers = [{"id": f"include/{name}", "text": text} for name, text in _files(include, ".h")]
    if not headers:
        log.warning("%s: no C headers there; cheaders.jsonl stays empty", include)
    domains = {"code": code, "reference": _topics() + docstrings, "cheaders": headers}
    return write_corpus(out, domains.items(), {"python": sys.version.split()[0], "licence": "PSF"})


def _files(root: Path, suffix: str) -> Iterator[tuple[str, str]]:
    """Relative path and text of the UTF-8 files below ``root``, sorted by path."""
    found = []
    for folder, names, files in os.walk(root):
        names[:] = [name for name in names if name not in SKIPPED]
        found += [Path(folder) / name for name in files if name.endswith(suffix)]
    for path in sorted(found, key=lambda path: path.relative_to(root).as_posix()):
        data = path.read_bytes()
        if not 0 < len(data) <= MAX_BYTES or GENERATED.search(data[:300]):
            continue
        try:
            yield path.relative_to(root).as_posix(), data.decode("utf-8")
        except UnicodeDecodeError:
            continue  # a few modules of the library are in other encodings on purpose


def _topics() -> list[dict[str, Any]]:
    from pydoc_data.topics import topics

    return [{"id": f"topics/{name}", "text": text} for name, text in sorted(topics.items())]


def _docstrings(source: str) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old modules
            tree = ast.parse(source)
    except SyntaxError:
        return  # templates that only look like modules
    waiting: list[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef] = [tree]
    while waiting:
        node = waiting.pop()
        text = ast.get_docstring(node)
        if text and len(text) > MIN_DOCSTRING:
            yield text
        inner = [n for n in node.body if isinstance(n, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)]
        waiting += reversed(inner)
