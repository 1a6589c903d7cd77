"""Pictures as they are given (PIL images, paths, bytes): the one place that checks and opens them."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import PIL.Image
from PIL.Image import Image

ImageSource = Image | str | bytes | None
Picture = Image | str | os.PathLike | bytes
_SHOWN = 80  # characters of a path in an error message


def image_source(image: Any) -> ImageSource:
    """What is kept of an image as it was given; nothing is opened.

    Args:
        image: a PIL image, a path, the bytes of an image file, None, or the {"bytes": ..., "path": ...} of a
            Hugging Face `datasets` row that was not decoded (its bytes win).

    Returns:
        the PIL image, the path as text, the bytes, or None.

    Raises:
        ValueError: another type, an address on the web, or an empty path, empty bytes or an empty mapping.
    """
    if isinstance(image, Mapping):
        found = image.get("bytes") or image.get("path")
        if found is None:
            raise ValueError(f"image={dict(image)!r} has neither bytes nor a path: fill in one of them.")
        image = found
    if image is None or isinstance(image, Image):
        return image
    if isinstance(image, (bytes, bytearray)):
        image = bytes(image)
    elif isinstance(image, (str, os.PathLike)):
        image = os.fspath(image)
    else:
        kind = type(image).__name__
        raise ValueError(f"image is a {kind}: pass a PIL image, a path, the bytes of an image file, or None.")
    if not image:
        raise ValueError(f"image={image!r} is empty: pass a path or bytes, or None for a text-only question.")
    if isinstance(image, str) and "://" in image:
        raise ValueError(
            f"image={shown(image)} is an address, and nothing is downloaded here: download the picture first "
            "and pass its path."
        )
    return image


def open_image(image: Any) -> Image | None:
    """The picture behind anything that `image_source` takes: a PIL image as it is, a file or bytes in RGB.

    Raises:
        ValueError: as `image_source`; no such file; or not an image that Pillow can read.
    """
    source = image_source(image)
    if source is None or isinstance(source, Image):
        return source
    if isinstance(source, str) and not is_file(source):
        raise ValueError(f"image={shown(source)}: no such file.")
    try:
        with PIL.Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as opened:
            return opened.convert("RGB")
    except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
        raise ValueError(f"image={shown(source)} cannot be read as an image: {error}") from error


def rgb(source: ImageSource) -> Image:
    """The picture behind a source, in RGB. Raises ValueError: as `open_image`, or there is none."""
    image = open_image(source)
    if image is None:
        raise ValueError("image=None: there is no picture to open.")
    return image.convert("RGB")


def is_file(path: str) -> bool:
    """Whether a text is the path of a file; False for one that no file system takes as a name."""
    try:
        return Path(path).is_file()
    except (OSError, ValueError):
        return False


def shown(source: ImageSource) -> str:
    """A source in a few words, without opening it."""
    if isinstance(source, bytes):
        return f"<{len(source)} bytes>"
    if isinstance(source, Image):
        return f"<{source.mode} {source.width}x{source.height}>"
    if isinstance(source, str) and len(source) > _SHOWN:
        return f"{source[: _SHOWN // 2]!r}...{source[-_SHOWN // 2 :]!r}"
    return repr(source)
