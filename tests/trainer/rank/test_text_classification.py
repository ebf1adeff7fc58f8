"""Text classification beyond its defaults, with real models: losses of the Trainer, two texts a row, weights."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.trainer.memory import Memory, learner_of
from tests.trainer.rank.conftest import COLOURS, WORDS
from tests.trainer.rank.peers import losses_of_ours, losses_of_trainer
from tests.trainer.rank.test_loop import config

from finetune_trainer.model import load
from finetune_trainer.tasks.text_classification import ONE


def test_fifty_steps_with_smoothed_labels_equal_those_of_the_trainer(tiny_base: Path, tmp_path: Path) -> None:
    draw = np.random.default_rng(1)
    texts = [draw.integers(4, 19, size) for size in draw.integers(3, 20, 83)]
    store = Memory(input_ids=texts, labels=draw.integers(0, 3, (83, 1)).tolist())
    learner = learner_of(spec={"training": {"labelSmoothing": 0.1}}, labels=["a", "b", "c"], form=ONE)
    settings = config(max_steps=50, label_smoothing=0.1)

    def model() -> Any:
        return load(tiny_base, learner=learner, seed=5, dropout=0.0).model.double()

    ours, batches = losses_of_ours(model(), learner, store, settings)
    theirs = losses_of_trainer(model(), batches, settings, work=tmp_path)
    assert len(theirs) == 50
    assert ours == pytest.approx(theirs, rel=1e-7)  # theirs adds up the smoothed part in single precision


def pairs(count: int) -> list[dict[str, Any]]:
    """The second text tells the label; one of them is rare."""
    draw = random.Random(1)
    found = []
    for _ in range(count):
        colour = draw.choices(COLOURS, (8, 8, 1))[0]
        first, second = (" ".join(draw.choice(WORDS) for _ in range(draw.randint(1, 6))) for _ in range(2))
        found.append({"text": f"{first} {draw.choice(COLOURS)}", "other": f"{colour} {second}", "label": colour})
    return found


def test_a_run_on_pairs_with_weighted_focal_loss_beats_the_trivial_answer(make_run: Any, tmp_path: Path) -> None:
    made = make_run(
        pairs(400),
        base=with_pairs(tmp_path),
        task={"columns": {"pair": "other"}},
        training={
            "maxSteps": 60,
            "learningRate": 5e-3,
            "loss": {"type": "focal", "gamma": 1},
            "classWeights": "balanced",
        },
    )
    assert made.record.facts["tokenTypes"]
    weights = dict(zip(made.record.labels, made.record.facts["classWeights"], strict=True))
    assert weights["blue"] > 3 * max(weights["red"], weights["green"])
    code, log = made.run(tmp_path / "work")
    assert code == 0, log
    evaluation = made.published()["outcome"]["evaluation"]
    assert evaluation["tuned"]["f1"] > evaluation["trivial"]["f1"] + 0.3, evaluation
    assert evaluation["tuned"].keys() == evaluation["probe"].keys() == evaluation["trivial"].keys()
    assert evaluation["tuned"]["loss"] < evaluation["trivial"]["loss"]


def with_pairs(directory: Path) -> Path:
    """A BERT whose tokenizer knows how two texts are put together."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *sorted({*WORDS, *COLOURS})]
    tokenizer = Tokenizer(models.WordPiece({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]").save_pretrained(directory / "pairs")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(directory / "pairs")
    return directory / "pairs"
