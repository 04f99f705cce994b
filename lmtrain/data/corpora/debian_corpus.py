"""A corpus of about 190 MB in eight domains from Debian's documentation packages, downloaded and not installed.

Versions move with Debian's releases: SOURCES.json records what was used, and losses compare only under equal digests.
"""

from __future__ import annotations

import gzip
import hashlib
import logging
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lmtrain.data.corpora.debian_text import dictionary_entries, html_text, roff_text
from lmtrain.data.corpora.jsonl import write_corpus
from lmtrain.errors import DataError

MAX_CODE_BYTES = 200_000
"""Larger files of code are generated tables."""
MIN_CHARACTERS = 64

log = logging.getLogger(__name__)


class Package(NamedTuple):
    """files: what is read of it, as a pattern over paths. text: how. together: a part of the path that is left out of
    the ids, so that translations of one page fall on one side of the held-out split."""

    name: str
    domain: str
    licence: str
    files: str
    text: Callable[[str], str] = str
    together: str = ""


HANDBOOK = r"html/(?!en-US)[^/]+/[^/]+\.html"
PACKAGES = (
    Package("libpython3.11-stdlib", "code", "PSF", r"\.py"),
    Package("libpython3.11-minimal", "code", "PSF", r"\.py"),
    Package("python3.11-doc", "rst", "PSF", r"_sources/.*\.txt"),
    Package("linux-doc-6.1", "rst", "GPL-2", r"Documentation/(?!translations/).*\.rst"),
    Package(
        "linux-doc-6.1", "multilingual", "GPL-2", r"Documentation/translations/.*\.rst", str, r"translations/[^/]+/"
    ),
    Package("debian-handbook", "prose", "GPL-2+ or CC-BY-SA-3.0", r"html/en-US/[^/]+\.html", html_text, r"en-US/"),
    Package("debian-handbook", "multilingual", "GPL-2+ or CC-BY-SA-3.0", HANDBOOK, html_text, r"(?<=html/)[^/]+/"),
    Package("anarchism", "prose", "GPL-2", r"html/[^/]+\.html", html_text),
    Package("dict-gcide", "dictionary", "GPL-3+", r"dictd/.*\.dict"),
    Package("dict-foldoc", "dictionary", "GFDL-1.2+", r"dictd/.*\.dict"),
    Package("manpages", "manual", "several free", r"man/man\d/.*", roff_text),
    Package("manpages-dev", "manual", "several free", r"man/man\d/.*", roff_text),
    Package("manpages-de", "multilingual", "GPL-3+", r"man/de/man\d/.*", roff_text, r"de/"),
    Package("manpages-fr", "multilingual", "GPL-3+", r"man/fr/man\d/.*", roff_text, r"fr/"),
    Package("manpages-ru", "multilingual", "GPL-3+", r"man/ru/man\d/.*", roff_text, r"ru/"),
    Package("manpages-ja", "multilingual", "several free", r"man/ja/man\d/.*", roff_text, r"ja/"),
    Package("postgresql-doc-15", "sql", "PostgreSQL", r"html/.*\.html", html_text),
    Package("sqlite3-doc", "sql", "public domain", r"sqlite3/.*\.html", html_text),
    Package("perl-doc", "pod", "Artistic or GPL-1+", r"\.pod"),
)


def write_debian_corpus(out: str | Path, packages: Sequence[Package] = PACKAGES) -> dict[str, Any]:
    """Write ``out/DOMAIN.jsonl`` and ``out/SOURCES.json``; returns the content of the latter.

    ``out/debs`` keeps the packages; one that is there is not asked for again. A package that this release of Debian
    does not have is left out, with a warning. Raises DataError if none can be had.
    """
    out = Path(out)
    debs = out / "debs"
    debs.mkdir(parents=True, exist_ok=True)
    found = {name: _deb(name, debs) for name in dict.fromkeys(package.name for package in packages)}
    missing = [name for name, path in found.items() if path is None]
    if len(missing) == len(found):
        raise DataError(
            f"{debs}: none of {', '.join(missing)} can be had with apt-get download (Debian's network out of reach, or "
            "no Debian); put their .deb files there and run again"
        )
    used = {package.name: package.licence for package in packages if found[package.name] is not None}
    made_from = {"packages": [_described(found[name], licence) for name, licence in used.items()], "missing": missing}

    def domains() -> Iterator[tuple[str, Iterator[dict[str, Any]]]]:
        for domain in dict.fromkeys(package.domain for package in packages):
            chosen = [(package, found[package.name]) for package in packages if package.domain == domain]
            yield domain, (row for package, deb in chosen if deb is not None for row in _documents(package, deb, out))

    return write_corpus(out, domains(), made_from)


