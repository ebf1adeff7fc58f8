"""Whatever a document says, names and labels of what is created are valid, and no shell reads any of it."""

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tests.unit.test_manifests import PROFILE, RICH, SUBJECT, config

from finetune_api.contract import LastMessage
from finetune_api.resolve import ResolveError
from finetune_operator import manifests
from finetune_operator.views import Counters

DNS = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
HOST = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
QUALIFIED = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")

ODD = st.sampled_from(
    ["", " ", "a b", "$(id)", "`id`", "; rm", "ä", "/", "a/", "/a", "a/b/c", "A.b/c", "a..b/c", "a\n", "-a"]
)
NAMES = st.from_regex(DNS, fullmatch=True).filter(lambda name: len(name) <= 253)
LONG = st.builds(lambda letter, length: letter * length, st.sampled_from("a1"), st.integers(1, 253))
KEYS = st.one_of(
    st.from_regex(QUALIFIED, fullmatch=True),
    st.builds(lambda prefix, name: f"{prefix}/{name}", NAMES | LONG, st.from_regex(QUALIFIED, fullmatch=True)),
    LONG,
)
VALUES = st.from_regex(VALUE, fullmatch=True)
QUEUES = st.from_regex(HOST, fullmatch=True) | LONG.map(lambda name: name[:63])


def maps(values: st.SearchStrategy[str]) -> st.SearchStrategy[dict[str, str]]:
    return st.dictionaries(KEYS | KEYS | KEYS | ODD | st.text(max_size=9), values, max_size=2)


DOCUMENTS = st.fixed_dictionaries(
    {
        "labels": maps(VALUES | VALUES | ODD),
        "annotations": maps(st.text(max_size=20)),
        "selector": maps(VALUES),
        "queue": QUEUES | QUEUES | ODD,
        "priority": QUEUES | QUEUES | ODD,
    }
)


@settings(max_examples=200, deadline=None)
@given(
    said=DOCUMENTS,
    name=NAMES | LONG,
    uid=st.uuids(),
    retry=st.text(max_size=20),
    run=st.from_regex(r"[0-9a-f]{16}", fullmatch=True) | LONG | ODD | st.text(max_size=70),
)
def test_what_an_accepted_document_yields_has_valid_names_and_labels(
    said: dict[str, Any], name: str, uid: Any, retry: str, run: str
) -> None:
    asked: dict[str, Any] = {
        **RICH,
        "queue": {"name": said["queue"], "workloadPriorityClass": said["priority"]},
        "podTemplate": {
            "metadata": {"labels": said["labels"], "annotations": said["annotations"]},
            "spec": {"nodeSelector": said["selector"]},
        },
    }
    try:
        pinned = config(asked, PROFILE)
        LastMessage(code=0, reason="PreflightPassed", message="m", run_id=run)
    except (ValidationError, ResolveError):
        return
    subject = replace(SUBJECT, name=name, uid=str(uid), retry=retry)
    counters = Counters(failures=1, tries=2)
    made = [
        manifests.config_map(subject, pinned, key="k"),
        manifests.service(subject),
        manifests.preflight_job(subject, pinned, key="k", ordinal=1, counters=counters, attempts=0, run="a" * 16),
        manifests.train_job(subject, pinned, key="k", run_id=run, ordinal=12345, counters=counters),
    ]
    for manifest in made:
        assert HOST.fullmatch(manifest["metadata"]["name"])
        for metadata in metadata_of(manifest):
            check_labels(metadata.get("labels") or {})
            # As Kubernetes looks at them.
            assert all(qualified(key.lower()) for key in metadata.get("annotations") or {})
    assert made[1]["metadata"]["name"][0].isalpha()
    event = manifests.event(subject, kind="Normal", reason="Any", message=retry, now="2026-03-01T00:00:00Z")
    assert DNS.fullmatch(event["metadata"]["name"])
    assert len(event["metadata"]["name"]) <= 253
    for job in made[2:]:
        pod = job["spec"]["template"]["spec"]
        check_labels(pod.get("nodeSelector") or {})
        (container,) = pod["containers"]
        assert "command" not in container, "the image's own entry point, without a shell"
        fixed = [argument for argument in container["args"] if argument != run]
        assert all(re.fullmatch(r"train|preflight|--[a-z-]+|/[a-z/.-]+", argument) for argument in fixed)


def metadata_of(manifest: manifests.Manifest) -> Iterator[dict[str, Any]]:
    yield manifest["metadata"]
    if manifest["kind"] == "Job":
        yield manifest["spec"]["template"]["metadata"]


def check_labels(labels: dict[str, str]) -> None:
    assert [key for key in labels if not qualified(key)] == []
    assert [value for value in labels.values() if not VALUE.fullmatch(value)] == []


def qualified(key: str) -> bool:
    prefix, slash, name = key.rpartition("/")
    return bool(QUALIFIED.fullmatch(name)) and (not slash or (bool(DNS.fullmatch(prefix)) and len(prefix) <= 253))


@pytest.mark.parametrize(
    ("template", "path"),
    [
        ({"metadata": {"labels": {"a b": "x"}}}, "metadata.labels"),
        ({"metadata": {"annotations": {"a/b/c": "x"}}}, "metadata.annotations"),
        ({"spec": {"nodeSelector": {"": "x"}}}, "spec.nodeSelector"),
        ({"spec": {"tolerations": [{"operator": "Exists"}, {"key": "-a"}]}}, "spec.tolerations[1].key"),
    ],
)
def test_a_name_that_kubernetes_does_not_take_is_refused_with_its_place(template: dict[str, Any], path: str) -> None:
    with pytest.raises(ResolveError) as caught:
        config({**RICH, "podTemplate": template})
    assert caught.value.reason == "NameInvalid"
    assert caught.value.message.startswith(f"spec.podTemplate.{path}: ")
    assert (
        "is not what Kubernetes takes as a name, such as team or example.org/team: correct it" in caught.value.message
    )


@pytest.mark.parametrize("key", ["a", "A_b.c-d", "example.org/team", "a" * 63, f"{'a' * 253}/b"])
def test_a_name_that_kubernetes_takes_is_fine(key: str) -> None:
    config({**RICH, "podTemplate": {"metadata": {"labels": {key: "x"}, "annotations": {key: "x"}}}})


@pytest.mark.parametrize("key", ["Example.org/x", "EXAMPLE.ORG/Team", "Example.org/A_b.C"])
def test_capitals_before_the_slash_are_fine_in_an_annotation_alone(key: str) -> None:
    config({**RICH, "podTemplate": {"metadata": {"annotations": {key: "x"}}}})
    for template in ({"metadata": {"labels": {key: "x"}}}, {"spec": {"nodeSelector": {key: "x"}}}):
        with pytest.raises(ResolveError, match="is not what Kubernetes takes as a name"):
            config({**RICH, "podTemplate": template})
