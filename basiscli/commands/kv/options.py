"""The options of `basis compress` for a KV cache."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AliasChoices, Field

from basiscli.cli.completion import methods_of, parameters_of
from basiscli.cli.fields import ModelName, Options, Parameters, argument, option
from basiscli.cli.options import (
    Device,
    HeadersOnly,
    Overwrite,
    Plugins,
    Resume,
    Seed,
    ShardSize,
    Storage,
    Workers,
)
from basiscli.commands.kv.plan import Export, Search

_TRAINING = "Training and search"


class Training(Options):
    """Options of training and search."""

    train_steps: Annotated[int, option("Steps of training; 0 for none.", panel=_TRAINING)] = 800
    batch: Annotated[int, option("Windows a step.", panel=_TRAINING)] = 2
    length: Annotated[int, option("Tokens a window.", panel=_TRAINING)] = 256
    search: Annotated[Search, option("How ranks are found: greedy, spectrum or uniform.", panel=_TRAINING)] = "greedy"


class KVOptions(Training, Storage, Plugins, Device, ShardSize, Workers, Seed, Resume, Overwrite, HeadersOnly):
    """Options of `basis compress --kv-ratio` and keywords of `basiscli.compress`."""

    model: Annotated[ModelName, argument("Folder or Hub id (org/name@revision); with nola an adapter.")] = "."
    kv_ratio: Annotated[float | None, option("Share of the KV cache to remove: 0.6 leaves 40 % of its bytes.")] = None
    kv_budget: Annotated[float | None, option("The same said as the share to keep: 0.4.")] = None
    output: Annotated[Path | None, option("Folder to make.", "-o", default="../MODEL-kvRATIO")] = None
    calibration: Annotated[
        ModelName | None,
        option(
            "Text, JSONL, a folder, or safetensors tokens.", default="a small built-in mix", metavar="PATH",
            names="file",
        ),
    ] = None  # fmt: skip
    method: Annotated[
        str,
        option("`basis methods` lists them; nola is for LoRA adapters.", "-m", complete=methods_of("compress", "nola")),
    ] = "matryoshka"
    parameters: Annotated[
        Parameters,
        option(
            "name=value of the method; repeatable.", "--parameter", "-p", metavar="NAME=VALUE", repeat=True,
            complete=parameters_of("compress"),
        ),
    ] = {}  # noqa: RUF012  # fmt: skip
    fold_values: Annotated[
        bool,
        option("Put the bases of the values into the weights: they then cost nothing.", "--fold-v"),
        Field(validation_alias=AliasChoices("fold_values", "fold_v")),
    ] = False
    export: Annotated[Export | None, option("remote-code: also for plain transformers, with trust_remote_code.")] = None
