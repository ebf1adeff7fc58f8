"""Instruction tuning with real tensors: TRL's losses, answers, whole runs."""

import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.trainer.memory import Memory, config_of
from tests.trainer.rank.lm import BOS, END, EOS, make_lm, save_lm, save_tokenizer
from tests.trainer.rank.peers import losses_of_sft
from tests.trainer.rank.test_causal_lm import exact, fifty_steps
from tests.trainer.rank.test_loop import config

from finetune_trainer import tasks
from finetune_trainer.checkpoint import OPTIMIZER, STATE, WEIGHTS
from finetune_trainer.tasks import Facts

ANIMALS = {"red": "cat", "green": "dog", "blue": "cat"}


def chats(count: int) -> list[dict[str, Any]]:
    """What an animal likes is asked for in two ways; the colour decides."""
    draw = random.Random(0)
    found = []
    for number in range(count):
        colour = draw.choice(list(ANIMALS))
        question = draw.choice(("{}: the {} sees?", "{}: who likes the {}?")).format(number, colour)
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": f"the {ANIMALS[colour]}"}]
        found.append({"messages": messages})
    return found


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_lm(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def store() -> Memory:
    """Rows of 6 to 20 tokens whose last ones are learned."""
    draw = np.random.default_rng(3)
    texts = [draw.integers(6, 60, size).astype(np.int32) for size in draw.integers(6, 21, 90)]
    turns = [int(draw.integers(2, len(text) - 1)) for text in texts]
    learned = [(np.arange(len(text)) >= turn).astype(np.uint8) for text, turn in zip(texts, turns, strict=True)]
    return Memory(input_ids=texts, learned=learned, turn=turns)


def learner_at(base: Path = Path(), **generation: Any) -> Any:
    facts = Facts(more={"ends": [END, EOS], "template": None, "limit": 128, "added": False}, base=base)
    spec = {"generation": generation} if generation else {}
    return tasks.get(config_of("instruction", **spec)).learner(facts)


@pytest.mark.parametrize(("packed", "dtype", "tolerance"), [(False, torch.float64, 1e-9), (True, torch.float32, 1e-5)])
def test_fifty_steps_equal_those_of_trls_sft(
    store: Memory, tmp_path: Path, packed: bool, dtype: torch.dtype, tolerance: float
) -> None:
    settings = config(max_steps=50, learning_rate=1e-3, batch_size=4)
    save_tokenizer(tmp_path / "tokenizer")
    ours, batches = fifty_steps(learner_at(), make_lm().to(dtype), store, settings, packed=packed)
    model = make_lm().to(dtype)

    def wide(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any) -> torch.Tensor:
        return exact(outputs.logits, labels, num_items_in_batch=num_items_in_batch)

    given = [{name: value for name, value in batch.items() if name != "turn"} for batch in batches]
    loss = wide if dtype == torch.float64 else None
    theirs = losses_of_sft(model, given, settings, work=tmp_path, tokenizer=tmp_path / "tokenizer", loss=loss)
    assert ours == pytest.approx(theirs, rel=tolerance)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_answers_are_those_of_generate_for_each_row_alone(tmp_path: Path, store: Memory, kind: str) -> None:
    """Padding on the left moves no position, whether positions are turned into angles or looked up."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = save_lm(tmp_path / kind, kind)
    learner = learner_at(base, maxNewTokens=7)
    model, rows = AutoModelForCausalLM.from_pretrained(base).eval(), np.arange(12)
    learner.set_up(model, final=True)
    tokenizer = AutoTokenizer.from_pretrained(base)
    batch = {name: torch.from_numpy(array) for name, array in learner.collate(store, rows).items()}
    with torch.no_grad():
        found = learner.predict(model, batch, generate=True)["hypothesis"]
        for row in rows:
            (ids,), turn = store.each("input_ids", rows[row : row + 1]), int(store.values("turn", rows)[row])
            alone = model.generate(torch.tensor([ids[:turn].tolist()]), max_new_tokens=7, do_sample=False)
            wanted = tokenizer.decode(alone[0, turn:], skip_special_tokens=True).strip()
            assert found[row] == wanted
    assert model.generation_config.eos_token_id == [END, EOS]


SPEC: dict[str, Any] = {
    "task": {"type": "instruction"},
    "data": {"maxLength": 64},
    "generation": {"maxNewTokens": 6},
    "training": {"maxSteps": 60, "batchSize": 4, "microBatch": 2, "learningRate": 1e-2, "evaluateEvery": {"steps": 30}},
    "checkpoint": {"every": {"steps": 10}},
}


def assert_losses_of_two(double: Any, single: Any, directory: Path, port: int) -> None:
    """Two processes compute what one has computed."""
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": "2"}
    both = [double.start(directory / "double", RANK=str(rank), LOCAL_RANK=str(rank), **group) for rank in (0, 1)]
    assert [started.wait() for started in both] == [0, 0], "\n".join(started.log for started in both)
    assert double.losses() == pytest.approx(single.losses(), rel=1e-5)


def test_a_run_learns_to_answer_and_publishes_its_template(
    make_run: Any, base: Path, tmp_path: Path, free_port: int
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made = make_run(chats(120), base=base, **SPEC)
    code, log = made.run(
        tmp_path / "work", stop=("finetune_trainer.training", "Duties", "due", 13, signal.SIGTERM.value)
    )
    assert code == 45, log
    code, log = made.run(tmp_path / "work-again")
    assert code == 0, log
    assert "rows are packed into" in log
    calm = make_run(chats(120), name="calm", base=base, **SPEC)
    code, log = calm.run(tmp_path / "work-calm")
    assert code == 0, log
    for name in (WEIGHTS, OPTIMIZER, STATE):
        assert made.last(name).read_bytes() == calm.last(name).read_bytes()
    assert made.losses() == calm.losses()
    double = make_run(chats(120), name="double", base=base, **SPEC)
    assert_losses_of_two(double, calm, tmp_path, free_port)
    evaluation = made.published()["outcome"]["evaluation"]
    assert evaluation["tuned"]["exact-match"] >= 0.9
    assert evaluation["base"]["exact-match"] == 0.0
    assert 0.3 < evaluation["trivial"]["exact-match"] < 0.9
    assert evaluation["tuned"]["rouge-l"] >= evaluation["tuned"]["exact-match"]
    tokenizer = AutoTokenizer.from_pretrained(made.model())
    model = AutoModelForCausalLM.from_pretrained(made.model())
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "7: the green sees?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**asked)[0, asked["input_ids"].shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "the dog"
    assert int(answer[-1]) == END  # it stops by itself
    rows = calm.encoded
    ids = rows.each("input_ids", np.arange(1))[0]
    assert list(ids).count(BOS) == 1
