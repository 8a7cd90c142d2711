"""Write what the documentation takes from the code: `python tools/make_docs.py`.

    docs/commands.md                  every command and option, from the command line itself
    docs/numbers.md                   the named numbers of reports and evaluations
    docs/schema/report.schema.json    the JSON schema of reports

A test compares them with the code.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"
_NUMBERS = """# Named numbers

What `numbers` in a [report](report.md) and in the document of `basis eval --json` hold, and what conditions of
`--fail-if` are written over. `basis report DIR --numbers` prints those of one run with their values. A method of
somebody else's may add its own.
"""


def commands() -> str:
    """Return the command reference, as `typer … utils docs` writes it."""
    words = [sys.executable, "-m", "typer", "basiscli.app", "utils", "docs", "--name", "basis", "--title", "Commands"]
    text = subprocess.run(words, env=os.environ | {"NO_COLOR": "1"}, capture_output=True, text=True, check=True).stdout
    text = re.sub(r"^\* `([\w -]+)`: .*\.\.\.$", lambda match: _in_full(match, text), text, flags=re.MULTILINE)
    return "\n".join(line.rstrip() for line in text.splitlines()).strip() + "\n"


def _in_full(entry: re.Match[str], text: str) -> str:
    """Return an entry of a list of commands with the whole first sentence of its help, which the list cuts short."""
    heading = re.search(rf"^#+ `basis (?:\w+ )?{entry[1]}`\n\n(.*?\.)(?=\s)", text, re.MULTILINE | re.DOTALL)
    return f"* `{entry[1]}`: {' '.join(heading[1].split())}" if heading else entry[0]


def numbers() -> str:
    """Return the page of named numbers."""
    from basiscli.reports.markdown import plain
    from basiscli.reports.numbers import documented

    rows = "".join(f"| `{name}` | {plain(meaning)} |\n" for name, meaning in documented())
    return f"{_NUMBERS}\n| name | meaning |\n|---|---|\n{rows}"


def schema() -> str:
    """Return the schema of reports."""
    from basiscli.reports.json_schema import schema_file

    return schema_file()


def main() -> None:
    """Write all three files."""
    made = {"commands.md": commands(), "numbers.md": numbers(), "schema/report.schema.json": schema()}
    for name, content in made.items():
        file = DOCS / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main()
