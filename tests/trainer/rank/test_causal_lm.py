"""Causal language models with real tensors: losses, packing, whole runs."""

import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.trainer.memory import Memory, learner_of
from tests.trainer.rank.lm import make_lm, save_lm
from tests.trainer.rank.peers import losses_of_trainer
from tests.trainer.rank.test_loop import Quiet, config

from finetune_api.contract import TrainingConfig
from finetune_trainer import nexttoken
from finetune_trainer.checkpoint import OPTIMIZER, STATE, WEIGHTS, State
from finetune_trainer.course import Plan
from finetune_trainer.data.batch import Encoded
from finetune_trainer.data.order import Order
from finetune_trainer.data.packing import pack
from finetune_trainer.loop import Objective, Setup, train
from finetune_trainer.model import ModelError
from finetune_trainer.nexttoken import NextToken, packing_differs
from finetune_trainer.optim import make_optimizer
from finetune_trainer.regularise import add_noise
from finetune_trainer.run import TRAIN
from finetune_trainer.world import World

STEPS = 50
LIMIT = 32
LEARNER = learner_of("causal-lm", pad_token_id=0)


@pytest.fixture(scope="module")
def store() -> Memory:
    draw = np.random.default_rng(2)
    return Memory(input_ids=[draw.integers(4, 60, size).astype(np.int32) for size in draw.integers(2, 21, 90)])


def tensors(batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in batch.items()}


def batch_of(store: Memory, rows: Any) -> dict[str, torch.Tensor]:
    return tensors(LEARNER.collate(store, np.asarray(rows)))


