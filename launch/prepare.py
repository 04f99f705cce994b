"""Make training data: tokenize text, hold some out, shuffle, write, verify.

    python launch/prepare.py python-corpus out=data/python
    python launch/prepare.py out=data/demo tokenizer=train:2048 heldout=0.03 workers=2 \\
        sources.code.path=data/python/code.jsonl sources.docs.path='manuals/**/*.txt'
    python launch/prepare.py verify data/demo

The first form collects the text that comes with Python. The second makes data/demo/tokenizer.json and a folder per
source, which a recipe names as data.tokenizer and data.sources.NAME.path. The third reads everything and compares.
A source is a file, a folder, a glob (text, jsonl, parquet, arrow, csv), or a dataset on the Hugging Face hub.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from pathlib import Path
from typing import Any, get_type_hints

from lmtrain.data.ingest import PrepareConfig, prepare
from lmtrain.data.manifest import NAME, Manifest, verify
from lmtrain.data.python_corpus import write_python_corpus
from lmtrain.data.reading import SourceOptions
from lmtrain.errors import EXIT_DONE, DataError, LmtrainError, UsageError, nearest


def main(argv: list[str]) -> int:
    """Run the command line ``argv``; returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        if not argv or {"--help", "-h", "help"} & set(argv):
            print(help_page())
        elif argv[0] == "verify":
            _verify(argv[1:])
        elif argv[0] == "python-corpus":
            _python_corpus(argv[1:])
        else:
            _prepare(argv)
    except LmtrainError as error:
        print(f"prepare: {error}", file=sys.stderr)
        return error.exit_code
    return EXIT_DONE


def parse(argv: list[str]) -> PrepareConfig:
    """The settings in ``key=value`` words. Raises UsageError with the nearest key."""
    known = [field.name for field in dataclasses.fields(PrepareConfig)]
    given: dict[str, Any] = {}
    sources: dict[str, dict[str, Any]] = {}
    for argument in argv:
        key, equals, text = argument.partition("=")
        if not equals:
            raise UsageError(f"{argument}: expected key=value; --help shows how")
        first, *rest = key.split(".")
        if first == "sources" and len(rest) == 2:
            fields = [field.name for field in dataclasses.fields(SourceOptions)]
            if rest[1] not in fields:
                raise UsageError(f"{key}: unknown key{nearest(rest[1], fields)}")
            sources.setdefault(rest[0], {})[rest[1]] = text
        elif first == "sources":
            raise UsageError(f"{key}: write sources.NAME.path=...")
        elif key not in known:
            raise UsageError(f"{key}: unknown key{nearest(key, known)}")
        else:
            given[key] = _value(key, text)
    for name, options in sources.items():
        if "path" not in options:
            raise UsageError(f"sources.{name}.path: missing")
    missing = [key for key in ("out", "tokenizer") if key not in given]
    if missing:
        raise UsageError(f"{missing[0]}: missing; --help shows an example")
    return PrepareConfig(sources={name: SourceOptions(**options) for name, options in sources.items()}, **given)


def help_page() -> str:
    """What the program does and every key, from the dataclasses."""
    from lmtrain.config.schema import keys_of

    lines = [(__doc__ or "").rstrip(), ""]
    for prefix, settings in (("", PrepareConfig), ("sources.NAME.", SourceOptions)):
        for key in keys_of(settings).values():
            if key.name != "sources":
                default = "required" if key.required else f"default {key.default}"
                lines.append(f"  {prefix + key.name + '=':<26} {key.doc} ({default})")
    return "\n".join(lines)


def _value(key: str, text: str) -> Any:
    kind = get_type_hints(PrepareConfig)[key]
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        return kind(text) if kind in (int, float) else text
    except (ValueError, KeyError):
        word = {bool: "true or false", int: "an integer", float: "a number"}[kind]
        raise UsageError(f"{key}: expected {word}, got {text}") from None


def _prepare(argv: list[str]) -> None:
    cfg = parse(argv)
    manifests, made = prepare(cfg)
    print(f"{cfg.out}: {'made' if made else 'already made from the same text and settings, nothing to do'}")
    for name, manifest in manifests.items():
        _show(name, manifest)


def _show(name: str, manifest: Manifest) -> None:
    train, heldout = manifest.file("train.bin"), manifest.file("heldout.bin")
    removed = sum(step.get("removed", 0) for step in manifest.pipeline)
    per_token = manifest.bytes_of_text["train"] / max(train.tokens, 1)
    print(
        f"  {name}: {train.documents:,} documents, {train.tokens:,} tokens, {per_token:.2f} bytes per token; held out "
        f"{heldout.documents:,} documents, {heldout.tokens:,} tokens; left out {removed:,} documents"
    )


def _verify(argv: list[str]) -> None:
    if len(argv) != 1:
        raise UsageError("verify: expected one folder")
    root = Path(argv[0])
    folders = [root] if (root / NAME).exists() else sorted(path.parent for path in root.glob(f"*/{NAME}"))
    if not folders:
        raise DataError(f"{root}: no {NAME} there or one folder below")
    for folder in folders:
        _show(str(folder), verify(folder))
    print(f"{root}: verified")


def _python_corpus(argv: list[str]) -> None:
    if len(argv) != 1 or not argv[0].startswith("out="):
        raise UsageError("python-corpus: expected out=FOLDER and nothing else")
    out = argv[0].removeprefix("out=")
    for name, (documents, size) in write_python_corpus(out).items():
        print(f"  {out}/{name}.jsonl: {documents:,} documents, {size / 1e6:.2f} MB")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
