"""Encoded images -> what a model sees, as preprocessor_config.json says it; and the same, changed at random.

Equal to what transformers' image processors make of an image, so that a published model sees what it was trained on.
Pillow is imported when an image is decoded. Torch-free.
"""

import io
import os
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from finetune_trainer.data.read import DataError
from finetune_trainer.data.read.images import FORMATS

_CHANNELS = 3
_IMAGENET_MEAN, _IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
_WORTH_A_THREAD = 16 * 1024
"""Bytes of an encoded image below which handing it to a thread takes as long as decoding it."""


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
    shortest: int | None
    """The shortest side is made so long before the middle is cut out; None: both sides are set at once."""
    resample: int
    """Pillow's number of the filter."""
    factor: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, document: Mapping[str, Any], *, asked: int | None, uri: str) -> Self:
        """Read preprocessor_config.json; `asked` is another size, square. Raises DataError ModelIncomplete."""
        try:
            height, width, shortest = _size(document) if asked is None else (asked, asked, None)
            factor = float(document.get("rescale_factor", 1 / 255)) if document.get("do_rescale", True) else 1.0
            plain = not document.get("do_normalize", True)
            mean = [0.0] * _CHANNELS if plain else document.get("image_mean") or _IMAGENET_MEAN
            std = [1.0] * _CHANNELS if plain else document.get("image_std") or _IMAGENET_STD
            mean, std = (tuple(float(number) for number in numbers) for numbers in (mean, std))
            resample = int(document.get("resample", 3 if _kind(document).startswith("ConvNext") else 2))
            if not len(mean) == len(std) == _CHANNELS or min(std) <= 0 or not 1 <= min(height, width) <= 4096:
                raise ValueError
            if not 0 <= resample <= 5 or not document.get("do_resize", True):
                raise ValueError
        except (TypeError, ValueError, KeyError):
            raise DataError(
                "ModelIncomplete",
                f"{uri}/preprocessor_config.json does not say how images become input (size, crop_size, resample, "
                "image_mean and image_std for three channels); write it with AutoImageProcessor.save_pretrained.",
            ) from None
        return cls(height, width, shortest, resample, factor, mean, std)

    def batch(self, images: Sequence[bytes], changes: "Sequence[Change] | None" = None) -> NDArray[np.float32]:
        """[images, 3, height, width]; large images are decoded by several threads."""
        found = np.empty((len(images), _CHANNELS, self.height, self.width), dtype=np.float32)

        def fill(number: int) -> None:
            found[number] = self.pixels(images[number], changes[number] if changes else None)

        if max(map(len, images), default=0) >= _WORTH_A_THREAD and len(images) > 1:
            list(_threads(os.getpid()).map(fill, range(len(images))))
        else:
            for number in range(len(images)):
                fill(number)
        return found

    def pixels(self, data: bytes, change: Change | None = None) -> NDArray[np.float32]:
        """[3, height, width]."""
        from PIL import Image, ImageOps

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about transparency in palettes; preflight has decoded it once
            with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
                image = ImageOps.exif_transpose(opened).convert("RGB")
        if change is None:
            image = self._fitted(image)
        else:
            w, h = image.size
            left, top, right, bottom = change.box
            box = (left * w, top * h, max(right * w, left * w + 1), max(bottom * h, top * h + 1))
            box = (min(box[0], w - 1), min(box[1], h - 1), min(box[2], w), min(box[3], h))
            image = image.resize((self.width, self.height), self.resample, box=box)
            image = _colored(ImageOps.mirror(image) if change.flip else image, change.colors)
        values = np.asarray(image, dtype=np.float32).transpose(2, 0, 1)
        return np.asarray(values * self._scale - self._shift, dtype=np.float32)

    def _fitted(self, image: Any) -> Any:
        if self.shortest is None:
            return image.resize((self.width, self.height), self.resample)
        w, h = image.size
        short, long = min(w, h), max(w, h)
        other = int(self.shortest * long / short)
        image = image.resize((self.shortest, other) if w <= h else (other, self.shortest), self.resample)
        left, top = (image.width - self.width) // 2, (image.height - self.height) // 2
        return image.crop((left, top, left + self.width, top + self.height))

    @cached_property
    def _scale(self) -> NDArray[np.float32]:
        return np.float32(self.factor) / np.array(self.std, np.float32)[:, None, None]

    @cached_property
    def _shift(self) -> NDArray[np.float32]:
        return (np.array(self.mean, np.float32) / np.array(self.std, np.float32))[:, None, None]


def _size(document: Mapping[str, Any]) -> tuple[int, int, int | None]:
    """Height, width and the length of the shortest side before the cut."""
    size = document["size"]
    kind = _kind(document)
    square = isinstance(size, int)
    if square or set(size) == {"shortest_edge"}:
        edge = int(size if square else size["shortest_edge"])
        if kind.startswith("ConvNext"):
            # below 384 a middle part of crop_pct is shown, from there on all of the image, made square
            return edge, edge, None if edge >= 384 else int(edge / float(document.get("crop_pct") or 224 / 256))
        if not document.get("do_center_crop", not square):
            return edge, edge, None if square else edge
        height, width = _sides(document.get("crop_size") or edge)
        return height, width, edge
    height, width = _sides(size)
    return height, width, None


def _kind(document: Mapping[str, Any]) -> str:
    return str(document.get("image_processor_type") or document.get("feature_extractor_type") or "")


def _kind(document: Mapping[str, Any]) -> str:
    return str(document.get("image_processor_type") or document.get("feature_extractor_type") or "")


def _sides(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size["height"]), int(size["width"]))


def _colored(image: Any, factors: Sequence[float]) -> Any:
    from PIL import ImageEnhance

    kinds = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for kind, factor in zip(kinds, factors, strict=True):
        if factor != 1:
            image = kind(image).enhance(factor)
    return image


@lru_cache(maxsize=1)
def _threads(process: int) -> ThreadPoolExecutor:
    """One pool a process: a fork would inherit one without threads."""
    return ThreadPoolExecutor(min(8, len(os.sched_getaffinity(0))), thread_name_prefix="images")
