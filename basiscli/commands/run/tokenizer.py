"""The tokenizer of a recipe's result, and the source of each model's embedding rows for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from basiscli.checkpoints.source import Source
from basiscli.checkpoints.views import Checkpoint
from basiscli.commands.run.mergekit import ModelName, TokenizerChoice, TokenOfModel, Zero
from basiscli.errors import InputError
from basiscli.hub.resolve import resolve
from basiscli.model.vocabulary import ABSENT, MEAN, Donor, RowMap
from basiscli.runtime.load import load_tokenizer

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Alignment:
    """One vocabulary for all models."""

    rows: Mapping[ModelName, RowMap] | None
    """By model, the source of each row; None where all models have the result's vocabulary already."""
    tokenizer: Any
    """The result's, of transformers."""
    notes: list[str]


def align(
    choice: TokenizerChoice, checkpoints: Mapping[ModelName, Checkpoint], base_model: ModelName | None, file: Path
) -> Alignment:
    """Return the result's tokenizer and the source of each model's rows for it.

    Rows that a model lacks come from the source that the recipe names; else from the only model that has the token;
    else from the base; else they are the mean over the models that have it.

    Args:
        choice: the recipe's `tokenizer` table.
        checkpoints: every model of the merge.
        base_model: the base; None to take the first model's tokenizer as the base's.
        file: the recipe.

    Raises:
        InputError: a model that the choice names is not in the recipe, or has no tokenizer or no such token.
    """
    notes: list[str] = []
    base = base_model or next(iter(checkpoints))
    tokenizers = {base: load_tokenizer(checkpoints[base].source.folder)}
    for name, checkpoint in checkpoints.items():
        if name not in tokenizers:
            try:
                tokenizers[name] = load_tokenizer(checkpoint.source.folder)
            except InputError:
                tokenizers[name] = tokenizers[base]
                notes.append(f"{name} has no tokenizer: it is taken to have {base}'s")
    vocabularies = {name: _vocabulary(tokenizers[name], checkpoint) for name, checkpoint in checkpoints.items()}
    if choice.source == "base":
        made = tokenizers[base]
    elif choice.source == "union":
        made = _union(tokenizers[base], [tokenizers[name] for name in checkpoints], vocabularies)
    else:
        named = tokenizers.get(choice.source)
        made = load_tokenizer(resolve(choice.source.model).folder) if named is None else named
    absent = [token for token in choice.tokens if token not in made.get_vocab()]
    if absent:
        made = _copy(made)
        made.add_tokens(absent)
    wanted = made.get_vocab()
    sizes = {checkpoint.vocabulary_size for checkpoint in checkpoints.values()}
    same = len(sizes) == 1 and all(vocabulary == wanted for vocabulary in vocabularies.values())
    if same and not choice.tokens and not choice.pad_to_multiple_of:
        return Alignment(None, made, notes)  # rows beyond the tokenizer's, too, stay as they are
    rows = _row_maps(choice, wanted, vocabularies, checkpoints, base_model, file, notes)
    return Alignment(rows, made, notes)


def tokenizer_files(tokenizer: Any) -> dict[str, bytes]:
    """Return the contents of the files that a transformers tokenizer saves, by name."""
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {item.name: item.read_bytes() for item in sorted(Path(folder).iterdir()) if item.is_file()}


def chat_template(word: str, sources: Sequence[Source], file: Path) -> str | None:
    """Return the chat template that a recipe asks for: its text, 'chatml', or 'auto' for the models' commonest.

    None if that is 'auto' and no model has one.

    Raises:
        InputError: the word is none of these.
    """
    if word == "auto":
        found = Counter(template.strip() for source in sources if (template := _template(source)))
        return found.most_common(1)[0][0] if found else None
    if word == "chatml":
        return CHATML
    if "{" not in word:
        raise InputError(
            f"no chat template is called '{word}'", file=file, remedy="auto, chatml, or the text of a Jinja template"
        )
    return word


