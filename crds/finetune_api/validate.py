"""Every problem of a document at once, each with its place, what is wrong in plain words, and the remedy.

Accepts and refuses what the API server does with `--validate=strict` (a test compares the two on a corpus): the types
and bounds are the models' own, read by pydantic; unknown fields, empty values and rules over several fields are found
by a walk along the models, so that one problem never hides another.
"""

import re
import sys
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path as FilePath
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from finetune_api import GROUP, VERSION, scalars
from finetune_api.base import Model
from finetune_api.document import Document, Node, Path, Position, find, plain, read
from finetune_api.job import FineTuneJob
from finetune_api.profile import FineTuneProfile, FineTuneProfileSpec
from finetune_api.resolve import Defaults, ResolveError, resolve
from finetune_api.wording import closest, either, hint, meant, not_text, plain_word, shown, wrong

API_VERSION = f"{GROUP}/{VERSION}"
KINDS: dict[str, type[FineTuneJob] | type[FineTuneProfile]] = {
    "FineTuneJob": FineTuneJob,
    "FineTuneProfile": FineTuneProfile,
}


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, or with severity note only worth knowing. Line and column count from 1."""

    file: str
    line: int
    column: int
    path: str
    message: str
    severity: Literal["error", "note"] = "error"

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}:{self.column}: "
        note = "note: " if self.severity == "note" else ""
        return where + note + (f"{self.path}: " if self.path else "") + self.message


@dataclass(frozen=True)
class Checked:
    """One document of a file: `model` is None when it has problems, or is of a kind that is not ours."""

    kind: str
    name: str
    model: FineTuneJob | FineTuneProfile | None
    problems: tuple[Problem, ...]

    @property
    def valid(self) -> bool:
        return not any(problem.severity == "error" for problem in self.problems)


def check(source: str | bytes, *, name: str) -> list[Checked]:
    """What is in a file. `name` is what problems call it."""
    documents = [_check_document(document, name) for document in read(source)]
    return [checked for checked in documents if checked is not None]


M = TypeVar("M", FineTuneJob, FineTuneProfile)


def load_job(text: str | bytes, *, name: str) -> tuple[FineTuneJob | None, list[Problem]]:
    """The one FineTuneJob of a file, or None and every problem of the file."""
    return _load(text, FineTuneJob, name)


def load_profile(text: str | bytes, *, name: str) -> tuple[FineTuneProfile | None, list[Problem]]:
    """The one FineTuneProfile of a file, or None and every problem of the file."""
    return _load(text, FineTuneProfile, name)


def _load(text: str | bytes, kind: type[M], name: str) -> tuple[M | None, list[Problem]]:
    documents = check(text, name=name)
    errors = [problem for document in documents for problem in document.problems if problem.severity == "error"]
    if errors:
        return None, errors
    found = [document.model for document in documents if isinstance(document.model, kind)]
    if len(found) != 1:
        message = f"holds {len(found) or 'no'} {kind.__name__}{'s' if len(found) > 1 else ''}: give a file with one"
        return None, [Problem(name, 1, 1, "", message)]
    return found[0], []


def main(paths: Sequence[str], *, profile: str | None = None) -> int:
    """Prints every problem of the files (- is standard input); 0 when there is none, else 1. With a file that holds a
    FineTuneProfile a problem is also what the operator refuses under it."""
    fence: FineTuneProfileSpec | None = None
    if profile is not None:
        source = _source(profile)
        found, problems = (None, []) if source is None else load_profile(source, name=profile)
        for problem in problems:
            print(problem)
        if found is None:
            return 1
        fence = found.spec
    bad = [path for path in paths if not _good(path, fence)]
    return 1 if bad else 0


def _source(path: str) -> bytes | None:
    try:
        return sys.stdin.buffer.read() if path == "-" else FilePath(path).read_bytes()
    except OSError as error:
        print(f"{path}: cannot be read: {error.strerror}: give the path of a YAML file")
        return None


def _good(path: str, fence: FineTuneProfileSpec | None) -> bool:
    """Whether a file has no problem; prints those it has."""
    name = "<stdin>" if path == "-" else path
    source = _source(path)
    if source is None:
        return False
    documents, good = check(source, name=name), True
    if not documents:
        print(f"{name}: holds no document: write a FineTuneJob into it")
        good = False
    for document in documents:
        for problem in document.problems:
            print(problem)
        refused = _refused(document.model, fence)
        if refused is not None:
            print(f"{name}: FineTuneJob {document.name}: {refused}")
        elif document.valid and document.model is not None:
            print(f"{name}: {document.kind} {document.name} is valid")
        good = good and document.valid and refused is None
    return good


def _refused(model: FineTuneJob | FineTuneProfile | None, fence: FineTuneProfileSpec | None) -> str | None:
    """What the operator would say under the profile. Where the document names no namespace none is judged."""
    if fence is None or not isinstance(model, FineTuneJob):
        return None
    job = f"{model.metadata.get('namespace') or ''}/{model.metadata.get('name') or ''}"
    images = Defaults(
        trainer_image="trainer", preflight_image="preflight"
    )  # the operator's flags, which nothing judges
    try:
        resolve(model.spec, fence, job=job, job_uid="", generation=1, defaults=images)
    except ResolveError as error:
        return error.message
    return None


# --- one document ---


@dataclass(frozen=True)
class _Found:
    """A problem before its place is looked up."""

    path: Path
    message: str
    at_key: bool = False
    severity: Literal["error", "note"] = "error"
    position: Position | None = None


def _check_document(document: Document, file: str) -> Checked | None:
    found = [_Found(fault.path, fault.message, position=fault.position) for fault in document.faults]
    root = document.root
    if root is None or root.value is None:
        return Checked("", "", None, _placed(found, root, file)) if found else None
    if not isinstance(root.value, dict):
        found.append(_Found((), "must be a map with apiVersion, kind, metadata and spec"))
        return Checked("", "", None, _placed(found, root, file))
    model_type, envelope = _kind(root)
    found += envelope
    kind, name = str(plain(root).get("kind")), _name(root)
    if model_type is None:
        return Checked(kind, name, None, _placed(found, root, file))
    model, problems = _validated(model_type, root)
    found += problems
    if any(problem.severity == "error" for problem in found):
        model = None
    return Checked(kind, name, model, _placed(found, root, file))


def _validated(
    model_type: type[FineTuneJob] | type[FineTuneProfile], root: Node
) -> tuple[FineTuneJob | FineTuneProfile | None, list[_Found]]:
    found = [*_metadata(root.value.get("metadata")), *_walk(model_type, root, ())]
    if "status" in root.value:
        found.append(_Found(("status",), "is the operator's to write: ignored", at_key=True, severity="note"))
    elsewhere = {problem.path for problem in found if problem.severity == "error"}
    data = plain(_without_empty(root))
    data.pop("status", None)
    try:
        model = model_type.model_validate(data)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            translated = _translated(detail, model_type, root)
            if translated is not None and translated.path not in elsewhere:
                found.append(translated)
        return None, found
    return model, [*found, *_notes(root, ("spec",))]


def _kind(root: Node) -> tuple[type[FineTuneJob] | type[FineTuneProfile] | None, list[_Found]]:
    """The model of a document, or None with the reason why there is none."""
    found = []
    for field in ("apiVersion", "kind"):
        node = root.value.get(field)
        if node is None or not isinstance(node.value, str):
            example = API_VERSION if field == "apiVersion" else "FineTuneJob"
            found.append(_Found((field,), f"is missing: write {field}: {example}"))
    if found:
        return None, found
    version, kind = root.value["apiVersion"].value, root.value["kind"].value
    ours = version.split("/")[0] == GROUP
    if not ours and kind not in KINDS:
        note = f"{kind} of {version} is not ours: skipped"
        return None, [_Found((), note, severity="note")]
    if version != API_VERSION:
        return None, [_Found(("apiVersion",), f"{version} does not exist: write {API_VERSION}")]
    if kind not in KINDS:
        return None, [_Found(("kind",), f"{kind} does not exist{meant(kind, KINDS)}")]
    return KINDS[kind], []


def _name(root: Node) -> str:
    node = find(root, ("metadata", "name"))
    return str(node.value) if node is not None else ""


def _placed(found: Iterable[_Found], root: Node | None, file: str) -> tuple[Problem, ...]:
    problems = []
    for item in dict.fromkeys(found):
        position = item.position or (_locate(root, item.path, at_key=item.at_key) if root else Position(1, 1))
        problems.append(Problem(file, position.line, position.column, written(item.path), item.message, item.severity))
    return tuple(sorted(problems, key=lambda problem: (problem.line, problem.column)))


def _locate(root: Node, path: Path, *, at_key: bool) -> Position:
    """Where the value at `path` stands, or the key of the innermost part of the path that is there."""
    node, position = root, root.position
    for index, part in enumerate(path):
        inner = find(node, (part,))
        if inner is None:
            return position
        position = node.keys[str(part)] if isinstance(node.value, dict) else inner.position
        node = inner
        last = index == len(path) - 1
        if last and not at_key and node.value is not None and not isinstance(node.value, dict | list):
            return node.position
    return position


def written(path: Path) -> str:
    """spec.data.train[0].uri; keys that are no words are put into brackets."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        elif re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", part):
            text += f".{part}" if text else part
        else:
            text += f'["{part[:60]}"]'
    return text


