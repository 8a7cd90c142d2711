"""From what a user writes to what is on disk: a folder, a weights file, or a model of the Hub."""

from __future__ import annotations

from pathlib import Path

from basiscli.checkpoints.source import HUB_ID, Source, is_hub_id
from basiscli.errors import HubError, InputError


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
    match = HUB_ID.fullmatch(spec)
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
