import io
import json
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from tests.trainer.memory import Memory, config_of, learner_of

from finetune_trainer import tasks
from finetune_trainer.data.pixels import Augment, Processor, thumbnail
from finetune_trainer.data.read import DataError
from finetune_trainer.tasks.base import Piece, RowError, Tools
from finetune_trainer.tasks.text_classification import ONE, SEVERAL

KIND = "image-classification"
DOCUMENT: dict[str, Any] = {
    "image_processor_type": "ViTImageProcessor",
    "size": {"height": 8, "width": 8},
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.5, 0.6, 0.7],
}


def picture(width: int = 12, height: int = 10, *, seed: int = 0, mode: str = "RGB", kind: str = "PNG") -> bytes:
    """A smooth random image."""
    kind = "TIFF" if mode == "CMYK" else kind
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).convert(mode).save(out, kind)
    return out.getvalue()


def processor(document: dict[str, Any] = DOCUMENT, *, asked: int | None = None) -> Processor:
    return Processor.of(document, asked=asked, uri="s3://models/vit")


# --- pixels ---


@pytest.mark.parametrize(
    "document",
    [
        DOCUMENT,
        {**DOCUMENT, "resample": 3, "size": {"height": 7, "width": 9}},
        {**DOCUMENT, "do_normalize": False},
        {**DOCUMENT, "do_rescale": False, "resample": 0},
        {**DOCUMENT, "image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 8}, "crop_pct": 0.875},
        {**DOCUMENT, "image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 384}, "resample": 3},
        {
            **DOCUMENT,
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": 9},
            "crop_size": {"height": 8, "width": 8},
            "do_center_crop": True,
            "do_resize": True,
            "resample": 3,
        },
        {
            **DOCUMENT,
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": 6},
            "crop_size": {"height": 9, "width": 8},
            "do_center_crop": True,
            "do_resize": True,
            "resample": 2,
        },
    ],
)
@pytest.mark.parametrize(
    ("width", "height", "mode"),
    [(12, 10, "RGB"), (9, 31, "RGBA"), (30, 8, "L"), (8, 8, "P"), (23, 17, "CMYK"), (10, 12, "LA"), (9, 9, "1")],
)
def test_pixels_equal_those_of_transformers(document: dict[str, Any], width: int, height: int, mode: str) -> None:
    data = picture(width, height, mode=mode)
    kind = getattr(transformers, f"{document['image_processor_type']}Pil", None) or getattr(
        transformers, document["image_processor_type"]
    )
    theirs = kind(**{name: value for name, value in document.items() if name != "image_processor_type"})
    wanted = theirs(Image.open(io.BytesIO(data)).convert("RGB"), return_tensors="np")["pixel_values"][0]
    np.testing.assert_allclose(processor(document).batch([data])[0], wanted, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("size", [9, {"height": 9, "width": 9}, {"shortest_edge": 9}], ids=str)
@pytest.mark.parametrize(
    "name",
    ["Beit", "Bit", "CLIP", "ConvNext", "DeiT", "MobileNetV1", "MobileNetV2", "Pvt", "Segformer", "Siglip", "ViT"],
)
def test_what_a_document_leaves_out_is_as_in_transformers(name: str, size: Any) -> None:
    document = {"size": size, "crop_size": {"height": 8, "width": 7}, "image_mean": [0.5] * 3, "image_std": [0.3] * 3}
    data = picture(21, 13)
    named = {**document, "image_processor_type": f"{name}ImageProcessorFast"}
    theirs = getattr(transformers, f"{name}ImageProcessorPil")(**document)
    try:
        wanted = theirs(Image.open(io.BytesIO(data)), return_tensors="np")["pixel_values"][0]
        same_shape = wanted.shape == theirs(Image.new("RGB", (30, 9)), return_tensors="np")["pixel_values"][0].shape
    except (AttributeError, TypeError, ValueError):
        same_shape = False
    if not same_shape:  # images that cannot share a batch, or no size for that class
        with pytest.raises(DataError, match="does not say how images"):
            processor(named)
        return
    np.testing.assert_allclose(processor(named).batch([data])[0], wanted, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", ["EfficientNetImageProcessor", "MobileViTFeatureExtractor", "Donut"])
def test_a_preprocessor_that_does_more_than_ours_is_refused(name: str) -> None:
    with pytest.raises(DataError, match=r"are not known here; choose a model whose processor is one of Beit, Bit"):
        processor({**DOCUMENT, "image_processor_type": name})


def test_a_photograph_stands_upright_as_its_camera_says() -> None:
    image, out = Image.open(io.BytesIO(picture(8, 8))), io.BytesIO()
    exif = image.getexif()
    exif[0x0112] = 6  # turned by a quarter
    image.save(out, "PNG", exif=exif)
    straight = processor().batch([picture(8, 8)])[0]
    np.testing.assert_array_equal(processor().batch([out.getvalue()])[0], np.rot90(straight, k=-1, axes=(1, 2)))


@pytest.mark.parametrize(
    "document",
    [
        {},
        {**DOCUMENT, "size": None},
        {**DOCUMENT, "size": {"width": 8}},
        {**DOCUMENT, "size": {"height": 0, "width": 8}},
        {**DOCUMENT, "image_mean": [0.5]},
        {**DOCUMENT, "image_std": [0.0, 1.0, 1.0]},
        {**DOCUMENT, "resample": "bilinear"},
        {**DOCUMENT, "do_resize": False},
    ],
)
def test_a_preprocessor_that_says_too_little_is_refused(document: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"s3://models/vit/preprocessor_config\.json does not say how images"):
        processor(document)


def test_a_narrow_image_takes_no_more_memory_than_it_has_pixels() -> None:
    document = {**DOCUMENT, "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 64}}
    made = processor({**document, "crop_size": {"height": 64, "width": 64}, "do_center_crop": True, "do_resize": True})
    out = io.BytesIO()
    Image.new("L", (1_000_000, 1), 255).save(out, "PNG")  # 12 GB, were all of it resized
    assert np.allclose(
        made.batch([out.getvalue()]), (1 - np.array(made.mean)[:, None, None]) / np.array(made.std)[:, None, None]
    )


def test_threads_make_the_same_of_large_images() -> None:
    images = [picture(300, 200, seed=seed) for seed in range(5)]
    assert len(images[0]) > 16 * 1024
    np.testing.assert_array_equal(
        processor().batch(images), np.stack([processor().batch([data])[0] for data in images])
    )


# --- augmentation ---


def drawn(augment: Augment, *, seed: int = 1, count: int = 6) -> NDArray[np.float32]:
    np.random.seed(seed)
    images = [picture(seed=number) for number in range(count)]
    return processor().batch(images, augment.draw(count))


@given(st.booleans(), st.floats(0.05, 1), st.floats(0, 0.9), st.integers(0, 2**32 - 1))
def test_what_is_shown_is_inside_the_image_and_large_enough(flip: bool, crop: float, color: float, seed: int) -> None:
    np.random.seed(seed)
    for change in Augment(flip=flip, crop=crop, color=color).draw(20):
        left, top, right, bottom = change.box
        assert 0 <= left < right <= 1 + 1e-12
        assert 0 <= top < bottom <= 1 + 1e-12
        # what would reach over a side is cut off, which the ratio of the sides allows for
        assert (right - left) * (bottom - top) >= min(crop, crop * 0.75) - 1e-9
        assert all(1 - color <= factor <= 1 + color for factor in change.colors)
        assert flip or not change.flip


def test_equal_seeds_change_alike_and_others_otherwise() -> None:
    augment = Augment(flip=True, crop=0.5, color=0.3)
    np.testing.assert_array_equal(drawn(augment), drawn(augment))
    assert not np.array_equal(drawn(augment), drawn(augment, seed=2))


def test_a_flip_mirrors_left_and_right_in_some_of_the_cases() -> None:
    plain, flipped = drawn(Augment()), drawn(Augment(flip=True))
    same = [np.array_equal(a, b) for a, b in zip(plain, flipped, strict=True)]
    mirrored = [np.allclose(a, b[:, :, ::-1], atol=0.02) for a, b in zip(plain, flipped, strict=True)]
    assert any(same)
    assert any(mirrored)
    assert all(a or b for a, b in zip(same, mirrored, strict=True))


# --- the task ---


def task(**options: Any) -> tasks.Task:
    return tasks.get(config_of(KIND, task=options))


def encoded(rows: list[dict[str, Any]], tools: Tools) -> list[Piece]:
    found = []
    for pieces in task().encode([task().read_row(row) for row in rows], tools):
        assert not isinstance(pieces, RowError)
        found += pieces
    return found


def store() -> tuple[Memory, list[bytes]]:
    images = [picture(seed=number) for number in range(4)]
    arrays = [np.frombuffer(image, np.uint8) for image in images]
    paths = [np.frombuffer(path, np.uint8) for path in (b"a/1.png", b"b/2.png", b"", b"")]
    return Memory(image=arrays, path=paths, labels=[[0], [1], [2], [1]], length=[1] * 4), images


def learner(form: str = ONE, **options: Any) -> tasks.Learner:
    facts = {"labels": ["a", "b", "c"], "form": form, "more": {"preprocessor": DOCUMENT}}
    return learner_of(KIND, {"task": options}, **facts)


def test_rows_are_stored_as_their_files_were() -> None:
    tools = Tools(None, "Truncate", {}, DOCUMENT)
    rows = [
        {"image": picture(seed=1), "label": "cat"},
        {"image": picture(seed=2), "label": ["cat", 3], "path": "cät/2.png"},
    ]
    one, two = encoded(rows, tools)
    assert one.columns == {"image": rows[0]["image"], "path": b"", "labels": [0]}
    assert two.columns == {"image": rows[1]["image"], "path": "cät/2.png".encode(), "labels": [0, 1]}
    first, second = (task().read_row(row) for row in rows)
    assert (first.form, second.form) == (ONE, SEVERAL)
    assert first.content != second.content


def facts_of(config: dict[str, Any], document: dict[str, Any] = DOCUMENT, **options: Any) -> dict[str, Any]:
    return task(**options).facts(Tools(None, "Truncate", config, document))


def test_a_size_that_does_not_fit_the_positions_is_refused() -> None:
    vit = {"image_size": 8, "patch_size": 4, "num_attention_heads": 2}
    assert facts_of(vit)["preprocessor"] == DOCUMENT
    with pytest.raises(DataError, match=r"imageSize: images of 16 x 16 pixels do not fit .* positions for 8 x 8"):
        facts_of(vit, imageSize=16)
    with pytest.raises(DataError, match=r"preprocessor_config\.json: images of 7 x 9 pixels"):
        facts_of(vit, {**DOCUMENT, "size": {"height": 7, "width": 9}})
    with pytest.raises(DataError, match="images of 1 channels"):
        facts_of({"num_channels": 1})


def test_another_size_is_published_with_a_cnn() -> None:
    size = {"size": {"shortest_edge": 8}, "crop_pct": 0.9}
    resnet = {**DOCUMENT, "image_processor_type": "ConvNextImageProcessor", **size}
    found = facts_of({"model_type": "resnet"}, resnet, imageSize=32)
    made = learner_of(KIND, {"task": {"imageSize": 32}}, labels=["a", "b"], more=found)
    document = json.loads(made.files()["preprocessor_config.json"])
    theirs = transformers.ViTImageProcessor(**document)
    assert document["image_processor_type"] == "ViTImageProcessor"
    wanted = theirs(Image.open(io.BytesIO(picture())), return_tensors="np")["pixel_values"][0]
    np.testing.assert_allclose(
        Processor.of(document, asked=None, uri="").batch([picture()])[0], wanted, rtol=1e-5, atol=2e-6
    )
    assert learner().files() == {}


def test_a_micro_batch_holds_pixels_and_labels() -> None:
    kept, images = store()
    batch = learner().collate(kept, np.array([2, 0]))
    np.testing.assert_array_equal(batch["pixel_values"][0], processor().batch([images[2]])[0])
    assert batch["labels"].tolist() == [2, 0]
    assert learner(SEVERAL).collate(kept, np.array([2]))["labels"].tolist() == [[0, 0, 1]]


def test_evaluation_never_augments() -> None:
    kept, _ = store()
    made = learner(augment={"flip": True, "crop": 0.3, "color": 0.5, "mixup": 1.0})
    assert made.augments
    assert not learner(augment={"flip": False, "crop": 1.0}).augments
    batch = [made.collate(kept, np.arange(4))["pixel_values"] for _ in range(2)]
    np.testing.assert_array_equal(*batch)
    np.testing.assert_array_equal(batch[0], learner().collate(kept, np.arange(4))["pixel_values"])
    np.testing.assert_array_equal(batch[0], learner().collate_for_training(kept, np.arange(4))["pixel_values"])
    assert not np.array_equal(batch[0], made.collate_for_training(kept, np.arange(4))["pixel_values"])


def test_people_see_a_small_picture_and_its_name() -> None:
    kept, images = store()
    name, png = learner().picture(kept, 1) or ("", b"")
    assert name == "b/2.png"
    shown = Image.open(io.BytesIO(png))
    assert (shown.format, shown.size) == ("PNG", (64, 53))
    colours = shown.getcolors(64 * 64)
    original = Image.open(io.BytesIO(images[1])).getcolors(64 * 64)
    assert {colour for _, colour in colours or ()} == {colour for _, colour in original or ()}
    assert Image.open(io.BytesIO(thumbnail(picture(300, 200)))).size == (64, 43)
    assert Image.open(io.BytesIO(thumbnail(picture(900, 1)))).size == (64, 1)


class Linear(torch.nn.Module):
    """A model whose logits are a linear function of the pixels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.weight = torch.nn.Parameter(torch.randn(3 * 8 * 8, 3, dtype=torch.float64))

    def forward(self, pixel_values: torch.Tensor) -> Any:
        return SimpleNamespace(logits=pixel_values.double().flatten(1) @ self.weight)


@pytest.mark.parametrize("form", [ONE, SEVERAL])
def test_mixup_blends_images_and_the_losses_of_both_labels(form: str) -> None:
    kept, _ = store()
    made, model = learner(form, augment={"mixup": 0.5}), Linear()
    np.random.seed(3)
    arrays = made.collate_for_training(kept, np.arange(4))
    share, plain = float(arrays["share"][0]), learner(form).collate(kept, np.arange(4))
    assert 0 < share < 1
    np.random.seed(3)
    np.random.beta(0.5, 0.5)
    other = np.random.permutation(4)
    pixels = share * plain["pixel_values"] + (1 - share) * plain["pixel_values"][other]
    np.testing.assert_allclose(arrays["pixel_values"], pixels, atol=1e-6)
    logits, labels = model(torch.from_numpy(arrays["pixel_values"])).logits, torch.from_numpy(plain["labels"])
    functional = torch.nn.functional
    loss = functional.cross_entropy if form == ONE else functional.binary_cross_entropy_with_logits
    targets = labels if form == SEVERAL else torch.eye(3)[labels]
    blended = share * targets + (1 - share) * targets[other]
    inputs = {name: torch.from_numpy(array) for name, array in arrays.items()}
    torch.testing.assert_close(
        made.loss(model, inputs), loss(logits, blended.double(), reduction="sum"), rtol=1e-6, atol=1e-9
    )


def test_reading_needs_no_random_numbers_but_in_training() -> None:
    kept, _ = store()
    random.seed(1)
    np.random.seed(1)
    before = (random.getstate(), np.random.get_state()[2])
    learner(augment={"flip": True}).collate(kept, np.arange(4))
    assert (random.getstate(), np.random.get_state()[2]) == before