def _deb(name: str, debs: Path) -> Path | None:
    """The package's file in ``debs``, downloaded if it is not there; None if it cannot be had."""
    there = sorted(debs.glob(f"{name}_*.deb"))
    if there:
        return there[-1]
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise DataError("debian-corpus needs apt-get and dpkg-deb (Debian, Ubuntu)")
    with tempfile.TemporaryDirectory(dir=debs) as work:  # so that half a file is never taken for a package
        done = subprocess.run(
            ["apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", name],
            cwd=work, capture_output=True, text=True,
        )  # fmt: skip
        files = list(Path(work).glob("*.deb"))
        if done.returncode or not files:
            lines = [line for line in done.stderr.splitlines() if line.startswith("E:")] or ["no file came"]
            log.warning("%s: left out: %s", name, lines[0])
            return None
        os.replace(files[0], debs / files[0].name)
    return debs / files[0].name


def _described(deb: Path | None, licence: str) -> dict[str, str]:
    fields = _dpkg("-f", str(deb), "Package", "Version")
    package, version = (line.partition(": ")[2] for line in fields.splitlines())
    digest = hashlib.sha256(Path(str(deb)).read_bytes()).hexdigest()
    return {"package": package, "version": version, "sha256": digest, "licence": licence}


def _dpkg(*arguments: str) -> str:
    done = subprocess.run(["dpkg-deb", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise DataError(" ".join(done.stderr.split()))
    return done.stdout


def _documents(package: Package, deb: Path, out: Path) -> Iterator[dict[str, Any]]:
    """The documents of a package, by path; links are other names of what is there anyway."""
    with tempfile.TemporaryDirectory(dir=out) as work:
        _dpkg("-x", str(deb), work)
        names = sorted(
            os.path.relpath(os.path.join(folder, name), work)
            for folder, _, files in os.walk(work)
            for name in files
            if not os.path.islink(os.path.join(folder, name))
        )
        for name in names:
            plain = re.sub(r"\.(gz|dz)$", "", name)
            if not re.search(f"{package.files}$", plain):
                continue
            data = _bytes(Path(work) / name)
            texts: Iterable[tuple[str, str]]
            if plain.endswith(".dict"):
                index = (Path(work) / plain).with_suffix(".index").read_text(encoding="utf-8")
                texts = ((f"{package.name}/{word}", text) for word, text in dictionary_entries(data, index))
            elif package.domain == "code" and len(data) > MAX_CODE_BYTES:
                continue
            else:
                number = re.sub(package.together, "", plain, count=1) if package.together else plain
                family = re.sub(r"^manpages-\w\w$", "manpages", package.name)
                texts = [(f"{family}/{number}", _decoded(data, package.text))]
            yield from ({"id": key, "text": text} for key, text in texts if len(text.strip()) >= MIN_CHARACTERS)


def _bytes(path: Path) -> bytes:
    if path.suffix in (".gz", ".dz"):
        with gzip.open(path) as file:
            return file.read()
    return path.read_bytes()


def _decoded(data: bytes, text: Callable[[str], str]) -> str:
    """Text of UTF-8 data, or of Latin-1, in which a few old pages are."""
    try:
        return text(data.decode("utf-8"))
    except UnicodeDecodeError:
        return text(data.decode("latin-1"))
