"""What `basis expand` is told."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from basiscli.cli.fields import ModelName, argument, option
from basiscli.cli.options import Overwrite


class ExpandOptions(Overwrite):
    """Options of `basis expand` and keywords of `basiscli.expand`."""

    adapter: Annotated[ModelName, argument("A LoRA adapter: folder or Hub id.")]
    initial: Annotated[
        ModelName | None,
        option("The adapter its training began with (basis init): gives plain LoRA of twice the rank.", names="model"),
    ] = None
    base: Annotated[
        ModelName | None,
        option("The base to add it to; with --initial, the original model's name.", names="model"),
    ] = None
    output: Annotated[Path | None, option("Folder to make.", "-o", default="./ADAPTER-merged or -lora")] = None
