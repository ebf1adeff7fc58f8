"""Preferences: rows, the losses of TRL, whole runs."""

import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.trainer.memory import Memory, config_of
from tests.trainer.rank.lm import make_lm, save_lm, save_tokenizer
from tests.trainer.rank.peers import losses_of_dpo
from tests.trainer.rank.test_causal_lm import STEP, fifty_steps
from tests.trainer.rank.test_instruction import assert_losses_of_two
from tests.trainer.rank.test_loop import config
from tests.trainer.test_instruction import ANSWER, CHATML, SYSTEM, USER, refused, tools_of

from finetune_trainer import tasks
from finetune_trainer.checkpoint import OPTIMIZER, STATE, WEIGHTS
from finetune_trainer.tasks import Facts
from finetune_trainer.tasks.base import IGNORED, RowError

OTHER = {"role": "assistant", "content": "a dog"}


def task_of(**options: Any) -> Any:
    return tasks.get(config_of("preference", task=options))


def learner_of(loss: str = "sigmoid", beta: float = 0.3) -> Any:
    return task_of(loss=loss, beta=beta).learner(Facts(more={"ends": [2], "template": None, "limit": 128}))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_lm(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def store() -> Memory:
    """Pairs of chats of random tokens that begin alike."""
    draw = np.random.default_rng(4)
    ids, first, turns = [], [], []
    for _ in range(90):
        prompt = draw.integers(6, 60, draw.integers(2, 7))
        answers = [draw.integers(6, 60, draw.integers(1, 9)) for _ in range(2)]
        ids.append(np.concatenate([prompt, answers[0], prompt, answers[1]]).astype(np.int32))
        first.append(len(prompt) + len(answers[0]))
        turns.append(len(prompt))
    return Memory(input_ids=ids, chosen=first, chosen_turn=turns, rejected_turn=turns)


class WithBase:
    """The learner with what the base says beside each micro-batch."""

    def __init__(self, learner: Any, model: Any) -> None:
        self._learner, self._model = learner, model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._learner, name)

    def collate(self, store: Memory, rows: Any) -> dict[str, Any]:
        arrays = self._learner.collate(store, rows)
        inputs = {name: torch.from_numpy(array) for name, array in arrays.items()}
        with torch.no_grad():
            return {**arrays, "base": self._learner.of_base(self._model, inputs).double().numpy()}


def reference(gains: torch.Tensor, counts: torch.Tensor, *, loss: str, beta: float) -> torch.Tensor:
    """The formulas of the papers, from log-ratios and numbers of tokens [2, rows]."""
    if loss == "ipo":
        means = gains / counts
        return (means[0] - means[1] - 1 / (2 * beta)) ** 2
    margins = beta * (gains[0] - gains[1])
    return torch.relu(1 - margins) if loss == "hinge" else -torch.nn.functional.logsigmoid(margins)


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "hinge"])
def test_losses_and_gradients_are_those_of_the_papers(store: Memory, loss: str) -> None:
    base, model = make_lm().double(), make_lm(initializer_range=0.3).double()
    learner = WithBase(learner_of(loss, 0.3), base)
    inputs = {name: torch.from_numpy(array) for name, array in learner.collate(store, np.arange(7)).items()}
    ours = learner.loss(model, inputs)
    ours.backward()
    gradient = model.lm_head.weight.grad.clone()
    model.zero_grad()
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits.log_softmax(-1)
    wanted = inputs["labels"][:, 1:]
    known = wanted != IGNORED
    tokens = logits[:, :-1].gather(-1, wanted.clamp(min=0)[..., None])[..., 0] * known
    gains = tokens.sum(-1).reshape(2, -1) - inputs["base"].T
    theirs = reference(gains, known.sum(-1).reshape(2, -1), loss=loss, beta=0.3).sum()
    theirs.backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=0)
    torch.testing.assert_close(gradient, model.lm_head.weight.grad, rtol=1e-8, atol=1e-12)
    with torch.no_grad():
        found = learner.predict(model, inputs, generate=False)
    assert found["loss"].sum() == pytest.approx(float(theirs.detach()))
    assert found["margin"] == pytest.approx((0.3 * (gains[0] - gains[1])).detach().numpy())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "hinge"])
def test_fifty_steps_equal_those_of_trls_dpo(
    store: Memory, tmp_path: Path, loss: str, dtype: torch.dtype, tolerance: float
) -> None:
    settings = config(max_steps=50, learning_rate=1e-3, batch_size=4)
    save_tokenizer(tmp_path / "tokenizer")
    learner = WithBase(learner_of(loss, 0.3), make_lm().to(dtype))
    ours, batches = fifty_steps(learner, make_lm().to(dtype), store, settings)
    theirs = losses_of_dpo(
        make_lm().to(dtype), batches, settings, work=tmp_path, tokenizer=tmp_path / "tokenizer", loss=loss, beta=0.3
    )
    assert ours == pytest.approx(theirs, rel=tolerance)
    assert ours[-1] < ours[0]


def test_the_base_itself_is_of_two_minds() -> None:
    found = learner_of().metrics({"loss": np.log([2.0, 2.0]), "count": np.ones(2), "margin": np.array([1e-6, -1e-7])})
    assert found["reward-accuracy"] == 0.5
    found = learner_of().metrics({"loss": np.ones(4), "count": np.ones(4), "margin": np.array([0.0, 1.0, 2.0, -1.0])})
    assert found == {"loss": 1.0, "reward-accuracy": 0.625, "reward-margin": 0.5}


def test_a_mistake_is_a_pair_whose_rejected_answer_is_favoured() -> None:
    assert learner_of().shown({"margin": np.array([1.0, -1.0])}) == (["chosen", "chosen"], ["chosen", "rejected"])


