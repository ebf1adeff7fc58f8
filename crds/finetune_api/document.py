"""YAML as kubectl and the API server read it, every value with its place in the file.

PyYAML's own types differ from theirs: it reads `2e-5` as text and `2001-01-01` as a date, and keeps the last of two
equal keys. Only its scanner and parser are used here; scalars are resolved by the rules of sigs.k8s.io/yaml, which is
go-yaml v2 (YAML 1.1 booleans, Go's number syntax) followed by Go's JSON encoding (3.0 becomes the integer 3). Strict as
the API server is: a duplicate key is a problem, although kubectl itself would silently keep the last one.

Tested against recorded answers of the Go library (tests/crd/goyaml).
"""

import base64
import binascii
import json
import math
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import yaml

MAX_DEPTH = 100
"""Levels of nesting; no document of ours has more than ten."""
MAX_VALUES = 200_000
"""Values of one document after its aliases are expanded: a few lines can stand for billions."""

Scalar = str | int | float | bool | None
Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Position:
    """A place in a file; line and column count from 1."""

    line: int
    column: int


@dataclass(frozen=True)
class Node:
    """One value. `value` is a scalar, a dict of Nodes or a list of Nodes."""

    value: Any
    position: Position
    raw: str | None = None
    """The text in the file, of a scalar without quotes."""
    keys: dict[str, Position] = field(default_factory=dict)
    """Where each key of a map stands."""
    size: int = 1
    """Number of values in it, itself included."""


@dataclass(frozen=True)
class Fault:
    """What is wrong with a document as YAML, with the path of the value it concerns."""

    path: Path
    position: Position
    message: str


@dataclass(frozen=True)
class Document:
    """One document of a file. `root` is None when it is empty or does not parse."""

    root: Node | None
    faults: tuple[Fault, ...]


class _Failure(Exception):
    """Ends the reading of one document."""

    def __init__(self, message: str, position: Position) -> None:
        super().__init__(message)
        self.message = message
        self.position = position


class _Parser(yaml.reader.Reader, yaml.scanner.Scanner, yaml.parser.Parser):
    """PyYAML's parser, with tabs between tokens where libyaml and go-yaml allow them."""

    def __init__(self, stream: str, *, is_json: bool) -> None:
        if not is_json:  # only JSON escapes the slash; kubectl tells the two apart by trying
            vars(self)["ESCAPE_REPLACEMENTS"] = {k: v for k, v in self.ESCAPE_REPLACEMENTS.items() if k != "/"}
        yaml.reader.Reader.__init__(self, stream)
        yaml.scanner.Scanner.__init__(self)
        yaml.parser.Parser.__init__(self)

    def scan_to_next_token(self) -> None:
        if self.index == 0 and self.peek() == "\ufeff":
            self.forward()
        found = False
        while not found:
            while self.peek() == " " or (self.peek() == "\t" and (self.flow_level or not self.allow_simple_key)):
                self.forward()
            if self.peek() == "#":
                while self.peek() not in "\0\r\n\x85\u2028\u2029":
                    self.forward()
            if self.scan_line_break():  # type: ignore[no-untyped-call]
                if not self.flow_level:
                    self.allow_simple_key = True
            else:
                found = True


def read(source: str | bytes) -> list[Document]:
    """The documents of a file, separated by lines of `---`. Never raises: what is wrong is in the faults."""
    try:
        text = source.decode() if isinstance(source, bytes) else source
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        return [_failed(_Failure("the file is not UTF-8 text: save it as UTF-8", Position(line, 1)))]
    documents = []
    for first_line, chunk in _chunks(text):
        if isinstance(chunk, _Failure):
            documents.append(_failed(chunk))
        else:
            documents.append(_Composer(chunk, first_line).document())
    return documents


def plain(node: Node) -> Any:
    """The value as JSON would carry it."""
    if isinstance(node.value, dict):
        return {key: plain(value) for key, value in node.value.items()}
    if isinstance(node.value, list):
        return [plain(value) for value in node.value]
    return node.value


def find(root: Node, path: Path) -> Node | None:
    """The value at `path`, or None when it is not there."""
    node: Node | None = root
    for part in path:
        if node is None:
            return None
        if isinstance(node.value, dict):
            node = node.value.get(part)
        elif isinstance(node.value, list) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
        else:
            return None
    return node


