"""Models -> structural CustomResourceDefinitions with CEL rules; writes them, the chart's copies and docs/api.md.

    python -m finetune_api.crd --write | --check

What a structural schema cannot express, or what would not say the same on the client and on the server, is refused
with the field's path: a schema that silently loses a constraint is worse than none. The refusals are listed by the
functions named `_refuse_*` and by `KNOWN`.
"""

import argparse
import difflib
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml

from finetune_api import GROUP, VERSION
from finetune_api.base import Effect, Model, Rule, has_path
from finetune_api.document import plain, read
from finetune_api.job import FineTuneJob
from finetune_api.profile import FineTuneProfile

ROOT = Path(__file__).parents[2]
HEADER = "# Generated from crds/finetune_api by `python -m finetune_api.crd --write`: edit the models, not this file.\n"

COPIED = {
    "description", "enum", "format", "maxItems", "maxLength", "maxProperties", "maximum", "minItems", "minLength",
    "minProperties", "minimum", "pattern", "type",
}  # fmt: skip
KNOWN = COPIED | {
    "$ref", "additionalProperties", "anyOf", "const", "default", "exclusiveMaximum", "exclusiveMinimum", "items",
    "properties", "propertyNames", "required", "title", "x-effect",
}  # fmt: skip
TYPES = {"array", "boolean", "integer", "number", "object", "string"}
CEL_RESERVED = {
    "true", "false", "null", "in", "as", "break", "const", "continue", "else", "for", "function", "if", "import", "let",
    "loop", "package", "namespace", "return", "var", "void", "while",
}  # fmt: skip

JOB_COLUMNS = (
    ("Phase", "string", ".status.phase", 0),
    ("Step", "integer", ".status.progress.step", 0),
    ("Progress", "integer", ".status.progress.percent", 0),
    ("Loss", "number", ".status.progress.loss", 0),
    ("Metric", "number", ".status.checkpoint.best.value", 0),
    # A date column prints the time since then, and a time to come as <invalid>.
    ("ETA", "string", ".status.progress.estimatedCompletionTime", 0),
    # The number of the attempt that the last restart ended is the number of restarts.
    ("Restarts", "integer", ".status.restarts[-1:].attempt", 0),
    ("Age", "date", ".metadata.creationTimestamp", 0),
    ("Run", "string", ".status.run.id", 1),
    ("Model", "string", ".status.model.uri", 1),
    ("Queue", "string", ".spec.queue.name", 1),
    ("Message", "string", ".status.message", 1),
)
PROFILE_COLUMNS = (
    ("Endpoint", "string", ".spec.storage.endpoint", 0),
    ("Age", "date", ".metadata.creationTimestamp", 0),
)
ENVELOPE = {
    "apiVersion": {"type": "string", "description": f"{GROUP}/{VERSION}"},
    "kind": {"type": "string", "description": "Kind of the document."},
    "metadata": {"type": "object"},
}


class Inexpressible(Exception):
    """A model says what a structural schema cannot; the message names the field's path."""

    def __init__(self, path: str, message: str) -> None:
        super().__init__(f"{path}: {message}")


def open_api_schema(model: type[Model], *, apart: bool = False) -> dict[str, Any]:
    """The structural schema of a whole resource. `apart`: with a validation for each rule, for whoever reads it.

    Raises Inexpressible when the model says what such a schema cannot.
    """
    raw = model.model_json_schema(by_alias=True)
    generator = Generator(raw.get("$defs", {}), models_below(model), apart=apart)
    properties = dict(ENVELOPE)
    for name in ("spec", "status"):
        if name in raw["properties"]:
            properties[name] = generator.convert(
                raw["properties"][name], path=name, in_spec=name == "spec", effect=None
            )
    if "status" in properties:
        _lift_default(properties["status"])
    return {
        "type": "object",
        "description": generator.text(raw, model.__name__),
        "properties": properties,
        "required": ["spec"],
    }


