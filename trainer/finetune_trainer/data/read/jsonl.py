"""JSON Lines: every line that is not blank is one JSON object (RFC 8259), stricter than Python's reader.

Refused: NaN and infinities, numbers beyond a double's range, names given twice in an object (Python would silently keep
the last), half surrogate pairs, and nesting deeper than any schema needs.
"""

import json
import re
from collections.abc import Iterator
from math import isinf
from typing import Any

from .base import DataError, File, Row, some
from .lines import Line

DEPTH_LIMIT = 64
"""Objects and arrays inside each other."""
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_KINDS = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}


class _RefusedError(Exception):
    """What Python reads and JSON does not have, or what no reader agrees about; the message is the sentence."""


def rows(source: Iterator[Line], file: File) -> Iterator[Row | DataError]:
    """A row an object; `file.columns` are the keys of the first one."""
    for number, line in source:
        if isinstance(line, DataError):
            yield line
        elif line and not line.isspace():
            row = _row(line, number, file)
            if not file.columns and isinstance(row, Row):
                file.columns = list(row.values)
            yield row


def parse(text: str) -> Any:
    """The JSON value. Raises ValueError, whose message is a sentence with a remedy (and never holds the text)."""
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError:
        raise
    except _RefusedError as error:
        raise ValueError(str(error)) from None
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    except ValueError:
        raise ValueError("a number has too many digits; write it as text or shorten it.") from None
    if text.count("[") + text.count("{") > DEPTH_LIMIT and _deeper(value, DEPTH_LIMIT):
        raise ValueError(_TOO_DEEP)
    if _SURROGATE.search(text) and not _encodable(value):
        raise ValueError("a text holds half a surrogate pair, which is no character; mend the row.")
    return value


def _row(line: str, number: int, file: File) -> Row | DataError:
    try:
        value = parse(line)
    except json.JSONDecodeError as error:
        return file.bad_row(f"{number}:{error.colno}", f"not JSON ({error.msg}); every line must be one JSON object.")
    except ValueError as error:
        return file.bad_row(number, str(error))
    if not isinstance(value, dict):
        kind = _KINDS.get(type(value), "a number")
        return file.bad_row(number, f'the line is {kind}, not an object; write rows as {{"column": value, ...}}.')
    return Row(number, value)


_TOO_DEEP = f"nested too deeply, more than {DEPTH_LIMIT} levels; simplify the row."


def _constant(name: str) -> None:
    raise _RefusedError(f"{name} is not JSON; use null or leave the field out.")


def _float(text: str) -> float:
    value = float(text)
    if isinf(value):
        raise _RefusedError("a number is out of the range of 64-bit floats; write it as text or mend it.")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1}) if len(names) < 1000 else names[:1]
        raise _RefusedError(f"the row names {some(twice)} twice; name each column once.")
    return found


_DECODER = json.JSONDecoder(parse_constant=_constant, parse_float=_float, object_pairs_hook=_object)


def _deeper(value: Any, levels: int) -> bool:
    """Whether there is a value more than `levels` levels deep."""
    layer = [value]
    for _ in range(levels + 1):
        layer = [
            inner
            for outer in layer
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not layer:
            return False
    return True


def _encodable(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True
