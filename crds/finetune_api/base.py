"""What every model of the API shares: strictness, names, effects and cross-field rules.

A rule is written once, by one of the combinators below. It is checked here by Python and rendered to CEL for the API
server by `crd.py`, so that `finetune validate` and `kubectl apply` say the same thing in the same words.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.alias_generators import to_camel
from pydantic_core import PydanticCustomError

from finetune_api.scalars import seconds

Effect = Literal["train", "evaluate", "publish", "judge", "attempt", "live"]
"""What changing a field causes: a new run, a new evaluation, a new publication, a new judgement of stored metrics,
a restart of the pods from the last checkpoint, or nothing."""


@dataclass(frozen=True)
class Rule:
    """A condition over several fields of one object: CEL for the API server, Python for everybody else."""

    cel: str
    """What has to be true where `on` is set."""
    message: str
    holds: Callable[[Any], bool]
    on: str = ""
    """A path below the object: where it is not set, the rule holds. Empty for one that always says something."""


def _names(names: tuple[str, ...], last: str = "and") -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {last} {names[-1]}"


def _attribute(model: BaseModel, camel: str) -> Any:
    for name, info in type(model).model_fields.items():
        if (info.alias or name) == camel:
            return getattr(model, name)
    raise AttributeError(f"{type(model).__name__} has no field {camel}")


def _count(model: BaseModel, names: tuple[str, ...]) -> int:
    return sum(_attribute(model, name) is not None for name in names)


def exactly_one_of(*names: str) -> Rule:
    cel = " + ".join(f"(has(self.{name}) ? 1 : 0)" for name in names) + " == 1"
    return Rule(cel, f"give exactly one of {_names(names)}", lambda model: _count(model, names) == 1)


def at_most_one_of(*names: str) -> Rule:
    cel = " + ".join(f"(has(self.{name}) ? 1 : 0)" for name in names) + " <= 1"
    return Rule(cel, f"give {_names(names)} not together: at most one of them", lambda model: _count(model, names) <= 1)


def only_with(field: str, *, values: tuple[str, ...], fields: tuple[str, ...]) -> Rule:
    """`fields` may be set only when the required string `field` has one of `values`."""
    allowed = _names(values, "or")
    options = ", ".join(f"'{value}'" for value in values)
    none = f" || !({' || '.join(f'has(self.{name})' for name in fields)})" if len(fields) > 1 else ""
    cel = f"self.{field} in [{options}]{none}"
    return Rule(
        cel,
        f"{_names(fields)} {'goes' if len(fields) == 1 else 'go'} only with {field}: {allowed}",
        lambda model: _attribute(model, field) in values or _count(model, fields) == 0,
        on=fields[0] if len(fields) == 1 else "",
    )


def only_beside(field: str, other: str, *, values: tuple[str, ...], default: str) -> Rule:
    """`field` may be set only when `other` has one of `values`; both are paths below the object that holds the rule.

    `default` is what an `other` that is left out amounts to.
    """
    options = ", ".join(f"'{value}'" for value in values)
    return Rule(
        f"{has_path(other)} ? self.{other} in [{options}] : {str(default in values).lower()}",
        f"{field} goes only with {other}: {_names(values, 'or')}",
        lambda model: at(model, field) is None or (at(model, other) or default) in values,
        on=field,
    )


def never_beside(field: str, other: str, *, values: tuple[str, ...], reason: str) -> Rule:
    """`field` may not be set when `other` has one of `values`, none of which is its default."""
    options = ", ".join(f"'{value}'" for value in values)
    return Rule(
        f"!({has_path(other)} && self.{other} in [{options}])",
        f"{field} does not go with {other}: {_names(values, 'or')}, {reason}",
        lambda model: at(model, field) is None or at(model, other) not in values,
        on=field,
    )


def lasts_a_minute(field: str) -> Rule:
    """Shorter times would end a job before it begins, or take away what the operator has not read yet."""
    return Rule(
        f"duration(self.{field}) >= duration('1m')",
        f"{field} is at least 1m",
        lambda model: _long_enough(at(model, field)),
        on=field,
    )


def _long_enough(duration: Any) -> bool:
    """What is no duration has another problem."""
    try:
        return duration is None or seconds(duration) >= 60
    except (ValueError, TypeError):
        return True


def has_path(path: str) -> str:
    """CEL that says whether a path is set, whatever is missing on the way to it."""
    parts = path.split(".")
    return " && ".join(f"has(self.{'.'.join(parts[: index + 1])})" for index in range(len(parts)))


def at(model: Any, path: str) -> Any:
    """What is at a path, None where it is missing. Inner objects are models, or maps where their types are unproven."""
    found = model
    for part in path.split("."):
        if isinstance(found, BaseModel):
            found = _attribute(found, part)
        else:
            found = found.get(part) if isinstance(found, dict) else None
    return found


def items(value: Any) -> list[Any]:
    """Of a list; the validator asks rules about documents whose types are still wrong."""
    return value if isinstance(value, list) else []


class Model(BaseModel):
    """A frozen, strict object with camelCase names outside and snake_case inside; unknown fields are errors."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        populate_by_name=True,
        extra="forbid",
        frozen=True,
        strict=True,
        ser_json_inf_nan="null",
    )
    rules: ClassVar[tuple[Rule, ...]] = ()

    @model_validator(mode="after")
    def _rules_hold(self) -> Self:
        for rule in self.rules:
            if not rule.holds(self):
                raise PydanticCustomError("rule", "{message}", {"message": rule.message})
        return self

    def document(self) -> dict[str, Any]:
        """The object as JSON values, unset fields left out."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


def spec_field(effect: Effect | None, description: str, *, required: bool = False, **constraints: Any) -> Any:
    """A field of a spec. `effect` says what changing it causes; None for an object whose fields say it themselves.

    No field of a spec has a schema default: unset stays visible, so that a profile's default can apply.
    """
    extra: dict[str, Any] = {} if effect is None else {"x-effect": effect}
    default: Any = ... if required else None
    return Field(default, description=description, json_schema_extra=extra, **constraints)
