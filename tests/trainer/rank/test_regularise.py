"""Dropout, the running mean, the pull towards the base, noise on embeddings, recomputed activations."""

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.trainer.memory import learner_of
from tests.trainer.rank.architectures import inputs_for, make
from tests.trainer.rank.test_loop import Data, Quiet, config, model_in, setup_of
from tests.trainer.rank.test_rank import wait_for_records

from finetune_trainer.base_model import DROPOUTS
from finetune_trainer.checkpoint import State
from finetune_trainer.ema import Ema
from finetune_trainer.loop import seed_all, train
from finetune_trainer.model import ModelError, load, recompute_activations
from finetune_trainer.regularise import Anchor, add_noise
from finetune_trainer.tasks.text_classification import ONE

LEARNER = learner_of(labels=["a", "b"], form=ONE)


# --- dropout ---


@pytest.mark.parametrize("name", ["bert", "roberta", "albert", "distilbert", "gpt2", "llama", "t5", "bart", "vit"])
def test_the_names_of_dropout_reach_every_architecture(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a training pass, whatever is called asks for the one rate."""
    functional = torch.nn.functional
    plain, attention, asked = functional.dropout, functional.scaled_dot_product_attention, set()

    def watch(states: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
        asked.add(p if training else 0.0)
        return plain(states, p, training, inplace)

    def watch_attention(*given: Any, dropout_p: float = 0.0, **more: Any) -> torch.Tensor:
        asked.add(dropout_p)
        return attention(*given, dropout_p=dropout_p, **more)

    monkeypatch.setattr(functional, "dropout", watch)
    monkeypatch.setattr(functional, "scaled_dot_product_attention", watch_attention)
    names = DROPOUTS & make(name).config.to_dict().keys()
    make(name, **dict.fromkeys(names, 0.375)).train()(**inputs_for(name))
    assert asked == {0.375}


def test_the_documents_dropout_takes_the_place_of_the_models(tiny_base: Path) -> None:
    def rates(dropout: float | None) -> set[float]:
        model = load(tiny_base, learner=LEARNER, seed=1, dropout=dropout).model
        return {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)}

    assert rates(None) == {0.1}
    assert rates(0.25) == {0.25}
    assert rates(0.0) == {0.0}


# --- the running mean ---


def test_the_mean_is_what_its_formula_says() -> None:
    model = torch.nn.Linear(1, 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        model.weight.fill_(1.0)
    mean, wanted = Ema(model, decay=0.5), 1.0
    for step, value in enumerate((2.0, 4.0, 8.0, -3.0, 5.0, 6.0, 7.0, 8.0, 9.0, 9.5), start=1):
        with torch.no_grad():
            model.weight.fill_(value)
        mean.update(step)
        kept = min(0.5, (1 + step) / (10 + step))
        wanted = kept * wanted + (1 - kept) * value
    assert mean.snapshot()["weight"].item() == pytest.approx(wanted, rel=1e-12)
    with mean.in_place():
        assert model.weight.item() == pytest.approx(wanted, rel=1e-12)
    with pytest.raises(ZeroDivisionError), mean.in_place():
        raise ZeroDivisionError
    assert model.weight.item() == 9.5
    assert mean.snapshot()["weight"].item() == pytest.approx(wanted, rel=1e-12)


def test_only_what_trains_has_a_mean() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2).requires_grad_(False), torch.nn.Linear(2, 2))
    assert set(Ema(model, decay=0.9).snapshot()) == {"1.weight", "1.bias"}


# --- the pull towards the base ---


def test_the_pull_is_the_papers_penalty_for_sgd(tiny_base: Path) -> None:
    settings = config(max_steps=6, optimizer="sgd", learning_rate=0.05, max_grad_norm=1e9, weight_decay=0.25)
    alpha, fresh = 0.4, {"classifier.weight", "classifier.bias"}
    data = Data()

    ours = model_in(tiny_base, dtype=torch.float64, dropout=False)
    anchor = Anchor(ours, alpha=alpha, fresh=fresh)
    setup = setup_of(ours, data, settings, anchored=anchor.names)
    setup.after_step = lambda step: anchor.pull(setup.optimizer)
    train(setup, State(micro_batch=8), Quiet())

    theirs = model_in(tiny_base, dtype=torch.float64, dropout=False).train()
    base = {name: p.detach().clone() for name, p in theirs.named_parameters()}
    for step in range(6):
        inputs = data.inputs_of(data.order.batch(step))
        labels = inputs.pop("labels")
        loss = torch.nn.functional.cross_entropy(theirs(**inputs).logits, labels)
        rate = setup_rate(settings, step)
        gradients = torch.autograd.grad(loss, list(theirs.parameters()), allow_unused=True)
        with torch.no_grad():
            for (name, p), gradient in zip(theirs.named_parameters(), gradients, strict=True):
                if name in fresh:
                    penalty = settings.weight_decay * p if p.ndim > 1 else torch.zeros_like(p)
                else:
                    penalty = torch.zeros_like(p)
                p.sub_(rate * ((gradient if gradient is not None else 0.0) + penalty))
                if name not in fresh:
                    p.sub_(rate * alpha * (p - base[name]))
    for one, two in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)


def setup_rate(settings: Any, step: int) -> float:
    from finetune_trainer.optim import learning_rate

    return learning_rate(settings, step=step, total=settings.max_steps)


def test_a_stronger_pull_stays_closer_to_the_base(tiny_base: Path) -> None:
    def distance(alpha: float) -> float:
        settings = config(max_steps=30, learning_rate=5e-3)
        model = model_in(tiny_base, dtype=torch.float32, dropout=False)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        anchor = Anchor(model, alpha=alpha, fresh={"classifier.weight", "classifier.bias"})
        setup = setup_of(model, Data(), settings, anchored=anchor.names)
        setup.after_step = lambda step: anchor.pull(setup.optimizer)
        train(setup, State(micro_batch=8), Quiet())
        return sum(
            float((p.detach() - before[name]).square().sum()) for name, p in model.named_parameters() if "bert" in name
        )

    assert distance(20.0) < 0.5 * distance(1e-6)


# --- noise on the embeddings ---


def noisy_states(name: str, *, alpha: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The embeddings of a pass without noise and of one with it, and the rows' mask."""
    model, inputs = make(name), inputs_for(name)
    seen: list[torch.Tensor] = []
    reader = model.get_encoder() if model.config.is_encoder_decoder else model
    model.train()
    keep = reader.get_input_embeddings().register_forward_hook(lambda _m, _i, states: seen.append(states.detach()))
    model(**inputs)
    keep.remove()
    add_noise(model, alpha=alpha)
    reader.get_input_embeddings().register_forward_hook(lambda _m, _i, states: seen.append(states.detach()))
    torch.manual_seed(seed)
    model(**inputs)
    return seen[0], seen[-1], inputs["attention_mask"]


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "bart", "marian"])
def test_noise_is_uniform_over_the_real_tokens_of_a_row(name: str) -> None:
    before, after, mask = noisy_states(name, alpha=5.0)
    noise = (after - before).abs()
    assert float(noise[mask == 0].max()) == 0.0
    for row, real in enumerate(mask.sum(1).tolist()):
        bound = 5.0 / (real * before.shape[-1]) ** 0.5
        assert 0.8 * bound < float(noise[row].max()) <= bound * 1.0001
        assert float(noise[row][mask[row] == 1].mean()) == pytest.approx(bound / 2, rel=0.25)


