"""Pictures that strangers send: data URLs and, where they are allowed, addresses; bounded before decoding."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import PIL.Image
from PIL.Image import Image

from ..models.chats import Chat, read_chat
from ..models.downloads import download, is_address
from ..models.images import data_url_bytes, shown
from .settings import Refused, Settings

_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")


def open_sent(sent: Any, settings: Settings) -> Image:
    """A picture of a request, decoded, in RGB.

    Args:
        sent: a data URL; or an http address, where `settings.urls` allows them. Never a path.

    Raises:
        Refused: 400 for what is no picture, 413 for one that is too large.
    """
    limits = settings.limits
    if not isinstance(sent, str):
        raise Refused(400, "invalid_image", f"A picture is a data URL as text, not {type(sent).__name__}.")
    try:
        if sent[:5].lower() == "data:":
            found = data_url_bytes(sent)
        elif is_address(sent) and settings.urls:
            public = not settings.private_urls
            found = download(sent, limits.download_bytes, limits.download_seconds, public_only=public)
        elif is_address(sent):
            raise Refused(
                400, "urls_not_allowed", "This service fetches no addresses: send the picture as a data URL."
            )
        else:
            raise Refused(400, "invalid_image", f"{shown(sent)} is no data URL: data:image/png;base64,...")
    except ValueError as error:
        status = 413 if "the limit" in str(error) else 400
        raise Refused(status, "invalid_image", str(error)) from error
    return decode(found, limits.pixels)


def decode(found: bytes, limit: int) -> Image:
    """The picture in a file, in RGB, if it has at most `limit` pixels. Raises Refused as `open_sent`."""
    too_large = f"A picture may have {limit:,} pixels."
    try:
        with PIL.Image.open(io.BytesIO(found), formats=_FORMATS) as opened:  # reads the header alone
            width, height = opened.size
            if width * height > limit:
                raise Refused(413, "image_too_large", f"{too_large} This one has {width} x {height}.")
            return opened.convert("RGB")
    except PIL.Image.DecompressionBombError as error:
        raise Refused(413, "image_too_large", too_large) from error
    except (OSError, SyntaxError, ValueError, MemoryError) as error:
        raise Refused(400, "invalid_image", f"A picture cannot be read: {error}") from error


def open_messages(messages: Sequence[Any], settings: Settings) -> Chat:
    """OpenAI's chat messages with their pictures decoded.

    Raises:
        Refused: 400 for messages of another shape, 413 for too many or too large pictures.
    """
    count, turns = 0, []
    for number, message in enumerate(messages):
        content = message.get("content") if isinstance(message, Mapping) else None
        if not isinstance(content, list):
            turns.append(message)
            continue
        parts = []
        for part in content:
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind not in ("text", "input_text", "image_url", "input_image"):
                raise Refused(400, "invalid_message", f"messages[{number}] has a part of type {kind!r}.")
            if kind in ("image_url", "input_image"):
                count += 1
                if count > settings.limits.pictures:
                    said = f"A request may have {settings.limits.pictures} pictures."
                    raise Refused(413, "too_many_images", said)
                given = part.get("image_url")
                given = given.get("url") if isinstance(given, Mapping) else given
                part = {"type": "image", "image": open_sent(given, settings)}
            parts.append(part)
        turns.append({**message, "content": parts})
    try:
        return read_chat(turns)
    except (ValueError, AttributeError) as error:
        raise Refused(400, "invalid_message", str(error)) from error
