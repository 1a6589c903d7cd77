"""Pictures as they are given: the one place that checks and opens them."""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

import PIL.Image
from PIL.Image import Image

from .downloads import download, is_address

ImageSource = Image | str | bytes | None
Picture = Image | str | os.PathLike | bytes
_SHOWN = 80  # characters of a data URL in an error message; a path is told whole, up to what systems take
_LONGEST_PATH = 4096


def image_source(image: Any) -> ImageSource:
    """What is kept of an image as it was given; nothing is opened.

    Args:
        image: a PIL image, a path, the bytes of an image file, a data URL, an array [H, W, 3] or [H, W] of
            uint8, None, or the {"bytes": ..., "path": ...} of a Hugging Face `datasets` row that was not
            decoded (its bytes win).

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
    if isinstance(image, str) and image[:5].lower() == "data:":
        return data_url_bytes(image)
    if hasattr(image, "__array_interface__"):
        return _from_array(image)
    if isinstance(image, (bytes, bytearray)):
        image = bytes(image)
    elif isinstance(image, (str, os.PathLike)):
        image = os.fspath(image)
    else:
        kind = type(image).__name__
        raise ValueError(
            f"image is a {kind}: pass a PIL image, a path, an address, the bytes of an image file, an array "
            "of uint8, or None."
        )
    if not image:
        raise ValueError(f"image={image!r} is empty: pass a path or bytes, or None for a text-only question.")
    if isinstance(image, str) and "://" in image:
        raise ValueError(
            f"image={shown(image)} is an address, and nothing is downloaded here: download the picture first "
            "and pass its path."
        )
    return image


def data_url_bytes(url: str) -> bytes:
    """The bytes in a data URL (RFC 2397). Raises ValueError where it is none, or empty."""
    head, comma, body = url.partition(",")
    if not comma or head[:5].lower() != "data:":
        raise ValueError(f"image={shown(url)} is no data URL: it begins as data:image/png;base64,...")
    try:
        found = unquote_to_bytes(body)
        found = base64.b64decode(found, validate=True) if head.lower().endswith(";base64") else found
    except binascii.Error as error:
        raise ValueError(f"image={shown(url)} is a data URL with broken base64: {error}.") from error
    if not found:
        raise ValueError(f"image={shown(url)} is a data URL without data.")
    return found


def _from_array(image: Any) -> Image:
    kind = f"an array {list(image.shape)} of {image.dtype}"
    colours = image.ndim == 3 and image.shape[2] in (3, 4)
    if str(image.dtype) != "uint8" or not (image.ndim == 2 or colours) or 0 in image.shape:
        raise ValueError(f"image is {kind}: pass [height, width, 3] or [height, width] of uint8, 0 to 255.")
    return PIL.Image.fromarray(image).convert("RGB")


def open_image(image: Any) -> Image | None:
    """The picture behind anything that `image_source` takes, and behind an http address, which is downloaded.

    Returns:
        a PIL image as it is, everything else in RGB.

    Raises:
        ValueError: as `image_source`; no such file; a download that fails; or not an image that Pillow can
            read.
    """
    if isinstance(image, str) and is_address(image):
        image = download(image)
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
    most = _SHOWN if isinstance(source, str) and source[:5].lower() == "data:" else _LONGEST_PATH
    if isinstance(source, str) and len(source) > most:
        return f"{source[: _SHOWN // 2]!r}...{source[-_SHOWN // 2 :]!r}"
    return repr(source)


_THUMBNAIL = 48  # pixels of the longer side
_SMALL = 32 * 1024  # bytes of a PNG that is kept whole without being asked for


def picture_notes(image: Image | None, whole: bool | None = None) -> dict[str, Any]:
    """What is noted of an edit's picture: digest, size, a thumbnail (JPEG), and the picture itself (PNG).

    Args:
        whole: whether the picture is kept; None: where its PNG has at most 32 KiB.

    Returns:
        "image_sha256", "image_size" [width, height], "thumbnail" and, where it is kept, "picture", both in
        base64; an empty mapping without a picture.
    """
    if image is None:
        return {"image_sha256": None}
    colours = image.convert("RGB")
    digest = hashlib.sha256(colours.tobytes()).hexdigest()[:16]
    small = colours.copy()
    small.thumbnail((_THUMBNAIL, _THUMBNAIL))
    notes = {
        "image_sha256": digest,
        "image_size": list(colours.size),
        "thumbnail": _encoded(small, "JPEG", quality=70),
    }
    if whole is not False and (whole or colours.width * colours.height <= 16 * _SMALL):
        picture = _encoded(colours, "PNG")
        if whole or len(picture) <= _SMALL * 4 // 3:
            notes["picture"] = picture
    return notes


def noted_picture(record: Mapping[str, Any], thumbnail: bool = False) -> Image | None:
    """The picture that was noted with an edit, or its thumbnail; None where there is none.

    Raises:
        ValueError: what is noted is no picture.
    """
    kept = record.get("thumbnail" if thumbnail else "picture")
    if kept is None:
        return None
    try:
        data = base64.b64decode(kept, validate=True)
    except (ValueError, TypeError) as error:
        raise ValueError(f"the picture that is noted with the edit is damaged: {error}") from error
    return open_image(data)


def _encoded(image: Image, kind: str, **more: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **more)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