# --- the walk: unknown fields, empty values, rules ---


EMPTY = "has no value and counts as left out: give one or leave the line out"


def _without_empty(node: Node) -> Node:
    """Fields and map entries without a value taken away, as the API server does it; items of lists stay."""
    if isinstance(node.value, dict):
        kept = {key: _without_empty(value) for key, value in node.value.items() if value.value is not None}
        return replace(node, value=kept)
    if isinstance(node.value, list):
        return replace(node, value=[_without_empty(value) for value in node.value])
    return node


def _walk(model: type[Model], node: Node, path: Path) -> Iterator[_Found]:
    if not isinstance(node.value, dict):
        return
    fields = _fields(model)
    for key, value in node.value.items():
        here = (*path, key)
        if key not in fields:
            yield _Found(here, f"is no field{_meant_field(key, model, path)}", at_key=True)
        elif here == ("metadata",):
            continue
        elif value.value is None and here[0] == "spec":
            yield _Found(here, EMPTY, at_key=True, severity="note")
        else:
            yield from _walk_value(fields[key], value, here)
    if path[:1] == ("spec",):
        yield from _broken_rules(model, node, path)


def _walk_value(field: FieldInfo, node: Node, path: Path) -> Iterator[_Found]:
    model = _model_of(field.annotation)
    if isinstance(node.value, list):
        for index, item in enumerate(node.value):
            if item.value is None:
                yield _Found((*path, index), "has no value: give one or take the entry away")
            elif model is not None:
                yield from _walk(model, item, (*path, index))
    elif isinstance(node.value, dict) and model is not None:
        yield from _walk(model, node, path)
    elif isinstance(node.value, dict):
        for key, value in node.value.items():
            if value.value is None and path[0] == "spec":
                yield _Found((*path, key), EMPTY, at_key=True, severity="note")


