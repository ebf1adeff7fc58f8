"""Several tasks that write texts with one encoder-decoder, from rows to one published directory, on real processes."""

import json
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.matrix.kinds import _stepped, _walk

from finetune_trainer.run import TRAIN
from finetune_trainer.storage.commit import RecordKind, find

from .conftest import Made, MakeRun, loaded, write

FIVE, ELEVEN = "red ", "green "
"""What stands before a text that goes on in steps of 5, and of 11. The base takes these words for 1
and for 5."""
PARTS: list[dict[str, Any]] = [
    {"name": "five", "type": "summarization", "prefix": FIVE},
    {"name": "eleven", "type": "translation", "prefix": ELEVEN},
]
STEPS = {"five": 5, "eleven": 11}
ROLES = {"five": ("text", "summary"), "eleven": ("source", "target")}
TRAINING = {"epochs": 12.0, "batchSize": 16, "learningRate": 1e-2, "evaluateEvery": {"epochs": 12}}
SHORT = {"maxSteps": 8, "batchSize": 8, "microBatch": 4, "learningRate": 3e-3, "evaluateEvery": {"steps": 4}}
WRITTEN = {"generation": {"maxNewTokens": 8}, "data": {"maxTargetLength": 16}}


def texts(draw: random.Random, name: str, count: int) -> list[dict[str, str]]:
    """A walk of any step, and how it goes on in that task."""
    told = [_walk(draw, draw.choice((1, 5, 11))) for _ in range(count)]
    return [
        dict(zip(ROLES[name], (" ".join(words), " ".join(_stepped(words[-1], STEPS[name], 4))), strict=True))
        for words in told
    ]


def files(root: Path, *, count: int) -> dict[str, Any]:
    """Files of both tasks, and the part of a document that names them."""
    root.mkdir()
    draw = random.Random(3)
    sources: dict[str, list[dict[str, str]]] = {}
    for side, rows in (("train", count), ("validation", 20), ("test", 60)):
        for name in STEPS:
            write(root / f"{side}-{name}.jsonl", texts(draw, name, rows))
        sources[side] = [{"task": name, "uri": (root / f"{side}-{name}.jsonl").as_uri()} for name in STEPS]
    held = {side: {"sources": sources[side]} for side in ("validation", "test")}
    return {
        "task": {"type": "multi-task", "tasks": PARTS},
        "generation": {"maxNewTokens": 8},
        "data": {"train": sources["train"], **held, "maxTargetLength": 16},
    }


@pytest.fixture
def make(make_run: MakeRun, base_of: Callable[[str], Path], tmp_path: Path) -> Any:
    def of(name: str, *, base: str = "t5", count: int = 300, **spec: Any) -> Made:
        given = {"training": TRAINING, **files(tmp_path / f"rows-{name}", count=count), **spec}
        return make_run([{}], name=name, base=base_of(base), **given)

    return of


