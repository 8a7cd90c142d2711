"""Parameters of a method: a pydantic model, written by hand or made of a function's keyword-only parameters."""

from __future__ import annotations

import inspect
import keyword
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, ConfigDict, create_model


class Parameters(BaseModel):
    """Parameters of a method: unknown names and values out of range are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def parameters_of(function: Callable[..., Any]) -> type[BaseModel]:
    """Return a pydantic model whose fields are a function's keyword-only parameters."""
    fields: dict[str, Any] = {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            annotation = parameter.annotation
            if isinstance(annotation, str):  # `from __future__ import annotations`
                annotation = eval(annotation, function.__globals__)  # the plugin's own source text
            default = ... if parameter.default is inspect.Parameter.empty else parameter.default
            fields[parameter.name.rstrip("_")] = (annotation, default)
    model: type[BaseModel] = create_model(function.__name__, __base__=Parameters, **fields)
    return model


def python_name(name: str) -> str:
    """Return a parameter's name in Python, where `lambda` is `lambda_`."""
    return f"{name}_" if keyword.iskeyword(name) else name