def custom_resource_definition(
    model: type[Model],
    *,
    plural: str,
    short: str,
    scope: str,
    columns: tuple[tuple[str, str, str, int], ...],
) -> dict[str, Any]:
    """A CustomResourceDefinition; the status subresource is on exactly when the model has a status."""
    schema = open_api_schema(model)
    version: dict[str, Any] = {
        "name": VERSION,
        "served": True,
        "storage": True,
        "additionalPrinterColumns": [
            {"name": name, "type": kind, "jsonPath": path} | ({"priority": priority} if priority else {})
            for name, kind, path, priority in columns
        ],
        "schema": {"openAPIV3Schema": schema},
    }
    if "status" in schema["properties"]:
        version["subresources"] = {"status": {}}
    names = {
        "kind": model.__name__,
        "listKind": f"{model.__name__}List",
        "plural": plural,
        "singular": model.__name__.lower(),
        "shortNames": [short],
        "categories": ["finetune"],
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.{GROUP}"},
        "spec": {"group": GROUP, "names": names, "scope": scope, "versions": [version]},
    }


def definitions() -> dict[str, dict[str, Any]]:
    """File name -> CustomResourceDefinition."""
    return {
        "finetunejobs.yaml": custom_resource_definition(
            FineTuneJob, plural="finetunejobs", short="ftj", scope="Namespaced", columns=JOB_COLUMNS
        ),
        "finetuneprofiles.yaml": custom_resource_definition(
            FineTuneProfile, plural="finetuneprofiles", short="ftp", scope="Cluster", columns=PROFILE_COLUMNS
        ),
    }


# --- conversion ---


def models_below(model: type[Model]) -> dict[str, type[Model]]:
    """Every model below `model`, by the name that pydantic gives it in $defs."""
    found: dict[str, type[Model]] = {}

    def visit(kind: Any) -> None:
        if isinstance(kind, type) and issubclass(kind, Model):
            if kind.__name__ not in found:
                found[kind.__name__] = kind
                for field in kind.model_fields.values():
                    visit(field.annotation)
            elif found[kind.__name__] is not kind:
                raise Inexpressible(kind.__name__, "two models have this name: rename one")
            return
        for argument in get_args(kind):
            visit(argument)

    visit(model)
    return found


