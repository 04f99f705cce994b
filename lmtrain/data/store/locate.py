"""What a path on the command line means: a prepared folder, the folder around several, or a store of any format."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from lmtrain.data.store.foreign import open_store
from lmtrain.data.store.manifest import NAME, SPLITS, Manifest, open_split
from lmtrain.data.store.store import Store
from lmtrain.data.tokenizer import Tokenizer
from lmtrain.errors import DataError


@dataclass(frozen=True)
class Located:
    """One source. path: of the prepared folder or the store. manifest: None for a store that is not prepared, whose
    only split is ``""``. tokenizer: the one given, else the one that lies with a prepared folder, else None."""

    path: str
    manifest: Manifest | None
    stores: dict[str, Store] = field(default_factory=dict)
    tokenizer: Tokenizer | None = None

    def required_tokenizer(self) -> Tokenizer:
        """The tokenizer, or DataError saying how to give it."""
        if self.tokenizer is None:
            made = f" {self.manifest.tokenizer.name}" if self.manifest else ""
            raise DataError(f"{self.path}: its tokenizer{made} is not beside it; give it as tokenizer=PATH")
        return self.tokenizer


def prepared_folders(path: str | Path) -> list[Path]:
    """``path``, or the folders in it, that hold a manifest; not what a merge has under way."""
    root = Path(path)
    if (root / NAME).exists():
        return [root]
    return sorted(entry.parent for entry in root.glob(f"*/{NAME}") if entry.parent.suffix != ".partial")


def locate(path: str | Path, tokenizer: Tokenizer | None = None) -> list[Located]:
    """Every source at ``path``, open; prepared ones held to ``tokenizer``, if given. Raises DataError."""
    folders = prepared_folders(path)
    if not folders:
        _refuse_text(Path(path))
        return [Located(str(path), None, {"": open_store(path, tokenizer)}, tokenizer)]
    return [_prepared(folder, tokenizer) for folder in folders]


def _refuse_text(path: Path) -> None:
    """Raise DataError for a file, or a folder of files, none of which is a store."""
    files = [path] if path.is_file() else [entry for entry in path.glob("*") if entry.is_file()]
    stores = any(file.suffix in (".idx", ".bin", ".ds", ".npy") for file in files)
    if files and not stores and not Path(f"{path}.idx").exists():
        raise DataError(
            f"{path}: this is text, not tokens; prepare it first: python launch/prepare.py out=NEW "
            f"tokenizer=train:8192 sources.NAME.path={path}"
        )


def _prepared(folder: Path, tokenizer: Tokenizer | None) -> Located:
    manifest = Manifest.read(folder)
    fingerprint = manifest.tokenizer.fingerprint
    if tokenizer is None:
        beside = [folder.parent / name for name in ("tokenizer.json", "tokenizer.model")]
        loaded = (Tokenizer.load(path) for path in beside if path.is_file())
        tokenizer = next((each for each in loaded if each.fingerprint == fingerprint), None)
    elif tokenizer.fingerprint != fingerprint:
        raise DataError(
            f"{folder}: made with tokenizer {manifest.tokenizer.name} ({fingerprint[:12]}), {tokenizer.path} is "
            f"another ({tokenizer.fingerprint[:12]})"
        )
    stores = {split: open_split(folder, split, manifest) for split in SPLITS}
    return Located(str(folder), manifest, stores, tokenizer)
