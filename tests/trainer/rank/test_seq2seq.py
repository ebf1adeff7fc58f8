"""Encoder-decoders: losses, generation, methods, and whole runs."""

import json
import random
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.trainer.memory import Memory, learner_of
from tests.trainer.rank import writers
from tests.trainer.rank.peers import losses_of_trainer
from tests.trainer.rank.test_loop import Data, Quiet, config, setup_of
from tests.trainer.writers import ALPHA, BEGIN, END, ENGLISH, GERMAN, PAD, STARTS, UNKNOWN, WORDS, tokenizer

from finetune_api.contract import GenerationConfig, MethodConfig
from finetune_trainer import adapt
from finetune_trainer.checkpoint import State
from finetune_trainer.evaluate import Evaluator
from finetune_trainer.loop import Objective, train
from finetune_trainer.model import Loaded
from finetune_trainer.tasks import Learner
from finetune_trainer.tasks.generated import set_decoding
from finetune_trainer.world import World

KINDS = ("t5", "bart", "marian", "mbart", "mbart50")
TRAINING: dict[str, Any] = {"maxSteps": 30, "batchSize": 16, "learningRate": 1e-2}


def translations(count: int, *, seed: int = 0) -> list[dict[str, str]]:
    """Some words, and the same backwards."""
    draw = random.Random(seed)
    chosen = [draw.choices(WORDS, k=draw.randint(1, 5)) for _ in range(count)]
    return [{"source": " ".join(words), "target": " ".join(reversed(words))} for words in chosen]


def store_of(rows: list[dict[str, str]]) -> Memory:
    def ids(text: str) -> list[int]:
        return [*(ALPHA + WORDS.index(word) for word in text.split()), END]

    return Memory(
        input_ids=[ids(row["source"]) for row in rows],
        target_ids=[ids(row["target"]) for row in rows],
        reference=[np.frombuffer(row["target"].encode(), np.uint8) for row in rows],
    )


def learner_for(kind: str, base: Path, *, strategy: str = "greedy", beams: int | None = None) -> Learner:
    start = STARTS.get(kind, GERMAN)
    facts = {"start": start, "end": END, "forced": ENGLISH if kind == "mbart50" else None, "limit": 40}
    generation = {"strategy": strategy, "maxNewTokens": 6, **({"beams": beams} if beams else {})}
    return learner_of("translation", {"generation": generation}, more=facts, pad_token_id=PAD, base=base)


