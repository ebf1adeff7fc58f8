"""Several tasks on one trunk, from rows to published directories, on real processes."""

import dataclasses
import itertools
import json
import random
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from finetune_trainer.checkpoint import State
from finetune_trainer.data.order import Order
from finetune_trainer.intervals import Draws
from finetune_trainer.loop import Objective, train
from finetune_trainer.run import TRAIN
from finetune_trainer.shared import SharedTrunk
from finetune_trainer.storage.commit import RecordKind, find

from .conftest import COLOURS, WORDS, Made, MakeRun, loaded, write
from .test_loop import Quiet, setup_of
from .test_loop import config as loop_config

METHODS: dict[str, dict[str, Any]] = {
    "full": {"type": "full"},
    "freeze": {"type": "full", "freeze": {"embeddings": True, "layers": 1}},
    "head": {"type": "head"},
    "lora": {"type": "lora", "rank": 4, "alpha": 8.0, "dropout": 0.1},
}
TRAINING = {"maxSteps": 10, "batchSize": 8, "microBatch": 4, "learningRate": 3e-3, "evaluateEvery": {"steps": 5}}


def sample(draw: random.Random) -> tuple[str, str, str]:
    """A text, the colour in it, and whether it is long."""
    colour, count = draw.choice(COLOURS), draw.randint(1, 10)
    words = [draw.choice(WORDS) for _ in range(count)]
    words.insert(draw.randint(0, count), colour)
    return " ".join(words), colour, "long" if count > 5 else "short"


