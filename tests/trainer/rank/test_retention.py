"""What a model has kept: retention sets on the base and on the tuned model, and what follows from a broken bound."""

import json
import random
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.matrix.cells import with_files
from tests.matrix.kinds import COLOURS, KINDS, WORDS, Rows, coloured, marching, tagged
from tests.trainer.rank import writers
from tests.trainer.rank.conftest import STEP, Made, write
from tests.trainer.rank.test_seq2seq import translations

from finetune_api.contract import LastMessage
from finetune_api.status import RetentionStatus
from finetune_trainer.preflight import preflight
from finetune_trainer.storage.commit import CURRENT, RecordKind

NARROW: dict[str, Any] = {"batchSize": 2, "microBatch": 2, "epochs": 4.0, "learningRate": 3e-3}
FAST: dict[str, Any] = {"batchSize": 16, "microBatch": 8, "maxSteps": 20, "learningRate": 3e-3}


def walks(count: int, *, seed: int) -> Rows:
    """What the decoder of the matrix was pretrained on beside `marching`: words 1 or 11 apart."""
    draw, words = random.Random(seed), sorted({*WORDS, *COLOURS})
    found = []
    for _ in range(count):
        step, first = draw.choice((1, 11)), draw.randrange(len(words))
        found.append(" ".join(words[(first + step * place) % len(words)] for place in range(draw.randint(3, 6))))
    return [{"text": text} for text in found]