def _failed(failure: _Failure) -> Document:
    return Document(None, (Fault((), failure.position, failure.message),))


def _chunks(text: str) -> Iterator[tuple[int, str | _Failure]]:
    """Documents and the number of lines before each, cut as Kubernetes' YAMLReader does it."""
    lines: list[str] = []
    start = 0
    for number, line in enumerate(text.split("\n")):
        if not line.startswith("---"):
            lines.append(line)
            continue
        if any(lines):
            yield start, "\n".join(lines)
        lines, start = [], number + 1
        rest = line[3:].strip()
        if rest and not rest.startswith("#"):
            message = f"after the separator --- only a comment may stand, not {rest[:40]}: put it on a line of its own"
            yield number, _Failure(message, Position(number + 1, 4))
    if any(lines):
        yield start, "\n".join(lines)


class _Composer:
    """Events of one document to Nodes."""

    def __init__(self, text: str, first_line: int) -> None:
        self.text = text
        self.first_line = first_line
        self.faults: list[Fault] = []
        self.anchors: dict[str, Node | None] = {}
        self.is_json = _is_json(text)

    def document(self) -> Document:
        try:
            return Document(self._root(), tuple(self.faults))
        except _Failure as failure:
            return _failed(failure)
        except yaml.reader.ReaderError as error:
            before = self.text[: error.position]
            line = before.count("\n")
            position = Position(self.first_line + line + 1, len(before) - before.rfind("\n"))
            character = ord(error.character) if isinstance(error.character, str) else error.character
            return _failed(_Failure(f"control character U+{character:04X} is not allowed: remove it", position))
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            return _failed(_Failure(_syntax_message(error), self._at(mark) if mark else Position(1, 1)))

    def _root(self) -> Node | None:
        self.parser = _parser(self.text, is_json=self.is_json)
        next(self._events())
        if self.parser.check_event(yaml.StreamEndEvent):
            return None
        version = self.parser.get_event().version
        if version not in (None, (1, 1), (1, 2)):
            raise _Failure(f"YAML {version[0]}.{version[1]} is not supported: remove %YAML", Position(1, 1))
        root = self._node((), self.parser.get_event(), 0)
        self.parser.get_event()
        if not self.parser.check_event(yaml.StreamEndEvent):
            mark = self.parser.peek_event().start_mark
            raise _Failure("a second document needs a separator: put a line of --- in front of it", self._at(mark))
        return root

    def _events(self) -> Iterator[Any]:
        while self.parser.check_event():
            yield self.parser.get_event()

    def _at(self, mark: Any) -> Position:
        return Position(self.first_line + mark.line + 1, mark.column + 1)

    def _node(self, path: Path, event: Any, depth: int) -> Node:
        position = self._at(event.start_mark)
        if depth > MAX_DEPTH:
            raise _Failure(f"nested deeper than {MAX_DEPTH} levels", position)
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event.anchor, position)
        if event.anchor:
            self.anchors[event.anchor] = None
        if isinstance(event, yaml.ScalarEvent):
            node = self._scalar(path, event, position)
        elif isinstance(event, yaml.SequenceStartEvent):
            node = self._sequence(path, position, depth)
        else:
            node = self._mapping(path, position, depth)
        if event.anchor:
            self.anchors[event.anchor] = node
        if node.size > MAX_VALUES:
            raise _Failure(f"more than {MAX_VALUES} values once its aliases are expanded: write less", position)
        return node

    def _alias(self, name: Any, position: Position) -> Node:
        if name not in self.anchors:
            raise _Failure(f"*{name} names no anchor: define &{name} above it", position)
        node = self.anchors[name]
        if node is None:
            raise _Failure(f"*{name} stands inside its own anchor &{name}", position)
        return node

    def _scalar(self, path: Path, event: Any, position: Position) -> Node:
        value = self._resolved(event, position)
        if isinstance(value, float) and not math.isfinite(value):
            message = f"{event.value} is no number that JSON can carry: give a finite one"
            self.faults.append(Fault(path, position, message))
        if isinstance(value, float):
            value = as_json(value)
        return Node(value, position, event.value if event.implicit[0] else None)

    def _resolved(self, event: Any, position: Position) -> Scalar:
        text = self._joined(event.value, position)
        if event.tag == "!" or (event.tag is None and not event.implicit[0]):
            return text
        try:
            return resolve_scalar(text, tag=event.tag)
        except ValueError as error:
            raise _Failure(str(error), position) from None

    def _joined(self, text: str, position: Position) -> str:
        """Surrogate pairs of JSON escapes as one character; YAML itself has no such pairs."""
        if not any("\ud800" <= character <= "\udfff" for character in text):
            return text
        try:
            if self.is_json:
                return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
        except UnicodeDecodeError:
            pass
        raise _Failure("an escape names half a character: write the character itself", position)

    def _sequence(self, path: Path, position: Position, depth: int) -> Node:
        items: list[Node] = []
        while not self.parser.check_event(yaml.SequenceEndEvent):
            items.append(self._node((*path, len(items)), self.parser.get_event(), depth + 1))
        self.parser.get_event()
        return Node(items, position, size=1 + sum(item.size for item in items))

    def _mapping(self, path: Path, position: Position, depth: int) -> Node:
        entries: dict[str, Node] = {}
        keys: dict[str, Position] = {}
        while not self.parser.check_event(yaml.MappingEndEvent):
            event = self.parser.get_event()
            at = self._at(event.start_mark)
            if _is_merge(event):
                merged = self._node(path, self.parser.get_event(), depth + 1)
                for source in _merge_sources(merged, at):
                    for name, value in source.value.items():
                        self._put(entries, keys, path, name, value, at)
                continue
            key = self._key(path, event, depth)
            value = self._node((*path, key), self.parser.get_event(), depth + 1)
            self._put(entries, keys, path, key, value, at)
        self.parser.get_event()
        return Node(entries, position, keys=keys, size=1 + sum(value.size for value in entries.values()))

    def _key(self, path: Path, event: Any, depth: int) -> str:
        node = self._node(path, event, depth + 1)
        if isinstance(node.value, dict | list) or node.value is None:
            raise _Failure("a key must be text: quote it", node.position)
        if isinstance(event, yaml.ScalarEvent):
            return _key_text(self._resolved(event, node.position))
        return _key_text(node.value)

    def _put(
        self, entries: dict[str, Node], keys: dict[str, Position], path: Path, key: str, value: Node, at: Position
    ) -> None:
        if key in entries:
            self.faults.append(
                Fault((*path, key), at, f"given twice, first in line {keys[key].line}: keep one of the two")
            )
            return
        entries[key] = value
        keys[key] = at


