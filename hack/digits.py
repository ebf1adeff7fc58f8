"""A real data set of images out of what a bare machine has: handwritten digits, which scikit-learn brings along.

1,797 digits written by hand, scanned and scaled to 8 x 8 pixels of 17 greys (the test set of the UCI collection of
Alpaydin and Kaynak 1998). Each becomes a PNG in the directory of its class, as an image folder has it. The last rows of
the collection are the test rows.

    python hack/digits.py DIRECTORY
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

ROWS, TEST_ROWS = 1400, 397


def make(directory: Path, *, rows: int = ROWS, test_rows: int = TEST_ROWS) -> dict[str, Counter[int]]:
    """Write `train/LABEL/NUMBER.png` and `test/LABEL/NUMBER.png`; returns how many of each digit both have."""
    found = load_digits()
    counts: dict[str, Counter[int]] = {"train": Counter(), "test": Counter()}
    for number, (pixels, label) in enumerate(zip(found.images, found.target, strict=True)):
        side = "train" if number < rows else "test" if number >= len(found.images) - test_rows else None
        if side is None:
            continue
        counts[side][int(label)] += 1
        path = directory / side / str(label) / f"{number:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.round(pixels * 255 / 16).astype(np.uint8)).save(path)
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description="Make a real image folder without network")
    parser.add_argument("directory", type=Path)
    arguments = parser.parse_args()
    for side, counts in make(arguments.directory).items():
        shares = ", ".join(f"{label} {count}" for label, count in sorted(counts.items()))
        print(f"{arguments.directory / side}/: {counts.total()} images: {shares}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
