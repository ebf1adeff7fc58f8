"""Memory as predicted from shapes, against what real training steps of the same models take, tensor by tensor."""

import gc
from typing import Any

import pytest
import torch
import transformers
from tests.trainer.memory import config_of
from tests.trainer.peak import Peak

from finetune_api.contract import MethodConfig, TrainingConfig
from finetune_api.tasks import MethodType
from finetune_trainer import adapt
from finetune_trainer.adapt.base import Inputs, parameter_counts
from finetune_trainer.anatomy import FAMILIES, Unknown, anatomy
from finetune_trainer.layers import trunk_or_model
from finetune_trainer.model import Loaded, recompute_activations
from finetune_trainer.nexttoken import NextToken
from finetune_trainer.optim import make_optimizer
from finetune_trainer.predicted import FEATURE_ROWS, Batch, Prediction, predict

TOLERANCE, TOLERANCE_BF16 = 0.10, 0.20
"""CPUs cast to bf16 at other places than GPUs, for which the formulas are."""
_DIFFERENT = ("bert", "gpt2", "llama", "t5", "vit")
ROWS, TOKENS, TARGETS, LABELS, WORDS = 8, 96, 40, 5, 2000
_ENCODER = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4, "num_hidden_layers": 4}
_TEXT = {"vocab_size": WORDS, "max_position_embeddings": 160, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_BART = {
    f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in {"ffn_dim": 512, "layers": 3}.items()
}
_BART |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "d_model": 128}
_GROUPED = {**_ENCODER, **_TEXT, "num_key_value_heads": 2}
_SIZES: dict[str, dict[str, Any]] = {
    "albert": {**_ENCODER, **_TEXT, "embedding_size": 64},
    "bart": {**_BART, **_TEXT, "decoder_start_token_id": 2},
    "bert": {**_ENCODER, **_TEXT},
    "camembert": {**_ENCODER, **_TEXT},
    "deit": {**_ENCODER, "image_size": 32, "patch_size": 4},
    "distilbert": {**_TEXT, "dim": 128, "hidden_dim": 512, "n_heads": 4, "n_layers": 4},
    "electra": {**_ENCODER, **_TEXT, "embedding_size": 128},
    "gemma": {**_GROUPED, "head_dim": 32},
    "gpt2": {"vocab_size": WORDS, "n_embd": 128, "n_head": 4, "n_layer": 4, "n_positions": 160, "pad_token_id": 0},
    "gpt_neox": {**_ENCODER, **_TEXT},
    "llama": _GROUPED,
    "mbart": {**_BART, **_TEXT, "decoder_start_token_id": 2},
    "mistral": _GROUPED,
    "modernbert": {**_ENCODER, **_TEXT, "cls_token_id": 1, "sep_token_id": 2},
    "mpnet": {**_ENCODER, **_TEXT},
    "mt5": {"vocab_size": WORDS, "d_model": 128, "d_kv": 32, "d_ff": 256, "num_heads": 4, "num_layers": 3},
    "opt": {**_TEXT, "hidden_size": 128, "ffn_dim": 512, "num_attention_heads": 4, "num_hidden_layers": 4},
    "phi3": _GROUPED,
    "qwen2": _GROUPED,
    "qwen3": {**_GROUPED, "head_dim": 32},
    "roberta": {**_ENCODER, **_TEXT},
    "t5": {"vocab_size": WORDS, "d_model": 128, "d_kv": 32, "d_ff": 512, "num_heads": 4, "num_layers": 3},
    "vit": {**_ENCODER, "image_size": 32, "patch_size": 4},
    "xlm-roberta": {**_ENCODER, **_TEXT},
}
_WRITES = ("gemma", "gpt2", "gpt_neox", "llama", "mistral", "opt", "phi3", "qwen2", "qwen3")
_TRANSLATES = ("bart", "mbart", "mt5", "t5")
_SEES = ("deit", "vit")


