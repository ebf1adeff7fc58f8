"""Encoded images -> what a model sees, as preprocessor_config.json says it; and the same, changed at random.

Equal to what transformers' image processors make of an image, so that a published model sees what it was trained on.
Pillow is imported when an image is decoded. Torch-free.
"""

import io
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from finetune_trainer.data.read import DataError
from finetune_trainer.data.read.images import FORMATS, upright

_CHANNELS = 3
_LARGEST = 4096
_RESIZED_WHOLE = 16 * 1000 * 1000
"""Pixels of a resized image up to which all of it is computed before the middle is cut out."""
_WORTH_A_THREAD = 16 * 1024
"""Bytes of an encoded image below which handing it to a thread takes as long as decoding it."""


class _Kind(NamedTuple):
    """What a class of image processors does unless its document says otherwise."""

    resample: int
    shortest: bool = False
    """Whether a size of one number is that of the shorter side, not of both."""
    cut: bool = False
    """Whether the middle is cut out."""
    by_share: bool = False
    """Whether the size is that of the cut, and crop_pct its share of what it is cut from."""


_BILINEAR, _BICUBIC = 2, 3
_KINDS: Mapping[str, _Kind] = {
    "Beit": _Kind(_BICUBIC),
    "Bit": _Kind(_BICUBIC, shortest=True, cut=True),
    "CLIP": _Kind(_BICUBIC, shortest=True, cut=True),
    "ConvNext": _Kind(_BICUBIC, shortest=True, by_share=True),
    "DeiT": _Kind(_BICUBIC, cut=True),
    "MobileNetV1": _Kind(_BILINEAR, shortest=True, cut=True),
    "MobileNetV2": _Kind(_BILINEAR, shortest=True, cut=True),
    "Pvt": _Kind(_BICUBIC),
    "Segformer": _Kind(_BILINEAR),
    "Siglip": _Kind(_BICUBIC, shortest=True),
    "ViT": _Kind(_BILINEAR),
}
"""By the names in transformers, which tests compare with. Others swap channels, normalise twice and the like."""
_NAMED = re.compile(r"(\w+?)(ImageProcessor|FeatureExtractor)(Fast|Pil)?")


def _kind_of(document: Mapping[str, Any]) -> str:
    """The name of a document's class without its ending; a document that names none is a ViT's."""
    name = str(document.get("image_processor_type") or document.get("feature_extractor_type") or "ViTImageProcessor")
    found = _NAMED.fullmatch(name)
    return found[1] if found else name


@dataclass(frozen=True)
class Augment:
    """What is drawn anew for each image in training."""

    flip: bool = False
    """Mirror left and right, in half of the cases."""
    crop: float = 1.0
    """The smallest share of the image's area that is shown; with it the ratio of its sides changes by up to a third."""
    color: float = 0.0
    """By what share brightness, contrast and saturation change at most."""

    @property
    def nothing(self) -> bool:
        return not self.flip and self.crop >= 1 and not self.color

    def draw(self, count: int) -> "list[Change]":
        """How `count` images are changed, from numpy's global generator, which the loop seeds for each micro-batch."""
        draws = np.random.random((count, 8))
        return [self._change(row) for row in draws]

    def _change(self, draw: NDArray[np.float64]) -> "Change":
        area = self.crop + (1 - self.crop) * draw[1]
        ratio = float(np.exp((2 * draw[2] - 1) * np.log(4 / 3))) if self.crop < 1 else 1.0
        width, height = min(1.0, (area * ratio) ** 0.5), min(1.0, (area / ratio) ** 0.5)
        left, top = (1 - width) * draw[3], (1 - height) * draw[4]
        colors = 1 + self.color * (2 * draw[5:8] - 1)
        return Change(
            self.flip and bool(draw[0] < 0.5), (left, top, left + width, top + height), tuple(map(float, colors))
        )


@dataclass(frozen=True)
class Change:
    """One image's."""

    flip: bool
    box: tuple[float, float, float, float]
    """Left, top, right, bottom of what is shown, as shares of width and height."""
    colors: tuple[float, ...]
    """Factors of brightness, contrast and saturation."""


