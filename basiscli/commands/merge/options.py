"""The options of `basis merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from basiscli.cli.completion import methods_of, parameters_of
from basiscli.cli.fields import ModelName, ModelNames, Parameters, Weights, argument, option
from basiscli.cli.options import (
    AllowMissing,
    AllowNonfinite,
    Device,
    HeadersOnly,
    Memory,
    Overwrite,
    Plugins,
    Resume,
    Seed,
    ShardSize,
    Storage,
    TrustRemoteCode,
    Workers,
)


class MergeOptions(
    Storage, AllowNonfinite, AllowMissing, TrustRemoteCode, Plugins, Device, ShardSize, Workers, Memory, Seed, Resume,
    Overwrite, HeadersOnly,
):  # fmt: skip
    """Options of `basis merge` and keywords of `basiscli.merge`."""

    models: Annotated[ModelNames, argument("Folders, Hub ids (org/name@revision) or LoRA adapters, in order.")]
    method: Annotated[str, option("`basis methods` lists them.", "-m", complete=methods_of("merge"))]
    output: Annotated[Path | None, option("Folder to make.", "-o", default="./merge-METHOD")] = None
    base: Annotated[
        ModelName | None, option("The common base. [default: the one that all models name]", names="model")
    ] = None
    onto: Annotated[ModelName | None, option("Continue an earlier merge by the same method.", names="model")] = None
    parameters: Annotated[
        Parameters,
        option(
            "name=value of the method; repeatable.",
            "--parameter",
            "-p",
            metavar="NAME=VALUE",
            repeat=True,
            complete=parameters_of("merge"),
        ),
    ] = {}  # noqa: RUF012
    weights: Annotated[Weights | None, option("One number a model: 1,0.5,2.", metavar="NUMBERS")] = None
    as_adapter: Annotated[bool, option("Write a LoRA adapter (ortho of adapters).")] = False