def files(root: Path, *, count: int = 120) -> dict[str, Any]:
    """Files of two tasks with columns of their own, and the part of a document that names them."""
    root.mkdir()
    draw = random.Random(3)
    sources: dict[str, list[dict[str, str]]] = {}
    for side, rows in (("train", count), ("validation", 24), ("test", 24)):
        found = [sample(draw) for _ in range(rows)]
        write(root / f"{side}-colour.jsonl", [{"body": text, "colour": colour} for text, colour, _ in found])
        found = [sample(draw) for _ in range(rows // 2)]
        write(root / f"{side}-length.jsonl", [{"text": text, "label": [size]} for text, _, size in found])
        sources[side] = [
            {"task": name, "uri": (root / f"{side}-{name}.jsonl").as_uri()} for name in ("colour", "length")
        ]
    return {
        "task": {
            "type": "multi-task",
            "tasks": [
                {"name": "colour", "type": "text-classification", "columns": {"text": "body", "label": "colour"}},
                {"name": "length", "type": "text-classification", "lossWeight": 0.5},
            ],
        },
        "data": {
            "train": sources["train"],
            "validation": {"sources": sources["validation"]},
            "test": {"sources": sources["test"]},
        },
    }


@pytest.fixture
def make(make_run: MakeRun, tmp_path: Path) -> Any:
    def of(name: str, **spec: Any) -> Made:
        return make_run([{}], name=name, **{"training": TRAINING, **files(tmp_path / f"rows-{name}"), **spec})

    return of


def test_preflight_fixes_labels_and_forms_task_by_task(make: Any) -> None:
    made = make("preflight")
    assert made.record.labels == ["colour/blue", "colour/green", "colour/red", "length/long", "length/short"]
    assert made.record.form == "colour: one label; length: a list of labels"


@pytest.mark.parametrize("method", METHODS)
def test_every_task_is_published_as_a_directory_that_its_auto_class_loads(
    make: Any, tiny_base: Path, tmp_path: Path, method: str
) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    made = make(method, method=METHODS[method])
    code, log = made.run(tmp_path / "work")
    assert code == 0, log
    outcome = made.published()["outcome"]
    assert {"mean", "loss", "colour.f1", "length.f1"} <= outcome["evaluation"]["tuned"].keys()
    assert {"mean", "colour.f1"} <= outcome["evaluation"]["trivial"].keys() & outcome["evaluation"]["probe"].keys()
    index = json.loads((made.model() / "tasks.json").read_text())
    assert [entry["name"] for entry in index["tasks"]] == ["colour", "length"]
    trunks = []
    for entry, labels in zip(index["tasks"], (["blue", "green", "red"], ["long", "short"]), strict=True):
        directory = made.model() / entry["directory"]
        assert entry["class"] == "AutoModelForSequenceClassification"
        AutoTokenizer.from_pretrained(directory)
        if method == "lora":
            from peft import PeftModel
            from transformers import AutoConfig

            config = AutoConfig.from_pretrained(directory)
            base = AutoModelForSequenceClassification.from_pretrained(
                tiny_base, config=config, ignore_mismatched_sizes=True
            )
            before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
            model = PeftModel.from_pretrained(base, directory).merge_and_unload()
            trained = [
                name
                for name, tensor in model.base_model.state_dict().items()
                if f"bert.{name}" in before and not torch.equal(tensor, before[f"bert.{name}"])
            ]
            assert trained
        else:
            model, info = AutoModelForSequenceClassification.from_pretrained(directory, output_loading_info=True)
            assert not info["missing_keys"]
            assert not info["unexpected_keys"]
        assert list(model.config.id2label.values()) == labels
        trunks.append(model.base_model.state_dict())
    assert all(torch.equal(trunks[0][name], trunks[1][name]) for name in trunks[0])


def test_where_the_model_errs_is_told_task_by_task(make_run: MakeRun, tmp_path: Path) -> None:
    """Every tenth label of one task is wrong; rows of the other have many labels each."""
    spec = files(tmp_path / "rows", count=240)
    path = tmp_path / "rows" / "train-colour.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows[::10]:
        row["colour"] = "red" if row["colour"] != "red" else "blue"
    write(path, rows)
    for side, count in (("train", 60), ("validation", 24), ("test", 24)):
        texts = [sample(random.Random(f"{side}{number}"))[0].split() for number in range(count)]
        tagged = [{"tokens": words, "tags": ["X" if w in COLOURS else "O" for w in words]} for words in texts]
        write(path.with_name(f"{side}-length.jsonl"), tagged)
    spec["task"]["tasks"][1] = {"name": "length", "type": "token-classification"}
    made = make_run([{}], name="errs", training={**TRAINING, "maxSteps": 30}, **spec)
    code, log = made.run(tmp_path / "work")
    assert code == 0, log
    bodies = {record.kind: record.body for record in made.records}
    errors = bodies[RecordKind.EVALUATED]["errors"]
    assert set(errors) == {"colour", "length"}
    assert errors["colour"]["labels"] == ["blue", "green", "red"]
    assert np.array(errors["colour"]["confusion"]).sum() == 24, "the test rows of that task alone"
    places = np.array([found["place"] for found in errors["colour"]["mistakes"]], dtype=np.int64)
    store = made.encoded
    assert set(store.values("task", places).tolist()) <= {0}
    suspects = bodies[RecordKind.BASELINE]["suspects"]
    assert suspects, "the probe sees the colour in a text"
    assert {found["part"] for found in suspects} == {"colour"}
    assert {found["label"] for found in suspects} <= set(COLOURS)
    lines = store.values("row", np.array([found["place"] for found in suspects]))
    assert (lines % 10 == 1).mean() > 0.5, "of all rows a tenth was changed"
    report = (made.model().parent / "report.html").read_text()
    for title in ("Which labels are mixed up: colour", "Training rows that may be mislabelled: colour"):
        assert f"<h2>{title}</h2>" in report


def test_a_run_shows_signs_of_life_while_each_tasks_intervals_are_computed(make: Any) -> None:
    learner, store, _ = loaded(make("alive"))
    rows = store.rows(TRAIN)
    trivial = learner.trivial(store, rows, rows)
    assert trivial is not None
    outcomes = learner.settle({**learner.gold(store, rows), **trivial, "place": rows})
    beats: list[int] = []
    draws = Draws(len(rows), 3, 160)
    found = draws.measured(learner, outcomes, beat=lambda: beats.append(1))
    assert {"mean", "loss", "colour.f1", "length.f1"} <= found.keys()
    assert len(beats) == 3 * 10, "once through the draws to count rows, and once for each task"


def test_the_loss_is_that_of_each_task_by_its_share_and_weight(make: Any) -> None:
    """Ours against the mean losses of the whole models, each on its own rows."""
    made = make("loss", method=METHODS["full"])
    learner, store, base = loaded(made)
    rows = store.rows(TRAIN)
    batch = rows[np.array([0, 1, 2, 100, 130, 140, 150])]
    tensors = {name: torch.from_numpy(array) for name, array in learner.collate(store, batch).items()}
    wanted = 0.0
    for name, own, weight in (("colour", batch[:4], 1.0), ("length", batch[4:], 0.5)):
        inputs = {key.partition("/")[2]: value for key, value in tensors.items() if key.startswith(name)}
        loss = base.model.parts[name].eval()(**inputs).loss  # transformers' own
        wanted += weight * len(own) / len(batch) * float(loss.detach())
    found = 0.0
    for own, count in learner.shares(store, batch):
        inputs = {name: torch.from_numpy(array) for name, array in learner.collate(store, own).items()}
        found += float(learner.loss(base.model, inputs).detach()) / count
    assert found == pytest.approx(wanted, rel=1e-6)


def test_a_stopped_run_ends_with_the_same_weights(make: Any, tmp_path: Path) -> None:
    ends = []
    for name, stop in (
        ("calm", None),
        ("stopped", ("finetune_trainer.training", "Duties", "due", 4, signal.SIGTERM.value)),
    ):
        made = make(name)
        code, log = made.run(tmp_path / f"{name}-1", stop=stop)
        assert code == (45 if stop else 0), log
        if stop:
            assert made.run(tmp_path / f"{name}-2")[0] == 0
        trained = find(made.records, RecordKind.TRAINED)[-1]
        assert trained.body["step"] == 10
        ends.append((made.losses(), made.published()["outcome"]["model"]["digest"]))
    assert ends[0] == ends[1]


def test_two_processes_train_the_same(make: Any, tmp_path: Path, free_port: int) -> None:
    """Tasks fall to ranks as pieces do: often one rank has one task only."""
    training = {**TRAINING, "maxSteps": 6, "dropout": 0.0}
    alone = make("alone", training=training)
    assert alone.run(tmp_path / "one")[0] == 0
    both = make("both", training=training)
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port), "LOCAL_WORLD_SIZE": "1"}
    started = [both.start(tmp_path / f"two-{rank}", RANK=str(rank), LOCAL_RANK="0", **group) for rank in range(2)]
    assert [process.wait() for process in started] == [0, 0], started[0].log
    assert both.losses() == pytest.approx(alone.losses(), rel=1e-5)
    one, two = (made.tensors("weights.safetensors") for made in (alone, both))
    assert one.keys() == two.keys()
    assert max(float(abs(one[name] - two[name]).max()) for name in one) < 1e-4


