"""Writes charts/finetune-operator/values.schema.json: the profile's part out of the generated CRD, the rest from here.

python hack/chart_schema.py [--check]
"""

import json
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "charts/finetune-operator/values.schema.json"
NAME = r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"
IMAGE = r"^[^\s]+$"
VARIABLE = {
    "type": "object",
    "additionalProperties": False,
    "required": ["name"],
    "properties": {
        "name": {"type": "string", "pattern": r"^[A-Za-z_][A-Za-z0-9_]*$"},
        "value": {"type": "string"},
        "valueFrom": {"type": "object"},
    },
}


def partly(**properties: Any) -> dict[str, Any]:
    """An object with some of these properties and no others."""
    return {"type": "object", "additionalProperties": False, "properties": properties}


def closed(**properties: Any) -> dict[str, Any]:
    """An object with exactly these properties."""
    return {**partly(**properties), "required": list(properties)}


def from_crd(schema: dict[str, Any]) -> dict[str, Any]:
    """A structural schema as plain JSON Schema: extensions go, objects become closed, exclusive bounds numbers."""
    result = {key: value for key, value in schema.items() if not key.startswith("x-")}
    for strict, bound in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if result.pop(strict, False):
            result[strict] = result.pop(bound)
    if "properties" in result:
        result["properties"] = {name: from_crd(child) for name, child in result["properties"].items()}
        result["additionalProperties"] = False
    if isinstance(result.get("items"), dict):
        result["items"] = from_crd(result["items"])
    return result


def schema() -> dict[str, Any]:
    crd = yaml.safe_load((ROOT / "crds/finetuneprofiles.yaml").read_text(encoding="utf-8"))
    version = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    spec = from_crd(version["properties"]["spec"])["properties"]
    del spec["allowedLicenses"]["minItems"]  # values.yaml has all fields; empty ones are left out
    for name in ("cache", "queue"):
        spec[name] = {"anyOf": [{"type": "object", "maxProperties": 0}, spec[name]]}
    image = {"type": "string", "pattern": IMAGE}
    strings = {"type": "object", "additionalProperties": {"type": "string"}}
    quantities = {"type": "object", "additionalProperties": {"type": ["string", "number"]}}
    values = closed(
        images=closed(
            operator=image,
            preflight=image,
            trainer=image,
            pullPolicy={"enum": ["Always", "IfNotPresent", "Never"]},
        ),
        imagePullSecrets={"type": "array", "items": closed(name={"type": "string", "minLength": 1})},
        watchNamespaces={"type": "array", "uniqueItems": True, "items": {"type": "string", "pattern": NAME}},
        replicas={"type": "integer", "minimum": 1},
        log=closed(format={"enum": ["text", "json"]}, level={"enum": ["debug", "info", "warning"]}),
        metrics=closed(port={"type": "integer", "minimum": 1024, "maximum": 65535}),
        networkPolicy=closed(
            enabled={"type": "boolean"},
            metricsFrom={"type": "array", "items": {"type": "object"}},
            jobNamespaces={"type": "array", "uniqueItems": True, "items": {"type": "string", "pattern": NAME}},
            jobEgress={"type": "array", "items": {"type": "object"}},
        ),
        serviceAccount=closed(annotations=strings),
        resources=partly(requests=quantities, limits=quantities),
        nodeSelector=strings,
        tolerations={"type": "array", "items": {"type": "object"}},
        priorityClassName={"type": "string"},
        profile=closed(create={"type": "boolean"}, name={"type": "string", "pattern": NAME}, **spec),
    )
    values["properties"]["global"] = {"type": "object"}  # Helm's own, for charts inside charts
    values["properties"]["env"] = {"type": "array", "items": VARIABLE}  # --reuse-values of older releases lacks it
    return {"$schema": "http://json-schema.org/draft-07/schema#", "title": "Values of finetune-operator", **values}


def main() -> int:
    text = json.dumps(schema(), indent=2, ensure_ascii=False) + "\n"
    if sys.argv[1:] == ["--check"]:
        if TARGET.read_text(encoding="utf-8") == text:
            return 0
        print(f"{TARGET.relative_to(ROOT)} is stale: run python hack/chart_schema.py", file=sys.stderr)
        return 1
    TARGET.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