def fifty_steps(
    learner: Any, model: Any, store: Memory, settings: TrainingConfig, *, packed: bool = False
) -> tuple[list[float], list[Any]]:
    """The losses of the loop, and the batch of each step."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True)
    objective, optimizer = accelerator.prepare(Objective(model, learner), make_optimizer(model, settings))
    packs = pack(np.arange(90), store.lengths(np.arange(90)), limit=LIMIT) if packed else None
    rows = np.arange(90 if packs is None else len(packs))
    lengths = store.lengths(rows) if packs is None else packs.lengths(store.lengths(packs.rows))

    def inputs_of(units: Any) -> dict[str, torch.Tensor]:
        arrays = learner.collate(store, units) if packs is None else learner.collate_packs(store, packs.of(units))
        return tensors(arrays)

    setup = Setup(
        world=World(),
        accelerator=accelerator,
        objective=objective,
        optimizer=optimizer,
        parameters=list(model.parameters()),
        config=settings,
        plan=Plan(STEPS, None, "loss", False),
        order=Order(len(rows), settings.batch_size, 5, lengths),
        rows=rows,
        shares=lambda units: [
            (units, learner.count(store, units if packs is None else np.concatenate(packs.of(units))))
        ],
        inputs_of=inputs_of,
        train_mode=model.train,
        beat=lambda: None,
    )
    state = State(micro_batch=3)
    train(setup, state, Quiet())
    return state.losses, [inputs_of(setup.rows[setup.order.batch(step)]) for step in range(STEPS)]


def exact(logits: torch.Tensor, labels: torch.Tensor, **named: Any) -> torch.Tensor:
    """The loss of transformers' causal models, but in the model's own precision: theirs goes through fp32."""
    wanted, count = labels[:, 1:].flatten(), named.get("num_items_in_batch")
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), wanted, reduction="sum")
    return loss / ((wanted != -100).sum() if count is None else count)


@pytest.mark.parametrize(
    ("kind", "packed", "dtype", "tolerance"),
    [
        ("llama", False, torch.float64, 1e-9),
        ("llama", True, torch.float64, 1e-9),
        ("gpt2", True, torch.float64, 1e-9),
        ("llama", True, torch.float32, 1e-5),
    ],
)
def test_fifty_steps_equal_those_of_the_trainer(
    store: Memory, tmp_path: Path, kind: str, packed: bool, dtype: torch.dtype, tolerance: float
) -> None:
    settings = config(max_steps=STEPS, learning_rate=1e-3, batch_size=4)
    ours, batches = fifty_steps(LEARNER, make_lm(kind).to(dtype), store, settings, packed=packed)
    model = make_lm(kind).to(dtype)
    if dtype == torch.float64:
        model.loss_function = exact
    theirs = losses_of_trainer(model, batches, settings, work=tmp_path)
    assert ours == pytest.approx(theirs, rel=tolerance)
    assert ours[-1] < ours[0]


def test_chunks_of_logits_change_fifty_steps_by_less_than_2e_6(store: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(max_steps=STEPS, learning_rate=1e-3, batch_size=4)
    whole, _ = fifty_steps(LEARNER, make_lm(), store, settings)
    monkeypatch.setattr(nexttoken, "CELLS", 60 * 7)
    assert fifty_steps(LEARNER, make_lm(), store, settings)[0] == pytest.approx(whole, rel=2e-6)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "cohere", "gemma2"])
def test_losses_and_gradients_equal_those_of_all_logits(store: Memory, kind: str) -> None:
    model, next_token, inputs = make_lm(kind).double(), NextToken(), batch_of(store, [0, 1, 2])
    labels = inputs.pop("labels")
    ours = next_token.loss(model, inputs, labels)
    ours.backward()
    gradients = {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    model.zero_grad()
    logits = model(**inputs).logits
    theirs = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    theirs.backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=0)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-8, atol=1e-10)
    assert next_token._last[model] is (kind != "gemma2")  # which bends its logits


def test_scores_are_each_positions_loss_and_whether_it_was_guessed(store: Memory) -> None:
    model, inputs = make_lm(), batch_of(store, [3, 4])
    found = LEARNER.predict(model, inputs, generate=False)
    with torch.no_grad():
        logits = model(**LEARNER.model_inputs(inputs)).logits.log_softmax(-1)
    for row in range(2):
        ids = inputs["input_ids"][row, : int(inputs["attention_mask"][row].sum())]
        wanted = -sum(logits[row, at, ids[at + 1]] for at in range(len(ids) - 1))
        assert found["loss"][row] == pytest.approx(float(wanted), rel=1e-5)
        assert found["count"][row] == len(ids) - 1
        assert found["correct"][row] == sum(int(logits[row, at].argmax() == ids[at + 1]) for at in range(len(ids) - 1))


def test_a_model_that_sees_what_it_is_to_predict_is_refused(store: Memory) -> None:
    with pytest.raises(ModelError, match="BertLMHeadModel sees the tokens that it is to predict"):
        LEARNER.loss(make_lm("bert"), batch_of(store, [0, 1]))


def test_the_proof_leaves_model_and_generators_as_they_were(store: Memory) -> None:
    model = make_lm("gpt2").train()
    model.transformer.drop.eval()
    before = torch.get_rng_state()
    LEARNER.loss(model, batch_of(store, [0]))
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert not model.transformer.drop.training


def packed_and_alone(store: Memory, rows: Any) -> tuple[Any, Any]:
    """A sequence of rows with padding behind it, and each of them by itself."""
    longer = [np.arange(10), np.asarray(rows)]
    packed = {name: value[1:] for name, value in tensors(LEARNER.collate_packs(store, longer)).items()}
    return LEARNER.model_inputs(packed), [LEARNER.model_inputs(batch_of(store, [row])) for row in rows]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_packed_rows_do_not_see_one_another(store: Memory, kind: str) -> None:
    packed, alone = packed_and_alone(store, [5, 6, 7])
    assert packing_differs(make_lm(kind), packed, alone) is None


def test_a_model_that_mixes_packed_rows_is_found_out(store: Memory) -> None:
    packed, alone = packed_and_alone(store, [5, 6, 7])
    said = packing_differs(make_lm("opt"), packed, alone)
    assert said is not None
    assert said.startswith("OPTForCausalLM answers packed rows otherwise than alone")
    masked = {**packed, "attention_mask": torch.ones_like(packed["input_ids"])}
    assert packing_differs(make_lm(), masked, alone) is not None  # a mask of ones undoes it


def test_noise_on_packed_rows_is_what_each_has_by_itself(store: Memory) -> None:
    model = make_lm().train()
    add_noise(model, alpha=5.0)
    seen: list[torch.Tensor] = []
    embedding = model.get_input_embeddings()
    embedding.register_forward_hook(lambda _module, _inputs, states: seen.append(states.detach()))
    batch = LEARNER.model_inputs(tensors(LEARNER.collate_packs(store, [np.array([8, 9])])))
    LEARNER._next._last[model] = True  # type: ignore[attr-defined]  # proven already
    LEARNER.loss(model, {**batch, "labels": batch["input_ids"]})
    noise = (seen[0] - embedding.weight[batch["input_ids"]]).abs()[0]
    first, second = store.lengths(np.array([8, 9]))
    for rows, tokens in ((noise[:first], first), (noise[first:], second)):
        most = 5.0 / (tokens * 16) ** 0.5
        assert 0.8 * most < float(rows.max()) <= most


# --- whole runs ---

SPEC: dict[str, Any] = {
    "task": {"type": "causal-lm"},
    "data": {"maxLength": 32},
    "training": {"maxSteps": 12, "batchSize": 4, "microBatch": 2, "learningRate": 1e-2, "evaluateEvery": {"steps": 6}},
    "checkpoint": {"every": {"steps": 4}},
}
STEP = ("finetune_trainer.training", "Duties", "due")


def texts(count: int) -> list[dict[str, Any]]:
    draw = random.Random(0)

    def sentence() -> str:
        colour, verb = draw.choice(("red", "green", "blue")), draw.choice(("sees", "likes"))
        return f"the {colour} {draw.choice(('cat', 'dog'))} {verb} the {draw.choice(('cat', 'dog'))}"

    return [{"text": " ".join(sentence() for _ in range(draw.randint(1, 6)))} for _ in range(count)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_lm(tmp_path_factory.mktemp("llama"))


def test_a_run_learns_packs_its_rows_and_resumes_to_the_same_bytes(make_run: Any, base: Path, tmp_path: Path) -> None:
    calm = make_run(texts(80), name="calm", base=base, **SPEC)
    code, log = calm.run(tmp_path / "work-calm")
    assert code == 0, log
    assert "rows are packed into" in log
    evaluation = calm.published()["outcome"]["evaluation"]
    assert evaluation["tuned"]["perplexity"] < 0.5 * evaluation["base"]["perplexity"]
    assert set(evaluation["tuned"]) == {"loss", "perplexity", "token-accuracy", "memorisation"}
    stopped = make_run(texts(80), name="stopped", base=base, **SPEC)
    code, log = stopped.run(tmp_path / "work-0", stop=(*STEP, 7, signal.SIGTERM.value))
    assert code == 45, log
    code, log = stopped.run(tmp_path / "work-1")
    assert code == 0, log
    assert stopped.losses() == calm.losses()
    for name in (WEIGHTS, OPTIMIZER, STATE):
        assert stopped.last(name).read_bytes() == calm.last(name).read_bytes()


def test_rows_seen_more_often_share_no_sequence_with_others(make_run: Any, base: Path, tmp_path: Path) -> None:
    (tmp_path / "more.jsonl").write_text("".join(f'{{"text": "the dog likes the cat {n}"}}\n' for n in range(20)))
    spec = {**SPEC, "training": {**SPEC["training"], "epochs": 1.0, "maxSteps": None, "batchSize": 1}}
    sources = [{"uri": (tmp_path / "run" / "train.jsonl").as_uri()}, {"uri": (tmp_path / "more.jsonl").as_uri()}]
    sources[1]["weight"] = 2.0  # type: ignore[assignment]
    made = make_run(texts(30), base=base, **{**spec, "data": {**SPEC["data"], "train": sources}})
    code, log = made.run(tmp_path / "work")
    assert code == 0, log
    rows = made.encoded
    lengths = {part: rows.lengths(chosen) for part, chosen in by_source(rows).items()}
    first, second = (len(pack(np.arange(len(part)), part, limit=32)) for part in lengths.values())
    assert len(made.losses()) == first + 2 * second


def by_source(store: Encoded) -> dict[int, Any]:
    rows = store.rows(TRAIN)
    sources = store.values("source", rows)
    return {int(source): rows[sources == source] for source in np.unique(sources)}


def test_packing_is_refused_where_it_is_asked_for_and_left_out_where_it_is_not(make_run: Any, tmp_path: Path) -> None:
    base = save_lm(tmp_path / "opt", "opt")
    training = {**SPEC["training"], "maxSteps": 2}
    asked = make_run(texts(30), name="asked", base=base, **{**SPEC, "training": {**training, "packing": True}})
    code, log = asked.run(tmp_path / "work-asked")
    assert code == 42, log
    assert "training.packing: OPTForCausalLM answers packed rows otherwise than alone" in log
    unset = make_run(texts(30), name="unset", base=base, **{**SPEC, "training": training})
    code, log = unset.run(tmp_path / "work-unset")
    assert code == 0, log
    assert "rows are not packed: OPTForCausalLM" in log