class Generator:
    def __init__(
        self, definitions: Mapping[str, Any], models: Mapping[str, type[Model]], *, apart: bool = False
    ) -> None:
        self.definitions = definitions
        self.models = models
        self.apart = apart
        self.inside: list[str] = []

    def convert(self, schema: Mapping[str, Any], *, path: str, in_spec: bool, effect: str | None) -> dict[str, Any]:
        """One value's schema. `effect` is what an enclosing list or map declares for it."""
        schema, model = self.flat(schema, path)
        self._refuse_unknown(schema, path)
        effect = self._effect(schema, path, inherited=effect)
        if model is not None:
            self.inside.append(model)
        result = {key: schema[key] for key in COPIED if key in schema and key not in ("type", "enum")}
        result |= self._type(schema, path) | _bounds(schema, path)
        if result["type"] == "object":
            result |= self._object(schema, path, in_spec=in_spec, effect=effect, model=model)
        elif result["type"] == "array":
            if "maxItems" not in schema:
                raise Inexpressible(path, "a list without a bound: give it max_length")
            result["items"] = self.convert(schema["items"], path=f"{path}[]", in_spec=in_spec, effect=effect)
        elif in_spec and effect is None:
            raise Inexpressible(path, "declares no effect: say in spec_field what changing it causes")
        if in_spec and "default" in schema and schema["default"] is not None:
            raise Inexpressible(path, "a default in spec would hide that it is unset: put it into resolve.py")
        if schema.get("default") is not None:
            result["default"] = schema["default"]
        if model is not None:
            self.inside.pop()
        return _ordered(result)

    def text(self, schema: Mapping[str, Any], path: str) -> str:
        """The description."""
        description = str(schema.get("description") or "").strip()
        if not description:
            raise Inexpressible(path, "has no description: kubectl explain would show nothing")
        if description.startswith("Default:"):
            raise Inexpressible(path, "the description tells only the default: say what the field means")
        return " ".join(description.split())

    def flat(self, schema: Mapping[str, Any], path: str) -> tuple[dict[str, Any], str | None]:
        """The schema with references inlined and "or null" taken away; what stands beside them wins."""
        result, model = dict(schema), None
        while "anyOf" in result or "$ref" in result:
            if "anyOf" in result:
                choices = [choice for choice in result.pop("anyOf") if choice != {"type": "null"}]
                if len(choices) != 1:
                    raise Inexpressible(path, "may be of several types: a structural schema has one type a field")
                result = {**choices[0], **result}
            if "$ref" in result:
                model = result.pop("$ref").rpartition("/")[2]
                if model in self.inside:
                    raise Inexpressible(path, f"{model} contains itself: a structural schema is finite")
                result = {**self.definitions[model], **result}
        return result, model

    def _refuse_unknown(self, schema: Mapping[str, Any], path: str) -> None:
        unknown = sorted(set(schema) - KNOWN)
        if unknown:
            raise Inexpressible(path, f"{', '.join(unknown)} cannot be said in a structural schema")

    def _effect(self, schema: Mapping[str, Any], path: str, *, inherited: str | None) -> str | None:
        own = schema.get("x-effect")
        if own is not None and own not in get_args(Effect):
            raise Inexpressible(path, f"effect {own} is none of {', '.join(get_args(Effect))}")
        if own is not None and inherited is not None:
            raise Inexpressible(path, "declares an effect inside a field that declares one: keep one of the two")
        return own or inherited

    def _type(self, schema: Mapping[str, Any], path: str) -> dict[str, Any]:
        kind = schema.get("type")
        values = [schema["const"]] if "const" in schema else schema.get("enum")
        if values is not None:
            if not all(isinstance(value, str) for value in values):
                raise Inexpressible(path, "an enum of anything but strings: write strings")
            return {"type": "string", "enum": list(values)}
        if kind not in TYPES:
            raise Inexpressible(path, f"type {kind}: a structural schema needs one of {', '.join(sorted(TYPES))}")
        if kind == "string":
            if "maxLength" not in schema:
                raise Inexpressible(path, "a string without a bound: give it max_length")
            _refuse_pattern(schema.get("pattern"), path)
        if kind == "integer":
            return {"type": "integer", "format": "int64"}
        return {"type": kind}

    def _object(
        self, schema: Mapping[str, Any], path: str, *, in_spec: bool, effect: str | None, model: str | None
    ) -> dict[str, Any]:
        if "properties" not in schema:
            return self._map(schema, path, in_spec=in_spec, effect=effect)
        if schema.get("additionalProperties", True) is not False:
            raise Inexpressible(path, "takes unknown fields: the API server would drop them silently")
        properties = {}
        for name, value in schema["properties"].items():
            self.text(value if "description" in value else {}, f"{path}.{name}")
            properties[name] = self.convert(value, path=f"{path}.{name}", in_spec=in_spec, effect=effect)
        result: dict[str, Any] = {"properties": properties}
        if schema.get("required"):
            result["required"] = list(schema["required"])
        rules = self.models[model].rules if model else ()
        for rule in rules:
            reserved = set(re.findall(r"self\.(\w+)", f"{rule.cel} self.{rule.on}")) & CEL_RESERVED
            if reserved:
                raise Inexpressible(path, f"{min(reserved)} is a word of CEL: rename the field or write its rule so")
        if rules:
            groups = [[rule] for rule in rules] if self.apart else _groups(rules)
            result["x-kubernetes-validations"] = [_validation(group) for group in groups]
        return result

    def _map(self, schema: Mapping[str, Any], path: str, *, in_spec: bool, effect: str | None) -> dict[str, Any]:
        values = schema.get("additionalProperties")
        if not isinstance(values, Mapping):
            raise Inexpressible(path, "an object without fields: a structural schema needs to know its values")
        if "maxProperties" not in schema:
            raise Inexpressible(path, "a map without a bound: give it max_length")
        if in_spec and effect is None:
            raise Inexpressible(path, "declares no effect: say in spec_field what changing it causes")
        result: dict[str, Any] = {
            "additionalProperties": self.convert(values, path=f"{path}.*", in_spec=in_spec, effect=effect)
        }
        names = dict(schema.get("propertyNames", {}))
        longest = names.pop("maxLength", None)
        if names:
            raise Inexpressible(path, f"{', '.join(sorted(names))} of keys: only their length can be bounded")
        if longest is None:
            raise Inexpressible(path, "keys without a bound: give the key type max_length")
        result["x-kubernetes-validations"] = [
            {"rule": f"self.all(key, size(key) <= {longest})", "message": f"keys have at most {longest} characters"}
        ]
        return result


