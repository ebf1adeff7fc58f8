"""Several tasks that write texts with one model: how they are told apart, and what is said of each."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune_trainer import tasks
from finetune_trainer.data.read import DataError
from finetune_trainer.errors import MISTAKES, errors_of
from finetune_trainer.evaluate import PLACE
from finetune_trainer.hub import pipeline_tag
from finetune_trainer.tasks import Facts, Learner, Outcomes
from finetune_trainer.tasks.base import Piece

from .memory import Memory, config_of
from .test_seq2seq import tools
from .writers import ALPHA, END, ENGLISH, GERMAN, PAD, WORDS

SHORT: dict[str, Any] = {"name": "short", "type": "summarization", "prefix": "mu "}
GERMAN_TEXT: dict[str, Any] = {"name": "german", "type": "translation", "prefix": "kappa ", "lossWeight": 3.0}
MU, KAPPA = (ALPHA + WORDS.index(word) for word in ("mu", "kappa"))


def task_of(*parts: dict[str, Any], **spec: Any) -> Any:
    names = [part["name"] for part in parts]
    data = {"train": [{"uri": f"file:///{name}", "task": name} for name in names], **spec.pop("data", {})}
    return tasks.get(config_of("multi-task", task={"tasks": list(parts)}, data=data, **spec))


def learner(base: Path = Path(), **spec: Any) -> Learner:
    both = task_of(SHORT, GERMAN_TEXT, **spec)
    return both.learner(Facts(more=both.facts(tools()), pad_token_id=PAD, base=base))


def text(words: str) -> Any:
    return np.frombuffer(words.encode(), np.uint8)


def store_of(rows: list[tuple[int, str]]) -> Memory:
    """Rows of the tasks by number; what is to be written is the text itself, and what needs no model its first word."""
    ids = [[*(ALPHA + WORDS.index(word) for word in words.split()), END] for _, words in rows]
    return Memory(
        input_ids=ids,
        target_ids=ids,
        reference=[text(words) for _, words in rows],
        trivial=[text(words.partition(" ")[0]) for _, words in rows],
        task=np.array([number for number, _ in rows], np.uint8),
    )


ROWS = [(0, "alpha beta gamma delta epsilon"), (1, "beta gamma delta epsilon zeta"), (1, "gamma"), (0, "delta mu")]


def answered(both: Learner, store: Memory) -> Outcomes:
    rows = np.arange(len(ROWS))
    return both.settle({**both.gold(store, rows), **(both.trivial(store, rows, rows) or {}), PLACE: rows})


# --- told apart ---


def test_each_task_puts_its_own_words_before_its_texts() -> None:
    both = task_of(SHORT, GERMAN_TEXT)
    rows = [("short", {"text": "alpha", "summary": "beta"}), ("german", {"source": "alpha", "target": "gamma"})]
    samples = [both.parts[name].read_row(row).within(name) for name, row in rows]
    pieces = [piece for (piece,) in both.encode(samples, tools())]
    assert all(isinstance(piece, Piece) for piece in pieces)
    assert [list(piece.columns["input_ids"]) for piece in pieces] == [[MU, ALPHA, END], [KAPPA, ALPHA, END]]
    assert [piece.columns["task"] for piece in pieces] == [0, 1]


@pytest.mark.parametrize(
    ("parts", "before"),
    [
        ((SHORT, {**SHORT, "name": "other"}), 'has "mu " before it'),
        ((SHORT, {**GERMAN_TEXT, "prefix": "mu"}), "short and german"),  # the tokenizer drops the blank
        (({**SHORT, "prefix": "summarize: "}, {**GERMAN_TEXT, "prefix": "translate: "}), "apart"),  # unknown words
        (({"name": "short", "type": "summarization"}, {"name": "german", "type": "translation"}), "has nothing before"),
    ],
)
def test_tasks_that_look_the_same_to_the_model_are_refused(parts: tuple[dict[str, Any], ...], before: str) -> None:
    with pytest.raises(DataError, match="prefix of its own, in words that the tokenizer knows") as caught:
        task_of(*parts).facts(tools())
    assert caught.value.reason == "TasksAlike"
    assert before in str(caught.value)


def test_the_language_alone_may_tell_tasks_apart() -> None:
    part = {"type": "translation", "sourceLanguage": "en_XX"}
    there, back = ({**part, "name": name, "targetLanguage": name} for name in ("de_DE", "en_XX"))
    for kind in ("mbart", "mbart50"):
        assert task_of({**there, "name": "there"}, {**back, "name": "back"}).facts(tools(kind)).keys() == {
            "there",
            "back",
        }
        with pytest.raises(DataError):
            task_of({**there, "name": "there"}, {**there, "name": "again"}).facts(tools(kind))


def test_a_base_that_writes_no_texts_is_refused() -> None:
    with pytest.raises(DataError, match="an encoder and a decoder") as caught:
        task_of(SHORT, GERMAN_TEXT).facts(tools(is_encoder_decoder=None, model_type="bert"))
    assert caught.value.reason == "ModelUnsuitable"
    languages = {"targetLanguage": "fr_XX"}
    with pytest.raises(DataError, match=r"tasks\[german\]: task.targetLanguage: the base has no language fr_XX"):
        task_of(SHORT, {**GERMAN_TEXT, **languages}).facts(tools("mbart50"))


# --- one model ---


def test_all_tasks_are_one_model() -> None:
    both = learner()
    assert both.auto_class == "AutoModelForSeq2SeqLM"
    assert list(both.parts.values()) == [both]
    inputs = both.collate(store_of(ROWS), np.array([0, 1]))
    given = both.model_inputs(inputs)
    assert given.keys() == {"input_ids", "attention_mask", "decoder_input_ids"}
    assert np.array_equal(given["input_ids"], inputs["short/input_ids"])


def test_limits_and_decoding_are_those_of_the_document() -> None:
    spec = {"data": {"maxTargetLength": 3}, "generation": {"strategy": "beam", "beams": 3}}
    both = task_of(SHORT, GERMAN_TEXT, **spec)
    assert both.config.decoding is not None
    assert (both.config.decoding.beams, both.config.decoding.max_new_tokens) == (3, 3)
    sample = both.parts["short"].read_row({"text": "alpha", "summary": "beta " * 9}).within("short")
    ((piece,),) = both.encode([sample], tools())
    assert list(piece.columns["target_ids"]) == [ALPHA + 1, ALPHA + 1, END]


def test_shares_are_means_over_the_tokens_of_each_task() -> None:
    both, store = learner(), store_of(ROWS)
    found = {int(own[0]): divisor for own, divisor in both.shares(store, np.arange(4))}
    assert 1 / found[0] == pytest.approx(2 / 4 / (6 + 3))
    assert 1 / found[1] == pytest.approx(3.0 * 2 / 4 / (6 + 2))


# --- metrics ---


def test_metrics_are_those_of_each_task_and_the_mean_is_of_shares() -> None:
    both, store = learner(), store_of(ROWS)
    found = both.metrics(answered(both, store))
    assert {"short.rouge-l", "short.rouge-1", "german.bleu", "german.chrf", "mean"} <= found.keys()
    assert not {"short.loss", "german.loss", "short.token-accuracy"} & found.keys()  # no model, no loss
    assert found["german.chrf"] > 1
    assert found["mean"] == pytest.approx((found["short.rouge-l"] + found["german.bleu"] / 100) / 2)
    alone = tasks.get(config_of("summarization")).learner(Facts(more={"start": PAD}))
    mine = store_of([row for row in ROWS if row[0] == 0])
    own = alone.settle({**alone.gold(mine, np.arange(2)), **(alone.trivial(mine, np.arange(2), np.arange(2)) or {})})
    for name, value in alone.metrics(own).items():
        assert found[f"short.{name}"] == pytest.approx(value)


def test_intervals_are_of_the_same_mean() -> None:
    both, store = learner(), store_of(ROWS)
    outcomes = answered(both, store)
    everything = np.arange(len(ROWS))
    drawn = both.resampled(outcomes, [everything, everything[::-1]])
    assert drawn["mean"] == pytest.approx([both.metrics(outcomes)["mean"]] * 2)


def test_metrics_that_need_text_are_known_by_their_task() -> None:
    both = learner()
    assert both.generates("mean")
    assert both.generates("german.bleu")
    assert not both.generates("german.token-accuracy")
    assert both.higher_is_better("short.rouge-l")


def test_what_is_written_wrongly_is_shown_task_by_task() -> None:
    both, count = learner(), 40
    store = store_of([(int(row >= count), "alpha beta") for row in range(2 * count)])
    rows = np.arange(2 * count)
    given = {
        name: np.array([{"hypothesis|O": name, "loss|<f8": 1.0, "count|<i8": 3, "correct|<i8": 0}] * count)
        for name in ("of short", "of german")
    }
    losses = np.where(rows < count, 9.0, 1.0)
    outcomes = both.settle(
        {
            **both.gold(store, rows),
            "predicted": np.concatenate(list(given.values())),
            "loss": losses,
            "count": np.full(2 * count, 3),
            PLACE: rows,
        }
    )
    found = errors_of(both, outcomes, lambda: None)
    assert {name: len(own["mistakes"]) for name, own in found.items()} == {"short": MISTAKES, "german": MISTAKES}
    for name, own in found.items():
        assert {(row["truth"], row["answer"]) for row in own["mistakes"]} == {("alpha beta", f"of {name}")}


# --- for those who use the model ---


def test_card_and_index_say_what_to_put_before_a_text() -> None:
    both = learner()
    assert "- `short`: summarization, with `mu ` before each text\n" in both.usage()
    assert "- `german`: translation, with `kappa ` before each text\n" in both.usage()
    index = json.loads(both.files()["tasks.json"])
    assert index["format"] == 1
    assert [(entry["name"], entry["directory"], entry["prefix"]) for entry in index["tasks"]] == [
        ("short", ".", "mu "),
        ("german", ".", "kappa "),
    ]
    assert {entry["class"] for entry in index["tasks"]} == {"AutoModelForSeq2SeqLM"}
    alone = tasks.get(config_of("summarization", task={"prefix": "mu "}))
    assert alone.learner(Facts(more=alone.facts(tools()))).usage() == "Put `mu ` before each text.\n"


def test_card_and_index_say_how_a_text_in_another_language_begins() -> None:
    part = {"type": "translation", "sourceLanguage": "en_XX"}
    both = task_of(*({**part, "name": name[:2], "targetLanguage": name} for name in ("de_DE", "en_XX")))
    other = both.learner(Facts(more=both.facts(tools("mbart50"))))
    told = "- `de`: translation, with nothing before a text; sourceLanguage en_XX; targetLanguage de_DE; "
    assert f"{told}`model.generate(..., decoder_start_token_id={END}, forced_bos_token_id={GERMAN})`\n" in other.usage()
    entries = json.loads(other.files()["tasks.json"])["tasks"]
    assert [entry["generate"]["forced_bos_token_id"] for entry in entries] == [GERMAN, ENGLISH]
    assert [entry["targetLanguage"] for entry in entries] == ["de_DE", "en_XX"]


@pytest.mark.parametrize(
    ("parts", "tag"),
    [
        ((SHORT, GERMAN_TEXT), "text-generation"),
        ((SHORT, {**SHORT, "name": "other"}), "summarization"),
    ],
)
def test_the_hub_has_a_name_for_what_the_tasks_have_in_common(parts: tuple[dict[str, Any], ...], tag: str) -> None:
    assert pipeline_tag(task_of(*parts).config.task) == tag