def spoken(directory: Path, model: Any, told: list[str]) -> list[str]:
    """What a published model writes, by transformers alone."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    inputs = tokenizer(told, padding=True, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    return list(tokenizer.batch_decode(model.eval().generate(**inputs), skip_special_tokens=True))


@pytest.mark.parametrize(
    ("base", "method"),
    [("t5", {"type": "full"}), ("t5", {"type": "lora", "rank": 8, "alpha": 32.0, "dropout": 0.0})],
    ids=["full", "lora"],
)
def test_one_model_learns_both_tasks_and_is_told_which_by_a_word(
    make: Any, base_of: Callable[[str], Path], tmp_path: Path, base: str, method: dict[str, Any]
) -> None:
    from transformers import AutoModelForSeq2SeqLM

    made = make("run", base=base, method=method)
    code, log = made.run(tmp_path / "work")
    assert code == 0, log
    outcome = made.published()["outcome"]
    found = outcome["evaluation"]
    assert {"mean", "loss", "five.rouge-l", "five.loss", "eleven.bleu", "eleven.chrf"} <= found["tuned"].keys()
    assert {"mean", "five.rouge-l", "eleven.bleu"} <= found["trivial"].keys() & found["base"].keys()
    for metric, margin in (("five.rouge-l", 0.3), ("eleven.bleu", 20.0)):
        assert found["tuned"][metric] > max(found["base"][metric], found["trivial"][metric]) + margin, found
    assert found["tuned"]["mean"] <= 1.0

    directory = made.model()
    if method["type"] == "lora":
        from peft import PeftModel

        model = PeftModel.from_pretrained(AutoModelForSeq2SeqLM.from_pretrained(base_of(base)), directory)
        model.generation_config = model.generation_config.from_pretrained(directory)
    else:
        model, info = AutoModelForSeq2SeqLM.from_pretrained(directory, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
    index = {entry["name"]: entry for entry in json.loads((directory / "tasks.json").read_text())["tasks"]}
    assert {name: entry["prefix"] for name, entry in index.items()} == {"five": FIVE, "eleven": ELEVEN}
    draw = random.Random(99)
    rows = texts(draw, "five", 40)
    for name, step in STEPS.items():
        told = [index[name]["prefix"] + row["text"] for row in rows]
        wanted = [" ".join(_stepped(row["text"].split()[-1], step, 4)) for row in rows]
        right = [a == b for a, b in zip(spoken(directory, model, told), wanted, strict=True)]
        assert np.mean(right) > 0.5, name

    card = (directory / "README.md").read_text()
    assert "- `five`: summarization, with `red ` before each text" in card
    assert "- `eleven`: translation, with `green ` before each text" in card
    report = Path(outcome["model"]["reportUri"].removeprefix("file://")).read_text()
    assert "Mistakes, the surest first: five" in report


def test_the_loss_is_the_sum_of_what_each_task_alone_would_have(make: Any, tmp_path: Path) -> None:
    """Ours against transformers' own tokenizer and loss on the rows of each task, by its share and weight."""
    from transformers import AutoTokenizer

    made = make("loss", count=30, task={"type": "multi-task", "tasks": [PARTS[0], {**PARTS[1], "lossWeight": 0.5}]})
    learner, store, base = loaded(made)
    model, tokenizer = base.model.eval(), AutoTokenizer.from_pretrained(made.config.model.removeprefix("file://"))
    rows = store.rows(TRAIN)
    numbers = store.values("task", rows)
    batch = np.concatenate([rows[numbers == 0][:5], rows[numbers == 1][:3]])
    found = 0.0
    for own, count in learner.shares(store, batch):
        inputs = {name: torch.from_numpy(array) for name, array in learner.collate(store, own).items()}
        found += float(learner.loss(model, inputs).detach()) / count

    wanted = 0.0
    for part, own, weight in ((PARTS[0], batch[:5], 1.0), (PARTS[1], batch[5:], 0.5)):
        lines = (tmp_path / "rows-loss" / f"train-{part['name']}.jsonl").read_text().splitlines()
        source, target = ROLES[part["name"]]
        chosen = [json.loads(lines[line - 1]) for line in store.values("row", own)]
        read = tokenizer([part["prefix"] + row[source] for row in chosen], padding=True, return_tensors="pt")
        labels = tokenizer([row[target] for row in chosen], padding=True, return_tensors="pt").input_ids
        labels = labels.masked_fill(labels == tokenizer.pad_token_id, -100)
        loss = model(input_ids=read.input_ids, attention_mask=read.attention_mask, labels=labels).loss
        wanted += weight * len(own) / len(batch) * float(loss.detach())
    assert found == pytest.approx(wanted, rel=1e-6)


def test_a_stopped_run_ends_with_the_same_weights(make: Any, tmp_path: Path) -> None:
    ends = []
    for name, stop in (
        ("calm", None),
        ("stopped", ("finetune_trainer.training", "Duties", "due", 4, signal.SIGTERM.value)),
    ):
        made = make(name, count=60, training=SHORT)
        code, log = made.run(tmp_path / f"{name}-1", stop=stop)
        assert code == (45 if stop else 0), log
        if stop:
            assert made.run(tmp_path / f"{name}-2")[0] == 0
        assert find(made.records, RecordKind.TRAINED)[-1].body["step"] == 8
        ends.append((made.losses(), made.published()["outcome"]["model"]["digest"]))
    assert ends[0] == ends[1]


def test_two_processes_train_the_same(make: Any, tmp_path: Path, free_port: int) -> None:
    training = {**SHORT, "dropout": 0.0}
    alone = make("alone", count=60, training=training)
    assert alone.run(tmp_path / "one")[0] == 0
    both = make("pair", count=60, training=training)
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port), "LOCAL_WORLD_SIZE": "1"}
    started = [both.start(tmp_path / f"two-{rank}", RANK=str(rank), LOCAL_RANK="0", **group) for rank in range(2)]
    assert [process.wait() for process in started] == [0, 0], started[0].log
    assert both.losses() == pytest.approx(alone.losses(), rel=1e-5)
    one, two = (made.tensors("weights.safetensors") for made in (alone, both))
    assert one.keys() == two.keys()
    assert max(float(abs(one[name] - two[name]).max()) for name in one) < 1e-4


def test_a_merged_model_is_one_directory_beside_gates_and_retention_sets(make: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForSeq2SeqLM

    gates = [{"metric": "eleven.bleu", "atLeast": 0.0}, {"metric": "five.rouge-l", "atLeast": 2.0}]
    kept = tmp_path / "kept.jsonl"
    write(kept, texts(random.Random(5), "eleven", 12))
    of_kept = {"name": "kept", "task": {"type": "translation", "prefix": "blue "}, "data": {"uri": kept.as_uri()}}
    made = make(
        "merged",
        count=60,
        training=SHORT,
        method={"type": "lora", "rank": 4},
        output={"merge": True},
        evaluation={"gates": gates, "primary": "five.rouge-l", "retention": [of_kept]},
    )
    code, log = made.run(tmp_path / "work")
    assert code == 48, log
    found = made.message(tmp_path / "work").result
    assert found is not None
    assert found.evaluation.gates is not None
    assert [gate.passed for gate in found.evaluation.gates] == [True, False]
    assert [(one.metric, one.rows) for one in found.evaluation.retention or ()] == [("loss", 12)]
    AutoModelForSeq2SeqLM.from_pretrained(made.model())