def _groups(rules: Sequence[Rule]) -> list[list[Rule]]:
    """One validation for all rules that begin with the same field.

    With each write, a status's too, the API server evaluates all of them, and looking a field up is what costs it most:
    what is not set is looked up once.
    """
    by_field: dict[str, list[Rule]] = {}
    for rule in rules:
        by_field.setdefault(rule.on.partition(".")[0] or rule.message, []).append(rule)
    return list(by_field.values())


def _validation(rules: Sequence[Rule]) -> dict[str, str]:
    by_path: dict[str, list[Rule]] = {}
    for rule in rules:
        by_path.setdefault(rule.on, []).append(rule)
    field = rules[0].on.partition(".")[0]
    known = field if len(by_path) > 1 else ""
    parts = [_where(path, _all(group), known=known) for path, group in by_path.items()]
    whole = parts[0] if len(parts) == 1 else _where(field, " && ".join(f"({part})" for part in parts))
    if len(rules) == 1:
        return {"rule": whole, "message": rules[0].message}
    said = " + ".join(f"(({_where(rule.on, rule.cel)}) ? '' : {_text(rule.message + '; ')})" for rule in rules)
    return {"rule": whole, "messageExpression": f"{said} + 'finetune validate names the lines'"}


def _all(rules: Sequence[Rule]) -> str:
    return rules[0].cel if len(rules) == 1 else " && ".join(f"({rule.cel})" for rule in rules)


def _where(path: str, cel: str, *, known: str = "") -> str:
    """A condition that holds where the path is not set. `known`: its first field, which is known to be set."""
    if path == known:
        return cel
    there = has_path(path).removeprefix(f"has(self.{known}) && ")
    return f"!{there} || ({cel})" if "&&" not in there else f"!({there}) || ({cel})"


def _text(words: str) -> str:
    """As CEL writes it."""
    return "'" + words.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _bounds(schema: Mapping[str, Any], path: str) -> dict[str, Any]:
    """exclusiveMinimum and exclusiveMaximum as the CRD dialect has them: booleans beside the bound."""
    result: dict[str, Any] = {}
    for side, exclusive in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
        if exclusive in schema:
            if side in schema:
                raise Inexpressible(path, f"{side} and {exclusive} together: keep one of them")
            result |= {side: schema[exclusive], exclusive: True}
    return result


def _refuse_pattern(pattern: str | None, path: str) -> None:
    """Patterns must mean the same to Go's RE2 (the API server) and to Rust's regex (pydantic)."""
    if pattern is None:
        return
    if not (pattern.startswith("^") and pattern.endswith("$")):
        raise Inexpressible(path, "a pattern that is not anchored: put ^ in front and $ at the end")
    if re.search(r"(?<!\\)\(\?(?!:)", pattern):
        raise Inexpressible(path, "a pattern with (?...): RE2 has no lookaround, and flags differ")
    escapes = re.search(r"\\[^-.^$*+?()\[\]{}|/\\tnrfv]", pattern)
    if escapes:
        raise Inexpressible(path, f"a pattern with {escapes[0]}: it means other characters to RE2; list them in []")
    if re.search(r"[*+?}]\+", pattern):
        raise Inexpressible(path, "a pattern with a possessive quantifier: RE2 has none")
    if any(int(count) > 1000 for count in re.findall(r"\{\d*,?(\d+)\}", pattern)):
        raise Inexpressible(path, "a pattern that repeats more than 1000 times: RE2 refuses it; bound the length")


