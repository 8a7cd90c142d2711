"""Inputs on disk: a folder or weights file, and what its config and model card say."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from basiscli.checkpoints.files import ADAPTER, ADAPTER_CONFIG, RESIDUAL, read_json

HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")


@dataclass(frozen=True)
class Source:
    """A model or adapter on disk, and the name that a user gave for it; `hub.resolve.resolve` makes it."""

    spec: str
    """What the user wrote."""
    path: Path
    """A folder, or one weights file."""
    repo_id: str | None = None
    """`org/name` of a model of the Hub."""
    revision: str | None = None
    """Its commit hash."""
    headers_only: bool = False
    """Whether the weights' files may lack their data, which is enough to plan with."""

    @property
    def is_remote(self) -> bool:
        """Whether only the headers are here, and the weights' data is on the Hub."""
        return self.headers_only and self.repo_id is not None

    @property
    def folder(self) -> Path:
        """The folder that holds configuration and weights."""
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def is_adapter(self) -> bool:
        """Whether this is a PEFT adapter."""
        return self.path.is_dir() and (self.path / ADAPTER_CONFIG).is_file()

    @property
    def label(self) -> str:
        """Its name in reports and cards: the Hub id with revision, or the folder's name without its path."""
        if self.repo_id is None:
            return Path(self.spec).name.strip(".") or self.path.name
        return f"{self.repo_id}@{self.revision}" if self.revision else self.repo_id

    @cached_property
    def config(self) -> dict[str, Any]:
        """Content of `config.json`, {} without one."""
        return read_json(self.folder / "config.json")

    @cached_property
    def card(self) -> dict[str, Any]:
        """The YAML metadata of the model card, {} without one."""
        file = self.folder / "README.md"
        if not file.is_file():
            return {}
        match = re.match(r"\s*---\r?\n(.*?)\r?\n---", file.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
        if match is None:
            return {}
        import yaml

        try:
            card = yaml.safe_load(match[1])
        except (yaml.YAMLError, ValueError, RecursionError):
            return {}  # a card is prose; a broken one is no reason to refuse the weights
        return card if isinstance(card, dict) else {}

    @property
    def base_revision(self) -> str | None:
        """The base's revision in an adapter's config, else None."""
        named = read_json(self.path / ADAPTER_CONFIG).get("revision") if self.is_adapter else None
        return named if isinstance(named, str) and named else None

    @cached_property
    def base_model(self) -> str | None:
        """The base model that the adapter config or the model card names; None for none or several."""
        if self.is_adapter:
            named = read_json(self.path / ADAPTER_CONFIG).get("base_model_name_or_path")
        else:
            named = self.card.get("base_model")
            if isinstance(named, list):
                named = named[0] if len(named) == 1 else None
        return named if isinstance(named, str) and named else None


def models_in(folder: Path) -> list[Path]:
    """Return the model folders in an output: the folder itself, or its sub-folders `adapter` and `residual`."""
    if (folder / "config.json").is_file() or not (folder / ADAPTER / ADAPTER_CONFIG).is_file():
        return [folder]
    return [part for part in (folder / ADAPTER, folder / RESIDUAL) if part.is_dir()]


def is_hub_id(text: str) -> bool:
    """Return whether a string has the form `org/name` or `org/name@revision`."""
    return HUB_ID.fullmatch(text) is not None