def _parser(text: str, *, is_json: bool) -> Any:
    return _Parser(text, is_json=is_json)


def _is_json(text: str) -> bool:
    if not text.lstrip().startswith("{"):
        return False
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _is_merge(event: Any) -> bool:
    return (
        isinstance(event, yaml.ScalarEvent)
        and event.value == "<<"
        and (event.implicit[0] or event.tag == "tag:yaml.org,2002:merge")
    )


def _merge_sources(node: Node, at: Position) -> list[Node]:
    """The maps of a merge key, last first: of several, the first has the last word."""
    sources = node.value[::-1] if isinstance(node.value, list) else [node]
    if not all(isinstance(source.value, dict) for source in sources):
        raise _Failure("<< takes a map or a list of maps", at)
    return list(sources)


def _syntax_message(error: yaml.MarkedYAMLError) -> str:
    problem = str(error.problem or error.context)
    if "\\t" in problem:
        return "a tab cannot indent YAML: use spaces"
    context = f" ({error.context})" if error.context and error.problem else ""
    return f"not YAML: {problem}{context}"


# --- scalars ---

_WORDS: dict[str, bool | float | None] = {
    **dict.fromkeys(("y", "Y", "yes", "Yes", "YES", "true", "True", "TRUE", "on", "On", "ON"), True),
    **dict.fromkeys(("n", "N", "no", "No", "NO", "false", "False", "FALSE", "off", "Off", "OFF"), False),
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), math.nan),
    **dict.fromkeys((".inf", ".Inf", ".INF", "+.inf", "+.Inf", "+.INF"), math.inf),
    **dict.fromkeys(("-.inf", "-.Inf", "-.INF"), -math.inf),
}
_DECIMAL = re.compile(r"[-+]?[1-9][0-9]*|[-+]?0")
_PREFIXED = re.compile(r"([-+]?)0(?:[xX]([0-9a-fA-F]+)|[oO]?([0-7]+)|[bB]([01]+))")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_TAGS = {
    "tag:yaml.org,2002:str": "text",
    "tag:yaml.org,2002:bool": "a boolean",
    "tag:yaml.org,2002:int": "an integer",
    "tag:yaml.org,2002:float": "a number",
    "tag:yaml.org,2002:null": "null",
    "tag:yaml.org,2002:timestamp": "a time",
}


