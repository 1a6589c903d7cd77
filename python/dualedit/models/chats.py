"""Questions of more than one picture or one turn: chat messages as they are given, pictures opened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from .images import open_image

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Chat:
    """A conversation that ends with the user's turn.

    Attributes:
        messages: role and parts of each turn, as chat templates read them.
        images: the pictures in it, in order.
    """

    messages: tuple[dict[str, Any], ...]
    images: tuple[Image.Image, ...]

    @property
    def words(self) -> str:
        """The text of the last turn."""
        return " ".join(p["text"] for p in self.messages[-1]["content"] if p["type"] == "text")


def is_chat(prompt: Any) -> bool:
    """Whether a prompt is given as chat messages."""
    return isinstance(prompt, (list, tuple)) and all(isinstance(message, Mapping) for message in prompt)


def read_chat(messages: Any) -> Chat:
    """Chat messages with their pictures opened.

    Args:
        messages: mappings with "role" and "content": a text, or parts {"type": "text", "text": ...} and
            {"type": "image", "image": ...} (anything that `open_image` takes), or OpenAI's
            {"type": "image_url", "image_url": {"url": ...}}.

    Raises:
        ValueError: another shape; names the message and the part.
    """
    turns, images = [], []
    if not messages:
        raise ValueError("messages is empty: pass at least one message of the user.")
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        role, content = message.get("role"), message.get("content")
        role = "system" if role == "developer" else role
        if role not in ROLES:
            raise ValueError(f"{where}: role={role!r}, choose one of {', '.join(ROLES)}.")
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        if not isinstance(content, (list, tuple)) or not content:
            raise ValueError(f"{where}: content={content!r}, pass a text or a list of parts.")
        parts = [_part(f"{where}.content[{i}]", part, images) for i, part in enumerate(content)]
        turns.append({"role": role, "content": parts})
    chat = Chat(tuple(turns), tuple(images))
    if turns[-1]["role"] != "user" or not chat.words.strip():
        raise ValueError("messages has to end with a question of the user: its text is what is answered.")
    return chat


def pictures_and_words(images: Any, words: str) -> Chat:
    """One turn with several pictures in front of a question. Raises ValueError for an unreadable one."""
    parts = [{"type": "image", "image": image} for image in images]
    return read_chat([{"role": "user", "content": [*parts, {"type": "text", "text": words}]}])


def _part(where: str, part: Any, images: list[Image.Image]) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind in ("text", "input_text") and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    given = None
    if kind in ("image_url", "input_image"):
        given = part.get("image_url")
        given = given.get("url") if isinstance(given, Mapping) else given
    elif kind == "image":
        given = next((part[name] for name in ("image", "url", "path") if part.get(name) is not None), None)
    if given is None:
        raise ValueError(
            f'{where} is of type {kind!r}: pass {{"type": "text", "text": ...}}, {{"type": "image", "image": '
            '...}} or {"type": "image_url", "image_url": {"url": ...}}.'
        )
    try:
        image = open_image(given)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    assert image is not None
    images.append(image)
    return {"type": "image", "image": image}
