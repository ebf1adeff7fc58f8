"""The field table of docs/api.md, from the models."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from finetune_api import GROUP, VERSION
from finetune_api.base import Model
from finetune_api.crd import Generator, models_below, open_api_schema
from finetune_api.job import FineTuneJob
from finetune_api.profile import FineTuneProfile


def fields(model: type[Model], part: str) -> Iterator[tuple[str, dict[str, Any], str | None]]:
    """(path, schema, effect) of every field below `part` ("spec" or "status"), parents first."""
    raw = model.model_json_schema(by_alias=True)
    generator = Generator(raw.get("$defs", {}), models_below(model))

    def visit(
        schema: Mapping[str, Any], path: str, inherited: str | None
    ) -> Iterator[tuple[str, dict[str, Any], str | None]]:
        flat, _ = generator.flat(schema, path)
        effect = flat.get("x-effect") or inherited
        yield path, flat, effect
        inner, _ = generator.flat(flat.get("items", {}), path)
        suffix = "[]" if "items" in flat else ""
        for name, value in {**flat.get("properties", {}), **inner.get("properties", {})}.items():
            yield from visit(value, f"{path}{suffix}.{name}", effect)

    for name, value in generator.flat(raw["properties"][part], part)[0]["properties"].items():
        yield from visit(value, f"{part}.{name}", None)


def kind_of(schema: Mapping[str, Any]) -> str:
    """Type and bounds in words."""
    if "const" in schema or "enum" in schema:
        return " \\| ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    kind = schema["type"]
    if kind == "array":
        inner = schema["items"]
        of = "objects" if "$ref" in inner or inner.get("type") == "object" else f"{inner['type']}s"
        return f"list of {of}{_range(schema, 'minItems', 'maxItems')}"
    if kind == "object":
        return "object" if "properties" in schema else f"map{_range(schema, 'minProperties', 'maxProperties')}"
    if kind == "string":
        pattern = f", `{schema['pattern']}`".replace("|", "\\|") if "pattern" in schema else ""
        return f"string{_range(schema, 'minLength', 'maxLength')}{pattern}"
    low = [f"≥ {schema['minimum']:g}"] if "minimum" in schema else []
    low += [f"> {schema['exclusiveMinimum']:g}"] if "exclusiveMinimum" in schema else []
    high = [f"≤ {schema['maximum']}"] if "maximum" in schema else []
    high += [f"< {schema['exclusiveMaximum']}"] if "exclusiveMaximum" in schema else []
    return ", ".join([kind, *low, *high])


def _range(schema: Mapping[str, Any], low: str, high: str) -> str:
    least, most = schema.get(low), schema.get(high)
    if most is None:
        return ""
    return f", {least} to {most}" if least else f", at most {most}"


def _meaning_and_default(description: str) -> tuple[str, str]:
    match = re.search(r"Default: (.*?)\.(?: |$)", description)
    if match is None:
        return description, ""
    meaning = (description[: match.start()] + description[match.end() :]).strip()
    return meaning, match[1]


def _table(model: type[Model], part: str) -> Iterator[str]:
    with_effect = part == "spec"
    yield "|Field|Type|" + ("Default|Effect|" if with_effect else "") + "Meaning|"
    yield "|-|-|" + ("-|-|" if with_effect else "") + "-|"
    required = _required(model)
    for path, schema, effect in fields(model, part):
        description = " ".join(str(schema.get("description", "")).split()).replace("|", "\\|")
        meaning, default = _meaning_and_default(description)
        if path in required:
            default = "required"
        leaf = effect if schema.get("type") != "object" or "properties" not in schema else None
        middle = f"{default}|{leaf or ''}|" if with_effect else ""
        yield f"|`{path}`|{kind_of(schema)}|{middle}{meaning}|"


def _required(model: type[Model]) -> set[str]:
    found: set[str] = set()

    def visit(schema: Mapping[str, Any], path: str) -> None:
        for name in schema.get("required", ()):
            found.add(f"{path}.{name}")
        for name, value in schema.get("properties", {}).items():
            suffix = "[]" if "items" in value else ""
            visit(value.get("items", value), f"{path}.{name}{suffix}")

    visit(open_api_schema(model)["properties"]["spec"], "spec")
    return found


def _rules(model: type[Model]) -> Iterator[str]:
    def visit(schema: Mapping[str, Any], path: str) -> Iterator[str]:
        for rule in schema.get("x-kubernetes-validations", ()):
            yield f"- `{path}`: {rule['message']}"
        for name, value in schema.get("properties", {}).items():
            suffix = "[]" if "items" in value else ""
            yield from visit(value.get("items", value), f"{path}.{name}{suffix}")

    yield from visit(open_api_schema(model, apart=True)["properties"]["spec"], "spec")


INTRODUCTION = f"""\
<!-- Generated from crds/finetune_api by `python -m finetune_api.crd --write`: edit the models, not this file. -->
# The API, field by field

Group `{GROUP}`, version `{VERSION}`. `kubectl explain finetunejob.spec --recursive` says the same;
`finetune validate FILE` lists everything that is wrong with a document, without a cluster.

No field of a spec has a schema default: a value is the job's, else the profile's, else the default below, which
is filled in when the run is resolved.

Effect is what changing the field causes: **train** a new run; **evaluate** the committed model is evaluated again;
**publish** it is published again; **judge** gates are decided again from stored metrics; **attempt** the pods stop
with a checkpoint and go on in the new form; **live** nothing restarts.
"""


def api_table() -> str:
    """The text of docs/api.md."""
    lines = [INTRODUCTION]
    for model in (FineTuneJob, FineTuneProfile):
        lines += [f"## {model.__name__}\n", " ".join((model.__doc__ or "").split()) + "\n", *_table(model, "spec")]
        lines += ["\nRules over several fields:\n", *_rules(model), ""]
        if "status" in model.model_fields:
            lines += ["### Status\n", *_table(model, "status"), ""]
    return "\n".join(lines).rstrip() + "\n"
