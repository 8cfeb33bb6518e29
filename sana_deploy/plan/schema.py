"""The JSON Schema of plan.json, which ships with the package: `sana_deploy.plan.schema.PATH` is the file.

`python -m sana_deploy.plan.schema` writes it anew.

A minor version adds keys, which readers ignore: the artifact's objects allow more than they name.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .artifact import SCHEMA_VERSION, Plan

PATH = Path(__file__).with_name("plan.schema.json")


def plan_schema() -> dict[str, Any]:
    """Return the schema as JSON Schema 2020-12."""
    schema = Plan.model_json_schema(mode="serialization")
    major = SCHEMA_VERSION.partition(".")[0]
    schema["properties"]["schema_version"]["pattern"] = rf"^{major}\.[0-9]+$"
    schema["properties"]["digest"]["pattern"] = "^sha256:[0-9a-f]{64}$"
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": f"sana_deploy plan, schema version {SCHEMA_VERSION}",
    }


def main() -> None:
    """Write the file."""
    PATH.write_text(json.dumps(plan_schema(), indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
