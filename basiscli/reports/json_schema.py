"""The JSON schema of `basis_report.json`, for those who read it with something else."""

from __future__ import annotations

import json
from typing import Any

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from basiscli.reports.schema import SCHEMA_VERSION, Report


class _WithInfinities(GenerateJsonSchema):
    """JSON has no numbers for NaN and Inf: reports write them as strings."""

    schema_dialect = "https://json-schema.org/draft/2020-12/schema"

    def field_title_should_be_set(self, schema: object) -> bool:
        """Leave out titles that only repeat the fields' names."""
        return False

    def float_schema(self, schema: core_schema.FloatSchema) -> JsonSchemaValue:
        """Return the schema of a number that may be NaN or infinite."""
        return {"type": ["number", "string"], "pattern": "^(NaN|-?Infinity)$"}


def report_schema() -> dict[str, Any]:
    """Return the JSON Schema of `basis_report.json`; reports of earlier releases may lack what is not required."""
    found = Report.model_json_schema(schema_generator=_WithInfinities)
    head = {"$schema": _WithInfinities.schema_dialect, "title": f"basis_report.json, schema version {SCHEMA_VERSION}"}
    return head | {name: value for name, value in found.items() if name not in head}


def schema_file() -> str:
    """Return the content of `report.schema.json`."""
    return json.dumps(report_schema(), indent=2, ensure_ascii=False) + "\n"
