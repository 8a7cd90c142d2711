"""The options of `basis compress`: those of KV caches and of adapters together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from basiscli.cli.command import Command
from basiscli.cli.fields import flag_of, options_of
from basiscli.commands import kv, nola
from basiscli.commands.kv.api import KVOptions
from basiscli.commands.nola.api import RandomBases
from basiscli.errors import UsageError


class CompressOptions(RandomBases, KVOptions):
    """Options of `basis compress` at the command line."""


def variant(given: Mapping[str, Any]) -> Command:
    """Return the command for the given options: an adapter's compression with `method="nola"`, else a KV cache's.

    Raises:
        UsageError: an option that only the other kind has.
    """
    command = nola.command if given.get("method") == "nola" else kv.command
    if command is nola.command and given.get("engine", "local") != "local":
        raise UsageError(f"--method nola is done here: --engine {given['engine']}", remedy="leave --engine out")
    meanings = options_of(CompressOptions)
    strange = [n for n in meanings if n in given and n not in command.model.model_fields and n != "model"]
    if strange:
        kind = "--method nola" if command.model is not KVOptions else "--kv-ratio"
        raise UsageError(
            f"{flag_of(strange[0], meanings[strange[0]])} is no option of basis compress {kind}",
            remedy="leave it out" if kind == "--method nola" else "add --method nola, for a LoRA adapter",
        )
    return command