@dataclass(frozen=True)
class Processor:
    """How images become arrays [3, height, width]."""

    height: int
    width: int
    resized: tuple[int, int] | int
    """Height and width, or the length of the shorter side, that the image has before the middle is cut out."""
    resample: int
    """Pillow's number of the filter."""
    factor: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, document: Mapping[str, Any], *, asked: int | None, uri: str) -> Self:
        """Read preprocessor_config.json; `asked` is another size, square. Raises DataError ModelIncomplete."""
        name = _kind_of(document)
        if name not in _KINDS:
            raise DataError(
                "ModelUnsuitable",
                f"{uri}/preprocessor_config.json: images made into input by {name}ImageProcessor are not known here; "
                f"choose a model whose processor is one of {', '.join(sorted(_KINDS))}.",
            )
        try:
            kind = _KINDS[name]
            height, width, resized = _size(document, kind) if asked is None else (asked, asked, (asked, asked))
            factor = float(document.get("rescale_factor", 1 / 255)) if document.get("do_rescale", True) else 1.0
            plain = not document.get("do_normalize", True)
            mean = [0.0] * _CHANNELS if plain else document["image_mean"]
            std = [1.0] * _CHANNELS if plain else document["image_std"]
            mean, std = (tuple(float(number) for number in numbers) for numbers in (mean, std))
            resample = int(document.get("resample", kind.resample))
            if not len(mean) == len(std) == _CHANNELS or min(std) <= 0:
                raise ValueError
            sides = (height, width, resized) if isinstance(resized, int) else (height, width, *resized)
            if not 1 <= min(sides) <= max(sides) <= _LARGEST:
                raise ValueError
            if not 0 <= resample <= 5 or not document.get("do_resize", True):
                raise ValueError
        except (AttributeError, TypeError, ValueError, KeyError):
            raise DataError(
                "ModelIncomplete",
                f"{uri}/preprocessor_config.json does not say how images become input (size, crop_size, resample, "
                "image_mean and image_std for three channels); write it with AutoImageProcessor.save_pretrained.",
            ) from None
        return cls(height, width, resized, resample, factor, mean, std)

    def batch(self, images: Sequence[bytes], changes: "Sequence[Change] | None" = None) -> NDArray[np.float32]:
        """[images, 3, height, width]; large images are decoded by several threads."""
        found = np.empty((len(images), _CHANNELS, self.height, self.width), dtype=np.float32)

        def fill(number: int) -> None:
            found[number] = self._pixels(images[number], changes[number] if changes else None)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about transparency in palettes; preflight has decoded it once
            if max(map(len, images), default=0) >= _WORTH_A_THREAD and len(images) > 1:
                list(_threads(os.getpid()).map(fill, range(len(images))))
            else:
                for number in range(len(images)):
                    fill(number)
        return found

    def _pixels(self, data: bytes, change: Change | None) -> NDArray[np.float32]:
        """[3, height, width]."""
        image = opened(data)
        if change is None:
            image = self._fitted(image)
        else:
            w, h = image.size
            left, top, right, bottom = change.box
            box = (left * w, top * h, max(right * w, left * w + 1), max(bottom * h, top * h + 1))
            box = (min(box[0], w - 1), min(box[1], h - 1), min(box[2], w), min(box[3], h))
            image = image.resize((self.width, self.height), self.resample, box=box)
            image = _changed(image, change)
        values = np.asarray(image, dtype=np.float32).transpose(2, 0, 1)
        return np.asarray(values * self._scale - self._shift, dtype=np.float32)

    def _fitted(self, image: Any) -> Any:
        from PIL import Image

        w, h = image.size
        if isinstance(self.resized, int):
            long = int(self.resized * max(w, h) / min(w, h))
            width, height = (self.resized, long) if w <= h else (long, self.resized)
        else:
            height, width = self.resized
        left, top = (width - self.width) // 2, (height - self.height) // 2
        if width * height <= _RESIZED_WHOLE:
            whole = image.resize((width, height), self.resample)
            return whole.crop((left, top, left + self.width, top + self.height))  # black beyond its sides
        # Only what is shown: a long, narrow image would take any amount of memory. The last bit of a value may differ.
        seen = (max(left, 0), max(top, 0), min(left + self.width, width), min(top + self.height, height))
        box = (seen[0] * w / width, seen[1] * h / height, seen[2] * w / width, seen[3] * h / height)
        shown = image.resize((seen[2] - seen[0], seen[3] - seen[1]), self.resample, box=box)
        framed = Image.new("RGB", (self.width, self.height))
        framed.paste(shown, (max(-left, 0), max(-top, 0)))
        return framed

    @cached_property
    def _scale(self) -> NDArray[np.float32]:
        return np.asarray(np.float32(self.factor) / np.array(self.std, np.float32), np.float32)[:, None, None]

    @cached_property
    def _shift(self) -> NDArray[np.float32]:
        return np.asarray(np.array(self.mean, np.float32) / np.array(self.std, np.float32), np.float32)[:, None, None]


def _size(document: Mapping[str, Any], kind: _Kind) -> tuple[int, int, tuple[int, int] | int]:
    """Height and width of what is shown, and what the image is resized to before."""
    size = document["size"]
    if isinstance(size, int):
        size = {"shortest_edge": size} if kind.shortest else {"height": size, "width": size}
    edge = size.get("shortest_edge")
    if kind.by_share:
        # below 384 a middle part of crop_pct is shown, from there on all of the image, made square
        cut = int(edge / float(document.get("crop_pct") or 224 / 256))
        return edge, edge, (edge, edge) if edge >= 384 else cut
    resized = _sides(size) if edge is None else int(edge)
    if document.get("do_center_crop", kind.cut):
        return *_sides(document["crop_size"]), resized
    if isinstance(resized, int):
        raise ValueError("images of different shapes cannot share a batch")
    return *resized, resized


def _sides(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size["height"]), int(size["width"]))


def opened(data: bytes) -> Any:
    """The image in RGB, upright as its camera says."""
    from PIL import Image

    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        return upright(image)


def thumbnail(data: bytes, *, side: int = 64) -> bytes:
    """A small PNG for people; what is smaller is shown larger, with its pixels."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = opened(data)
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    image = image.resize(size, Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.BICUBIC)
    out = io.BytesIO()
    image.save(out, "PNG", optimize=True)
    return out.getvalue()


def _changed(image: Any, change: Change) -> Any:
    from PIL import ImageEnhance, ImageOps

    if change.flip:
        image = ImageOps.mirror(image)
    kinds = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for kind, factor in zip(kinds, change.colors, strict=True):
        if factor != 1:
            image = kind(image).enhance(factor)
    return image


@lru_cache(maxsize=1)
def _threads(process: int) -> ThreadPoolExecutor:
    """One pool a process: a fork would inherit one without threads."""
    return ThreadPoolExecutor(min(8, len(os.sched_getaffinity(0))), thread_name_prefix="images")
