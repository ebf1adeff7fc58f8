"""Image classification end to end: losses equal to those of transformers.Trainer, and a stop that changes nothing."""

import io
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tests.trainer.memory import Memory, learner_of
from tests.trainer.rank.architectures import RESNET, VIT
from tests.trainer.rank.peers import losses_of_trainer
from tests.trainer.rank.test_loop import Quiet, config, setup_of

from finetune_trainer.adapt.base import freeze_statistics
from finetune_trainer.checkpoint import WEIGHTS, State
from finetune_trainer.data.order import Order
from finetune_trainer.loop import Objective, train
from finetune_trainer.tasks.text_classification import ONE

KIND = "image-classification"
SIZES = {"vit": 8, "resnet": 32}
COLOURS = ("red", "green", "blue")
ROWS, STEPS = 40, 50


def picture(draw: np.random.Generator, label: int) -> bytes:
    """Noise in which one colour is a little stronger."""
    pixels = draw.integers(0, 160, (9, 9, 3))
    pixels[:, :, label] += 60
    out = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(out, "PNG")
    return out.getvalue()


def document(size: int) -> dict[str, Any]:
    return {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": size, "width": size},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }


def model_of(name: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(1)
    labels = {"id2label": dict(enumerate(COLOURS)), "label2id": {label: n for n, label in enumerate(COLOURS)}}
    if name == "vit":
        settings = transformers.ViTConfig(**VIT, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **labels)
        return transformers.ViTForImageClassification(settings).to(dtype)
    return transformers.ResNetForImageClassification(transformers.ResNetConfig(**RESNET, **labels)).to(dtype)


class Data:
    """Images of three classes."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        draw = np.random.default_rng(2)
        labels = draw.integers(0, 3, ROWS)
        images = [np.frombuffer(picture(draw, label), np.uint8) for label in labels]
        self.dtype = dtype
        self.store = Memory(image=images, labels=labels[:, None], length=[1] * ROWS)
        self.learner = learner_of(KIND, labels=list(COLOURS), form=ONE, more={"preprocessor": document(SIZES[name])})
        self.order = Order(ROWS, 8, 5, np.ones(ROWS, np.int64))

    def inputs_of(self, rows: Any) -> dict[str, torch.Tensor]:
        found = {n: torch.from_numpy(array) for n, array in self.learner.collate(self.store, rows).items()}
        return {**found, "pixel_values": found["pixel_values"].to(self.dtype)}


@pytest.mark.parametrize(
    ("name", "dtype", "tolerance"),
    [(name, *kind) for name in SIZES for kind in ((torch.float64, 1e-9), (torch.float32, 1e-5))],
)
def test_fifty_steps_equal_those_of_the_trainer(
    tmp_path: Path, name: str, dtype: torch.dtype, tolerance: float
) -> None:
    # transformers lets batch norms decay, which it does not know by their name in ResNet; ours lets no norm decay
    decay = 0.1 if name == "vit" else 0.0
    data, state, settings = Data(name, dtype), State(micro_batch=3), config(max_steps=STEPS, weight_decay=decay)
    model, other = model_of(name, dtype), model_of(name, dtype)
    setup = setup_of(model, data, settings, objective=Objective(model, data.learner))  # type: ignore[arg-type]

    def train_mode() -> None:
        model.train()
        freeze_statistics(model)

    setup.train_mode = train_mode
    train(setup, state, Quiet())
    other.train = lambda mode=True: (type(other).train(other, mode), freeze_statistics(other))[0]
    batches = [data.inputs_of(data.order.batch(step)) for step in range(STEPS)]
    theirs = losses_of_trainer(other, batches, settings, work=tmp_path)
    assert state.losses == pytest.approx(theirs, rel=tolerance)
    assert state.losses[-1] < state.losses[0]


def base(directory: Path, name: str) -> Path:
    model_of(name).base_model.save_pretrained(directory)
    transformers.ViTImageProcessor(**document(SIZES[name])).save_pretrained(directory)
    return directory


def saved(root: Path, count: int) -> list[dict[str, Any]]:
    """Rows whose images lie beside the files of rows."""
    draw, found = np.random.default_rng(3), []
    root.mkdir()
    for number in range(count):
        label = int(draw.integers(0, 3))
        (root / f"{number}.png").write_bytes(picture(draw, label))
        found.append({"image": f"{root.name}/{number}.png", "label": COLOURS[label]})
    return found


SPEC: dict[str, Any] = {
    "task": {"type": KIND, "augment": {"flip": True, "crop": 0.6, "color": 0.1, "mixup": 0.2}},
    "training": {
        "maxSteps": 12,
        "batchSize": 16,
        "microBatch": 8,
        "learningRate": 3e-3,
        "evaluateEvery": {"steps": 6},
    },
    "checkpoint": {"every": {"steps": 4}},
}


def test_a_stop_changes_nothing_in_the_weights_augmented_as_they_are(make_run: Any, tmp_path: Path) -> None:
    directory = base(tmp_path / "base", "vit")
    for name in ("calm", "stopped"):
        (tmp_path / name).mkdir()
    rows = [saved(tmp_path / name / "images", 120) for name in ("calm", "stopped")]
    calm, stopped = (
        make_run(found, name=name, base=directory, **SPEC)
        for name, found in zip(("calm", "stopped"), rows, strict=True)
    )
    code, log = calm.run(tmp_path / "work-calm")
    assert code == 0, log
    stop = ("finetune_trainer.training", "Duties", "due", 7, signal.SIGTERM.value)
    code, log = stopped.run(tmp_path / "work-1", stop=stop)
    assert code == 45, log
    code, log = stopped.run(tmp_path / "work-2")
    assert code == 0, log
    assert calm.losses() == stopped.losses()
    assert calm.last(WEIGHTS).read_bytes() == stopped.last(WEIGHTS).read_bytes()
    evaluation = calm.published()["outcome"]["evaluation"]
    assert evaluation == stopped.published()["outcome"]["evaluation"]
    assert evaluation["tuned"]["accuracy"] > evaluation["trivial"]["accuracy"]
    assert evaluation["probe"]["accuracy"] > evaluation["trivial"]["accuracy"]
    model = transformers.AutoModelForImageClassification.from_pretrained(calm.model())
    processor = transformers.AutoImageProcessor.from_pretrained(calm.model())
    draw = np.random.default_rng(9)
    images = [Image.open(io.BytesIO(picture(draw, label))) for label in range(3)]
    answers = model(**processor(images, return_tensors="pt")).logits.argmax(-1).tolist()
    assert sum(answer == label for label, answer in enumerate(answers)) >= 2


@pytest.mark.parametrize("data", [b"", b"\x89PNG\r\n\x1a\n broken", b"no image at all"])
def test_a_broken_image_names_file_and_row(make_run: Any, tmp_path: Path, data: bytes) -> None:
    (tmp_path / "run").mkdir()
    rows = saved(tmp_path / "run/images", 30)
    (tmp_path / "run/images/4.png").write_bytes(data)
    with pytest.raises(Exception, match=r"train\.jsonl:5: "):
        make_run(rows, base=base(tmp_path / "base", "vit"), **SPEC)