def tensors(arrays: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tokenizer alone."""
    directory = tmp_path_factory.mktemp("words")
    tokenizer("mbart").save(str(directory / "tokenizer.json"))
    return directory


# --- losses ---


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_models_own(kind: str, words: Path) -> None:
    model, learner, store = writers.model_of(kind).double(), learner_for(kind, words), store_of(translations(7))
    rows = np.arange(7)
    inputs = tensors(learner.collate(store, rows))
    ours = learner.loss(model, inputs) / learner.count(store, rows)
    torch.testing.assert_close(ours, model(**inputs).loss, rtol=1e-12, atol=0)
    with torch.no_grad():
        outcomes = learner.predict(model, inputs, generate=False)
    assert outcomes["loss"].sum() / outcomes["count"].sum() == pytest.approx(float(ours), rel=1e-12)
    if STARTS.get(kind) is not None:  # our decoder inputs are what the model makes of labels
        without = {name: value for name, value in inputs.items() if name != "decoder_input_ids"}
        torch.testing.assert_close(model(**without).loss, model(**inputs).loss, rtol=1e-12, atol=0)


def test_token_accuracy_is_a_share_of_the_targets_tokens(words: Path) -> None:
    model, learner, store = writers.model_of("t5"), learner_for("t5", words), store_of(translations(9))
    inputs = tensors(learner.collate(store, np.arange(9)))
    with torch.no_grad():
        metrics = learner.metrics(learner.predict(model, inputs, generate=False))
    known = inputs["labels"] != -100
    right = (model(**inputs).logits.argmax(-1) == inputs["labels"])[known]
    assert metrics["token-accuracy"] == pytest.approx(float(right.double().mean()))
    assert set(metrics) == {"token-accuracy", "loss"}


@pytest.mark.parametrize(
    ("kind", "dtype", "tolerance", "micro"),
    [
        ("bart", torch.float64, 1e-9, 3),
        ("bart", torch.float32, 1e-5, 3),
        ("t5", torch.float64, 1e-9, 8),  # whose norms are in fp32 always, so that the cut into micro-batches shows
    ],
)
def test_fifty_steps_equal_those_of_the_trainer(
    kind: str, dtype: torch.dtype, tolerance: float, micro: int, words: Path, tmp_path: Path
) -> None:
    settings, learner = config(max_steps=50, learning_rate=3e-3), learner_for(kind, words)

    data = Data()
    data.store = store_of(translations(83))
    data.inputs_of = lambda rows: tensors(learner.collate(data.store, rows))  # type: ignore[method-assign]

    def model() -> Any:
        found = writers.model_of(kind).to(dtype)
        for module in found.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            if hasattr(module, "dropout") and isinstance(module.dropout, float):
                module.dropout = 0.0
        return found.train()

    ours, state = model(), State(micro_batch=micro)
    setup = setup_of(ours, data, settings, objective=Objective(ours, learner))
    train(replace(setup, shares=lambda rows: [(rows, learner.count(data.store, rows))]), state, Quiet())
    batches = [data.inputs_of(data.order.batch(step)) for step in range(50)]
    theirs = losses_of_trainer(model(), batches, settings, work=tmp_path)
    assert state.losses == pytest.approx(theirs, rel=tolerance)
    assert state.losses[-1] < state.losses[0]


# --- what is written ---


def written(model: Any, learner: Learner, rows: list[dict[str, str]]) -> list[str]:
    """By one rank, through the evaluator."""
    evaluator = Evaluator(learner, store_of(rows), World(), torch.no_grad, lambda: None)
    inputs = store_of(rows)
    outcomes = evaluator.outcomes(
        model, np.arange(len(rows)), inputs_of=lambda chosen: tensors(learner.collate(inputs, chosen))
    )
    texts: list[str] = outcomes["hypothesis"][np.argsort(outcomes["place"])].tolist()
    return texts


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beams", [None, 3])
def test_texts_are_what_generate_gives_for_each_row_alone(kind: str, beams: int | None, words: Path) -> None:
    torch.manual_seed(1)
    model, rows = writers.model_of(kind), translations(9)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0.0, 1.0)  # so that what is written depends on what is read
    model.generation_config.suppress_tokens = [PAD, UNKNOWN, BEGIN, *range(ALPHA + len(WORDS), 60)]
    plain = {name: getattr(model.generation_config, name) for name in ("pad_token_id", "suppress_tokens")}
    learner = learner_for(kind, words, strategy="beam" if beams else "greedy", beams=beams)
    learner.set_up(model, final=True)
    texts = written(model, learner, rows)
    theirs = writers.model_of(kind)
    theirs.load_state_dict(model.state_dict())
    start, forced = STARTS.get(kind, GERMAN), ENGLISH if kind == "mbart50" else None
    for number, text in enumerate(texts):
        (ids,) = store_of(rows).each("input_ids", np.array([number]))
        found = theirs.generate(
            input_ids=torch.from_numpy(ids.astype(np.int64))[None],
            num_beams=beams or 1,
            do_sample=False,
            max_new_tokens=6,
            decoder_start_token_id=start,
            forced_bos_token_id=forced,
            eos_token_id=END,
            **plain,
        )
        assert text == tokenizer("mbart").decode(found[0].tolist()).strip()
    assert len(set(texts)) > 1


def test_evaluations_in_training_are_greedy_and_nothing_is_drawn_at_random() -> None:
    model = writers.model_of("bart")
    for name, value in {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "no_repeat_ngram_size": 3}.items():
        setattr(model.generation_config, name, value)
    decoding = GenerationConfig(strategy="beam", beams=5, max_new_tokens=90, length_penalty=0.5)
    set_decoding(model, decoding, final=False, limit=40)
    settings = model.generation_config
    assert (settings.num_beams, settings.do_sample, settings.max_new_tokens) == (1, False, 40)
    assert (settings.temperature, settings.top_p, settings.length_penalty) == (None, None, None)
    set_decoding(model, decoding, final=True)
    assert (settings.num_beams, settings.length_penalty, settings.max_new_tokens) == (5, 0.5, 90)
    assert settings.no_repeat_ngram_size == 3, "what the document does not set stays the base's"
    settings.validate(strict=True)


def test_a_sign_of_life_is_given_with_every_token(words: Path) -> None:
    model, rows = writers.model_of("t5"), translations(3)
    learner, store, signs = learner_for("t5", words), store_of(translations(3)), [0, 0]

    def count(place: int) -> None:
        signs[place] += 1

    learner.set_up(model, final=True)
    model.generation_config.min_new_tokens = 6
    evaluator = Evaluator(learner, store, World(), torch.no_grad, lambda: count(0), lambda: count(1))
    evaluator.outcomes(model, np.arange(3), inputs_of=lambda chosen: tensors(learner.collate(store, chosen)))
    assert signs == [1, 1 + 6]
    model(**tensors(learner.collate(store, np.arange(len(rows)))))
    assert signs == [1, 1 + 6], "not beyond the evaluation"


METHODS = {
    "lora": {"rank": 2, "alpha": 4.0, "dropout": 0.0},
    "dora": {"rank": 2, "alpha": 4.0, "dropout": 0.0},
    "ia3": {},
    "adapter": {"reduction": 4, "variant": "pfeiffer"},
    "prompt": {"virtual_tokens": 3},
    "prefix": {"virtual_tokens": 3},
}


@pytest.mark.parametrize("kind", ["t5", "bart"])
@pytest.mark.parametrize("name", METHODS)
def test_texts_can_be_written_through_each_method(kind: str, name: str, words: Path) -> None:
    model, learner, rows = writers.model_of(kind), learner_for(kind, words), translations(5)
    learner.set_up(model, final=True)
    plain = written(model, learner, rows)
    method = adapt.get(MethodConfig(type=name, **METHODS[name]))
    tuned = method.prepare(Loaded(model, frozenset()), seed=1)
    texts = written(tuned, learner, rows)
    assert len(texts) == 5
    if name in ("lora", "dora", "ia3", "adapter"):  # which begin by changing nothing
        assert texts == plain
    batch = tensors(learner.collate(store_of(rows), np.arange(5)))
    learner.loss(tuned, batch).backward()


# --- runs ---


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
    texts = [
        reader.decode(model.generate(**reader(row["source"], return_tensors="pt"))[0], skip_special_tokens=True)
        for row in rows
    ]
    evaluation = made.published()["outcome"]["evaluation"]
    wanted = corpus_bleu(texts, [[row["target"] for row in rows]]).score
    assert evaluation["tuned"]["bleu"] == pytest.approx(wanted, rel=1e-4)
    copied = corpus_bleu([row["source"] for row in rows], [[row["target"] for row in rows]]).score
    assert evaluation["trivial"] == {"bleu": pytest.approx(copied, rel=1e-4), "chrf": evaluation["trivial"]["chrf"]}
    assert evaluation["base"]["loss"] > evaluation["tuned"]["loss"]


def test_a_stopped_run_ends_as_an_undisturbed_one_and_adapters_say_how_to_write(make_run: Any, tmp_path: Path) -> None:
    base = writers.save(tmp_path / "base", "bart")
    spec: dict[str, Any] = {
        "base": base,
        "task": {"type": "summarization", "columns": {"text": "source", "summary": "target"}},
        "training": {**TRAINING, "maxSteps": 12, "evaluateEvery": {"steps": 6}},
        "method": {"type": "lora", "rank": 2},
        "generation": {"strategy": "beam", "beams": 2, "maxNewTokens": 5},
        "checkpoint": {"every": {"steps": 100}},
    }
    calm = make_run(translations(80), name="calm", **spec)
    assert calm.run(tmp_path / "calm-work")[0] == 0
    made = make_run(translations(80), name="stopped", **spec)
    stop = ("finetune_trainer.training", "Duties", "due", 8, signal.SIGTERM.value)
    code, log = made.run(tmp_path / "work", stop=stop)
    assert code == 45, log
    code, log = made.run(tmp_path / "work-again")
    assert code == 0, log
    assert made.losses() == calm.losses()
    assert made.published()["outcome"]["model"]["digest"] == calm.published()["outcome"]["model"]["digest"]
    settings = json.loads((made.model() / "generation_config.json").read_text())
    assert (settings["num_beams"], settings["max_new_tokens"]) == (2, 5)
    assert (made.model() / "adapter_config.json").exists()
    assert set(made.published()["outcome"]["evaluation"]["trivial"]) == {"rouge-1", "rouge-2", "rouge-l"}
