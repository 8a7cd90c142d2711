"""From what a user writes to what is on disk: a folder, a weights file, or a model of the Hub."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from basiscli.errors import HubError, InputError

_HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER, RESIDUAL = "adapter", "residual"
"""The two models in a folder that `basis init` made."""
_MOST_JSON = 200_000_000  # an index of a million tensors; more would only fill the memory


@dataclass(frozen=True)
class Source:
    """One input: the words that named it and the folder (or single file) that holds it."""

    spec: str
    """What the user wrote."""
    path: Path
    """A folder, or one weights file."""
    repo_id: str | None = None
    revision: str | None = None
    """The commit that a Hub revision stood for."""
    headers_only: bool = False
    """Whether the weights' files may end where their data would begin: enough to plan with."""

    @property
    def is_remote(self) -> bool:
        """Whether the weights are on the Hub, and only their headers here."""
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
        """What a stranger may know this input by: its Hub id and revision, or the name (not the path) of its folder."""
        if self.repo_id is None:
            return Path(self.spec).name.strip(".") or self.path.name
        return f"{self.repo_id}@{self.revision}" if self.revision else self.repo_id

    @cached_property
    def config(self) -> dict[str, Any]:
        """`config.json`, or an empty table."""
        return read_json(self.folder / "config.json")

    @cached_property
    def card(self) -> dict[str, Any]:
        """The metadata at the top of the model card, or an empty table."""
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
        """The revision of its base that an adapter names."""
        named = read_json(self.path / ADAPTER_CONFIG).get("revision") if self.is_adapter else None
        return named if isinstance(named, str) and named else None

    @cached_property
    def base_model(self) -> str | None:
        """The one base that this input names: in its adapter config, or else in its model card."""
        if self.is_adapter:
            named = read_json(self.path / ADAPTER_CONFIG).get("base_model_name_or_path")
        else:
            named = self.card.get("base_model")
            if isinstance(named, list):
                named = named[0] if len(named) == 1 else None
        return named if isinstance(named, str) and named else None


def resolve(spec: str, *, headers_only: bool = False, tokenizer: bool = False) -> Source:
    """Find a model: an existing path first, else a model of the Hub (downloaded, or from its cache).

    Args:
        spec: what a user writes.
        headers_only: of a model of the Hub that is not here, fetch the headers of its weights alone; on disk, take
            folders of such headers, too.
        tokenizer: with the headers of a model of the Hub, fetch its tokenizer.

    Raises:
        InputError: if there is no such path and the words are no Hub id.
        HubError: if the Hub does not give it.
    """
    try:
        path = Path(spec).expanduser()
        if path.exists():
            return Source(spec, path.resolve(), headers_only=headers_only)
    except (RuntimeError, OSError, ValueError):
        pass  # the home of nobody, a name too long or with a null byte: no path, and refused below as no Hub id either
    match = _HUB_ID.fullmatch(spec)
    if match is None or spec.startswith((".", "~", "/")):
        raise InputError(
            f"no such model: {spec}",
            remedy="give a folder, a .safetensors, .bin or .gguf file, or a Hub id like org/name@revision",
        )
    if headers_only:
        from basiscli.hub.headers import pull_headers

        folder, commit, is_whole = pull_headers(match["repo"], match["revision"], tokenizer=tokenizer)
        return Source(spec, folder, match["repo"], commit, headers_only=not is_whole)
    from basiscli.hub.client import pull

    folder, commit = pull(match["repo"], match["revision"])
    return Source(spec, folder, match["repo"], commit)


def models_in(folder: Path) -> list[Path]:
    """Return the models that an output holds: the folder itself, or the adapter and the residual in it."""
    if (folder / "config.json").is_file() or not (folder / ADAPTER / ADAPTER_CONFIG).is_file():
        return [folder]
    return [part for part in (folder / ADAPTER, folder / RESIDUAL) if part.is_dir()]


def resolve_base(named: str, namer: Source, *, headers_only: bool = False) -> Source:
    """Find the base that an input names; a relative path counts from the input's folder, too."""
    beside = (namer.folder / named).resolve()
    is_path = Path(named).exists()
    if not is_path and beside.is_dir():
        return Source(named, beside, headers_only=headers_only)
    on_hub = f"{named}@{namer.base_revision}" if namer.base_revision and not is_path and is_hub_id(named) else named
    try:
        return resolve(on_hub, headers_only=headers_only)
    except HubError as error:
        raise HubError(
            f"{namer.spec} names {on_hub} as its base, and {error.what}",
            remedy=f"{error.remedy}; or say where the base is with --base",
        ) from error
    except InputError as error:
        raise InputError(
            f"{namer.spec} names '{named}' as its base, and that is neither a folder here nor a Hub id",
            file=namer.folder,
            remedy="say where the base is with --base",
        ) from error


def is_hub_id(text: str) -> bool:
    """Return whether some words can name a model of the Hub."""
    return _HUB_ID.fullmatch(text) is not None


def leads_out(file: Path) -> bool:
    """Return whether a file is really one outside of its folder.

    Such links, in a folder that a stranger made, would carry files of this machine into what is written and pushed. The
    Hub's cache is made of links to its blobs; these count as inside.
    """
    real = file.resolve()
    inside = [file.parent]
    for snapshot in file.parents:
        if snapshot.parent.name == "snapshots":
            inside += [snapshot.parents[1] / "blobs", snapshot.parents[2] / "blobs"]  # of the model, of the whole cache
    return not any(real.is_relative_to(folder.resolve()) for folder in inside)


def read_json(file: Path) -> dict[str, Any]:
    """Return a JSON object from a file; an absent file is an empty table.

    Raises:
        InputError: if the file is there and holds anything but a JSON object.
    """
    if not file.is_file():
        return {}
    if leads_out(file):
        raise InputError("a link that leads out of the folder", file=file, remedy="put the file itself in its place")
    if file.stat().st_size > _MOST_JSON:
        raise InputError(f"more than {_MOST_JSON // 10**6} MB of JSON", file=file, remedy="restore the file")
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise InputError(f"not valid JSON: {error}", file=file, remedy="restore the file") from error
    if not isinstance(table, dict):
        raise InputError("not a JSON object", file=file, remedy="restore the file")
    return table
