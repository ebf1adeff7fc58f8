"""Freezing and gradual unfreezing: what trains at which step."""

import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.trainer.rank.architectures import ARCHITECTURES, inputs_for, make

from finetune_api.contract import MethodConfig
from finetune_trainer import adapt, checkpoint
from finetune_trainer.layers import layer_numbers
from finetune_trainer.model import Loaded, ModelError

FAST = {"epochs": 1.0, "batchSize": 16, "microBatch": 8, "learningRate": 5e-3, "evaluateEvery": {"steps": 7}}


def prepared(name: str, *, fresh: frozenset[str] = frozenset(), **fields: Any) -> tuple[adapt.Method, Any]:
    method = adapt.get(MethodConfig(type="full", **fields))
    return method, method.prepare(Loaded(make(name), fresh), seed=1)


def training(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_embeddings_and_first_blocks_stay_frozen(name: str) -> None:
    _, model = prepared(name, freeze_embeddings=True, freeze_layers=1)
    numbers = layer_numbers(model)
    assert training(model) == {key for key, number in numbers.items() if number > 1}
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(checkpoint.trainable(model).values(), lr=0.1)
    model.train()
    answers = model(**inputs_for(name))
    (answers.start_logits + answers.end_logits if name == "distilbert" else answers.logits).square().sum().backward()
    optimizer.step()
    changed = {key for key, parameter in model.named_parameters() if not torch.equal(parameter, before[key])}
    assert changed
    assert changed <= training(model)


def test_patterns_freeze_parameters_and_whole_modules() -> None:
    _, model = prepared("bert", freeze_patterns=["bert.pooler", "*.attention.self.query.bias"])
    frozen = {name for name, _ in model.named_parameters()} - training(model)
    assert frozen == {
        "bert.pooler.dense.weight",
        "bert.pooler.dense.bias",
        "bert.encoder.layer.0.attention.self.query.bias",
        "bert.encoder.layer.1.attention.self.query.bias",
    }


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"freeze_patterns": ["bert.decoder"]},
            r"patterns: bert.decoder matches no parameter .* bert\.encoder\.layer\.\*",
        ),
        ({"freeze_layers": 3}, "layers: BertForSequenceClassification has 2 layers, 3 cannot be frozen"),
        ({"freeze_patterns": ["classifier"]}, "classifier.weight would be frozen, but the base model has no such"),
        ({"freeze_patterns": ["*"]}, "would be frozen"),
    ],
)
def test_freezing_that_makes_no_sense_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        prepared("bert", fresh=frozenset({"classifier.weight"}), **fields)


def test_nothing_left_to_train_is_refused() -> None:
    with pytest.raises(ModelError, match="nothing is left to train"):
        prepared("bert", freeze_patterns=["*"])


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "resnet"])
def test_what_trains_grows_downwards_at_known_steps(name: str) -> None:
    method, model = prepared(name, unfreeze_every_steps=10, freeze_embeddings=True)
    numbers = layer_numbers(model)
    wanted = {0: {3}, 9: {3}, 10: {3, 2}, 19: {3, 2}, 20: {3, 2, 1}, 1000: {3, 2, 1}}
    assert set(checkpoint.trainable(model)) == {key for key, number in numbers.items() if number}
    for step in (0, 9, 10, 19, 20, 1000, 10, 0):  # also backwards: a step is all that counts
        method.before_step(model, step)
        assert training(model) == {key for key, number in numbers.items() if number in wanted[step]}
        assert set(checkpoint.trainable(model)) == {key for key, number in numbers.items() if number}


SPEC: dict[str, Any] = {
    "method": {"type": "full", "unfreeze": {"everySteps": 4}},
    "training": FAST,
    "checkpoint": {"every": {"steps": 2}},
}


def test_a_killed_run_with_unfreezing_ends_in_the_same_weights(make_run: Any, rows: Any, tmp_path: Path) -> None:
    calm = make_run(rows(300), name="calm", **SPEC)
    assert calm.run(tmp_path / "work-calm")[0] == 0
    made = make_run(rows(300), name="killed", **SPEC)
    started = made.start(tmp_path / "work-first")
    while "checkpoint" not in made.kinds():
        time.sleep(0.02)
    started.kill(signal.SIGKILL)
    started.wait()
    code, log = made.run(tmp_path / "work-second")
    assert code == 0, log
    assert "going on from the checkpoint of step" in log
    assert made.losses() == calm.losses()
    assert made.last(checkpoint.WEIGHTS).read_bytes() == calm.last(checkpoint.WEIGHTS).read_bytes()
    assert set(load_file(made.last(checkpoint.WEIGHTS))) >= {"bert.embeddings.word_embeddings.weight"}


def test_two_ranks_unfreeze_like_one(make_run: Any, rows: Any, tmp_path: Path, free_port: int) -> None:
    single = make_run(rows(300), name="single", **SPEC)
    assert single.run(tmp_path / "work-single")[0] == 0
    double = make_run(rows(300), name="double", **SPEC)
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port), "LOCAL_WORLD_SIZE": "2"}
    both = [double.start(tmp_path / "work", RANK=str(rank), LOCAL_RANK=str(rank), **group) for rank in (0, 1)]
    assert [started.wait() for started in both] == [0, 0], "\n".join(started.log for started in both)
    assert double.losses() == pytest.approx(single.losses(), rel=1e-5)


def test_the_result_says_how_many_parameters_trained(make_run: Any, rows: Any, tmp_path: Path) -> None:
    made = make_run(
        rows(40),
        method={"type": "lora", "rank": 2, "targets": ["query"]},
        training={"maxSteps": 1, "batchSize": 8},
        output={"merge": True},
    )
    code, log = made.run(tmp_path / "work")
    assert code == 0, log
    model = made.published()["outcome"]["model"]
    head, additions = 3 * 32 + 3, 2 * 2 * (2 * 32)
    pooler = 32 * 32 + 32 if "bert.pooler" in str(list(load_file(made.last(checkpoint.WEIGHTS)))) else 0
    assert model["trainableParameters"] == head + additions + pooler
    total = sum(tensor.numel() for tensor in load_file(made.model() / "model.safetensors").values())
    assert model["parameters"] == total + additions
    card = (made.model() / "README.md").read_text()
    assert f"{model['trainableParameters']:,} of {model['parameters']:,} parameters trained" in card
