"""Annotated types of parameters that several methods share, with mergekit's names."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from basiscli import PerModel

Share = Annotated[float, Field(ge=0, le=1)]

Density = Annotated[PerModel[Share], Field(description="share of each task vector's elements that stays")]
Gamma = Annotated[PerModel[Share], Field(description="share of largest elements that is dropped as outliers")]
Epsilon = Annotated[
    PerModel[Annotated[float, Field(ge=0, lt=0.5)]],
    Field(description="how far the probability to stay rises and falls from the density with the rank"),
]
Lambda = Annotated[float, Field(description="scale of the merged task vector")]
Rescale = Annotated[bool, Field(description="give back the length that dropping took")]
Normalize = Annotated[bool, Field(description="divide by the sum of the weights of the models that count")]
Interpolation = Annotated[float, Field(ge=0, le=1, description="0 is the first model, 1 the second")]
