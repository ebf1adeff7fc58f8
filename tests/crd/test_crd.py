"""The generator: what it writes, what it refuses, and that the committed files are fresh."""

import json
import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from finetune_api import crd
from finetune_api.base import Model, Rule, exactly_one_of, spec_field
from finetune_api.crd import Inexpressible, open_api_schema
from finetune_api.document import plain, read
from finetune_api.job import FineTuneJob
from finetune_api.table import api_table, fields

Short = Annotated[str, StringConstraints(max_length=8)]
JOB = crd.definitions()["finetunejobs.yaml"]["spec"]["versions"][0]
SPEC = JOB["schema"]["openAPIV3Schema"]["properties"]["spec"]


def resource(spec: type[Model]) -> type[Model]:
    """A resource whose spec is the given model."""

    class Resource(Model):
        """A resource."""

        api_version: str
        kind: str
        metadata: dict[str, Any]
        spec: Any = Field(description="What is asked for.")

    Resource.__annotations__["spec"] = spec
    Resource.model_fields["spec"].annotation = spec
    Resource.model_rebuild(force=True)
    return Resource


def spec_of(
    annotation: Any, *, effect: Any = "train", description: str = "A field.", **constraints: Any
) -> type[Model]:
    """A resource whose spec has the one field `value`."""

    class Spec(Model):
        value: Any = spec_field(effect, description, **constraints)

    Spec.model_fields["value"].annotation = annotation
    Spec.model_rebuild(force=True)
    return resource(Spec)


def schema_of(annotation: Any, **options: Any) -> dict[str, Any]:
    schema: dict[str, Any] = open_api_schema(spec_of(annotation, **options))
    value: dict[str, Any] = schema["properties"]["spec"]["properties"]["value"]
    return value


class Open(BaseModel):
    model_config = ConfigDict(extra="allow")
    a: Short = Field(description="A field.")


class Loop(Model):
    inner: "Loop | None" = spec_field(None, "Itself.")


class WithReservedWord(Model):
    rules: ClassVar[tuple[Rule, ...]] = (exactly_one_of("namespace", "name"),)
    namespace: Short | None = spec_field("train", "A field.")
    name: Short | None = spec_field("train", "A field.")


class WithEffect(Model):
    a: Short | None = spec_field("train", "A field.")


class WithoutEffect(Model):
    a: Short | None = spec_field(None, "A field.")


REFUSED: dict[str, tuple[type[Model], str]] = {
    "a string without a bound": (spec_of(str | None), "spec.value: a string without a bound"),
    "a list without a bound": (spec_of(list[Short] | None), "spec.value: a list without a bound"),
    "an unbounded string in a list": (spec_of(list[str], max_length=3), "spec.value[]: a string without a bound"),
    "a map without a bound": (spec_of(dict[Short, Short] | None), "spec.value: a map without a bound"),
    "a map with unbounded keys": (spec_of(dict[str, Short], max_length=3), "spec.value: keys without a bound"),
    "a map with patterned keys": (
        spec_of(dict[Annotated[str, StringConstraints(max_length=3, min_length=1)], Short], max_length=3),
        "spec.value: minLength of keys",
    ),
    "a map of anything": (spec_of(dict[Short, Any], max_length=3), "spec.value"),
    "anything": (spec_of(Any), "spec.value: type None"),
    "two types": (spec_of(int | Short | None), "spec.value: may be of several types"),
    "a tuple": (spec_of(tuple[int, int] | None), "spec.value: prefixItems cannot be said"),
    "a multiple": (spec_of(int, multiple_of=2), "spec.value: multipleOf cannot be said"),
    "a set": (spec_of(set[int], max_length=3), "spec.value: uniqueItems cannot be said"),
    "an enum of numbers": (spec_of(Literal[1, 2] | None), "spec.value: an enum of anything but strings"),
    "no effect": (spec_of(int | None, effect=None), "spec.value: declares no effect"),
    "no effect on a list": (spec_of(list[int], effect=None, max_length=3), "spec.value[]: declares no effect"),
    "no effect on a map": (spec_of(dict[Short, Short], effect=None, max_length=3), "spec.value: declares no effect"),
    "no effect below": (spec_of(WithoutEffect | None, effect=None), "spec.value.a: declares no effect"),
    "two effects": (spec_of(WithEffect | None, effect="train"), "spec.value.a: declares an effect inside"),
    "an unknown effect": (spec_of(int | None, effect="reboot"), "spec.value: effect reboot is none of"),
    "no description": (spec_of(int | None, description=""), "spec.value: has no description"),
    "a description that is a default": (spec_of(int, description="Default: 3."), "spec.value: the description tells"),
    "lookahead": (
        spec_of(Annotated[str, Field(pattern="^a$", max_length=3, json_schema_extra={"pattern": "^(?=a)a$"})]),
        "spec.value: a pattern with (?...)",
    ),
    "a back reference": (
        spec_of(Annotated[str, Field(max_length=3, json_schema_extra={"pattern": r"^(a)\1$"})]),
        r"spec.value: a pattern with \1",
    ),
    "a class that is Unicode in Rust": (
        spec_of(Annotated[str, Field(max_length=3, pattern=r"^\s$")]),
        r"spec.value: a pattern with \s",
    ),
    "a pattern that is not anchored": (
        spec_of(Annotated[str, Field(max_length=3, pattern="a")]),
        "spec.value: a pattern that is not anchored",
    ),
    "a possessive quantifier": (
        spec_of(Annotated[str, Field(max_length=3, json_schema_extra={"pattern": "^a++$"})]),
        "spec.value: a pattern with a possessive",
    ),
    "too many repetitions": (
        spec_of(Annotated[str, Field(max_length=3, pattern="^a{1,2000}$")]),
        "spec.value: a pattern that repeats more than 1000",
    ),
    "a model that contains itself": (spec_of(Loop | None, effect=None), "spec.value.inner: Loop contains itself"),
    "two lower bounds": (spec_of(int, ge=1, gt=0), "spec.value: minimum and exclusiveMinimum"),
    "a word of CEL": (spec_of(WithReservedWord | None, effect=None), "spec.value: namespace is a word of CEL"),
    "unknown fields": (spec_of(Open | None, effect=None), "spec.value: takes unknown fields"),
}


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case)
def test_what_a_structural_schema_cannot_say_is_refused_with_its_path(case: str) -> None:
    model, message = REFUSED[case]
    with pytest.raises(Inexpressible, match=re.escape(message)):
        open_api_schema(model)


