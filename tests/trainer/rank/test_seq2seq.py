"""Runs of summarization and translation, on tiny encoder-decoders."""

import random
from pathlib import Path
from typing import Any

import pytest
from tests.trainer.rank import writers
from tests.trainer.rank.conftest import WORDS

TRAINING: dict[str, Any] = {"maxSteps": 30, "batchSize": 16, "learningRate": 1e-2}


def translations(count: int, *, seed: int = 0) -> list[dict[str, str]]:
    """Some words, and the same backwards."""
    draw = random.Random(seed)
    chosen = [draw.choices(WORDS, k=draw.randint(1, 5)) for _ in range(count)]
    return [{"source": " ".join(words), "target": " ".join(reversed(words))} for words in chosen]


@pytest.mark.parametrize("strategy", ["greedy", "beam"])
def test_a_published_model_writes_what_was_measured(make_run: Any, tmp_path: Path, strategy: str) -> None:
    base = writers.save(tmp_path / "base", "t5")
    generation = {"strategy": strategy, "maxNewTokens": 7}
    made = make_run(
        translations(100), base=base, task={"type": "translation"}, training=TRAINING, generation=generation
    )
    code, log = made.run(tmp_path / "work")
    assert code == 0, log
    from sacrebleu import corpus_bleu
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    model = AutoModelForSeq2SeqLM.from_pretrained(made.model()).eval()
    assert model.generation_config.num_beams == (4 if strategy == "beam" else 1)
    assert model.generation_config.max_new_tokens == 7
    reader = AutoTokenizer.from_pretrained(made.model())
    rows = translations(100)[9::10]
    written = [
        reader.decode(model.generate(**reader(row["source"], return_tensors="pt"))[0], skip_special_tokens=True)
        for row in rows
    ]
    evaluation = made.published()["outcome"]["evaluation"]
    wanted = corpus_bleu(written, [[row["target"] for row in rows]]).score
    assert evaluation["tuned"]["bleu"] == pytest.approx(wanted, rel=1e-4)
    copied = corpus_bleu([row["source"] for row in rows], [[row["target"] for row in rows]]).score
    assert evaluation["trivial"] == {"bleu": pytest.approx(copied, rel=1e-4), "chrf": evaluation["trivial"]["chrf"]}
    assert evaluation["base"]["loss"] > evaluation["tuned"]["loss"]
