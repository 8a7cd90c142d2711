"""Finding a model that a user names: a folder, a weights file, or a Hub id."""

from __future__ import annotations

from pathlib import Path

from basiscli.checkpoints.source import HUB_ID, Source, is_hub_id
from basiscli.errors import HubError, InputError


def resolve(spec: str, *, headers_only: bool = False, tokenizer: bool = False) -> Source:
    """Return the local files of a model: an existing path, else a Hub id, which is downloaded or found in the cache.

        Checkpoint.open(resolve("org/name@main"))
        Checkpoint.open(resolve("~/models/merged"))

    Args:
        spec: a folder, a weights file, or `org/name` with an optional `@revision`.
        headers_only: fetch only the headers of the weights of a Hub model that is not cached; accept local folders
            of such headers, too.
        tokenizer: with `headers_only`, fetch the tokenizer as well.

    Raises:
        InputError: neither an existing path nor a Hub id.
        HubError: the Hub does not have it, or cannot be reached.
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
    """Return the base model that an input names; a relative path is tried from the input's folder as well.

    Args:
        named: a path or Hub id, from the input's adapter_config.json or model card.
        namer: the input.
        headers_only: as for `resolve`.

    Raises:
        InputError, HubError: as for `resolve`, with the input in the message.
    """
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
