"""Every rule over several fields is broken by a document, of the corpus or made from the table of tasks."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from tests.crd.senseless import documents
from tests.crd.test_corpus import CORPUS

from finetune_api import crd
from finetune_api.job import FineTuneJob
from finetune_api.profile import FineTuneProfile
from finetune_api.validate import check

SENSELESS = dict(documents())


def rules(schema: object) -> Iterator[str]:
    """The sentences of all rules in a schema."""
    if isinstance(schema, dict):
        yield from (rule["message"] for rule in schema.get("x-kubernetes-validations", ()))
        for value in schema.values():
            yield from rules(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from rules(value)


KNOWN = {
    message for model in (FineTuneJob, FineTuneProfile) for message in rules(crd.open_api_schema(model, apart=True))
}


def broken(data: bytes) -> list[str]:
    """Sentences of broken rules among the client's problems."""
    problems = [problem.message for document in check(data, name="") for problem in document.problems]
    return [message for message in problems if message in KNOWN]


def encoded(document: dict[str, Any]) -> bytes:
    return json.dumps(document).encode()


def test_every_rule_is_broken_by_a_document() -> None:
    said = {message for file in CORPUS for message in broken(file.read_bytes())}
    said |= {message for document in SENSELESS.values() for message in broken(encoded(document))}
    keys_by_length = {message for message in KNOWN if message.startswith("keys have at most")}
    assert KNOWN - said == keys_by_length


@pytest.mark.parametrize("name", SENSELESS)
def test_what_a_task_does_not_have_is_refused(name: str) -> None:
    assert broken(encoded(SENSELESS[name]))
