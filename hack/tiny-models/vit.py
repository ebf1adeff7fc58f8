"""Pretrains a small vision transformer from random weights with `finetune run`, for tests/assets/tiny-vit.

What it learns from: letters in the fonts of a Debian machine (fonts-dejavu), turned, sheared, blurred and in noise. Of
digits, which the example tunes it for, it sees nothing.

    nice -n 5 python hack/tiny-models/vit.py [--images N] [--steps N] [--work DIRECTORY]
"""

import argparse
import io
import random
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import yaml
from PIL import Image, ImageDraw, ImageFilter, ImageFont

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "hack"))
from demo import published  # noqa: E402

ASSET = ROOT / "tests/assets/tiny-vit"
FONTS = Path("/usr/share/fonts/truetype/dejavu")
SEED = 17
LETTERS = "ABCDEFGHIJKLMNPQRSTUVWXYZabdefghnqrt"
"""Small letters that look like their capitals are left out; so is O, which looks like a digit."""
SIDE = 32
SIZES = {
    "image_size": SIDE,
    "patch_size": 8,
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
}


def main() -> int:
    parser = argparse.ArgumentParser(description="Pretrain the small vision transformer of tests and examples")
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--work", type=Path, default=ROOT / ".work/tiny-vit")
    arguments = parser.parse_args()
    work: Path = arguments.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    make_images(work / "train.tar", count=arguments.images)
    make_base(work / "base")
    path = work / "job.yaml"
    path.write_text(yaml.safe_dump(job(work, steps=arguments.steps), sort_keys=False), encoding="utf-8")
    command = [sys.executable, "-m", "finetune_trainer", "run", str(path), "--work", str(work / "scratch")]
    code = subprocess.run(command, check=False).returncode
    if code == 0:
        keep(published(work / "output"), images=arguments.images, steps=arguments.steps)
    return code


def make_images(path: Path, *, count: int) -> None:
    """A tar of WebDataset's kind. Raises RuntimeError where the fonts are missing."""
    fonts = sorted(FONTS.glob("DejaVu*.ttf"))
    if not fonts:
        raise RuntimeError(f"no fonts in {FONTS}; install fonts-dejavu")
    draw = random.Random(SEED)
    with tarfile.open(path, "w") as archive:
        for number in range(count):
            letter = draw.choice(LETTERS)
            for ending, data in (("png", drawn(letter, fonts, draw)), ("cls", letter.encode())):
                entry = tarfile.TarInfo(f"{number:06}.{ending}")
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))


def drawn(letter: str, fonts: list[Path], draw: random.Random) -> bytes:
    """A letter, bright on dark, as a PNG of any resolution from 8 to SIDE pixels."""
    font = ImageFont.truetype(str(draw.choice(fonts)), draw.randint(34, 52))
    image = Image.new("L", (64, 64))
    ImageDraw.Draw(image).text((32, 32), letter, fill=draw.randint(150, 255), font=font, anchor="mm")
    shear, wide = draw.uniform(-0.3, 0.3), draw.uniform(0.8, 1.3)
    image = image.rotate(draw.uniform(-15, 15), Image.Resampling.BILINEAR, center=(32, 32))
    slant = (wide, shear, 32 - 32 * (wide + shear), 0, 1, draw.uniform(-4, 4))
    image = image.transform((64, 64), Image.Transform.AFFINE, slant, Image.Resampling.BILINEAR)
    if draw.random() < 0.5:
        image = image.filter(ImageFilter.MaxFilter(draw.choice((3, 5))))
    image = image.filter(ImageFilter.GaussianBlur(draw.uniform(0, 2)))
    side = draw.choice((8, 10, 12, 16, 24, SIDE))
    image = image.resize((side, side), Image.Resampling.BOX)
    noise = Image.frombytes("L", (side, side), draw.randbytes(side * side))
    image = Image.blend(image, noise, draw.uniform(0, 0.15))
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def make_base(directory: Path) -> None:
    """Random weights."""
    import torch
    from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

    torch.manual_seed(SEED)
    ViTModel(ViTConfig(**SIZES), add_pooling_layer=False).save_pretrained(directory)
    ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(directory)


def job(work: Path, *, steps: int) -> dict[str, Any]:
    return {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "tiny-vit"},
        "spec": {
            "task": {"type": "image-classification", "augment": {"crop": 0.7}},
            "model": {"uri": (work / "base").as_uri()},
            "data": {"train": [{"uri": (work / "train.tar").as_uri()}], "validation": {"fraction": 0.05}},
            "training": {
                "maxSteps": steps,
                "batchSize": 64,
                "microBatch": 64,
                "learningRate": 1e-3,
                "schedule": {"type": "cosine", "minimum": 0.02, "warmup": {"percent": 5}},
                "optimizer": {"type": "adamw", "weightDecay": 0.05},
                "evaluateEvery": {"steps": max(1, steps // 4)},
            },
            "output": {"uri": (work / "output").as_uri()},
            "resources": {"perNode": {"gpus": 0}},
        },
    }


def keep(outcome: dict[str, Any], *, images: int, steps: int) -> None:
    """The published model without its head, in half precision, with its recipe."""
    import torch
    from transformers import AutoImageProcessor, ViTModel

    directory = Path(outcome["model"]["uri"].removeprefix("file://"))
    model = ViTModel.from_pretrained(directory, dtype=torch.float16, add_pooling_layer=False)
    model.save_pretrained(ASSET)
    AutoImageProcessor.from_pretrained(directory).save_pretrained(ASSET)
    metrics = outcome["evaluation"]["tuned"]
    card = f"""# tiny-vit

A vision transformer of {sum(parameter.numel() for parameter in model.parameters()):,} weights in float16:
{SIZES["num_hidden_layers"]} layers of width {SIZES["hidden_size"]}, images of {SIDE} x {SIDE} pixels in patches of
{SIZES["patch_size"]} x {SIZES["patch_size"]}. A base for tests and examples; good for nothing else.

Made by `python hack/tiny-models/vit.py --images {images} --steps {steps}`, that is by `finetune run` with task
image-classification from random weights: {steps} steps of 64 images, AdamW, peak learning rate 1e-3, cosine schedule,
seed {SEED}. {images:,} images of {len(LETTERS)} letters in the DejaVu fonts, turned, sheared, blurred and in noise; no
digits. On held-out images: loss {metrics["loss"]:.3f}, accuracy {metrics["accuracy"]:.3f}.
"""
    (ASSET / "README.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