def topics(count: int, *, seed: int = 7) -> Rows:
    """Texts labelled by which of three words is in them, none of which `coloured` asks about."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        topic = draw.choice(WORDS[:3])
        words = [draw.choice(WORDS[3:]) for _ in range(draw.randint(2, 9))]
        words.insert(draw.randint(0, len(words)), topic)
        found.append({"text": " ".join(words), "label": topic})
    return found


def kept(root: Path, rows: Rows, *, name: str = "walks", **more: Any) -> dict[str, Any]:
    """A retention set of the rows."""
    root.mkdir(exist_ok=True)
    write(root / f"{name}.jsonl", rows)
    return {"name": name, "data": {"uri": (root / f"{name}.jsonl").as_uri()}, "task": {"type": "causal-lm"}, **more}


@pytest.fixture
def march(make_run: Any, tmp_path: Path, base_of: Callable[[str], Path]) -> Callable[..., Made]:
    """A decoder that learns walks of one kind, with a set of walks of other kinds that it knew."""

    def make(name: str, *, bound: float | None = 100.0, training: dict[str, Any] | None = None, **spec: Any) -> Made:
        one = kept(tmp_path, walks(200, seed=3), **({} if bound is None else {"maxRisePercent": bound}))
        return make_run(
            marching(random.Random(0), 300),
            **{"base": base_of("llama"), "task": {"type": "causal-lm"}, **spec},
            name=name,
            training={**NARROW, **(training or {})},
            evaluation={"retention": [one]},
        )

    return make


def only(made: Made, work: Path) -> RetentionStatus:
    message = made.message(work)
    assert message.result is not None
    (found,) = message.result.evaluation.retention or []
    return found


def judged(made: Made, **bounds: float) -> LastMessage:
    """What preflight says of the document with other bounds."""
    document = json.loads(made.config_path.read_text())
    (one,) = document["evaluation"]["retention"]
    one |= {"maxDrop": None, "maxRisePercent": None, **bounds}
    return preflight(type(made.config).model_validate(document), credentials=None, work=made.config_path.parent)


def test_a_rate_too_high_on_narrow_rows_forgets_and_the_bound_says_so(
    march: Callable[..., Made], tmp_path: Path
) -> None:
    made = march("forgets")
    code, log = made.run(tmp_path / "work")
    assert code == 48, log
    message, found = made.message(tmp_path / "work"), only(made, tmp_path / "work")
    assert message.reason == "GateNotMet"
    assert found.base is not None
    assert found.tuned is not None
    assert message.message.startswith(
        f"Forgotten too much: perplexity on walks is {found.tuned:.5g} where the untouched base has {found.base:.5g}, "
        "a rise of "
    )
    assert message.message.endswith(" %, wanted rise <= 100 %.")
    assert (found.passed, found.wanted, found.rows) == (False, "rise <= 100 %", 200)
    assert found.tuned > 2 * found.base
    assert found.low < found.difference < found.high
    assert found.difference == pytest.approx(found.tuned - found.base, rel=1e-3)
    assert not made.store.head(CURRENT), "consumers keep what they have"
    card = (made.model() / "README.md").read_text()
    assert "| walks | 200 | perplexity |" in card
    report = (made.model().parent / "report.html").read_text()
    assert "<h2>What the model has kept</h2>" in report
    assert "broken" in report

    # The bound is no part of any identity: preflight judges again what was measured.
    again = judged(made, maxRisePercent=1e5)
    assert (again.code, again.reason, again.run_id) == (0, "Reused", made.record.run_id)
    assert again.result is not None
    assert [one.passed for one in again.result.evaluation.retention or []] == [True]
    assert judged(made, maxRisePercent=100.0).code == 48
    assert made.kinds().count("retention") == 2


@pytest.mark.parametrize("against", ["l2sp", "rehearsal", "lora at a low rate"])
def test_what_is_said_to_help_against_forgetting_does(march: Callable[..., Made], tmp_path: Path, against: str) -> None:
    spec: dict[str, Any] = {}
    if against == "l2sp":
        spec["training"] = {"l2sp": {"alpha": 30.0}}
    elif against == "rehearsal":
        write(tmp_path / "rehearsal.jsonl", walks(100, seed=4))
        sources = [tmp_path / "helped" / "train.jsonl", tmp_path / "rehearsal.jsonl"]
        spec["data"] = {"train": [{"uri": sources[0].as_uri()}, {"uri": sources[1].as_uri(), "weight": 0.5}]}
    else:
        spec |= {"method": {"type": "lora"}, "training": {"learningRate": 1e-4}}
    made = march("helped", **spec)
    code, log = made.run(tmp_path / "work")
    assert code == 0, log
    found = only(made, tmp_path / "work")
    assert found.passed
    assert made.store.head(CURRENT)


def test_what_was_measured_is_not_measured_again_however_often_the_run_is_killed(
    march: Callable[..., Made], tmp_path: Path
) -> None:
    """Killed while the base is measured, while it is trained, and while the tuned model is measured."""
    spec = {"training": {"maxSteps": 6, "epochs": None}, "checkpoint": {"every": {"steps": 2}}}
    calm = march("calm", **spec)
    assert calm.run(tmp_path / "work-calm")[0] == 0
    made = march("killed", **spec)
    append = ("finetune_trainer.storage.commit", "Claim", "append")
    evaluate = ("finetune_trainer.evaluate", "Evaluator", "outcomes")
    assert made.run(tmp_path / "one", stop=(*evaluate, 1, 9))[0] == -9
    assert made.kinds() == ["claim"]
    assert made.run(tmp_path / "two", stop=(*append, 3, 9))[0] == -9
    assert made.kinds()[1:4] == ["claim", "retention", "checkpoint"]
    assert made.run(tmp_path / "three", stop=(*append, 6, 9))[0] == -9
    assert made.kinds().count("retention") == 2
    code, log = made.run(tmp_path / "four")
    assert code == 0, log
    assert [(r.body["of"], r.body["rows"]) for r in made.records if r.kind is RecordKind.RETENTION] == [
        ("base", 200),
        ("Best", 200),
    ]
    assert only(made, tmp_path / "four") == only(calm, tmp_path / "work-calm")


def test_what_was_measured_of_a_part_of_the_run_is_not_taken_for_the_whole(
    march: Callable[..., Made], tmp_path: Path
) -> None:
    spec = {"training": {"maxSteps": 18, "epochs": None}, "checkpoint": {"every": {"steps": 2}}, "bound": None}
    calm = march("calm", **spec)
    assert calm.run(tmp_path / "work-calm")[0] == 0
    made = march("ended", **spec)
    assert made.run(tmp_path / "one", stop=(*STEP, 5, signal.SIGTERM.value))[0] == 45
    code, log = made.run(tmp_path / "two", options=("--finish-now",))
    assert code == 0, log
    code, log = made.run(tmp_path / "three")
    assert code == 0, log
    assert only(made, tmp_path / "two").tuned != only(made, tmp_path / "three").tuned
    assert only(made, tmp_path / "three") == only(calm, tmp_path / "work-calm")
    assert [r.body["of"] for r in made.records if r.kind is RecordKind.RETENTION] == ["base", "Best", "Best"]


def test_two_processes_come_to_the_same_figure(march: Callable[..., Made], tmp_path: Path, free_port: int) -> None:
    spec = {"training": {"maxSteps": 6, "epochs": None, "batchSize": 4}}
    alone, both = march("alone", **spec), march("both", **spec)
    assert alone.run(tmp_path / "one")[0] == 0
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port), "LOCAL_WORLD_SIZE": "1"}
    started = [both.start(tmp_path / f"two-{rank}", RANK=str(rank), LOCAL_RANK="0", **group) for rank in range(2)]
    assert [process.wait() for process in started] == [0, 0], started[0].log
    one, two = only(alone, tmp_path / "one"), only(both, tmp_path / "two-0")
    assert two.base == one.base
    assert two.tuned == pytest.approx(one.tuned, rel=1e-4)
    assert made_before_training(both)


def test_a_stop_while_the_base_is_measured_ends_both_processes_before_training(
    march: Callable[..., Made], tmp_path: Path, free_port: int
) -> None:
    both = march("stopped", training={"maxSteps": 6, "epochs": None, "batchSize": 4})
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port), "LOCAL_WORLD_SIZE": "1"}
    stop = ("finetune_trainer.evaluate", "Evaluator", "_predictions", 1, signal.SIGTERM.value)
    started = [
        both.start(tmp_path / f"two-{rank}", stop=None if rank else stop, RANK=str(rank), LOCAL_RANK="0", **group)
        for rank in range(2)
    ]
    assert [process.wait() for process in started] == [45, 45], "\n".join(process.log for process in started)
    assert both.kinds() == ["claim", "measured"]


def made_before_training(made: Made) -> bool:
    """Whether the base was measured before anything was trained."""
    return made.kinds()[:2] == ["claim", "retention"]


def test_a_set_that_is_added_later_measures_and_trains_nothing(march: Callable[..., Made], tmp_path: Path) -> None:
    spec = {"training": {"maxSteps": 4, "epochs": None}}
    made = march("later", **spec)
    assert made.run(tmp_path / "one")[0] == 0
    two = kept(tmp_path, walks(50, seed=9), name="others")
    again = march("later", bound=None, **spec)
    document = json.loads(again.config_path.read_text())
    more = {**document["evaluation"]["retention"][0], "name": "others", "uri": two["data"]["uri"]}
    document["evaluation"]["retention"].append(more)
    again.config_path.write_text(json.dumps(document))
    last = preflight(type(made.config).model_validate(document), credentials=None, work=tmp_path / "preflight")
    assert (last.run_id, last.reason) == (made.record.run_id, "PreflightPassed")
    assert last.preflight is not None
    assert replace(made, inputs=last.preflight.inputs).run(tmp_path / "two")[0] == 0
    assert made.kinds().count("trained") == 1
    assert [record.body["set"] for record in made.records if record.kind is RecordKind.RETENTION] == [
        *("walks", "walks"),
        *("others", "others"),
    ]

    # By another name and another metric the same rows are not measured again.
    document["evaluation"]["retention"] = [{**more, "name": "renamed", "metric": "loss"}]
    again.config_path.write_text(json.dumps(document))
    last = preflight(type(made.config).model_validate(document), credentials=None, work=tmp_path / "preflight")
    assert last.preflight is not None
    assert replace(made, inputs=last.preflight.inputs).run(tmp_path / "three")[0] == 0
    found = only(made, tmp_path / "three")
    assert (found.name, found.metric, found.rows) == ("renamed", "loss", 50)
    assert made.kinds().count("retention") == 4
    assert made.kinds().count("evaluated") == 3


# --- features ---


def probing(task: str, root: Path, rows: Rows, **more: Any) -> dict[str, Any]:
    return kept(root, rows, name="topics", task={"type": task}, **more)


def test_full_tuning_at_a_high_rate_costs_features_and_a_head_costs_none(
    make_run: Any, base_of: Callable[[str], Path], tmp_path: Path
) -> None:
    rows = coloured(random.Random(0), 300)
    one = probing("text-classification", tmp_path, topics(400), maxDrop=0.05)
    spec = {"base": base_of("bert"), "evaluation": {"retention": [one]}}
    full = make_run(
        rows, name="full", training={**FAST, "maxSteps": 60, "learningRate": 3e-2}, output={"weights": "Last"}, **spec
    )
    code, log = full.run(tmp_path / "full-work")
    assert code == 48, log
    lost = only(full, tmp_path / "full-work")
    assert full.message(tmp_path / "full-work").message.endswith("wanted drop <= 0.05.")
    assert lost.metric == "probe-accuracy"
    assert lost.high < -0.05
    head = make_run(rows, name="head", training=FAST, method={"type": "head"}, **spec)
    code, log = head.run(tmp_path / "head-work")
    assert code == 0, log
    same = only(head, tmp_path / "head-work")
    assert (same.difference, same.low, same.high) == (0.0, 0.0, 0.0)
    assert same.base == same.tuned == lost.base
    assert same.base > 0.7, "three topics, of which the features tell most"


@pytest.mark.parametrize("case", ["lora", "prompt", "multi-task"])
def test_features_are_those_of_the_trunk_with_what_the_method_has_added(
    case: str, make_run: Any, base_of: Callable[[str], Path], tmp_path: Path
) -> None:
    spec: dict[str, Any] = {"method": {"type": "lora" if case == "multi-task" else case}}
    rows: Rows = coloured(random.Random(0), 100)
    if case == "prompt":
        spec["method"]["virtualTokens"] = 5
        spec["data"] = {"maxLength": 48}
    if case == "multi-task":
        for side, seed in (("train", 1), ("validation", 2)):
            write(tmp_path / f"{side}-colour.jsonl", coloured(random.Random(seed), 50))
            write(tmp_path / f"{side}-tags.jsonl", tagged(random.Random(seed), 50))
        train, validation = (
            [{"task": name, "uri": (tmp_path / f"{side}-{name}.jsonl").as_uri()} for name in ("colour", "tags")]
            for side in ("train", "validation")
        )
        spec["data"] = {"train": train, "validation": {"sources": validation}}
        kinds = {"colour": "text-classification", "tags": "token-classification"}
        spec["task"] = {"type": "multi-task", "tasks": [{"name": name, "type": kinds[name]} for name in kinds]}
    one = probing("text-classification", tmp_path, topics(120))
    training = {**FAST, "learningRate": 3e-2}
    made = make_run(rows, base=base_of("bert"), training=training, evaluation={"retention": [one]}, **spec)
    code, log = made.run(tmp_path / "work")
    assert code == 0, log
    found = only(made, tmp_path / "work")
    assert found.passed is None
    assert found.difference != 0.0, "what was added changes the features"


def test_images_and_encoder_decoders_are_asked_in_their_own_way(
    make_run: Any, base_of: Callable[[str], Path], tmp_path: Path
) -> None:
    for name in ("trained", "asked"):
        (tmp_path / name).mkdir()
    pictures = with_files(KINDS["image-classification"].rows(random.Random(0), 80), tmp_path / "trained" / "seen")
    others = with_files(KINDS["image-classification"].rows(random.Random(5), 60), tmp_path / "asked" / "seen")
    one = kept(tmp_path / "asked", others, name="shapes", task={"type": "image-classification"}, maxDrop=0.0)
    task = {"task": {"type": "image-classification"}, "method": {"type": "head"}}
    made = make_run(
        pictures, name="trained", base=base_of("vit"), training=FAST, evaluation={"retention": [one]}, **task
    )
    code, log = made.run(tmp_path / "images")
    assert code == 0, log
    assert only(made, tmp_path / "images").difference == 0.0

    base = writers.save(tmp_path / "t5", "t5")
    one = kept(tmp_path, translations(40, seed=9), name="backwards", task={"type": "translation"}, maxRisePercent=0.0)
    task = {"task": {"type": "translation"}, "training": {**FAST, "maxSteps": 10, "learningRate": 1e-2}}
    made = make_run(translations(100), name="writer", base=base, evaluation={"retention": [one]}, **task)
    code, log = made.run(tmp_path / "texts")
    assert code == 0, log
    found = only(made, tmp_path / "texts")
    assert (found.metric, found.passed) == ("loss", True)
    assert found.difference < 0, "rows of the task itself are learned"
