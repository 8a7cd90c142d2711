"""Schema of mergekit's recipe format: its keys, their meaning and their defaults.

Written from the format's documentation (mergekit 0.1.5, README and docs). What mergekit ignores silently is an error
here: unknown keys and parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from basiscli.commands.run.reading import Strict, parse
from basiscli.commands.run.setting import Setting
from basiscli.errors import InputError

KEYS = {"merge_method", "models", "slices", "modules"}
"""Top-level keys of which a file in mergekit's format has one."""
IGNORED = {"int8_mask"}
"""Parameters that are accepted without effect: they only save mergekit memory."""


class ModelName(Strict):
    """A model, and an adapter on it: written `path@revision+adapter@revision`, or as a table."""

    model: str
    lora: str | None = None

    def __str__(self) -> str:
        return self.model if self.lora is None else f"{self.model}+{self.lora}"


def _model_name(given: Any) -> Any:
    if isinstance(given, ModelName):
        return given
    if isinstance(given, dict):  # what mergekit writes into the cards of its results
        return {key: _spec(part) if key in {"model", "lora"} else part for key, part in given.items()}
    if not isinstance(given, str):
        raise ValueError(f"a model is written path@revision+adapter, not {given!r}")
    model, plus, lora = given.partition("+")
    if not plus or _is_path(given):
        return {"model": given}
    if not (model and lora) or "+" in lora:
        raise ValueError(f"a model is written path@revision+adapter, not {given!r}")
    return {"model": model, "lora": lora}


def _is_path(given: str) -> bool:
    try:
        return Path(given).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # too long, a null byte, the home of nobody
        return False


def _spec(given: Any) -> Any:
    """Return `path@revision` of a table with both."""
    if not isinstance(given, dict) or "path" not in given:
        return given
    if unknown := set(given) - {"path", "revision"}:
        raise ValueError(f"unknown key '{min(unknown)}': a model's table has path and revision")
    revision = given.get("revision")
    return f"{given['path']}@{revision}" if revision else given["path"]


Name = Annotated[ModelName, BeforeValidator(_model_name)]
Table = BeforeValidator(lambda given: {} if given is None else given)  # a key with nothing after it
Parameters = Annotated[dict[str, Setting], Table, Field(default_factory=dict)]


class InputModel(Strict):
    """An entry of `models`: one model and its parameters."""

    model: Name
    parameters: Parameters


class InputSlice(InputModel):
    """An entry of `sources`: layers `layer_range[0]` to `layer_range[1]` − 1 of one model."""

    layer_range: tuple[int, int]

    @model_validator(mode="after")
    def _in_order(self) -> InputSlice:
        if not 0 <= self.layer_range[0] < self.layer_range[1]:
            raise ValueError(f"layer_range {list(self.layer_range)}: the first layer, and the one after the last")
        return self

    @property
    def layers(self) -> int:
        """Number of layers."""
        return self.layer_range[1] - self.layer_range[0]


class OutputSlice(Strict):
    """An entry of `slices`: layers of the result, and the layers of models that they are merged from."""

    sources: list[InputSlice] = Field(min_length=1)
    base_model: Name | None = None
    parameters: Parameters

    @model_validator(mode="after")
    def _of_one_depth(self) -> OutputSlice:
        depths = [source.layers for source in self.sources]
        if len(set(depths)) > 1:
            raise ValueError(
                f"the sources of a slice have {', '.join(map(str, depths))} layers: they must have as many"
            )
        return self


class Part(Strict):
    """An entry of `modules`: whole models, or layers of models, to merge."""

    models: list[InputModel] | None = Field(None, min_length=1)
    slices: list[OutputSlice] | None = Field(None, min_length=1)
    parameters: Parameters

    @model_validator(mode="after")
    def _one_form(self) -> Part:
        if (self.models is None) == (self.slices is None):
            raise ValueError("either 'models' or 'slices' says what is merged")
        return self