def _lift_default(status: dict[str, Any]) -> None:
    """`observedGeneration: -1` moves up to status itself: there it applies before anybody has written a status."""
    defaults = {name: field.pop("default") for name, field in status["properties"].items() if "default" in field}
    if defaults != {"observedGeneration": -1}:
        raise Inexpressible("status", f"defaults {defaults}: only observedGeneration has one, -1")
    status["default"] = defaults
    _refuse_defaults(status["properties"], "status")


def _refuse_defaults(properties: Mapping[str, Any], path: str) -> None:
    for name, field in properties.items():
        if "default" in field:
            raise Inexpressible(f"{path}.{name}", "a default: only status.observedGeneration has one")
        inner = field.get("items", field)
        _refuse_defaults(inner.get("properties", {}), f"{path}.{name}")


ORDER = ("type", "format", "description", "default", "enum", "pattern")


def _ordered(schema: dict[str, Any]) -> dict[str, Any]:
    last = ("items", "additionalProperties", "properties", "required", "x-kubernetes-validations")
    if "description" in schema:
        schema["description"] = " ".join(schema["description"].split())

    def place(key: str) -> tuple[int, str]:
        if key in ORDER:
            return ORDER.index(key), ""
        return (50 + last.index(key), "") if key in last else (20, key)

    return {key: schema[key] for key in sorted(schema, key=place)}


# --- files ---


def _dump(document: Mapping[str, Any]) -> str:
    text = HEADER + yaml.safe_dump(dict(document), sort_keys=False, width=118, allow_unicode=True)
    (back,) = read(text)
    if back.root is None or plain(back.root) != document:
        raise AssertionError("PyYAML wrote what Kubernetes reads differently")  # such as an enum value y
    return text


def generated(root: Path = ROOT) -> dict[Path, str]:
    """Every generated file and its text."""
    from finetune_api.table import api_table  # it reads the schemas made here

    files = {}
    for name, definition in definitions().items():
        text = _dump(definition)
        files[root / "crds" / name] = text
        files[root / "charts" / "finetune-operator" / "crds" / name] = text
    files[root / "docs" / "api.md"] = api_table()
    return files


def stale(root: Path = ROOT) -> list[str]:
    """For each file that is not what the models say: its path and the first differing lines."""
    found = []
    for path, text in generated(root).items():
        there = path.read_text() if path.exists() else ""
        if there != text:
            changes = difflib.unified_diff(there.splitlines(), text.splitlines(), "committed", "generated", lineterm="")
            found.append(f"{path.relative_to(root)} is stale:\n" + "\n".join(list(changes)[:20]))
    return found


def main(arguments: list[str] | None = None) -> int:
    """Writes or checks the generated files; the exit code is 1 when one is stale."""
    parser = argparse.ArgumentParser(prog="python -m finetune_api.crd", description="CRDs, chart copies, docs/api.md")
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--write", action="store_true", help="write the files")
    mode.add_argument("--check", action="store_true", help="fail, naming the files, when one is not fresh")
    parser.add_argument("--root", type=Path, default=ROOT, help="the repository")
    options = parser.parse_args(arguments)
    if options.check:
        problems = stale(options.root)
        for problem in problems:
            print(problem, file=sys.stderr)
        if problems:
            print("run: python -m finetune_api.crd --write", file=sys.stderr)
        return 1 if problems else 0
    for path, text in generated(options.root).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        print(path.relative_to(options.root))
    return 0


if __name__ == "__main__":
    sys.exit(main())
