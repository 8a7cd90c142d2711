"""The options of `basis push`."""

from __future__ import annotations

from typing import Annotated

from pydantic import AliasChoices, Field

from basiscli.cli.fields import ModelName, Options, argument, option


class PushOptions(Options):
    """Options of `basis push` and keywords of `basiscli.push`."""

    folder: Annotated[ModelName, argument("What a command wrote.")]
    target: Annotated[
        str,
        argument("Model of the Hub; made if need be.", metavar="ORG/NAME[@BRANCH]", recipe="to"),
        Field(validation_alias=AliasChoices("target", "to")),
    ]
    private: Annotated[bool, option("Make the model private.")] = False
    create_pr: Annotated[bool, option("Open a pull request instead of committing.")] = False
    revision: Annotated[str | None, option("Branch; made if need be.", default="main")] = None
    message: Annotated[str | None, option("Of the commit.", default="the command")] = None
