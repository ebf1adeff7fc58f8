"""The YAML reader agrees with Kubernetes' own libraries, whose answers are recorded in goyaml/golden.json."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_api.document import Position, find, plain, read

GOLDEN = json.loads((Path(__file__).parent / "goyaml" / "golden.json").read_text())


def values(text: str) -> list[Any]:
    """The documents of a text that has no fault; empty ones, which kubectl skips, left out."""
    documents = read(text)
    assert [fault for document in documents for fault in document.faults] == []
    return [plain(document.root) for document in documents if document.root and document.root.value is not None]


def value(text: str) -> Any:
    (found,) = values(text)
    return found


def fault(text: str | bytes) -> tuple[str, int, int]:
    """Message, line and column of the first fault."""
    first = next(fault for document in read(text) for fault in document.faults)
    return first.message, first.position.line, first.position.column


@pytest.mark.parametrize("entry", GOLDEN, ids=lambda entry: repr(entry["text"])[:60])
def test_a_text_reads_as_kubernetes_own_libraries_read_it(entry: dict[str, Any]) -> None:
    if "error" in entry:
        assert any(document.faults for document in read(entry["text"]))
        return
    expected = [document for document in entry["documents"] if document is not None]
    # As JSON texts, so that 1, 1.0 and true differ.
    assert json.dumps(values(entry["text"]), sort_keys=True) == json.dumps(expected, sort_keys=True)


def test_the_recorded_answers_are_many() -> None:
    assert len(GOLDEN) > 700
    assert sum("error" in entry for entry in GOLDEN) > 100


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False).filter(lambda number: not number.is_integer())
    | st.text(st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="\ufeff\ufffe\uffff\u2028\u2029")),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text("abcyno0123456789.-_~", min_size=1, max_size=6), inner, max_size=4)
    ),
    max_leaves=20,
)


def quoted(document: Any, *, flow: bool) -> str:
    """YAML in which every text is quoted, so that any reader agrees what it is."""
    return yaml.safe_dump(document, default_style='"', default_flow_style=flow, allow_unicode=True, width=10_000)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(["a", "b", "true", "1", "c d"]), json_values, max_size=3))
def test_a_json_document_reads_as_itself(document: dict[str, Any]) -> None:
    if document:
        assert value(json.dumps(document)) == document
        assert value(json.dumps(document, ensure_ascii=False, indent=1)) == document


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(["a", "b", "true", "1", "c d"]), json_values, min_size=1), st.booleans())
def test_what_pyyaml_writes_with_quotes_reads_as_itself(document: dict[str, Any], flow: bool) -> None:
    assert value(quoted(document, flow=flow)) == document


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=40))
def test_no_text_raises(text: str) -> None:
    read(text)


@settings(max_examples=300, deadline=None)
@given(st.text("ab:-,[]{}&*<\n \t#'\"|>!%1.~", max_size=40))
def test_no_punctuation_raises(text: str) -> None:
    read(text)


def test_json_may_escape_the_slash_and_split_a_character() -> None:
    assert value('{"a": "s3:\\/\\/b", "c": "\\ud83d\\ude00"}') == {"a": "s3://b", "c": "😀"}


def test_every_value_knows_its_place() -> None:
    (document,) = read("# first\na:\n  - b: 1\n    c: [x, 'y']\n")
    assert document.root is not None
    node = find(document.root, ("a", 0, "c", 1))
    assert node is not None
    assert node.position == Position(4, 12)
    item = find(document.root, ("a", 0))
    assert item is not None
    assert item.keys == {"b": Position(3, 5), "c": Position(4, 5)}


def test_places_count_from_the_top_of_the_file_not_of_the_document() -> None:
    assert fault("a: 1\n---\nb: 2\nb: 3\n") == ("given twice, first in line 3: keep one of the two", 4, 1)


def test_the_text_of_an_unquoted_scalar_is_kept() -> None:
    (document,) = read("a: yes\nb: 'yes'\n")
    assert document.root is not None
    assert [document.root.value[key].raw for key in "ab"] == ["yes", None]


def test_every_duplicate_is_told_and_the_first_value_stays() -> None:
    (document,) = read("a: 1\na: 2\nb: {c: 1, c: 2}\n")
    assert [fault.path for fault in document.faults] == [("a",), ("b", "c")]
    assert document.root is not None
    assert plain(document.root) == {"a": 1, "b": {"c": 1}}


def test_a_tab_that_indents_is_told_as_one() -> None:
    assert fault("a:\n\tb: 1\n") == ("a tab cannot indent YAML: use spaces", 2, 1)


def test_a_control_character_is_told_with_its_place() -> None:
    assert fault("a: 1\nb: x\x00y\n") == ("control character U+0000 is not allowed: remove it", 2, 5)


def test_bytes_that_are_no_utf_8_are_told_with_their_line() -> None:
    assert fault(b"a: 1\nb: \xff\n") == ("the file is not UTF-8 text: save it as UTF-8", 2, 1)


def test_a_few_lines_that_expand_to_billions_are_refused_at_once() -> None:
    lines = ["a: &a [" + ", ".join(["x"] * 10) + "]"]
    lines += [f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True)]
    message, _, _ = fault("\n".join(lines) + "\n")
    assert message.startswith("more than 200000 values once its aliases are expanded")


def test_deep_nesting_is_refused_not_a_crash() -> None:
    assert fault("[" * 5000 + "]" * 5000)[0] == "nested deeper than 100 levels"


def test_a_bad_document_does_not_hide_the_next_one() -> None:
    first, second = read("a: [\n---\nb: 1\n")
    assert first.root is None
    assert second.root is not None
    assert plain(second.root) == {"b": 1}