def test_slices_are_of_the_rows_that_the_model_is_measured_on(make: Any, tmp_path: Path) -> None:
    rows = files(tmp_path / "rows")
    for side, name in itertools.product(("train", "validation", "test"), ("colour", "length")):
        path = tmp_path / "rows" / f"{side}-{name}.jsonl"
        found = [json.loads(line) for line in path.read_text().splitlines()]
        if side == "test":  # the others need no such column
            found = [{**row, "region": ("north", "south")[place % 2]} for place, row in enumerate(found)]
        write(path, found)
    made = make("sliced", **rows, evaluation={"slices": ["region"]})
    assert made.record.slices == {"region": ["north", "south"]}


def test_a_near_repetition_is_left_out_within_its_task_alone(make: Any, tmp_path: Path) -> None:
    text = " ".join(f"{WORDS[place % len(WORDS)]}{place}" for place in range(40))
    rows = files(tmp_path / "rows")
    colour = tmp_path / "rows" / "train-colour.jsonl"
    length = tmp_path / "rows" / "train-length.jsonl"
    near = [{"body": f"{text} red", "colour": "red"}, {"body": f"{text} {text[:12]} red", "colour": "red"}]
    with colour.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in near)
    with length.open("a") as file:
        file.write(json.dumps({"text": f"{text} red", "label": ["long"]}) + "\n")
    rows["data"]["deduplicate"] = {"near": True}
    made = make("near", **rows)
    store = loaded(made)[1]
    train = store.rows(TRAIN)
    kept = set(zip(store.values("task", train).tolist(), store.values("row", train).tolist(), strict=True))
    assert kept & {(0, 121), (0, 122), (1, 61)} == {(0, 121), (1, 61)}