def resolve_scalar(text: str, *, tag: str | None = None) -> Scalar:
    """What go-yaml v2 makes of an unquoted scalar, or of one with a tag.

    Raises ValueError when the text does not fit the tag.
    """
    if tag == "tag:yaml.org,2002:binary":
        try:
            return base64.b64decode(text, validate=True).decode(errors="replace")
        except binascii.Error:
            raise ValueError("!!binary takes base64") from None
    if tag is not None and tag not in _TAGS:
        return text
    if tag == "tag:yaml.org,2002:str":
        return text
    if text in _WORDS:
        return _fitting(_WORDS[text], text, tag)
    if re.match(r"[0-9+\-]", text):
        number = _number(text)
        return _fitting(text if number is None else number, text, tag)
    if re.fullmatch(r"\.[0-9]+(_[0-9]+)*([eE][-+]?[0-9]+)?", text) and math.isfinite(float(text)):
        return _fitting(float(text), text, tag)
    return _fitting(text, text, tag)


def _number(text: str) -> int | float | None:
    digits = text.replace("_", "")
    match = _PREFIXED.fullmatch(digits)
    if match:
        sign, hexadecimal, octal, binary = match.groups()
        base, body = (16, hexadecimal) if hexadecimal else (8, octal) if octal else (2, binary)
        number = int(sign + body, base)
        # Go tries 64 bits, signed, then unsigned without a sign; what is larger stays text, or becomes a float below.
        if -(2**63) <= number < 2**63 or (not sign and number < 2**64):
            return number
    elif _DECIMAL.fullmatch(digits):
        number = int(digits)
        if -(2**63) <= number < 2**63 or (digits[0] not in "+-" and number < 2**64):
            return number
    if _FLOAT.fullmatch(digits) and math.isfinite(float(digits)):
        return float(digits)
    return None


def as_json(number: float) -> int | float:
    """A number after Go's JSON encoding: whole ones below 1e21 are written without a point and arrive as integers."""
    if math.isfinite(number) and number.is_integer() and abs(number) < 1e21:
        return int(Decimal(repr(number)))
    return number


def _fitting(value: Scalar, text: str, tag: str | None) -> Scalar:
    if tag is None:
        return value
    wanted = _TAGS[tag]
    fits = {
        "a boolean": isinstance(value, bool),
        "an integer": isinstance(value, int) and not isinstance(value, bool),
        "a number": isinstance(value, int | float) and not isinstance(value, bool),
        "null": value is None,
        "a time": isinstance(value, str),
    }
    if not fits[wanted]:
        raise ValueError(f"{text[:40]} is not {wanted}, as its tag says")
    return value


def _key_text(value: Scalar) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return _float_key(value)
    return str(value)


def _float_key(number: float) -> str:
    """Go's FormatFloat(number, 'g', -1, 32): the fewest digits that single precision can tell apart."""
    if not math.isfinite(number):
        return ".nan" if math.isnan(number) else ".inf" if number > 0 else "-.inf"
    try:
        single = struct.pack("f", number)
    except OverflowError:
        return ".inf" if number > 0 else "-.inf"
    (near,) = struct.unpack("f", single)
    for precision in range(9):
        shortest = f"{near:.{precision}e}"
        if struct.pack("f", float(shortest)) == single:
            break
    digits, exponent = shortest.split("e")
    power = int(exponent)
    if power < -4 or power >= 6:
        return f"{digits}e{'-' if power < 0 else '+'}{abs(power):02d}"
    return format(Decimal(shortest), "f")
