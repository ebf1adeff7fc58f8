"""The client's verdict on every document of the corpus; tests/e2e/test_corpus.py asks the API server."""

from pathlib import Path

import pytest

from finetune_api.validate import check

CORPUS = sorted((Path(__file__).parent / "corpus").glob("*.yaml"))


def expectation(file: Path) -> tuple[str, str] | None:
    """None for a valid document, else the field path and a part of the client's message."""
    first = file.read_text().split("\n", 1)[0].removeprefix("# expect: ")
    if first == "valid":
        return None
    path, _, message = first.removeprefix("invalid ").partition(": ")
    return path, message


@pytest.mark.parametrize("file", CORPUS, ids=lambda file: file.stem)
def test_the_client_says_what_the_first_line_expects(file: Path) -> None:
    documents = check(file.read_bytes(), name=file.name)
    problems = [problem for document in documents for problem in document.problems if problem.severity == "error"]
    expected = expectation(file)
    if expected is None:
        assert problems == []
        return
    path, message = expected
    assert [problem for problem in problems if problem.path == path and message in problem.message], problems


def test_the_corpus_is_large_enough() -> None:
    verdicts = [expectation(file) is None for file in CORPUS]
    assert len(verdicts) >= 60
    assert 20 <= sum(verdicts) <= len(verdicts) - 40


@pytest.mark.parametrize("file", [file for file in CORPUS if expectation(file)], ids=lambda file: file.stem)
def test_a_bad_document_has_no_problem_besides_the_expected_one(file: Path) -> None:
    """Each document shows one mistake: more problems than that would be noise."""
    problems = {
        problem.path
        for document in check(file.read_bytes(), name=file.name)
        for problem in document.problems
        if problem.severity == "error"
    }
    several = {"label-no-on-off", "label-y", "uri-with-newline"}
    assert len(problems) == 1 or file.stem in several, problems