def test_micro_batches_hold_the_chosen_chats_and_then_the_rejected_ones(store: Memory) -> None:
    batch = learner_of().collate(store, np.arange(5))
    assert len(batch["input_ids"]) == 10
    for row in range(5):
        whole = [batch["input_ids"][at][batch["attention_mask"][at] == 1].tolist() for at in (row, row + 5)]
        assert whole[0] + whole[1] == store.each("input_ids", np.array([row]))[0].tolist()
        start = int(store.values("chosen_turn", np.array([row]))[0])
        for at, ids in zip((row, row + 5), whole, strict=True):
            labels = batch["labels"][at]
            assert (labels[:start] == IGNORED).all()
            assert labels[start : len(ids)].tolist() == ids[start:]
            assert (labels[len(ids) :] == IGNORED).all()


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "who?", "chosen": "the cat", "rejected": "a dog"},
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER]},
        {"chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
    ],
)
def test_answers_are_what_is_compared(base: Path, row: dict[str, Any]) -> None:
    tools, task = tools_of(base, template=CHATML), task_of()
    assert tools.text is not None
    (pieces,) = task.encode([task.read_row(row)], tools)
    columns = pieces[0].columns
    chosen, rejected = columns["input_ids"][: columns["chosen"]], columns["input_ids"][columns["chosen"] :]
    answers = (chosen[columns["chosen_turn"] :], rejected[columns["rejected_turn"] :])
    texts = [tools.text.tokenizer.decode(ids, skip_special_tokens=False) for ids in answers]
    assert [text.rstrip() for text in texts] == ["the cat<|im_end|>", "a dog<|im_end|>"]
    assert chosen[: columns["chosen_turn"]] == rejected[: columns["rejected_turn"]]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "a", "chosen": "b"}, "the column 'rejected' is missing"),
        ({"chosen": "b", "rejected": "c"}, "the column 'prompt' is missing"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "the chosen answer and the rejected one are the same"),
        ({"prompt": "a", "chosen": 3, "rejected": "b"}, "the column 'chosen' must hold text or messages"),
        ({"prompt": "a", "chosen": "b", "rejected": " "}, "the text in the column 'rejected' is empty"),
        ({"chosen": [USER, ANSWER], "rejected": [SYSTEM, USER, OTHER]}, "the messages before the last one differ"),
    ],
)
def test_a_bad_row_is_told_from_a_good_one(row: dict[str, Any], said: str) -> None:
    with pytest.raises(RowError, match=said):
        task_of().read_row(row)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"rejected": "the cat"}, "the chosen answer and the rejected one are the same"),
        ({"chosen": ""}, "the text in the column 'chosen' is empty"),
        ({"chosen": [USER]}, "the messages in the column 'chosen' must end with one of the assistant"),
    ],
)
def test_preflight_names_file_row_and_remedy(base: Path, tmp_path: Path, bad: dict[str, Any], said: str) -> None:
    good = {"prompt": "who?", "chosen": "the cat", "rejected": "a dog"}
    found = refused(tmp_path, base, [good, {**good, **bad}], "preference")
    assert f"chats.jsonl:2: {said}; mend or remove the row" in found


def test_an_answer_that_is_cut_off_is_refused(base: Path) -> None:
    row = {"prompt": "x" * 60, "chosen": "the cat", "rejected": "a dog"}
    task = task_of()
    (found,) = task.encode([task.read_row(row)], tools_of(base, template=CHATML, limit=20))
    assert isinstance(found, RowError)
    assert "the chosen answer begins at token" in str(found)


# --- whole runs ---

SPEC: dict[str, Any] = {
    "task": {"type": "preference", "beta": 0.5},
    "data": {"maxLength": 64},
    "training": {"maxSteps": 16, "batchSize": 4, "microBatch": 2, "learningRate": 3e-3, "evaluateEvery": {"steps": 8}},
    "checkpoint": {"every": {"steps": 4}},
}


def pairs(count: int) -> list[dict[str, Any]]:
    """Cats are better than dogs."""
    draw = random.Random(0)
    return [
        {
            "prompt": f"{number}: who sees the {draw.choice(('red', 'green', 'blue'))}?",
            "chosen": "the cat",
            "rejected": "the dog",
        }
        for number in range(count)
    ]


def test_a_run_learns_what_is_preferred_and_resumes_to_the_same_bytes(
    make_run: Any, base: Path, tmp_path: Path, free_port: int
) -> None:
    calm = make_run(pairs(60), name="calm", base=base, **SPEC)
    code, log = calm.run(tmp_path / "work-calm")
    assert code == 0, log
    evaluation = calm.published()["outcome"]["evaluation"]
    assert evaluation["base"]["reward-accuracy"] == 0.5
    assert evaluation["base"]["loss"] == pytest.approx(np.log(2), abs=1e-4)
    assert evaluation["tuned"]["reward-accuracy"] > 0.9
    assert (calm.model() / "chat_template.jinja").exists()
    stopped = make_run(pairs(60), name="stopped", base=base, **SPEC)
    code, log = stopped.run(tmp_path / "work-0", stop=(*STEP, 7, signal.SIGTERM.value))
    assert code == 45, log
    code, log = stopped.run(tmp_path / "work-1")
    assert code == 0, log
    assert stopped.losses() == calm.losses()
    for name in (WEIGHTS, OPTIMIZER, STATE):
        assert stopped.last(name).read_bytes() == calm.last(name).read_bytes()
    double = make_run(pairs(60), name="double", base=base, **SPEC)
    assert_losses_of_two(double, calm, tmp_path, free_port)