def _template(source: Source) -> str | None:
    try:
        found = load_tokenizer(source.folder).chat_template
    except InputError:
        return None
    return found.get("default") if isinstance(found, dict) else found


def _vocabulary(tokenizer: Any, checkpoint: Checkpoint) -> dict[str, int]:
    """Return the tokens that the model has rows for."""
    size = checkpoint.vocabulary_size or len(tokenizer)
    return {token: row for token, row in tokenizer.get_vocab().items() if row < size}


def _union(first: Any, tokenizers: Sequence[Any], vocabularies: Mapping[ModelName, dict[str, int]]) -> Any:
    """Return the first tokenizer with every other's tokens added to it, special ones as what they are there."""
    made = _copy(first)
    known = set(made.get_vocab())
    usable = set().union(*vocabularies.values())
    for tokenizer in tokenizers:
        special = {entry.content: entry for entry in tokenizer.added_tokens_decoder.values()}
        numbered = sorted((row, token) for token, row in tokenizer.get_vocab().items())  # the table's order is random
        new = [token for _, token in numbered if token not in known and token in usable]
        made.add_tokens([special.get(token, token) for token in new if token not in special])
        made.add_tokens([special[token] for token in new if token in special])
        known.update(new)
    return made


def _copy(tokenizer: Any) -> Any:
    from transformers import AutoTokenizer

    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return AutoTokenizer.from_pretrained(folder)


def _row_maps(
    choice: TokenizerChoice,
    wanted: dict[str, int],
    vocabularies: Mapping[ModelName, dict[str, int]],
    checkpoints: Mapping[ModelName, Checkpoint],
    base: ModelName | None,
    file: Path,
    notes: list[str],
) -> dict[ModelName, RowMap]:
    multiple = choice.pad_to_multiple_of or 1
    tokens = max(wanted.values()) + 1
    size = -(-tokens // multiple) * multiple
    own = {name: [ABSENT] * tokens + [MEAN] * (size - tokens) for name in checkpoints}
    donors: dict[int, list[Donor]] = {}
    nowhere = []
    for token, row in wanted.items():
        said = choice.tokens.get(token)
        having = [name for name in checkpoints if token in vocabularies[name]]
        for name in having:
            if not (said and said.force):
                own[name][row] = vocabularies[name][token]
        if len(having) == len(checkpoints) and not said:
            continue
        if said and said.source is not None:
            donors[row] = _said(said.source, token, vocabularies, checkpoints, file)
        elif having:
            chosen = [base] if base in having else having
            donors[row] = [Donor(checkpoints[name], vocabularies[name][token]) for name in chosen]
        else:
            nowhere.append(token)
    if nowhere:
        notes.append(f"{len(nowhere)} tokens are in no model, such as {min(nowhere)!r}: their rows are zero")
    return {name: RowMap(rows, donors) for name, rows in own.items()}


def _said(
    source: TokenOfModel | Zero | ModelName,
    token: str,
    vocabularies: Mapping[ModelName, dict[str, int]],
    checkpoints: Mapping[ModelName, Checkpoint],
    file: Path,
) -> list[Donor]:
    if isinstance(source, Zero):
        return []
    name = _known(source.model if isinstance(source, TokenOfModel) else source, checkpoints, file)
    row = vocabularies[name].get(token)
    if isinstance(source, TokenOfModel):
        row = vocabularies[name].get(source.token) if source.token is not None else source.token_id
    if row is None or row not in vocabularies[name].values():
        raise InputError(f"{name} has no row for the token {token!r} to come from", file=file, remedy="another source")
    return [Donor(checkpoints[name], row)]


def _known(name: ModelName, checkpoints: Mapping[ModelName, Checkpoint], file: Path) -> ModelName:
    if name not in checkpoints:
        raise InputError(f"{name} is not among the recipe's models", file=file, remedy="name one of them")
    return name
