"""Training rows known by heart: what is asked for, and that it is what greedy decoding would write."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.trainer.memory import Memory, config_of, learner_of
from tests.trainer.rank import writers
from tests.trainer.rank.lm import BOS, END, EOS, WORDS, make_lm, save_lm
from tests.trainer.rank.test_seq2seq import learner_for

from finetune_trainer import tasks
from finetune_trainer.storage.commit import CURRENT, RecordKind
from finetune_trainer.tasks import Facts
from finetune_trainer.tasks.continued import CONTEXT, CONTINUATION, reproduced, spans

ROWS = 12


def tensors(arrays: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


@given(
    st.lists(st.lists(st.booleans(), min_size=120, max_size=120), min_size=1, max_size=4),
    st.lists(st.tuples(st.integers(0, 60), st.integers(-5, 60)), min_size=4, max_size=4),
)
def test_a_row_is_reproduced_when_every_token_within_its_span_is(
    hits: list[list[bool]], asked: list[tuple[int, int]]
) -> None:
    count = len(hits)
    found = spans([start for start, _ in asked[:count]], [start + size for start, size in asked[:count]])
    for number, (start, size) in enumerate(asked[:count]):
        assert found[number].tolist() == [start, start + min(max(size, 0), CONTINUATION)]
    expected = [all(row[a:b]) for row, (a, b) in zip(hits, found.tolist(), strict=True)]
    assert reproduced(np.array(hits), found).tolist() == expected


@torch.no_grad()
def written(model: Any, given: list[int], count: int) -> list[int]:
    """What greedy decoding writes behind some tokens."""
    ids = torch.tensor([given])
    config = {"do_sample": False, "max_new_tokens": count, "min_new_tokens": count, "eos_token_id": None}
    found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **config)
    return [int(token) for token in found[0, len(given) :]]


def continued(model: Any) -> tuple[list[list[int]], list[int]]:
    """Rows that go on as greedy decoding does, every second one but for a token; and where they go on."""
    draw, rows, starts = random.Random(0), [], []
    for number in range(ROWS):
        start = 8 + number
        given = [BOS, *(draw.randrange(6, 60) for _ in range(start - 1))]
        rest = written(model, given, start - 1)
        if number % 2:
            place = draw.randrange(len(rest))
            rest[place] = 6 + (rest[place] - 5) % 54
        rows.append([*given, *rest, EOS])
        starts.append(start)
    return rows, starts


def test_what_is_found_in_one_pass_is_what_greedy_decoding_would_write() -> None:
    """Without beginnings of 50 tokens a half of the row is given; the token that ends a row is not asked for."""
    model = make_lm("llama").double()
    rows, starts = continued(model)
    texts = [np.array(row, np.int32) for row in rows]
    expected = [number % 2 == 0 for number in range(ROWS)]
    places = np.arange(ROWS)

    learner, store = learner_of("causal-lm", pad_token_id=0), Memory(input_ids=texts)
    asked = learner.continuations(store, places)
    assert asked is not None
    assert asked.tolist() == [[start, 2 * start - 1] for start in starts]
    assert learner.reproduced(model, tensors(learner.collate(store, places)), asked).tolist() == expected

    # The same rows as chats whose last turn begins where they go on, with a question behind the answer.
    learned = [(np.arange(len(row)) >= start).astype(np.uint8) for row, start in zip(rows, starts, strict=True)]
    chats = Memory(input_ids=texts, learned=learned, turn=starts)
    facts = Facts(more={"ends": [END, EOS], "template": None, "limit": 128, "added": False})
    answerer = tasks.get(config_of("instruction")).learner(facts)
    assert np.array_equal(answerer.continuations(chats, places), asked)
    assert answerer.reproduced(model, tensors(answerer.collate(chats, places)), asked).tolist() == expected


def test_a_long_row_is_asked_for_fifty_tokens_after_fifty() -> None:
    learner, store = learner_of("causal-lm", pad_token_id=0), Memory(input_ids=[np.arange(400), np.arange(3)])
    asked = learner.continuations(store, np.arange(2))
    assert asked is not None
    assert asked.tolist() == [[CONTEXT, CONTEXT + CONTINUATION], [1, 2]]


@pytest.mark.parametrize("kind", ["t5", "mbart50"])
def test_a_target_is_asked_for_without_what_is_forced(kind: str, tmp_path: Path) -> None:
    model, learner = writers.model_of(kind).double().eval(), learner_for(kind, tmp_path)
    first = 0 if learner.facts.more["forced"] is None else 1
    end, start = learner.facts.more["end"], learner.facts.more["start"]
    sources = [np.array([5 + number, 6, 7 + number, end], np.int32) for number in range(6)]
    targets = []
    for number, source in enumerate(sources):
        ids = torch.tensor(source[None].astype(np.int64))
        own = [start] + ([learner.facts.more["forced"]] if first else [])
        for _ in range(5):
            with torch.no_grad():
                logits = model(input_ids=ids, decoder_input_ids=torch.tensor([own])).logits
            own.append(int(logits[0, -1].argmax()))
        if number % 2:
            own[-1] = own[-1] - 1
        targets.append(np.array([*own[1:], end], np.int32))
    store, places = Memory(input_ids=sources, target_ids=targets), np.arange(6)
    asked = learner.continuations(store, places)
    assert asked is not None
    assert asked.tolist() == [[first, 5 + first]] * 6
    found = learner.reproduced(model, tensors(learner.collate(store, places)), asked)
    assert found.tolist() == [True, False] * 3


def test_tasks_that_write_no_text_are_not_asked() -> None:
    for kind in ("text-classification", "preference", "question-answering"):
        assert learner_of(kind, more={"limit": 9}).continuations(Memory(input_ids=[[1, 2]]), np.arange(1)) is None


# --- whole runs ---


def sentences(count: int, *, seed: int) -> list[dict[str, str]]:
    """Texts of 24 words in no order."""
    draw = random.Random(seed)
    return [{"text": " ".join(draw.choice(WORDS[:8]) for _ in range(24))} for _ in range(count)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4}
    return save_lm(tmp_path_factory.mktemp("llama"), initializer_range=0.02, **sizes)


MANY: dict[str, Any] = {"maxSteps": 280, "batchSize": 20, "microBatch": 20, "learningRate": 5e-3, "packing": False}


def test_a_model_trained_for_many_epochs_on_few_rows_knows_them_by_heart(
    make_run: Any, base: Path, tmp_path: Path
) -> None:
    spec = {
        "base": base,
        "task": {"type": "causal-lm"},
        "training": {**MANY, "evaluateEvery": {"steps": 280}},
        "evaluation": {"gates": [{"metric": "memorisation", "atMost": 0.1}], "metrics": ["memorisation"]},
        "output": {"weights": "Last"},
    }
    made = make_run(sentences(22, seed=1), **spec)
    code, log = made.run(tmp_path / "work")
    assert code == 48, log
    message = made.message(tmp_path / "work")
    assert message.result is not None
    found = message.result.evaluation
    assert found.tuned is not None
    assert found.base is not None
    assert found.tuned["memorisation"] > 0.9
    assert found.base["memorisation"] == 0.0
    assert f"memorisation is {found.tuned['memorisation']:.5g}, wanted <= 0.1" in message.message
    assert any(said.startswith("The model knows training rows by heart: ") for said in found.warnings or [])
    assert not made.store.head(CURRENT)
    (evaluated,) = [record.body for record in made.records if record.kind is RecordKind.EVALUATED]
    assert evaluated["askedByHeart"] == 20, "every training row"
    low, high = evaluated["intervals"]["memorisation"]
    assert low <= found.tuned["memorisation"] <= high
    assert "| memorisation | 0.0000 |" in (made.model() / "README.md").read_text().replace("| - ", "")
    assert "memorisation" in (made.model().parent / "report.html").read_text()

    # Killed while the tuned model is measured, it comes to the same figure.
    again = make_run(sentences(22, seed=1), name="again", **spec)
    stop = ("finetune_trainer.storage.commit", "Claim", "append", 4, 9)  # checkpoint, trained, baseline, evaluated
    assert again.run(tmp_path / "first", stop=stop)[0] == -9
    assert again.kinds()[-1] == "baseline"
    assert again.run(tmp_path / "second")[0] == 48
    other = again.message(tmp_path / "second").result
    assert other is not None
    assert other.evaluation.tuned == found.tuned


def test_a_single_pass_over_many_rows_is_not_known_by_heart(make_run: Any, base: Path, tmp_path: Path) -> None:
    made = make_run(
        sentences(300, seed=2),
        base=base,
        task={"type": "causal-lm"},
        training={**MANY, "maxSteps": 8},
        evaluation={"gates": [{"metric": "memorisation", "atMost": 0.1}], "baseline": "None"},
    )
    code, log = made.run(tmp_path / "work")
    assert code == 0, log
    outcome = made.published()["outcome"]["evaluation"]
    assert outcome["tuned"]["memorisation"] == 0.0
    assert outcome["base"] is None, "which was not asked for"
    assert not any("by heart" in said for said in outcome["warnings"] or [])
    assert json.loads(made.store.read(CURRENT))["runId"] == made.record.run_id
