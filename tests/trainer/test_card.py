"""Model cards: what the Hub may read of them, parsed back by its own library, and the license of the base."""

from typing import Any

import pytest
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st
from tests.trainer.memory import config_of, spec_of

from finetune_api.contract import RunConfig
from finetune_api.status import EvaluationStatus, Interval
from finetune_api.tasks import TASKS, TaskType
from finetune_trainer.card import model_card
from finetune_trainer.data.read import DataError
from finetune_trainer.hub import LIBRARIES, LICENSES, METRICS, hub_id, license_in
from finetune_trainer.license import license_of
from finetune_trainer.storage import StorageSettings, open_store

HUB_TAGS = {
    "text-classification", "token-classification", "question-answering", "summarization", "translation",
    "text-generation", "image-classification",
}  # fmt: skip
"""Those of the Hub's pipeline tags that our tasks could have."""
FRONT = "---\nlicense: {}\n---\n# A model\n"


def card(kind: TaskType = "text-classification", *, license_name: str | None = "apache-2.0", **spec: Any) -> ModelCard:
    config = config_of(kind, **spec)
    tuned = dict.fromkeys(TASKS[kind].metrics, 0.5)
    evaluation = EvaluationStatus(
        rows=90,
        on="test",
        trivial=tuned,
        tuned=tuned,
        intervals={"loss": Interval(low=0.4, high=0.6)},
        warnings=["Few."],
    )
    text = model_card(
        config,
        library="transformers",
        load_hint="model = load()",
        usage="",
        evaluation=evaluation,
        digest="sha256:0",
        counts=(10, 100),
        license_name=license_name,
    )
    return ModelCard(text)


@pytest.mark.parametrize("kind", TASKS)
def test_the_hubs_library_reads_back_what_the_hub_allows(kind: TaskType) -> None:
    found = card(kind, **spec_of(kind))
    data = found.data
    assert data.license in LICENSES
    assert data.library_name in LIBRARIES
    assert data.pipeline_tag in HUB_TAGS
    assert set(data.metrics or []) <= set(METRICS.values())
    known = set(TASKS[kind].metrics) & METRICS.keys()
    assert data.model_name == ("tests/memory" if known else None)  # which stands beside results that the Hub can name
    assert len(data.eval_results or []) == len(known)
    for result in data.eval_results or []:
        assert (result.task_type, result.dataset_name, result.metric_value) == (data.pipeline_tag, "90 test rows", 0.5)
    assert "## Use" in found.text
    assert "- Few." in found.text


def test_the_hub_knows_the_tag_of_every_task() -> None:
    assert {kind.pipeline_tag for kind in TASKS.values()} <= HUB_TAGS


def test_a_license_that_the_hub_does_not_know_is_other_with_its_name() -> None:
    data = card(license_name="acme-internal").data
    assert (data.license, data.license_name) == ("other", "acme-internal")
    assert card(license_name=None).data.license is None


def test_only_addresses_on_the_hub_are_named_in_the_metadata() -> None:
    assert card().data.base_model is None
    data = card(
        model={"uri": "hf://acme/base@main"},
        data={"train": [{"uri": "hf://datasets/acme/rows@v1/train.jsonl"}, {"uri": "file:///rows.jsonl"}]},
    ).data
    assert data.base_model == "acme/base"
    assert data.datasets == ["acme/rows"]
    assert hub_id("s3://bucket/model") is None


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (FRONT.format("MIT"), "mit"),
        ("\ufeff" + FRONT.format("apache-2.0").replace("\n", "\r\n"), "apache-2.0"),
        (FRONT.format("[apache-2.0]"), "apache-2.0"),
        (FRONT.format("other\nlicense_name: Acme"), "acme"),
        (FRONT.format("other"), "other"),
        (FRONT.format("[mit, gpl]"), None),
        (FRONT.format("3"), None),
        ("---\n- a\n---\n", None),
        ("---\nlicense: [\n---\n", None),
        ("---\nlicense: mit\n", None),
        ("license: mit", None),
        ("", None),
    ],
)
def test_the_license_stands_in_the_front_matter(text: str, named: str | None) -> None:
    assert license_in(text) == named


@given(st.text(max_size=200))
def test_any_card_is_read_without_an_error(text: str) -> None:
    for card in (text, f"---\n{text}\n---\n"):
        found = license_in(card)
        assert found is None or found == found.lower()


def licensed(given: str | None, allowed: list[str] | None) -> RunConfig:
    return config_of().model_copy(update={"model_license": given, "allowed_licenses": allowed})


@pytest.mark.parametrize(
    ("on_card", "given", "allowed", "found"),
    [
        (None, None, None, None),
        ("mit", None, None, "mit"),
        ("mit", "apache-2.0", None, "apache-2.0"),
        ("mit", None, ["mit"], "mit"),
        (None, "mit", ["mit"], "mit"),
        ("other", "mit", ["mit"], "mit"),
    ],
)
def test_a_license_is_the_documents_or_the_cards(
    tmp_path: Any, on_card: str | None, given: str | None, allowed: list[str] | None, found: str | None
) -> None:
    if on_card is not None:
        (tmp_path / "README.md").write_text(FRONT.format(on_card))
    store = open_store(tmp_path.as_uri(), StorageSettings())
    assert license_of(store, licensed(given, allowed)) == found


@pytest.mark.parametrize(
    ("on_card", "given", "said"),
    [
        (None, None, r"names no license in README.md; the profile allows mit: name it in spec.model.license"),
        ("other", None, "names no license"),
        ("gpl-3.0", None, "is under gpl-3.0; the profile allows mit: choose another base model"),
        ("gpl-3.0", "mit", "is under gpl-3.0"),
        ("mit", "gpl-3.0", "is under gpl-3.0"),
    ],
)
def test_what_the_profile_does_not_allow_is_refused(
    tmp_path: Any, on_card: str | None, given: str | None, said: str
) -> None:
    if on_card is not None:
        (tmp_path / "README.md").write_text(FRONT.format(on_card))
    store = open_store(tmp_path.as_uri(), StorageSettings())
    with pytest.raises(DataError, match=said) as caught:
        license_of(store, licensed(given, ["mit"]))
    assert caught.value.reason == "LicenseNotAllowed"