def test_a_default_in_spec_is_refused() -> None:
    class Spec(Model):
        a: int = Field(3, description="A field.", json_schema_extra={"x-effect": "train"})

    with pytest.raises(Inexpressible, match=re.escape("spec.a: a default in spec")):
        open_api_schema(resource(Spec))


def test_a_second_default_in_status_is_refused() -> None:
    class Status(Model):
        observed_generation: int = Field(-1, description="A field.")
        step: int = Field(0, description="A field.")

    class Spec(Model):
        a: int | None = spec_field("train", "A field.")

    class Resource(Model):
        """A resource."""

        metadata: dict[str, Any]
        spec: Spec = Field(description="Asked for.")
        status: Status | None = Field(None, description="Said of it.")

    with pytest.raises(Inexpressible, match="only observedGeneration has one"):
        open_api_schema(Resource)


def test_or_null_is_not_nullable() -> None:
    assert schema_of(int | None) == {"type": "integer", "format": "int64", "description": "A field."}


def test_exclusive_bounds_are_booleans_beside_the_bound() -> None:
    schema = schema_of(float | None, gt=0, lt=1)
    assert schema == {
        "type": "number", "description": "A field.", "minimum": 0, "exclusiveMinimum": True, "maximum": 1,
        "exclusiveMaximum": True,
    }  # fmt: skip


def test_a_single_choice_is_an_enum() -> None:
    assert schema_of(Literal["only"] | None)["enum"] == ["only"]


def test_references_are_inlined_and_the_fields_description_wins() -> None:
    schema = schema_of(WithEffect | None, effect=None, description="Mine.")
    assert schema["description"] == "Mine."
    assert list(schema["properties"]) == ["a"]


def test_the_length_of_keys_becomes_a_rule() -> None:
    schema = schema_of(dict[Short, Short] | None, max_length=3)
    assert schema["x-kubernetes-validations"] == [
        {"rule": "self.all(key, size(key) <= 8)", "message": "keys have at most 8 characters"}
    ]


