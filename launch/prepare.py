"""Make training data: tokenize text, hold some out, shuffle, write; look at it, check it, join it, pack it.

    python launch/prepare.py python-corpus out=data/python
    python launch/prepare.py debian-corpus out=data/debian
    python launch/prepare.py out=data/demo tokenizer=train:2048 heldout=0.03 workers=2 \\
        sources.code.path=data/python/code.jsonl sources.docs.path='manuals/**/*.txt'
    python launch/prepare.py verify data/demo

The first form collects the text that comes with Python, the second some 190 MB of Debian's documentation (downloaded).
The third makes data/demo/tokenizer.json and a folder per
source, which a recipe names as data.tokenizer and data.sources.NAME.path. The last is a verb on data that is there.
A source is a file, a folder, a glob (text, jsonl, parquet, arrow, csv), or a dataset on the Hugging Face hub.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from inspect import cleandoc
from typing import Any, get_type_hints

from lmtrain.data.corpora.debian_corpus import write_debian_corpus
from lmtrain.data.corpora.python_corpus import write_python_corpus
from lmtrain.data.counted import counted
from lmtrain.data.ingest.ingest import PrepareConfig, prepare
from lmtrain.data.ingest.reading import SourceOptions
from lmtrain.data.store_verbs import VERBS, summary
from lmtrain.errors import EXIT_DONE, EXIT_IO, LmtrainError, UsageError, nearest
from lmtrain.pipe import ends_with_its_reader


def main(argv: list[str]) -> int:
    """Run the command line ``argv``; returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        verb = VERBS.get(argv[0]) if argv else None
        verb = verb or (CORPORA.get(argv[0]) if argv else None)
        if not argv or {"--help", "-h", "help"} & set(argv):
            print(help_page() if verb is None else cleandoc(verb.__doc__ or ""))
        elif verb is not None:
            verb(argv[1:])
        else:
            _prepare(argv)
    except LmtrainError as error:
        print(f"prepare: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        raise
    except OSError as error:
        print(f"prepare: {error.filename or 'files'}: {error.strerror or error}", file=sys.stderr)
        return EXIT_IO
    return EXIT_DONE


def parse(argv: list[str]) -> PrepareConfig:
    """The settings in ``key=value`` words. Raises UsageError with the nearest key."""
    known = [field.name for field in dataclasses.fields(PrepareConfig)]
    given: dict[str, Any] = {}
    sources: dict[str, dict[str, Any]] = {}
    for argument in argv:
        key, equals, text = argument.partition("=")
        if not equals:
            raise UsageError(
                f"{argument}: expected key=value or a verb{nearest(argument, VERBS | CORPORA)}; --help shows how"
            )
        first, *rest = key.split(".")
        if first == "sources" and len(rest) == 2:
            fields = [field.name for field in dataclasses.fields(SourceOptions)]
            if rest[1] not in fields:
                raise UsageError(f"{key}: unknown key{nearest(rest[1], fields)}")
            sources.setdefault(rest[0], {})[rest[1]] = _value(key, text, get_type_hints(SourceOptions)[rest[1]])
        elif first == "sources":
            raise UsageError(f"{key}: write sources.NAME.path=...")
        elif key not in known:
            raise UsageError(f"{key}: unknown key{nearest(key, known)}")
        else:
            given[key] = _value(key, text, get_type_hints(PrepareConfig)[key])
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

    verbs = [f"  {name:<26} {(verb.__doc__ or '').splitlines()[0]}" for name, verb in (VERBS | CORPORA).items()]
    lines = [(__doc__ or "").rstrip(), "", "Verbs (VERB --help tells more):", *verbs, "", "Settings:"]
    for prefix, settings in (("", PrepareConfig), ("sources.NAME.", SourceOptions)):
        for key in keys_of(settings).values():
            if key.name != "sources":
                default = "required" if key.required else f"default {key.default}"
                lines.append(f"  {prefix + key.name + '=':<26} {key.doc} ({default})")
    return "\n".join(lines)


def _value(key: str, text: str, kind: Any) -> Any:
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
        print(summary(name, manifest))
        if any(step.get("removed") for step in manifest.pipeline):
            print(f"    examples of what was left out: {cfg.out}/{name}/filters.jsonl")


def _python_corpus(argv: Sequence[str]) -> None:
    """Collect the text that comes with the running Python: code, reference, C headers; nothing is downloaded.

        python-corpus out=FOLDER

    FOLDER: gets a .jsonl file per domain, each of which is a source for prepare.
    """
    out = _out("python-corpus", argv)
    _show_corpus(out, write_python_corpus(out), "version of Python")


def _debian_corpus(argv: Sequence[str]) -> None:
    """Collect Debian's documentation in 8 domains; downloads about 143 MB of packages with apt-get, installs nothing.

        debian-corpus out=FOLDER

    FOLDER: gets a .jsonl file per domain, each of which is a source for prepare.
    """
    out = _out("debian-corpus", argv)
    _show_corpus(out, write_debian_corpus(out), "packages, versions, licences")


def _show_corpus(out: str, made: Mapping[str, Any], contents: str) -> None:
    for name, domain in made["domains"].items():
        size = f"{domain['bytes_of_text'] / 1e6:.2f} MB"
        print(f"  {out}/{name}.jsonl: {counted(domain['documents'], 'document')}, {size}")
    print(f"  {out}/SOURCES.json: {contents}; digest of the corpus {made['digest']}")


def _out(verb: str, argv: Sequence[str]) -> str:
    if len(argv) != 1 or not argv[0].removeprefix("out=") or not argv[0].startswith("out="):
        got = " ".join(argv) or "nothing"
        raise UsageError(f"{verb}: expected out=FOLDER, where its .jsonl files go, and nothing else; got {got}")
    return argv[0].removeprefix("out=")


CORPORA: dict[str, Callable[[Sequence[str]], None]] = {"python-corpus": _python_corpus, "debian-corpus": _debian_corpus}


if __name__ == "__main__":
    with ends_with_its_reader():
        code = main(sys.argv[1:])
    sys.exit(code)
