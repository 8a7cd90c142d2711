"""What `basis init` and `basis extract` are told."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from basiscli.cli.completion import methods_of, parameters_of
from basiscli.cli.fields import ModelName, Options, Parameters, TargetModules, argument, option
from basiscli.cli.options import (
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
    Workers,
)


class Factors(Options):
    """The form of an adapter's factors, and which modules get them."""

    rank: Annotated[int | None, option("Rank of every factor.", "-r", default="16")] = None
    alpha: Annotated[float | None, option("PEFT's lora_alpha.", default="the rank: scaling 1")] = None
    rslora: Annotated[bool, option("Scale by alpha / √rank.")] = False
    exact: Annotated[bool, option("Decompose exactly; else to 3e-3, measured.")] = False
    target_modules: Annotated[
        TargetModules, option("all-linear, names (q_proj,v_proj), or a regular expression.", metavar="TEXT")
    ] = "all-linear"


class InitOptions(
    Factors, Storage, AllowNonfinite, Plugins, Device, ShardSize, Workers, Memory, Seed, Resume, Overwrite, HeadersOnly
):
    """Options of `basis init` and keywords of `basiscli.init`."""

    model: Annotated[ModelName, argument("Folder or Hub id (org/name@revision).")] = "."
    method: Annotated[str, option("`basis methods` lists them.", "-m", complete=methods_of("init"))] = "pissa"
    output: Annotated[Path | None, option("Folder to make.", "-o", default="./MODEL-METHOD")] = None
    calibration: Annotated[
        ModelName | None,
        option(
            "Text whose activations eva and corda look at: file, folder, JSONL or safetensors tokens.",
            default="a built-in mix", names="file",
        ),
    ] = None  # fmt: skip
    tokens: Annotated[int | None, option("Tokens of it.", default="16384")] = None
    length: Annotated[int | None, option("Tokens a window.", default="512")] = None
    quantize: Annotated[
        str | None, option("nf4: for a residual that will be loaded in 4 bits (pissa, olora).", metavar="nf4")
    ] = None
    rho: Annotated[float | None, option("eva: a module's rank is at most rho times the mean.", default="2")] = None
    whiten: Annotated[bool, option("eva: scale A to inputs of variance 1.")] = False
    center: Annotated[
        bool | None, option("eva: take the inputs' mean out first; --no-center leaves it in.", " /--no-center")
    ] = None
    bases: Annotated[int | None, option("nola: random matrices a factor.", default="1024")] = None
    parameters: Annotated[
        Parameters,
        option(
            "name=value of the method; repeatable.", "--parameter", "-p", metavar="NAME=VALUE", repeat=True,
            complete=parameters_of("init"),
        ),
    ] = {}  # noqa: RUF012  # fmt: skip

    @property
    def method_parameters(self) -> dict[str, object]:
        """The method's parameters, those included that have options of their own."""
        own = {"rho": self.rho, "whiten": self.whiten or None, "center": self.center, "bases": self.bases}
        return self.parameters | {name: value for name, value in own.items() if value is not None}


class ExtractOptions(Factors, Storage, AllowNonfinite, Device, Workers, Memory, Seed, Resume, Overwrite, HeadersOnly):
    """Options of `basis extract` and keywords of `basiscli.extract`."""

    model: Annotated[ModelName, argument("The fine-tuned model.")]
    base: Annotated[ModelName, option("What it was tuned from.", names="model")]
    energy: Annotated[
        float | None, option("Instead of one rank: what holds this share of each difference's squared norm.")
    ] = None
    output: Annotated[Path | None, option("Folder to make.", "-o", default="./MODEL-extract")] = None
    shard_size: Annotated[str, option("Size limit of a file.", machine=True, python_only=True)] = "5GB"