def every(schema: Any) -> Any:
    if isinstance(schema, dict):
        yield schema
        for value in schema.values():
            yield from every(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from every(value)


def test_no_keyword_of_ours_or_of_json_schema_reaches_the_definitions() -> None:
    forbidden = {"x-effect", "title", "$ref", "$defs", "anyOf", "allOf", "oneOf", "const", "nullable", "propertyNames"}
    for definition in crd.definitions().values():
        for part in every(definition):
            assert not forbidden & set(part)


def test_only_the_observed_generation_has_a_default() -> None:
    defaults = [part["default"] for part in every(JOB["schema"]) if "default" in part]
    assert defaults == [{"observedGeneration": -1}]


def test_a_definition_fits_into_the_annotation_of_a_client_side_apply() -> None:
    """As kubectl apply and Argo CD do it, unless told otherwise: annotations have 256 KiB together."""
    for name, definition in crd.definitions().items():
        assert len(json.dumps(definition)) < 200 * 1024, name


def test_every_rule_of_the_models_is_in_the_definition() -> None:
    rules = [rule for part in every(SPEC) for rule in part.get("x-kubernetes-validations", ())]
    said = "\n".join(rule.get("message") or rule["messageExpression"] for rule in rules)
    for model in crd.models_below(FineTuneJob).values():
        for rule in model.rules:
            assert rule.message.replace("'", "\\'") in said


def test_rules_that_begin_with_the_same_field_are_one_validation() -> None:
    """The API server evaluates each with every write of a status."""
    rules = [rule for part in every(SPEC) for rule in part.get("x-kubernetes-validations", ())]
    assert sum(len(model.rules) for model in crd.models_below(FineTuneJob).values()) > 150
    assert len(rules) < 60
    for rule in rules:
        assert ("message" in rule) != ("messageExpression" in rule)


def test_a_validation_looks_up_once_what_is_not_set_and_says_all_that_is_wrong() -> None:
    class Two(Model):
        rules = (
            Rule("self.a.b > 1", "b is more than 1", lambda _: True, on="a.b"),
            Rule("self.a.b < 9", "b isn't 9", lambda _: True, on="a.b"),
            Rule("self.a.c > 1", "c is more than 1", lambda _: True, on="a.c"),
            Rule("self.d > 1", "d is more than 1", lambda _: True),
        )

    inner, alone = (crd._validation(group) for group in crd._groups(Two.rules))
    assert inner == {
        "rule": (
            "!has(self.a) || ((!has(self.a.b) || ((self.a.b > 1) && (self.a.b < 9))) && "
            "(!has(self.a.c) || (self.a.c > 1)))"
        ),
        "messageExpression": (
            "((!(has(self.a) && has(self.a.b)) || (self.a.b > 1)) ? '' : 'b is more than 1; ') + "
            "((!(has(self.a) && has(self.a.b)) || (self.a.b < 9)) ? '' : 'b isn\\'t 9; ') + "
            "((!(has(self.a) && has(self.a.c)) || (self.a.c > 1)) ? '' : 'c is more than 1; ') + "
            "'finetune validate names the lines'"
        ),
    }
    assert alone == {"rule": "self.d > 1", "message": "d is more than 1"}


def test_every_printer_column_names_a_field_that_exists() -> None:
    schema = JOB["schema"]["openAPIV3Schema"]
    for column in JOB["additionalPrinterColumns"]:
        part = schema
        steps = re.sub(r"\[.*?\]", ".[]", column["jsonPath"]).strip(".").split(".")
        if steps[0] == "metadata":
            continue
        for step in steps:
            part = part["items"] if step == "[]" else part["properties"][step]
        assert part["type"] == column["type"], column


def test_names_are_what_people_type() -> None:
    names = [definition["spec"]["names"] for definition in crd.definitions().values()]
    assert [name["shortNames"] for name in names] == [["ftj"], ["ftp"]]
    assert [definition["spec"]["scope"] for definition in crd.definitions().values()] == ["Namespaced", "Cluster"]
    assert JOB["subresources"] == {"status": {}}


def test_every_field_of_a_spec_has_an_effect_unless_its_fields_have() -> None:
    without = {path for path, _, effect in fields(FineTuneJob, "spec") if effect is None}
    for path in without:
        assert any(inner.startswith((f"{path}.", f"{path}[].")) for inner, _, _ in fields(FineTuneJob, "spec")), path
    assert len(list(fields(FineTuneJob, "spec"))) - len(without) >= 60


def test_the_table_has_a_line_for_every_field() -> None:
    table = api_table()
    for path, _, _ in fields(FineTuneJob, "spec"):
        assert f"|`{path}`|" in table


def test_the_committed_files_are_fresh() -> None:
    assert crd.stale() == []


def test_the_committed_definitions_are_what_kubernetes_reads() -> None:
    for name, definition in crd.definitions().items():
        (document,) = read((crd.ROOT / "crds" / name).read_text())
        assert document.root is not None
        assert plain(document.root) == definition


def test_check_names_a_stale_file_and_write_mends_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert crd.main(["--write", "--root", str(tmp_path)]) == 0
    assert crd.main(["--check", "--root", str(tmp_path)]) == 0
    chart = tmp_path / "charts" / "finetune-operator" / "crds" / "finetunejobs.yaml"
    chart.write_text(chart.read_text().replace("ftj", "ftx"))
    capsys.readouterr()
    assert crd.main(["--check", "--root", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "charts/finetune-operator/crds/finetunejobs.yaml is stale" in said
    assert "--write" in said
    assert crd.main(["--write", "--root", str(tmp_path)]) == 0
    assert crd.main(["--check", "--root", str(tmp_path)]) == 0