def test_noise_depends_on_the_micro_batchs_seed_alone_and_is_off_in_evaluation(tiny_base: Path) -> None:
    def losses(alpha: float | None, *, micro: int = 4) -> list[float]:
        model = model_in(tiny_base, dtype=torch.float32, dropout=False)
        if alpha is not None:
            add_noise(model, alpha=alpha)
        state = State(micro_batch=micro)
        train(setup_of(model, Data(), config(max_steps=3)), state, Quiet())
        return state.losses

    assert losses(5.0) == losses(5.0) != losses(None)
    model = model_in(tiny_base, dtype=torch.float32, dropout=False).eval()
    inputs = {name: value for name, value in Data().inputs_of(np.arange(4)).items() if name != "labels"}
    before = model(**inputs).logits
    add_noise(model, alpha=5.0)
    assert torch.equal(model(**inputs).logits, before)


# --- recomputed activations ---


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "bart", "vit"])
def test_recomputed_activations_give_the_same_gradients_with_dropout_on(name: str) -> None:
    changed = {"attention_dropout": 0.2} if name == "llama" else {}

    def gradients(recompute: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
        model = make(name, **changed).double().train()
        if recompute:
            recompute_activations(model)
        seed_all(3)
        given = inputs_for(name).items()
        logits = model(**{key: value.double() if value.is_floating_point() else value for key, value in given}).logits
        logits.square().sum().backward()
        return logits.detach(), [p.grad for p in model.parameters() if p.grad is not None]

    (plain, kept), (logits, again) = gradients(False), gradients(True)
    torch.testing.assert_close(plain, logits, rtol=1e-9, atol=1e-12)
    assert len(kept) == len(again)
    for one, two in zip(kept, again, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)


def test_recomputed_activations_give_adapters_the_same_gradients() -> None:
    from finetune_api.contract import MethodConfig
    from finetune_trainer import adapt
    from finetune_trainer.model import Loaded

    def gradients(recompute: bool) -> dict[str, torch.Tensor]:
        method = adapt.get(MethodConfig(type="lora", rank=2, alpha=4.0, dropout=0.3))
        model = method.prepare(Loaded(make("bert").double(), frozenset()), seed=1).train()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.fill_(0.1)
        if recompute:
            recompute_activations(model)
        seed_all(3)
        model(**inputs_for("bert")).logits.square().sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain, again = gradients(False), gradients(True)
    assert plain.keys() == again.keys()
    assert any("lora_A" in name for name in plain)
    for name, gradient in plain.items():
        torch.testing.assert_close(gradient, again[name], rtol=1e-9, atol=1e-12)


def test_a_pass_with_recomputed_activations_keeps_less(tiny_base: Path) -> None:
    def kept(recompute: bool) -> int:
        model, sizes = model_in(tiny_base, dtype=torch.float32, dropout=True).train(), []
        if recompute:
            recompute_activations(model)
        inputs = {name: value for name, value in Data().inputs_of(np.arange(16)).items() if name != "labels"}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            model(**inputs)
        return sum(sizes)

    assert kept(True) < 0.5 * kept(False)


def test_a_model_that_cannot_recompute_is_refused() -> None:
    model = make("bert")
    type(model).supports_gradient_checkpointing, before = False, type(model).supports_gradient_checkpointing
    try:
        with pytest.raises(ModelError, match="BertForSequenceClassification cannot do it: leave it out"):
            recompute_activations(model)
    finally:
        type(model).supports_gradient_checkpointing = before


# --- all together, in whole runs ---


def test_a_killed_run_with_everything_on_ends_in_the_same_bytes(make_run: Any, rows: Any, tmp_path: Path) -> None:
    spec: dict[str, Any] = {
        "training": {
            "maxSteps": 12,
            "batchSize": 16,
            "microBatch": 8,
            "learningRate": 3e-3,
            "evaluateEvery": {"steps": 5},
            "layerwiseDecay": 0.8,
            "dropout": 0.2,
            "ema": {"decay": 0.9},
            "l2sp": {"alpha": 0.1},
            "neftune": {"alpha": 5.0},
            "gradientCheckpointing": True,
        },
        "checkpoint": {"every": {"steps": 2}},
    }
    calm = make_run(rows(120), name="calm", **spec)
    code, log = calm.run(tmp_path / "work-calm")
    assert code == 0, log
    made = make_run(rows(120), name="killed", **spec)
    started = made.start(tmp_path / "work-killed")
    wait_for_records(made, 3)
    started.kill(signal.SIGKILL)
    assert started.wait() == -9
    code, log = made.run(tmp_path / "work-last")
    assert code == 0, log
    assert "going on from the checkpoint of step" in log
    for name in ("weights.safetensors", "optimizer.safetensors", "state.json"):
        assert made.last(name).read_bytes() == calm.last(name).read_bytes()
    assert made.published()["outcome"]["model"]["digest"] == calm.published()["outcome"]["model"]["digest"]

    best = made.published()["outcome"]["best"]
    assert made.published()["outcome"]["evaluation"]["tuned"]["f1"] == pytest.approx(best["value"], abs=1e-4)
    assert json.loads((made.model() / "config.json").read_text())["use_cache"]


def test_the_mean_is_published(make_run: Any, rows: Any, tmp_path: Path) -> None:
    made = make_run(
        rows(60),
        training={"maxSteps": 4, "batchSize": 16, "learningRate": 1e-2, "ema": {"decay": 0.5}},
        output={"weights": "Last"},
    )
    code, log = made.run(tmp_path / "work")
    assert code == 0, log
    published = load_file(made.model() / "model.safetensors")
    raw, kept = load_file(made.last("weights.safetensors")), load_file(made.last("optimizer.safetensors"))
    for name in raw:
        assert torch.equal(published[name], kept[f"/mean/{name}"])
    assert not torch.equal(published["classifier.weight"], raw["classifier.weight"])