THREE: list[dict[str, Any]] = [
    {"name": "colour", "type": "text-classification"},
    {"name": "length", "type": "text-classification", "columns": {"label": "lengths"}, "lossWeight": 0.5},
    {"name": "tags", "type": "token-classification", "lossWeight": 2.0},
]


def of_three(root: Path) -> dict[str, Any]:
    """One file with the columns of three tasks: a label, a list of labels, a tag a word."""
    root.mkdir()
    draw = random.Random(7)
    rows = []
    for _ in range(60):
        text, colour, size = sample(draw)
        words = text.split()
        tags = ["B-colour" if word in COLOURS else "O" for word in words]
        rows.append({"text": text, "label": colour, "lengths": [size], "tokens": words, "tags": tags})
    for side, found in (("train", rows[:45]), ("validation", rows[45:])):
        write(root / f"{side}.jsonl", found)
    sources = {
        side: [{"task": part["name"], "uri": (root / f"{side}.jsonl").as_uri()} for part in THREE]
        for side in ("train", "validation")
    }
    return {
        "task": {"type": "multi-task", "tasks": THREE},
        "data": {"train": sources["train"], "validation": {"sources": sources["validation"]}},
    }


def reference(model: SharedTrunk, batches: list[list[tuple[str, float, dict[str, Any]]]], config: Any) -> list[float]:
    """A plain loop over transformers' own losses: whole batches of a task, one module as the trunk of all models."""
    from transformers import get_linear_schedule_with_warmup

    first, *others = parts = model.parts.values()
    for other in others:
        other.bert.embeddings, other.bert.encoder = first.bert.embeddings, first.bert.encoder
    plain = {name: p for name, p in model.named_parameters() if "bias" in name or "LayerNorm" in name}
    rest = [p for name, p in model.named_parameters() if name not in plain]
    groups = [{"params": rest, "weight_decay": 0.1}, {"params": list(plain.values()), "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, foreach=False, fused=False)
    schedule = get_linear_schedule_with_warmup(optimizer, 5, 50)
    for part in parts:
        part.train()
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        loss = sum(weight * model.parts[name](**inputs).loss for name, weight, inputs in batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_fifty_steps_equal_a_plain_loop(make: Any, tmp_path: Path, dtype: torch.dtype, tolerance: float) -> None:
    made = make("three", **of_three(tmp_path / "rows"))

    def fresh() -> SharedTrunk:
        model = loaded(made)[2].model.to(dtype)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        return model

    learner, store, _ = loaded(made)
    rows, settings = store.rows(TRAIN), loop_config()
    order = Order(len(rows), settings.batch_size, 5, learner.costs(store, rows))

    def tensors(own: Any) -> dict[str, torch.Tensor]:
        return {name: torch.from_numpy(array) for name, array in learner.collate(store, own).items()}

    data = SimpleNamespace(store=store, order=order, inputs_of=tensors)
    model, state = fresh(), State(micro_batch=3)
    setup = setup_of(model, data, settings, objective=Objective(model, learner), learner=learner)
    train(dataclasses.replace(setup, rows=rows), state, Quiet())

    weights = {part["name"]: part.get("lossWeight", 1.0) for part in THREE}
    batches = []
    for step in range(50):
        batch = rows[order.batch(step)]
        found = []
        for number, (name, weight) in enumerate(weights.items()):
            own = batch[store.values("task", batch) == number]
            if len(own):
                inputs = {key.partition("/")[2]: value for key, value in tensors(own).items()}
                if inputs["labels"].dtype == torch.uint8 or name == "length":
                    inputs["labels"] = inputs["labels"].to(dtype)
                found.append((name, weight * len(own) / len(batch), inputs))
        batches.append(found)
    assert {name for found in batches for name, _, _ in found} == weights.keys()
    other = fresh()
    assert state.losses == pytest.approx(reference(other, batches, settings), rel=tolerance)
    assert state.losses[-1] < state.losses[0]
    if dtype is torch.float64:
        theirs = dict(other.named_parameters())
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter, theirs[name], rtol=1e-7, atol=1e-10)