class TokenOfModel(Strict):
    """A token's embedding is that of one model's token."""

    kind: Literal["model_token"]
    model: Name
    token: str | None = None
    token_id: int | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> TokenOfModel:
        if (self.token is None) == (self.token_id is None):
            raise ValueError("a model_token has a token or a token_id")
        return self


class Zero(Strict):
    """A token's embedding is zero."""

    kind: Literal["zero"]


def _form(given: Any) -> str:
    kind = given.get("kind") if isinstance(given, dict) else getattr(given, "kind", None)
    return "as-model" if kind is None else f"as-{kind}"


class TokenChoice(Strict):
    """An entry of `tokens`: the source of one token's embedding."""

    source: (
        Annotated[
            Annotated[TokenOfModel, Tag("as-model_token")]
            | Annotated[Zero, Tag("as-zero")]
            | Annotated[Name, Tag("as-model")],
            Discriminator(_form, custom_error_type="kind", custom_error_message="the kinds are model_token and zero"),
        ]
        | None
    ) = None
    force: bool = False
    """Whether it also replaces the embeddings of models that have the token."""


class TokenizerChoice(Strict):
    """The `tokenizer` table: vocabulary of the result."""

    source: Literal["union", "base"] | Name = "union"
    tokens: Annotated[dict[str, TokenChoice], Table] = Field(default_factory=dict)
    pad_to_multiple_of: int | None = Field(None, ge=1)


class MergekitRecipe(Strict):
    """A whole recipe file in mergekit's format."""

    merge_method: str
    models: list[InputModel] | None = Field(None, min_length=1)
    slices: list[OutputSlice] | None = Field(None, min_length=1)
    modules: dict[str, Part] | None = Field(None, min_length=1)
    base_model: Name | None = None
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer_source: Literal["union", "base"] | Name | None = None
    tokenizer: TokenizerChoice | None = None
    chat_template: str | None = None
    parameters: Parameters

    @model_validator(mode="after")
    def _one_form(self) -> MergekitRecipe:
        if [self.models, self.slices, self.modules].count(None) != 2:
            raise ValueError("one of 'models', 'slices' and 'modules' says what is merged")
        if self.tokenizer_source and self.tokenizer:
            raise ValueError("'tokenizer' and 'tokenizer_source' say the same thing: give one of them")
        return self

    @property
    def vocabulary(self) -> TokenizerChoice | None:
        """`tokenizer`, or the same made of `tokenizer_source`; None to keep the base's vocabulary."""
        if self.tokenizer_source is not None:
            return TokenizerChoice(source=self.tokenizer_source, pad_to_multiple_of=None)
        return self.tokenizer

    @property
    def part(self) -> Part:
        """`models` or `slices` of the file, or of its only module, whose parameters come before the file's."""
        if self.modules:
            return next(iter(self.modules.values()))
        return Part(models=self.models, slices=self.slices, parameters={})

    def names(self) -> Iterator[ModelName]:
        """Yield every model that the recipe merges, each once, the base last."""
        slices = self.part.slices or []
        found = [one.model for one in self.part.models or []]
        found += [source.model for cut in slices for source in cut.sources]
        found += [base for base in [*(cut.base_model for cut in slices), self.base_model] if base is not None]
        yield from dict.fromkeys(found)


def is_mergekit(table: Mapping[str, Any]) -> bool:
    """Return whether a recipe's table is in mergekit's format."""
    return "steps" not in table and bool(KEYS & set(table))


def parse_mergekit(table: Mapping[str, Any], file: Path) -> MergekitRecipe:
    """Return a table as a checked recipe in mergekit's format.

    Raises:
        InputError: an unknown key, a wrong type, slices of different depths, a model of several parts.
    """
    recipe = parse(MergekitRecipe, table, file)
    if recipe.modules is not None and len(recipe.modules) > 1:
        raise InputError(
            f"a model of several parts ({', '.join(recipe.modules)}) is not merged by recipe",
            file=file,
            remedy="merge its checkpoints whole with `models`",
        )
    return recipe