def _model(kind: str, **changes: Any) -> Any:
    """A model with random weights, and the head its kind is for."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**_SIZES[kind], **changes})
    if kind in _WRITES:
        return transformers.AutoModelForCausalLM.from_config(config)
    if kind in _TRANSLATES:
        return transformers.AutoModelForSeq2SeqLM.from_config(config)
    config.num_labels = LABELS
    config.architectures = ["DeiTForImageClassification"] if kind == "deit" else None
    images = transformers.AutoModelForImageClassification
    texts = transformers.AutoModelForSequenceClassification
    return (images if kind in _SEES else texts).from_config(config)


def _inputs(kind: str, rows: int) -> Inputs:
    if kind in _SEES:
        return {"pixel_values": torch.randn(rows, 3, 32, 32)}
    ids = torch.randint(3, WORDS, (rows, TOKENS))
    mask = torch.ones_like(ids)
    mask[0, -9:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    return {**inputs, "decoder_input_ids": ids[:, :TARGETS].clone()} if kind in _TRANSLATES else inputs


def _loss(kind: str, model: Any, inputs: Inputs, tokens: NextToken) -> torch.Tensor:
    """As the tasks have it."""
    if kind in _WRITES:
        return tokens.loss(model, inputs, inputs["input_ids"])
    if kind in _TRANSLATES:
        logits = model(**inputs, use_cache=False).logits
        losses: torch.Tensor = -logits.log_softmax(-1).gather(-1, inputs["decoder_input_ids"][..., None])[..., 0].sum()
        return losses
    return torch.nn.functional.cross_entropy(
        model(**inputs).logits, torch.zeros(len(next(iter(inputs.values()))), dtype=torch.long)
    )


def _batch(kind: str) -> Batch:
    if kind in _SEES:
        return Batch(ROWS, 65 + (kind == "deit"), masked=False)
    if kind in _TRANSLATES:
        return Batch(ROWS, TOKENS, targets=TARGETS, labelled=ROWS * TARGETS, chunked=False)
    return Batch(ROWS, TOKENS, labelled=ROWS * (TOKENS - 1) if kind in _WRITES else 0)


def _trained(kind: str, method: MethodConfig, training: TrainingConfig, **changes: Any) -> tuple[int, Prediction]:
    """The peak of two optimizer steps of two micro-batches each, and what was predicted without the overhead."""
    model = _model(kind, **changes)
    shapes = {name: tuple(parameter.shape) for name, parameter in trunk_or_model(model).named_parameters()}
    fresh: set[str] = set()
    if kind in _WRITES + _TRANSLATES:
        shapes |= {
            name: tuple(p.shape) for name, p in model.named_parameters() if "lm_head" in name or "embed_out" in name
        }
    else:
        inside = {id(parameter) for parameter in trunk_or_model(model).parameters()}
        fresh = {name for name, parameter in model.named_parameters() if id(parameter) not in inside}
    found = predict(
        model.config.to_dict(),
        shapes,
        method=method,
        training=training,
        batch=_batch(kind),
        labels=LABELS if fresh else 0,
        device="cpu",
    )
    way = adapt.get(method)
    model = way.prepare(Loaded(model, frozenset(fresh)), seed=0)
    if training.gradient_checkpointing:
        recompute_activations(model)
    optimizer = make_optimizer(model, training)
    way.train(model)
    inputs, tokens = _inputs(kind, FEATURE_ROWS if method.type == "head" else ROWS), NextToken()
    if kind in _WRITES:
        tokens.loss(model, inputs, inputs["input_ids"])  # proves the model on its first batch, once
    gc.collect()
    half = training.precision == "bf16"
    with Peak([*model.parameters(), *model.buffers()]) as taken:
        for _ in range(2):
            for _ in range(2):
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
                    loss = _loss(kind, model, inputs, tokens)
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return taken.peak, found


def _method(kind: str, **fields: Any) -> MethodConfig:
    return config_of(method={"type": kind, **fields}).method


def _training(**fields: Any) -> TrainingConfig:
    return config_of(training=fields).training


def _check(taken: int, found: Prediction, *, tolerance: float = TOLERANCE) -> None:
    told = found.total - found.overhead
    assert abs(told / taken - 1) <= tolerance, (
        f"{taken / 1e6:.1f} MB were taken, {told / 1e6:.1f} MB predicted: {found}"
    )


def test_every_known_architecture_is_tried() -> None:
    assert set(_SIZES) == set(FAMILIES)


@pytest.mark.parametrize("kind", _SIZES)
def test_a_prediction_holds_where_all_weights_train(kind: str) -> None:
    _check(*_trained(kind, _method("full"), _training()))


@pytest.mark.parametrize("kind", _DIFFERENT)
def test_a_prediction_holds_for_low_rank_additions(kind: str) -> None:
    _check(*_trained(kind, _method("lora"), _training()))


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_a_prediction_holds_where_the_head_alone_trains_and_the_trunk_keeps_nothing(kind: str) -> None:
    _check(*_trained(kind, _method("head"), _training()))


@pytest.mark.parametrize("method", ["dora", "qlora", "adapter", "ia3", "prompt", "prefix"])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_prediction_holds_for_other_methods(kind: str, method: MethodType) -> None:
    _check(*_trained(kind, _method(method), _training()))


@pytest.mark.parametrize("kind", _DIFFERENT)
@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_prediction_holds_with_gradient_checkpointing(kind: str, method: MethodType) -> None:
    _check(*_trained(kind, _method(method), _training(gradientCheckpointing=True)))


@pytest.mark.parametrize("optimizer", ["adamw-8bit", "adafactor", "sgd"])
def test_a_prediction_holds_for_each_optimizer(optimizer: str) -> None:
    _check(*_trained("bert", _method("full"), _training(optimizer={"type": optimizer})))


@pytest.mark.parametrize("kind", _DIFFERENT)
def test_a_prediction_holds_in_bf16(kind: str) -> None:
    _check(*_trained(kind, _method("full"), _training(precision="bf16")), tolerance=TOLERANCE_BF16)


def test_a_prediction_holds_for_a_trunk_that_is_frozen_below() -> None:
    method = _method("full", freeze={"embeddings": True, "layers": 2})
    _check(*_trained("bert", method, _training()))


def test_dropout_of_the_document_counts_in_place_of_the_models_own() -> None:
    without = _trained(
        "bert", _method("full"), _training(dropout=0.0), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    _check(*without)
    assert _told(_training(dropout=0.0)) == without[1]
    assert _told(_training()).activations > without[1].activations


def test_running_mean_and_anchor_are_a_copy_each_of_what_trains() -> None:
    plain, both = _told(_training()), _told(_training(ema={"decay": 0.99}, l2sp={"alpha": 0.1}))
    assert both.copies == 2 * plain.gradients
    assert plain.copies == 0


def test_several_ranks_add_their_gradients_in_buckets_as_large() -> None:
    model = _model("bert")
    shapes = {name: tuple(parameter.shape) for name, parameter in model.bert.named_parameters()}
    ours = {"method": _method("full"), "training": _training(), "batch": _batch("bert"), "labels": LABELS}
    found = predict(model.config.to_dict(), shapes, device="cpu", ranks=2, **ours)
    assert found.copies == found.gradients


def test_trained_parameters_are_counted_as_the_model_has_them() -> None:
    for method in ("full", "lora", "dora", "adapter", "ia3", "prompt", "prefix"):
        model = _model("bert")
        inside = {id(parameter) for parameter in model.bert.parameters()}
        fresh = frozenset(name for name, parameter in model.named_parameters() if id(parameter) not in inside)
        prepared = adapt.get(_method(method)).prepare(Loaded(model, fresh), seed=0)
        assert _told(_training(), method).trained == parameter_counts(prepared)[0], method


def test_a_gpu_keeps_no_attention_weights_and_a_byte_for_each_dropped_value() -> None:
    ours = {
        "method": _method("full"),
        "training": _training(precision="fp32"),
        "batch": _batch("bert"),
        "labels": LABELS,
    }
    model = _model("bert")
    shapes = {name: tuple(parameter.shape) for name, parameter in model.bert.named_parameters()}
    on = {device: predict(model.config.to_dict(), shapes, device=device, **ours) for device in ("cpu", "gpu")}
    assert on["gpu"].activations < 0.8 * on["cpu"].activations
    assert on["gpu"].gradients == on["cpu"].gradients


def _told(training: TrainingConfig, method: MethodType = "full") -> Prediction:
    """For a BERT with its own dropout."""
    model = _model("bert")
    shapes = {name: tuple(parameter.shape) for name, parameter in model.bert.named_parameters()}
    return predict(
        model.config.to_dict(),
        shapes,
        method=_method(method),
        training=training,
        batch=_batch("bert"),
        labels=LABELS,
        device="cpu",
    )


def test_a_checkpoint_s_other_heads_do_not_count() -> None:
    model = transformers.BertForPreTraining(transformers.BertConfig(**_SIZES["bert"]))
    trunk = {f"bert.{name}": tuple(p.shape) for name, p in model.bert.named_parameters()}
    every = {name: tuple(p.shape) for name, p in model.named_parameters()}
    found = [anatomy(model.config.to_dict(), shapes, writes=False).shapes for shapes in (trunk, every)]
    assert found[0] == found[1] == trunk


def test_the_norms_of_old_checkpoints_are_found_by_their_old_names() -> None:
    model = transformers.BertModel(transformers.BertConfig(**_SIZES["bert"]))
    shapes = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tuple(p.shape)
        for name, p in model.named_parameters()
    }
    stack = anatomy(model.config.to_dict(), shapes, writes=False).stacks[0]
    assert (stack.blocks, stack.width, stack.inner, stack.root_mean_square) == (4, 128, 512, False)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "resnet"}, "of type resnet"),
        ({"model_type": "bert"}, "no blocks"),
        ({}, "of type None"),
    ],
)
def test_what_is_not_known_is_said_and_not_guessed(config: dict[str, Any], said: str) -> None:
    with pytest.raises(Unknown, match=said):
        anatomy(config, {"weight": (3, 3)}, writes=False)


def test_layers_as_wide_as_t5_has_buckets_of_positions_are_layers() -> None:
    model = _model("t5", d_model=32, d_kv=16, d_ff=64, num_heads=2)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert [len(stack.matrices) for stack in anatomy(model.config.to_dict(), shapes, writes=True).stacks] == [6, 10]


def test_an_activation_nobody_knows_is_not_guessed() -> None:
    model = _model("bert")
    shapes = {name: tuple(parameter.shape) for name, parameter in model.bert.named_parameters()}
    with pytest.raises(Unknown, match="activation mish"):
        anatomy({**model.config.to_dict(), "hidden_act": "mish"}, shapes, writes=False)


def test_experts_are_not_taken_for_one_layer() -> None:
    model = _model("llama")
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    more = {
        name.replace("gate_proj", f"expert{n}"): shape
        for name, shape in shapes.items()
        if "gate_proj" in name
        for n in range(8)
    }
    with pytest.raises(Unknown, match="10 layers 512 wide"):
        anatomy(
            model.config.to_dict(), {**{k: v for k, v in shapes.items() if "gate_proj" not in k}, **more}, writes=True
        )


def test_what_is_predicted_without_torch_is_what_is_done_with_it() -> None:
    from finetune_trainer import nexttoken, predicted
    from finetune_trainer.adapt import head

    assert (predicted.LOGITS_AT_ONCE, predicted.FEATURE_ROWS) == (nexttoken.CELLS, head.CHUNK)
