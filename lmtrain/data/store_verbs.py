"""What launch/prepare.py does with data that is there: look at it, check it, count it, join it, plan its blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from lmtrain.data.blocks.best_fit import num_pieces
from lmtrain.data.blocks.pack_plan import PackPlan, plan_folder, plans, write_plan
from lmtrain.data.counted import counted
from lmtrain.data.store.index import Index
from lmtrain.data.store.locate import Located, locate, prepared_folders
from lmtrain.data.store.manifest import NAME, SPLITS, Manifest
from lmtrain.data.store.manifest import verify as verify_folder
from lmtrain.data.store.merge import merge as merge_stores
from lmtrain.data.store.statistics import Statistics, sample_lines
from lmtrain.data.store.store import Store
from lmtrain.data.tokenizer import Tokenizer
from lmtrain.errors import UsageError, nearest


def inspect(argv: Sequence[str]) -> None:
    """Show what is in a store: format, counts, and some documents as text, with their borders and special tokens.

        inspect PATH [documents=0,17] [tokenizer=PATH]

    PATH: a prepared folder, the folder around several, the prefix of a .bin/.idx pair, a .ds or a .npy file.
    documents: their numbers; default: the first, the middle and the last one. tokenizer: default: the one beside a
    prepared folder.
    """
    (path,), options = _words("inspect", argv, 1, ("documents", "tokenizer"))
    for located in locate(path, _tokenizer(options)):
        tokenizer = located.required_tokenizer()
        for name, store in _named(located):
            print(f"{name}: {_counts(store)}; tokenizer of {tokenizer.vocab_size:,} ids, end {tokenizer.eod!r}")
            chosen = _numbers(options["documents"]) if "documents" in options else _spread(store.num_documents)
            print("\n".join(f"  {line}" for line in sample_lines(store, tokenizer, chosen)))


def verify(argv: Sequence[str]) -> None:
    """Read everything and compare: sizes, digests per 64 MiB, layout of the index, range of every id, pack plans.

        verify PATH [tokenizer=PATH]

    PATH: as of inspect; of a prepared folder's train or heldout, the folder. Without a manifest there
    are no digests to compare with, and the range of the ids is checked only against a tokenizer that is given. The
    first difference is told, with its file and place; exit code 65.
    """
    (path,), options = _words("verify", argv, 1, ("tokenizer",))
    tokenizer = _tokenizer(options)
    if Path(path).name in SPLITS and (Path(path).parent / NAME).is_file():
        path = str(Path(path).parent)
    trusted = False
    for folder in prepared_folders(path):
        print(summary(str(folder), verify_folder(folder)))
    for located in locate(path, tokenizer):  # a tokenizer that is another is refused here
        for name, store in _named(located):
            if located.manifest is None:
                trusted = True
                _verify_foreign(name, store, tokenizer)
            for length in plans(store):
                PackPlan.open(store, length).verify()
                print(f"  {plan_folder(store, length)}: verified")
    print(f"{path}: {'verified layout only' if trusted else 'verified'}")


def stats(argv: Sequence[str]) -> None:
    """Count: documents, tokens, lengths (a histogram), bytes per token, tokens below a character, ids never used.

        stats PATH [tokenizer=PATH]

    PATH, tokenizer: as of inspect. Reads everything. Many tokens that stand for less than a character (over 5 %) say
    that the vocabulary does not cover the text; many ids never used, that it was made for other text.
    """
    (path,), options = _words("stats", argv, 1, ("tokenizer",))
    for located in locate(path, _tokenizer(options)):
        tokenizer = located.required_tokenizer()
        for split, store in located.stores.items():
            known = located.manifest.bytes_of_text[split] if located.manifest else None
            print(f"{store.prefix}: {store.dtype.name}")
            print("\n".join(f"  {line}" for line in Statistics.of(store, tokenizer, known).lines()))


def merge(argv: Sequence[str]) -> None:
    """Join stores of one tokenizer: all documents of the first, then of the second, and so on.

        merge out=NEW PATH PATH ... [tokenizer=PATH]

    PATH: as of inspect. Prepared folders give a prepared folder NEW; any other formats give the pair NEW.bin, NEW.idx,
    and need the tokenizer: so .ds and .npy are converted, too. NEW appears when it is complete. Inputs of which
    one trains on a document whose tokens another holds out are refused; what nearly equals one is not found.
    """
    paths, options = _words("merge", argv, None, ("out", "tokenizer"))
    if not paths or "out" not in options:
        raise UsageError("merge: expected out=NEW and at least one PATH")
    print(f"{options['out']}: {_counts(merge_stores(options['out'], paths, _tokenizer(options)))}")


def pack(argv: Sequence[str]) -> None:
    """Plan which documents share a block (data.packing=best_fit): best fit decreasing, no document cut that fits.

        pack PATH length=2048 [tokenizer=PATH]

    PATH: as of inspect. length: data.block_tokens of the recipe, else its data.seq_len. The plan lies beside the
    tokens, PREFIX.pack-2048, and is refused if they change. About 40 bytes of memory per document.
    """
    (path,), options = _words("pack", argv, 1, ("length", "tokenizer"))
    if not options.get("length", "").isdecimal() or int(options["length"]) < 1:
        raise UsageError(f"pack: expected length=N, tokens of a block, got {options.get('length', 'none')}")
    length = int(options["length"])
    for located in locate(path, _tokenizer(options)):
        store = located.stores["train" if located.manifest else ""]
        header = write_plan(store, length)
        alone = sum(int(num_pieces(lengths, length).sum()) for _, lengths in store.document_lengths())
        width = length + 1
        unpacked = 1 - (header.num_blocks * width - header.num_padding) / max(alone * width, 1)
        print(
            f"{plan_folder(store, length)}: {counted(header.num_blocks, 'block')} of "
            f"{counted(header.num_pieces, 'piece')} of {counted(header.documents, 'document')}, "
            f"{header.num_padding / max(header.num_blocks * width, 1):.2%} padding "
            f"(unpacked: {counted(alone, 'block')}, {unpacked:.2%})"
        )


VERBS: dict[str, Callable[[Sequence[str]], None]] = {
    each.__name__: each for each in (inspect, verify, stats, merge, pack)
}


def summary(name: str, manifest: Manifest) -> str:
    """A prepared source in one line."""
    train, heldout = manifest.file("train.bin"), manifest.file("heldout.bin")
    reasons = {step["step"]: step["removed"] for step in manifest.pipeline if step.get("removed")}
    why = f" ({', '.join(f'{count:,} {reason}' for reason, count in reasons.items())})" if reasons else ""
    per_token = manifest.bytes_of_text["train"] / max(train.tokens, 1)
    ids = next((step for step in manifest.pipeline if step["step"] == "heldout"), None)
    of_ids = f" ({ids['ids']:,} of {counted(ids['of'], 'id')})" if ids else ""
    tokens, heldout_tokens = counted(train.tokens, "token"), counted(heldout.tokens, "token")
    return (
        f"  {name}: {counted(train.documents, 'document')}, {tokens}, {per_token:.2f} bytes per token; held out "
        f"{counted(heldout.documents, 'document')}{of_ids}, {heldout_tokens}; left out "
        f"{counted(sum(reasons.values()), 'document')}{why}"
    )


def _verify_foreign(name: str, store: Store, tokenizer: Tokenizer | None) -> None:
    if Path(f"{store.prefix}.idx").is_file():
        Index.open(f"{store.prefix}.idx").check()
    if tokenizer is not None:
        store.check_range(tokenizer.vocab_size)
    range_ = "" if tokenizer else ", nor its ids: no tokenizer= is given"
    print(f"  {name}: {_counts(store)}; no {NAME}: its bytes are compared with nothing{range_}")


def _words(
    verb: str, argv: Sequence[str], num_paths: int | None, keys: Sequence[str]
) -> tuple[list[str], dict[str, str]]:
    """Paths and ``key=value`` options. A word that names something on disk is a path even if it holds a ``=``."""
    paths: list[str] = []
    options: dict[str, str] = {}
    for word in argv:
        key, equals, value = word.partition("=")
        if not equals or Path(word).exists():
            paths.append(word)
        elif key not in keys:
            raise UsageError(f"{verb}: {key}: unknown key{nearest(key, keys)}")
        elif not value:
            raise UsageError(f"{verb}: {key}: expected a value, got nothing")
        else:
            options[key] = value
    if num_paths is not None and len(paths) != num_paths:
        raise UsageError(f"{verb}: expected one path, got {len(paths)}; {verb} --help shows how")
    return paths, options


def _tokenizer(options: dict[str, str]) -> Tokenizer | None:
    return Tokenizer.load(options["tokenizer"]) if "tokenizer" in options else None


def _named(located: Located) -> list[tuple[str, Store]]:
    return [(store.prefix, store) for store in located.stores.values()]


def _counts(store: Store) -> str:
    size = store.num_tokens * store.dtype.itemsize
    contents = f"{counted(store.num_documents, 'document')}, {counted(store.num_tokens, 'token')}"
    return f"{contents}, {store.dtype.name}, {size / 1e6:,.1f} MB"


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"inspect: documents: expected numbers with a comma between, got {text}") from None


def _spread(count: int) -> list[int]:
    return sorted({0, count // 2, count - 1}) if count else []
