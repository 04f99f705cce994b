"""Plain text of the formats documentation lies in: roff (man pages), HTML, and dictionaries in the format of dictd."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser

from lmtrain.errors import DataError

_GLYPHS = {
    "aq": "'", "dq": '"', "lq": "\u201c", "rq": "\u201d", "oq": "\u2018", "cq": "\u2019", "em": "\u2014",
    "en": "\u2013", "bu": "\u2022", "co": "\u00a9", "ti": "~", "ha": "^", "rs": "\\", "mu": "\u00d7",
    "+-": "\u00b1", "->": "\u2192", "<=": "\u2264", ">=": "\u2265", "!=": "\u2260", "ga": "`", "pc": "\u00b7",
    "de": "\u00b0", "la": "<", "ra": ">", "Bq": "\u201e", "Fo": "\u00ab", "Fc": "\u00bb", "ss": "\u00df",
}  # fmt: skip
_ESCAPE = re.compile(
    r"""\\(?: \((?P<two>..) | \[(?P<long>[^\]]*)\]       # glyphs
            | f(?:\[[^\]]*\]|\(..|.) | s[-+]?\d+ | [*n](?:\[[^\]]*\]|\(..|.) | [hvwDlLbox]'[^']*'   # fonts, sizes, ...
            | (?P<one>.) | $)""",
    re.VERBOSE,
)
_ONE = {"-": "-", "e": "\\", "\\": "\\", " ": " ", "~": " ", "0": " ", "'": "\u00b4", "`": "`", ".": ".", "t": "\t"}
_BREAKS = {"TP", "PP", "P", "LP", "IP", "HP", "sp", "br", "Pp", "It", "TQ", "nf", "fi", "EX", "EE", "RS", "RE"}
_SKIPPED = {"TH", "so", "de", "ie", "el", "if", "ds", "nr", "tr", "ad", "nh", "hy", "na", "ft", "ne", "in", "ta", "ll"}
_LINES = ("br", "li", "tr", "dt", "dd")
_BLOCKS = frozenset(
    (*_LINES, "p", "div", "table", "ul", "ol", "dl", "h1", "h2", "h3", "h4", "h5", "h6", "pre", "hr", "section")
)
_UNSEEN = frozenset(("script", "style", "head", "nav", "noscript", "svg"))


def roff_text(source: str) -> str:
    """What a man page says, without fonts and macros; paragraphs are separated by blank lines."""
    lines: list[str] = []
    inside = False  # a macro definition
    for line in source.split("\n"):
        name, _, rest = line[1:].lstrip().partition(" ")
        if inside or not line.startswith((".", "'")):
            inside = inside and not line.startswith("..")
            lines += [] if inside or line.startswith("..") else [_escapes(line)]
        elif name in ("SH", "SS", "Sh", "Ss"):
            lines += ["", _escapes(" ".join(_arguments(rest))), ""]
        elif name in _BREAKS:
            lines += ["", *([_escapes(_arguments(rest)[0])] if name == "IP" and rest.strip() else [])]
        elif name in ("BR", "BI", "IB", "IR", "RB", "RI"):  # alternating fonts: no blank between the parts
            lines.append(_escapes("".join(_arguments(rest))))
        elif name[:1].isalpha() and name not in _SKIPPED:
            lines.append(_escapes(" ".join(_arguments(rest))))
        inside = inside or name == "de"
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


def _arguments(rest: str) -> list[str]:
    return [quoted or plain for quoted, plain in re.findall(r'"([^"]*)"|(\S+)', re.split(r'\s?\\"', rest)[0])] or [""]


def _escapes(line: str) -> str:
    def replaced(found: re.Match[str]) -> str:
        glyph = found["two"] or found["long"]
        if glyph:
            point = re.fullmatch(r"u([0-9A-F]{4,6})", glyph)
            return chr(int(point[1], 16)) if point else _GLYPHS.get(glyph, "")
        return _ONE.get(found["one"] or "", "")

    return _ESCAPE.sub(replaced, line.split('\\"')[0])


def html_text(source: str) -> str:
    """What a page shows, block by block; white space stays as it is inside ``pre``."""
    parser = _Page()
    parser.feed(source)
    parser.close()
    return re.sub(r"\s*\n\s*\n\s*", "\n\n", "".join(parser.parts)).strip() + "\n"


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._unseen = self._pre = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._unseen += tag in _UNSEEN
        self._pre += tag == "pre"
        if tag in _BLOCKS:
            self.parts.append("\n" if tag in _LINES else "\n\n")
        elif tag in ("td", "th"):
            self.parts.append(" ")

    def handle_endtag(self, tag: str) -> None:
        self._unseen = max(self._unseen - (tag in _UNSEEN), 0)
        self._pre = max(self._pre - (tag == "pre"), 0)
        if tag in _BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self._unseen:
            self.parts.append(data if self._pre else re.sub(r"\s+", " ", data))


def dictionary_entries(text: bytes, index: str) -> Iterator[tuple[str, str]]:
    """Headword and text of every entry of a dictd dictionary; of headwords that share an entry, the first."""
    digits = {c: i for i, c in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")}

    def number(word: str) -> int:
        value = 0
        for character in word:
            value = value * 64 + digits[character]
        return value

    seen = set()
    for line in index.splitlines():
        try:
            word, start, size = line.split("\t")[:3]
            place = (number(start), number(size))
        except (ValueError, KeyError):
            raise DataError(f"not a line of a dictd index: {line[:80]!r}") from None
        if place not in seen and not word.startswith(("00-database", "00database")):
            seen.add(place)
            yield word, text[place[0] : sum(place)].decode("utf-8", errors="replace")
