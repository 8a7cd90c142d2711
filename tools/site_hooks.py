"""What MkDocs does with the documentation beyond its own rules; see `hooks` in mkdocs.yml."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
_GROUPS = {"merge": "Merging", "init": "Adapters", "compress": "Compression"}


def on_config(config: Any) -> Any:
    """List the methods' pages by what their methods are registered as; a new page needs no entry anywhere."""
    registered = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    family_of = {name: family.partition(".")[2] for family, names in registered.items() for name in names}
    groups: dict[str, list[str]] = {title: [] for title in [*_GROUPS.values(), "More"]}
    for page in sorted((ROOT / "docs" / "methods").glob("*.md")):
        groups[_GROUPS.get(family_of.get(page.stem, ""), "More")].append(f"methods/{page.name}")
    for entry in config["nav"]:
        if isinstance(entry, dict) and "Methods" in entry:
            entry["Methods"] = [{title: pages} for title, pages in groups.items() if pages]
    # A page that nobody gave a place still has one.
    named = str(config["nav"])
    config["nav"] += [page.name for page in sorted((ROOT / "docs").glob("*.md")) if page.name not in named]
    return config


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Name the files of the repository that pages link to: the site does not have them."""
    place = Path(config["docs_dir"]) / page.file.src_uri

    def named(link: re.Match[str]) -> str:
        target = (place.parent / link[2]).resolve()
        inside = target.is_relative_to(Path(config["docs_dir"]).resolve()) or not target.is_relative_to(ROOT)
        return link[0] if inside else f"{link[1]} (`{target.relative_to(ROOT)}`)"

    return re.sub(r"(?<!!)\[([^\]]+)\]\((\.\.?/[^)#\s]+)\)", named, markdown)
