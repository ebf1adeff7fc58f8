"""LoRA over four-bit weights: what is quantised, that it trains and loads, and that it merges into the base alone."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.trainer.rank.architectures import ARCHITECTURES, inputs_for, make, published, tuned

from finetune_api.contract import MethodConfig
from finetune_trainer import adapt, checkpoint
from finetune_trainer.adapt.base import parameter_counts
from finetune_trainer.adapt.with_peft import answers
from finetune_trainer.layers import plain_of
from finetune_trainer.model import Loaded, ModelError

LINEAR = [name for name in ARCHITECTURES if name not in ("gpt2", "resnet")]


def config(**fields: Any) -> MethodConfig:
    values = {"rank": 2, "alpha": 4.0, "dropout": 0.0, "quantization": "nf4", "double_quant": True}
    return MethodConfig(type="qlora", **{**values, **fields})


def prepared(name: str, **fields: Any) -> tuple[adapt.Method, Any]:
    method = adapt.get(config(**fields))
    return method, method.prepare(Loaded(make(name), frozenset()), seed=1)


@pytest.mark.parametrize("name", LINEAR)
def test_a_four_bit_model_trains_and_loads_as_the_card_says(name: str, tmp_path: Path) -> None:
    make(name).save_pretrained(tmp_path / "base")
    method, model = tuned(name, config())
    wanted = answers(model, inputs_for(name))
    method.save(model, tmp_path / "adapter", merge=False, example=inputs_for(name))
    hint = method.load_hint(model, merge=False)
    found = published(hint, tmp_path / "adapter", tmp_path / "base")
    for module in found.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # it packs layers whose width is a multiple of 64 alone
    torch.testing.assert_close(answers(found, inputs_for(name)), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", LINEAR)
def test_it_merges_into_the_unquantised_base(name: str, tmp_path: Path) -> None:
    from peft import PeftModel

    method, model = tuned(name, config())
    method.save(model, tmp_path / "merged", merge=True, example=inputs_for(name))
    merged = type(make(name)).from_pretrained(tmp_path / "merged").eval()
    method.save(model, tmp_path / "adapter", merge=False, example=inputs_for(name))
    adapted = PeftModel.from_pretrained(make(name), tmp_path / "adapter").eval()
    wanted = answers(adapted, inputs_for(name))
    torch.testing.assert_close(answers(merged, inputs_for(name)), wanted, atol=1e-4, rtol=1e-4)
    assert not all(torch.equal(a, b) for a, b in zip(answers(model, inputs_for(name)), wanted, strict=True))


def test_only_the_trunk_is_quantised_and_only_additions_and_heads_train() -> None:
    _, model = prepared("bert")
    plain = plain_of(model)
    assert plain.classifier.modules_to_save.default.weight.dtype is torch.float32
    dtypes = {key: p.dtype for key, p in plain.named_parameters() if key.endswith("base_layer.weight")}
    assert len(dtypes) == 13
    assert set(dtypes.values()) == {torch.uint8}
    assert all("lora_" in key or "classifier" in key for key in checkpoint.trainable(model))
    trained, total = parameter_counts(model)
    assert total == sum(p.numel() for p in make("bert").parameters()) + trained - (16 * 3 + 3)


def test_double_quantisation_needs_less_memory_for_scales() -> None:
    def scales(*, double: bool) -> int:
        _, model = prepared("bert", double_quant=double)
        states = [p.quant_state for p in model.parameters() if hasattr(p, "quant_state")]
        return sum(state.absmax.numel() * state.absmax.element_size() for state in states)

    assert scales(double=True) < scales(double=False)


def test_kinds_of_four_bit_numbers_differ() -> None:
    one, two = (answers(prepared("bert", quantization=kind)[1], inputs_for("bert")) for kind in ("nf4", "fp4"))
    assert not torch.equal(one[0], two[0])


@pytest.mark.parametrize("name", ["gpt2", "resnet"])
def test_what_cannot_be_quantised_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match="keeps linear layers in four bits, and the trunk of"):
        prepared(name)


def test_a_killed_run_over_four_bits_ends_in_the_same_model(make_run: Any, rows: Any, tmp_path: Path) -> None:
    spec: dict[str, Any] = {
        "method": {"type": "qlora", "rank": 2},
        "training": {"maxSteps": 6, "batchSize": 8, "learningRate": 1e-2},
        "checkpoint": {"every": {"steps": 2}},
        "output": {"merge": True},
    }
    calm = make_run(rows(40), name="calm", **spec)
    code, log = calm.run(tmp_path / "work-calm")
    assert code == 0, log
    halved = make_run(rows(40), name="stopped", **spec)
    started = halved.start(tmp_path / "work-first")
    while "checkpoint" not in halved.kinds():
        time.sleep(0.02)
    started.kill(9)
    started.wait()
    code, log = halved.run(tmp_path / "work-second")
    assert code == 0, log
    assert halved.losses() == calm.losses()
    assert halved.published()["outcome"]["model"]["digest"] == calm.published()["outcome"]["model"]["digest"]
