"""What is wrong with one value, in words that a person understands, and how to mend it."""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

from finetune_api import scalars
from finetune_api.document import resolve_scalar


def _pattern(kind: Any) -> str:
    """The pattern of an annotated string type."""
    return str(next(part.pattern for part in get_args(kind)[1:]))


PATTERNS = {
    scalars.Uri: "must be an address such as s3://bucket/folder or file:///folder, without spaces",
    scalars.SourceUri: "must be an address such as s3://bucket/folder, hf://org/name@revision or file:///folder, "
    "without spaces",
    scalars.Name: "must be lower-case letters, digits, - and . only, a letter or digit first and last",
    scalars.NamePattern: "must be lower-case letters, digits, -, . and * only",
    scalars.Quantity: 'must be an amount such as "2", 500m, 16Gi or 1.5G',
    scalars.PositiveQuantity: 'must be an amount such as "2", 500m, 16Gi or 1.5G, and more than 0',
    scalars.Duration: "must be a time such as 90s, 10m or 1h30m",
    scalars.LabelValue: "must be letters, digits, -, _ and . only, a letter or digit first and last",
}
HINTS = {_pattern(kind): hint for kind, hint in PATTERNS.items()}
NUMBERS = {"int_type": "a whole number", "int_from_float": "a whole number", "float_type": "a number"}
CONTAINERS = {"list_type": "a list", "dict_type": "a map", "model_type": "a map", "model_attributes_type": "a map"}
COMPARED = {
    "greater_than": ("gt", "more than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}


def wrong(error: Mapping[str, Any], *, raw: str | None) -> str:
    """One error of pydantic about a value; `raw` is the text in the file when it stands there without quotes."""
    kind, context, given = error["type"], error.get("ctx", {}), error["input"]
    if kind == "string_type":
        return not_text(given, raw)
    if kind in NUMBERS:
        return _not_number(given, NUMBERS[kind])
    if kind == "bool_type":
        return f"must be true or false, without quotes, not {shown(given)}"
    if kind in CONTAINERS:
        how = " (entries that begin with -)" if kind == "list_type" else " (lines of name: value)"
        return f"must be {CONTAINERS[kind]}{how}, not {shown(given)}"
    if kind == "literal_error":
        return _not_a_choice(given, raw, context)
    if kind in COMPARED:
        bound, words = COMPARED[kind]
        limit = context[bound]
        return f"must be {words} {f'{limit:g}' if isinstance(limit, float) else limit}, not {raw or given}"
    return _wrong_size(kind, context, given) or str(error["msg"])


def _wrong_size(kind: str, context: Mapping[str, Any], given: Any) -> str | None:
    if kind == "string_pattern_mismatch":
        return HINTS.get(context["pattern"], f"must match {context['pattern']}") + f", not {shown(given)}"
    if kind == "string_too_long":
        return f"has {len(given)} characters, at most {context['max_length']}: shorten it"
    if kind == "string_too_short":
        return f"is too short, at least {context['min_length']} characters: {shown(given)}"
    if kind == "too_long":
        return f"has {len(given)} entries, at most {context['max_length']}: take some away"
    if kind == "too_short":
        return f"has {len(given) or 'no'} entries, at least {context['min_length']}: add some, or leave the field out"
    return None


def not_text(given: Any, raw: str | None) -> str:
    """A value that is no text where text is wanted."""
    if isinstance(given, bool):
        return f'{raw or given} is a boolean in YAML: quote it: "{raw or given}"'
    if isinstance(given, int | float):
        return f'{raw or given} is a number in YAML: quote it: "{raw or given}"'
    return f"must be text, not {shown(given)}"


def _not_number(given: Any, wanted: str) -> str:
    if isinstance(given, str):
        try:
            value = resolve_scalar(given)
        except ValueError:
            value = given
        if isinstance(value, int | float) and not isinstance(value, bool):
            return f'"{given[:40]}" is text because of its quotes: take them away'
    return f"must be {wanted}, not {shown(given)}"


def _not_a_choice(given: Any, raw: str | None, context: Mapping[str, Any]) -> str:
    choices = re.findall(r"'([^']*)'", str(context["expected"]))
    if isinstance(given, str):
        return f"{shown(given)} is not known{meant(given, choices)}"
    if isinstance(given, bool | int | float) and str(raw).lower() in {choice.lower() for choice in choices}:
        return not_text(given, raw)
    return f"must be {either(choices)}, not {shown(given)}"


def shown(given: Any) -> str:
    """A value in a message: short, and of maps and lists only that they are."""
    if isinstance(given, dict):
        return "a map"
    if isinstance(given, list):
        return "a list"
    if isinstance(given, bool):
        return "true" if given else "false"
    text = str(given)
    return '""' if not text else text if len(text) <= 60 else text[:60] + "..."


def meant(value: str, choices: Iterable[str]) -> str:
    """The end of a sentence about an unknown word: the word that was meant, or all of them."""
    close = closest(value, choices)
    return f": did you mean {close}?" if close else f": write {either(list(choices))}"


def closest(value: str, choices: Iterable[str]) -> str | None:
    """The choice that looks like `value`, whatever its case, dashes and underscores."""
    by_word = {plain_word(choice): choice for choice in choices}
    close = difflib.get_close_matches(plain_word(value), by_word, n=1, cutoff=0.6)
    return by_word[close[0]] if close else None


def plain_word(text: str) -> str:
    """learning_rate, learning-rate and learningRate alike."""
    return text.replace("_", "").replace("-", "").lower()


def either(choices: Sequence[Any]) -> str:
    """a, b or c."""
    words = [str(choice) for choice in choices]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def hint(kind: Any) -> str:
    """What an annotated string type must look like."""
    return PATTERNS[kind]
