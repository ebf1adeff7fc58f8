"""Image classification: one label an image, or a list of labels, by a ViT or a CNN.

The encoded store holds the images as their files were, so that trainers need nothing else. Labels, losses, metrics,
trivial answer and probe are those of text classification.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from finetune_trainer.data.batch import Encoded
from finetune_trainer.data.order import Rows
from finetune_trainer.data.pixels import Augment, Processor, thumbnail
from finetune_trainer.data.read import DataError
from finetune_trainer.tasks.base import Column, Facts, Learner, Piece, RowError, Sample, Tools, cell, label_of
from finetune_trainer.tasks.text_classification import ONE, SEVERAL, TextClassification, TextClassifier

PREPROCESSOR = "preprocessor_config.json"


class ImageClassification(TextClassification):
    """Rows with an image and a label, or a list of labels."""

    reads = "images"
    store: ClassVar[Mapping[str, Column]] = {
        "image": Column("U8", ragged=True),
        "path": Column("U8", ragged=True),
        "labels": Column("I32", ragged=True, labels=True),
    }

    def read_row(self, row: Mapping[str, Any]) -> Sample:
        """The image is bytes that can be decoded: whoever reads the row has seen to that. In a folder it has a path."""
        image = cell(row, self.columns, "image")
        value, name = cell(row, self.columns, "label"), self.columns["label"]
        several = isinstance(value, list | tuple)
        labels = tuple(dict.fromkeys(label_of(item, name) for item in (value if several else [value])))
        content = hashlib.sha256(image).hexdigest()
        form, path = SEVERAL if several else ONE, row.get("path")
        payload = (image, path.encode(errors="replace") if isinstance(path, str) else b"")
        return Sample(content, "\n".join(sorted(labels)), labels, form, payload=payload)

    def encode(self, samples: Sequence[Sample], tools: Tools) -> Sequence[Sequence[Piece] | RowError]:
        found = []
        for sample in samples:
            image, path = sample.payload
            columns = {"image": image, "path": path, "labels": [tools.number(label) for label in sample.labels]}
            found.append([Piece(columns, tokens=0, length=1)])
        return found

    def facts(self, tools: Tools) -> dict[str, Any]:
        """The base's preprocessor_config.json, in the size that is asked for. Raises DataError."""
        asked, config = self.config.task.image_size, tools.model
        processor = Processor.of(tools.images, asked=asked, uri=self.config.model)
        known, channels = config.get("image_size"), config.get("num_channels", 3)
        sides = known if isinstance(known, list) else [known, known]
        if "num_attention_heads" in config and known is not None and [processor.height, processor.width] != list(sides):
            named = "spec.task.imageSize" if asked is not None else PREPROCESSOR
            raise DataError(
                "ModelUnsuitable",
                f"{named}: images of {processor.height} x {processor.width} pixels do not fit a model with positions "
                f"for {sides[0]} x {sides[1]} (image_size in config.json); use that size, or a CNN.",
            )
        if channels != 3:
            raise DataError(
                "ModelUnsuitable",
                f"{self.config.model}: the model takes images of {channels} channels; give one of RGB images.",
            )
        document = dict(tools.images)
        if asked is not None:
            for name in ("crop_pct", "crop_size"):
                document.pop(name, None)
            document |= {"size": {"height": asked, "width": asked}, "do_center_crop": False}
            document.pop("feature_extractor_type", None)
            document["image_processor_type"] = "ViTImageProcessor"  # others know no size but the shortest edge
            document["resample"] = Processor.of(tools.images, asked=asked, uri=self.config.model).resample
        return {"preprocessor": document}

    def learner(self, facts: Facts) -> Learner:
        return ImageClassifier(self.config, facts)


class ImageClassifier(TextClassifier):
    """A classifier of text but for its inputs."""

    auto_class = "AutoModelForImageClassification"
    targets = frozenset({"labels", "other_labels", "share"})

    @cached_property
    def processor(self) -> Processor:
        return Processor.of(self.facts.more["preprocessor"], asked=None, uri=self.config.model)

    @cached_property
    def _augment(self) -> Augment:
        task = self.config.task
        return Augment(flip=bool(task.augment_flip), crop=task.augment_crop or 1.0, color=task.augment_color or 0.0)

    @property
    def augments(self) -> bool:
        return not self._augment.nothing or self.config.task.augment_mixup is not None

    def files(self) -> dict[str, str]:
        document = self.facts.more["preprocessor"]
        if self.config.task.image_size is None:
            return {}
        return {PREPROCESSOR: json.dumps(document, indent=2, sort_keys=True) + "\n"}

    def collate(self, store: Encoded, rows: Rows) -> dict[str, NDArray[Any]]:
        return self._collated(store, rows, None)

    def collate_for_training(self, store: Encoded, rows: Rows) -> dict[str, NDArray[Any]]:
        """Images changed at random; with mixup (Zhang et al. 2018) each is blended with another of the micro-batch,
        whose labels are `other_labels` and whose own share of the image is `share`."""
        found = self._collated(store, rows, self._augment)
        alpha = self.config.task.augment_mixup
        if alpha is None:
            return found
        share = np.float32(np.random.beta(alpha, alpha))
        other = np.random.permutation(len(rows))
        found["pixel_values"] = share * found["pixel_values"] + (1 - share) * found["pixel_values"][other]
        found["other_labels"] = found["labels"][other]
        found["share"] = np.full(len(rows), share, dtype=np.float32)
        return found

    def _collated(self, store: Encoded, rows: Rows, augment: Augment | None) -> dict[str, NDArray[Any]]:
        images = [image.tobytes() for image in store.each("image", rows)]
        changes = None if augment is None or augment.nothing else augment.draw(len(images))
        labels = self.labels(store, rows)
        return {
            "pixel_values": self.processor.batch(images, changes),
            "labels": labels.astype(np.float32 if self.several else np.int64),
        }

    def picture(self, store: Encoded, row: int) -> tuple[str, bytes]:
        (path,), (image,) = (store.each(name, np.array([row])) for name in ("path", "image"))
        return path.tobytes().decode(errors="replace"), thumbnail(image.tobytes())

    def loss(self, model: Any, inputs: Mapping[str, Any]) -> Any:
        if "share" not in inputs:
            return super().loss(model, inputs)
        logits, share = model(**self.model_inputs(inputs)).logits, inputs["share"][0]
        own, other = (self._losses(self._loss, logits, inputs[name]).sum() for name in ("labels", "other_labels"))
        return share * own + (1 - share) * other
