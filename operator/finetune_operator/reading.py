"""Pure: reads what other programs have written: pods, and newer versions of this operator before they were rolled back.

What is not known here is passed over, and what cannot be is left out: a field more must not make a published model
unheard of, nor a status that says "done" as good as none.
"""

import json
import re
from collections.abc import Mapping
from copy import deepcopy
from datetime import datetime
from math import isfinite
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

M = TypeVar("M", bound=BaseModel)
Raw = Mapping[str, Any]
Place = tuple[int | str, ...]
"""A path in a document."""
BOUND = 2**53
"""Of integers that everybody reads alike in JSON; sums of them are far from what the API server stores at most."""
TIMES = ("startedAt", "firstStepAt", "updatedAt", "committedAt", "estimatedCompletionTime")
"""Fields in which pods tell times."""
RFC_3339 = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?(Z|[+-]\d\d:\d\d)", re.ASCII)
NAMING = ("schemaVersion", "runId")
"""Fields without which nobody knows what all the others speak of."""
PARTS = 1000
"""So many at most are left out of one document."""


def heard(model: type[M], text: str | bytes) -> M | None:
    """What a pod says, in JSON. None where it lacks something that has to be there, or where nothing of it is left."""
    try:
        found = _storable(json.loads(text))
    except (ValueError, RecursionError):
        return None
    whole = salvaged(model, found) if isinstance(found, dict) else None
    return whole if whole is not None and whole.model_fields_set else None


def _storable(value: Any) -> Any:
    """Without numbers and times that no status can hold: the API server would refuse all that is said with them."""
    if isinstance(value, dict):
        return {
            name: _storable(one)
            for name, one in value.items()
            if not _boundless(one) and (name not in TIMES or one is None or _is_time(one))
        }
    if isinstance(value, list):
        return [_storable(one) for one in value if not _boundless(one)]
    return value


def _boundless(value: Any) -> bool:
    if isinstance(value, float):
        return not isfinite(value)
    return isinstance(value, int) and not -BOUND <= value < BOUND


def _is_time(value: Any) -> bool:
    """As RFC 3339 has it, with a zone."""
    if not isinstance(value, str) or not RFC_3339.fullmatch(value):
        return False
    try:
        datetime.fromisoformat(value.replace("Z", "+00:00"))
    except ValueError:
        return False
    return True


def salvaged(model: type[M], raw: Raw) -> M | None:
    """As much of it as is right, the smallest part around a mistake left out. None where that is the whole."""
    whole, mended = dict(raw), False
    for _ in range(PARTS):
        try:
            return model.model_validate(whole, extra="ignore")
        except ValidationError as error:
            if not mended:  # it is not ours
                whole, mended = deepcopy(whole), True
            if not _leave_out(whole, error):
                return None
    return None


def _leave_out(whole: dict[str, Any], error: ValidationError) -> bool:
    """One mistake; False where nothing would be left that could be relied upon."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = first["loc"][:-1] if first["type"] == "missing" else first["loc"]
    while place and not _is_there(whole, place):
        place = place[:-1]
    if not place or place[-1] in NAMING:
        return False
    del _at(whole, place[:-1])[place[-1]]
    return True


def _at(whole: Any, place: Place) -> Any:
    for step in place:
        whole = whole[step]
    return whole


def _is_there(whole: Any, place: Place) -> bool:
    try:
        _at(whole, place)
    except (LookupError, TypeError):
        return False
    return True


def written(model: type[M], raw: Raw) -> tuple[M | None, dict[Place, Any]]:
    """What stands in an object of the API, and the fields of it that are unknown here, but for those of lists."""
    try:
        return model.model_validate(dict(raw)), {}
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
    places = [one["loc"] for one in found if one["type"] == "extra_forbidden"]
    rest = {place: _at(raw, place) for place in places if all(isinstance(step, str) for step in place)}
    return salvaged(model, raw), rest


def with_unknown(before: Raw, after: Raw, rest: Mapping[Place, Any]) -> dict[str, Any]:
    """`after` with the fields that are `unknown` to us, wherever the object around them is as it was `before`."""
    document = deepcopy(dict(after))
    for place, value in rest.items():
        around = place[:-1]
        as_it_was = _is_there(before, around) and _is_there(after, around) and _at(before, around) == _at(after, around)
        if not around or as_it_was:
            _at(document, around)[place[-1]] = value
    return document
