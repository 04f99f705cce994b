"""The Debian corpus from packages made here: what is read of each, ids, licences, and the extractors by hand."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from lmtrain.data.corpora import debian_corpus
from lmtrain.data.corpora.debian_corpus import PACKAGES, Package, write_debian_corpus
from lmtrain.data.corpora.debian_text import dictionary_entries, html_text, roff_text
from lmtrain.errors import DataError

MAN = r"""
.\" a comment
.TH OPEN 2 2023-01-01
.SH NAME
open, creat \- open a file
.SH SYNOPSIS
.nf
.BI "int open(const char *" pathname ", int " flags );
.fi
.SH DESCRIPTION
The
.BR open ()
call opens \fIpathname\fP; see \(lqfiles\(rq.
.TP
.B O_CREAT
A backslash: \e, \[u00E9]t\[u00E9].
.de XX
hidden
..
"""


def test_man_pages() -> None:
    text = roff_text(MAN)
    assert text.startswith(
        "NAME\n\nopen, creat - open a file\n\nSYNOPSIS\n\nint open(const char *pathname, int flags);"
    )
    assert (
        "The\nopen()\ncall opens pathname; see \u201cfiles\u201d.\n\nO_CREAT\nA backslash: \\, \u00e9t\u00e9." in text
    )
    assert "comment" not in text and "hidden" not in text and "OPEN" not in text


def test_pages() -> None:
    page = "<html><head><title>no</title></head><body><p>One\n  two &amp; <b>three</b></p><ul><li>a<li>b</ul>"
    assert html_text(page + "<pre>x\n  y</pre><script>no()</script></body>") == "One two & three\n\na\nb\n\nx\n  y\n"


def test_dictionaries() -> None:
    text = b"00-database-info\nAbc  first\nB  second\n"
    index = "00-database-info\tA\tR\nAbc\tR\tL\nabc too\tR\tL\nB\tc\tK\n"
    assert list(dictionary_entries(text, index)) == [("Abc", "Abc  first\n"), ("B", "B  second\n")]
    with pytest.raises(DataError, match="not a line of a dictd index"):
        list(dictionary_entries(text, "Abc R L"))


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="makes Debian packages")
def test_packages_to_domains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prose = "A paragraph that is long enough to be kept as a document of this corpus."
    files = {
        "usr/lib/python3/a.py": prose, "usr/lib/python3/table.py": "#" * 300_000, "usr/share/man/man2/open.2.gz": MAN,
        "usr/share/man/de/man2/open.2.gz": MAN.replace("open a file", "eine Datei \u00f6ffnen"), "usr/short.py": "x",
    }  # fmt: skip
    for name, text in files.items():
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    (tmp_path / "tree/usr/share/man/man2/creat.2.gz").symlink_to("open.2.gz")
    debs = tmp_path / "out" / "debs"
    debs.mkdir(parents=True)
    for package in ("manpages", "manpages-de"):
        (tmp_path / "tree/DEBIAN").mkdir(exist_ok=True)
        (tmp_path / "tree/DEBIAN/control").write_text(
            f"Package: {package}\nVersion: 1.2\nArchitecture: all\nMaintainer: x\nDescription: x\n", encoding="utf-8"
        )
        subprocess.run(
            ["dpkg-deb", "-b", str(tmp_path / "tree"), str(debs / f"{package}_1.2_all.deb")],
            check=True, capture_output=True,
        )  # fmt: skip
    wanted = [
        Package("manpages", "code", "free", r"\.py"),
        Package("manpages", "manual", "free", r"man/man\d/.*", roff_text),
        Package("manpages-de", "multilingual", "GPL", r"man/de/man\d/.*", roff_text, r"de/"),
        Package("none", "manual", "free", r".*"),
    ]
    monkeypatch.setattr(debian_corpus.subprocess, "run", _offline(subprocess.run))
    made = write_debian_corpus(tmp_path / "out", wanted)
    assert made["missing"] == ["none"] and [row["licence"] for row in made["packages"]] == ["free", "GPL"]
    assert [(row["package"], row["version"]) for row in made["packages"]] == [
        ("manpages", "1.2"),
        ("manpages-de", "1.2"),
    ]
    rows = {
        name: [
            json.loads(line) for line in (tmp_path / "out" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        for name in ("code", "manual", "multilingual")
    }
    assert [row["text"] for row in rows["code"]] == [prose]
    assert [row["id"] for row in rows["manual"]] == ["manpages/usr/share/man/man2/open.2"]
    assert [row["id"] for row in rows["multilingual"]] == ["manpages/usr/share/man/man2/open.2"]
    assert "eine Datei \u00f6ffnen" in rows["multilingual"][0]["text"]
    assert write_debian_corpus(tmp_path / "out", wanted)["digest"] == made["digest"]
    with pytest.raises(DataError, match=r"none of none can be had with apt-get download .*put their .deb files there"):
        write_debian_corpus(tmp_path / "empty", wanted[-1:])


def _offline(run: object) -> object:
    """apt-get finds nothing; dpkg-deb works."""

    def wrapped(command: list[str], **settings: object) -> object:
        if command[0] == "apt-get":
            return subprocess.CompletedProcess(command, 100, "", "E: Unable to locate package none\n")
        return run(command, **settings)  # type: ignore[operator]

    return wrapped


def test_every_package_says_where_it_belongs() -> None:
    assert {package.domain for package in PACKAGES} == {
        "code", "rst", "multilingual", "prose", "dictionary", "manual", "sql", "pod"
    }  # fmt: skip
    licences = {(package.name, package.licence) for package in PACKAGES}
    assert len(licences) == len({package.name for package in PACKAGES})