def _broken_rules(model: type[Model], node: Node, path: Path) -> Iterator[_Found]:
    """Rules of the object, unless a field that it requires is missing: that is the problem then."""
    names = {info.alias or name: name for name, info in model.model_fields.items()}
    values = _without_empty(node).value
    if any(info.is_required() and key not in values for key, info in _fields(model).items()):
        return
    given = {names[key]: plain(value) for key, value in values.items() if key in names}
    candidate = model.model_construct(**given)
    for rule in model.rules:
        if not rule.holds(candidate):
            yield _Found(path, rule.message, at_key=True)


def _fields(model: type[Model]) -> dict[str, FieldInfo]:
    return {info.alias or name: info for name, info in model.model_fields.items()}


def _model_of(annotation: Any) -> type[Model] | None:
    """The model inside Model | None, list[Model] and the like."""
    if isinstance(annotation, type) and not get_origin(annotation) and issubclass(annotation, Model):
        return annotation
    if get_origin(annotation) in (Union, types.UnionType, list):
        return next((model for inner in get_args(annotation) if (model := _model_of(inner))), None)
    return None


def _all_fields(model: type[Model], path: str) -> Iterator[tuple[str, str]]:
    for name, info in _fields(model).items():
        yield name, f"{path}.{name}" if path else name
        inner = _model_of(info.annotation)
        if inner is not None and name != "status":
            yield from _all_fields(inner, f"{path}.{name}" if path else name)


def _meant_field(key: str, model: type[Model], path: Path) -> str:
    siblings = _fields(model)
    close = closest(key, siblings)
    if close:
        return f": did you mean {close}?"
    elsewhere: list[str] = []
    for kind in KINDS.values():
        places = [place for name, place in _all_fields(kind, "") if name.lower() == plain_word(key)]
        elsewhere += [place for place in places if place not in elsewhere]
    if elsewhere and path[:1] != ("metadata",):
        return f": did you mean {' or '.join(elsewhere[:3])}?"
    return f"; there are {', '.join(siblings)}" if siblings else ""


# --- pydantic's errors in plain words ---


