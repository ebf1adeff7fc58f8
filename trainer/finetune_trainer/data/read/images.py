"""Images in rows: where their bytes come from, and whether they can be decoded.

A cell holds an image as bytes (folder, tar, parquet), as an object {"bytes": ..., "path": ...} (what the datasets
library writes), or as a path relative to the file of rows (jsonl, csv). Pillow is imported when an image is looked at.
"""

import io
import posixpath
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .base import MIB, ROW_LIMIT

ENDINGS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
"""What is decoded, by Pillow's names; everything else Pillow knows stays unused, and so do its errors."""
PIXEL_LIMIT = 64 * 1000 * 1000
_DEEP = ("I", "F")
_TOO_LARGE = f"the image has more than {PIXEL_LIMIT // 10**6} million pixels; make it smaller."


class ImageError(Exception):
    """A cell holds no usable image; the message is the end of a sentence: what is wrong, and the remedy."""


@dataclass(frozen=True)
class ImageInfo:
    """What an image is: Pillow's name of the format, size in pixels, Pillow's mode (RGB, L, ...)."""

    format: str
    width: int
    height: int
    mode: str


def image_bytes(value: Any, *, sibling: Callable[[str], bytes]) -> bytes:
    """The bytes of the image in a cell. `sibling` opens a path relative to the file of rows. Raises ImageError."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str) and value:
        return sibling(value)
    if isinstance(value, bytes) and value:
        return value
    kind = "nothing" if value is None or value in ("", b"") else type(value).__name__
    raise ImageError(f"the image must be bytes or a path relative to the file, found {kind}; mend the row.")


def relative_key(key: str, path: str) -> str:
    """The key of the object that `path` names beside the file `key`. Raises ImageError where it leads elsewhere."""
    directory = posixpath.dirname(key)
    normal = posixpath.normpath(path)
    if path.startswith("/") or "\\" in path or "\0" in path or "://" in path or normal.split("/")[0] in ("..", "."):
        raise ImageError(
            f"the path {path[:200]!r} leads out of the directory of the file; write paths relative to the file, "
            "with forward slashes."
        )
    return posixpath.join(directory, normal)


def upright(image: Any) -> Any:
    """An image as models see it: in RGB, turned as its camera says. Raises whatever its decoder raises."""
    from PIL import ImageOps

    return ImageOps.exif_transpose(image).convert("RGB")


def inspect(data: bytes) -> ImageInfo:
    """Decode an image fully. Raises ImageError where that cannot be done in bounded memory."""
    from PIL import Image, UnidentifiedImageError

    if len(data) > ROW_LIMIT:
        raise ImageError(f"the image has more than {ROW_LIMIT // MIB} MiB; make it smaller.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                width, height = image.size
                if width * height > PIXEL_LIMIT:
                    raise ImageError(_TOO_LARGE)
                if width * height == 0:
                    raise ImageError("the image has no pixels; replace it.")
                if image.mode in _DEEP or image.mode.startswith("I;"):
                    deep = f"the image has more than 8 bits a channel (mode {image.mode}), of which models would see"
                    raise ImageError(f"{deep} all above 255 as white; convert it to 8 bits.")
                upright(image)
                return ImageInfo(str(image.format), width, height, image.mode)
    except ImageError:
        raise
    except Image.DecompressionBombError:
        raise ImageError(_TOO_LARGE) from None
    except UnidentifiedImageError:
        raise ImageError(f"not an image of a known format ({', '.join(FORMATS)}); convert or replace it.") from None
    except Exception as error:  # decoders raise whatever a damaged file leads them to
        raise ImageError(f"the image cannot be decoded ({type(error).__name__}); replace it.") from error