def _translated(detail: Mapping[str, Any], model: type[Model], root: Node) -> _Found | None:
    """One error of pydantic; None for what the walk finds."""
    kind = detail["type"]
    path: Path = tuple(detail["loc"])
    if kind in ("extra_forbidden", "rule") or path[:1] == ("metadata",):
        return None
    node = find(root, path)
    if path[-1:] == ("[key]",):
        return _Found(path[:-2], f"a key of {len(detail['input'])} characters: at most {detail['ctx']['max_length']}")
    if kind == "missing":
        what = "is missing" if node is None else "has no value"
        return _Found(path, what + _purpose(model, path), at_key=True)
    return _Found(path, wrong(detail, raw=node.raw if node else None))


def _purpose(model: type[Model], path: Path) -> str:
    """The description of a missing field and what it may be."""
    field = None
    current: type[Model] | None = model
    for part in path:
        if isinstance(part, str) and current is not None:
            field = _fields(current).get(part)
            current = _model_of(field.annotation) if field else None
    if field is None:
        return ": add it"
    choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    description = (field.description or "").rstrip(".")
    return f": add it ({description}{': ' + either(choices) if choices else ''})"


# --- metadata, which the API server checks by rules of its own ---

METADATA_FIELDS = (
    "name", "generateName", "namespace", "labels", "annotations", "finalizers", "ownerReferences", "uid",
    "resourceVersion", "generation", "creationTimestamp", "deletionTimestamp", "deletionGracePeriodSeconds",
    "managedFields", "selfLink",
)  # fmt: skip
SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
LABEL = re.compile(r"([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]")


def _metadata(node: Node | None) -> Iterator[_Found]:
    if node is None or node.value is None:
        yield _Found(("metadata",), "is missing: add metadata: {name: ...}")
        return
    if not isinstance(node.value, dict):
        yield _Found(("metadata",), "must be a map (lines of name: value)")
        return
    yield from _metadata_name(node.value.get("name"))
    for key in node.value:
        if key not in METADATA_FIELDS:
            close = closest(key, METADATA_FIELDS)
            meant = f": did you mean {close}?" if close else "; a note of your own goes into metadata.annotations"
            yield _Found(("metadata", key), f"is no field{meant}", at_key=True)
    for key in ("labels", "annotations"):
        yield from _metadata_map(key, node.value.get(key))


def _metadata_name(node: Node | None) -> Iterator[_Found]:
    path: Path = ("metadata", "name")
    if node is None or node.value is None or node.value == "":
        yield _Found(path, "is missing: give the document a name")
    elif not isinstance(node.value, str):
        yield _Found(path, not_text(node.value, node.raw))
    elif len(node.value) > 253:
        yield _Found(path, f"has {len(node.value)} characters, at most 253: shorten it")
    elif not SUBDOMAIN.fullmatch(node.value):
        yield _Found(path, f"{hint(scalars.Name)}, not {shown(node.value)}")


def _metadata_map(field: str, node: Node | None) -> Iterator[_Found]:
    path: Path = ("metadata", field)
    if node is None or node.value is None:
        return
    if not isinstance(node.value, dict):
        yield _Found(path, "must be a map (lines of name: value)")
        return
    for key, value in node.value.items():
        prefix, slash, name = key.rpartition("/")
        if (
            (slash and not SUBDOMAIN.fullmatch(prefix))
            or not LABEL.fullmatch(name)
            or len(name) > 63
            or len(prefix) > 253
        ):
            yield _Found((*path, key), "must be a key such as team or example.com/team", at_key=True)
        if value.value is None:
            continue
        if not isinstance(value.value, str):
            yield _Found((*path, key), not_text(value.value, value.raw))
        elif field == "labels" and (len(value.value) > 63 or (value.value and not LABEL.fullmatch(value.value))):
            yield _Found((*path, key), f"{hint(scalars.LabelValue)}, at most 63 of them")


def _notes(node: Node, path: Path) -> Iterator[_Found]:
    """file:// is fine for `finetune run`, and refused by a cluster."""
    value = find(node, path)
    if value is None:
        return
    if isinstance(value.value, dict):
        for key in value.value:
            yield from _notes(node, (*path, key))
    elif isinstance(value.value, list):
        for index in range(len(value.value)):
            yield from _notes(node, (*path, index))
    elif path[-1] == "uri" and str(value.value).startswith("file://"):
        yield _Found(path, "file:// works with finetune run only: a cluster needs s3://", severity="note")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
