"""From an image and a question to the tensors a model is called with, by the model's own processor."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

Picture = Image.Image | str | os.PathLike


def open_image(image: Picture | None) -> Image.Image | None:
    """A PIL image from an image or a path.

    Raises:
        ValueError: a path without a file, a file that is no image, or another type.
    """
    if image is None or isinstance(image, Image.Image):
        return image
    if not isinstance(image, (str, os.PathLike)):
        raise ValueError(f"image is a {type(image).__name__}: pass a PIL image or a path.")
    path = Path(image)
    if not path.is_file():
        raise ValueError(f"image={str(path)!r}: no such file.")
    try:
        with Image.open(path) as opened:
            return opened.convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"image={str(path)!r} cannot be read as an image: {error}") from error


class Prompter:
    """Builds model inputs for questions, and target tokens that continue them.

    Args:
        processor: of the model, with a tokenizer.
        template: a format string with {prompt} (and the image placeholder, where there is an image) for
            models without a chat template; None uses the chat template, or else the image token and the
            prompt.
    """

    def __init__(self, processor: Any, template: str | None = None):
        if template is not None and "{prompt}" not in template:
            raise ValueError(f"template={template!r} has no {{prompt}}: put it where the question goes.")
        self.processor = processor
        self.template = template
        self.tokenizer = getattr(processor, "tokenizer", processor)

    @property
    def _chats(self) -> bool:
        return self.template is None and bool(getattr(self.processor, "chat_template", None))

    def _conversation(self, image: Image.Image | None, prompt: str) -> list[dict]:
        picture = [] if image is None else [{"type": "image", "image": image}]
        return [{"role": "user", "content": [*picture, {"type": "text", "text": prompt}]}]

    def text(self, image: Image.Image | None, prompt: str) -> str:
        """The prompt as the model reads it, placeholders not expanded."""
        if self._chats:
            conversation = self._conversation(image, prompt)
            return self.processor.apply_chat_template(
                conversation, add_generation_prompt=True, tokenize=False
            )
        token = getattr(self.processor, "image_token", "<image>")
        if self.template is not None:
            text = self.template.replace("{prompt}", prompt)
            return text if image is not None else text.replace(token, "").lstrip()
        return prompt if image is None else f"{token}\n{prompt}"

    def inputs(self, questions: Sequence[tuple[Image.Image | None, str]]) -> dict[str, Tensor]:
        """Inputs of one batch of questions, left-padded; questions with and without an image may be mixed.

        Raises:
            ValueError: an empty list or an empty question.
        """
        if not questions:
            raise ValueError("questions is empty: pass at least one (image, prompt).")
        for _, prompt in questions:
            if not isinstance(prompt, str) or not prompt.strip():
                raise ValueError(f"prompt={prompt!r}: pass a question.")
        texts = [self.text(image, prompt) for image, prompt in questions]
        images = [image for image, _ in questions if image is not None]
        # A chat template writes the beginning-of-sequence token itself where the model has one.
        begin = getattr(self.tokenizer, "bos_token", None)
        special = not (self._chats and begin and texts[0].startswith(begin))
        side, self.tokenizer.padding_side = getattr(self.tokenizer, "padding_side", "left"), "left"
        try:
            batch = self.processor(
                text=texts, return_tensors="pt", padding=len(texts) > 1, add_special_tokens=special,
                **({"images": images} if images else {}),
            )  # fmt: skip
        finally:
            self.tokenizer.padding_side = side
        return dict(batch)

    def target_ids(self, image: Image.Image | None, prompt: str, target: str, eos: int | None) -> Tensor:
        """Tokens [T] of an answer as they follow the prompt, with `eos` behind them where given.

        Raises:
            ValueError: an empty target.
        """
        if not isinstance(target, str) or not target.strip():
            raise ValueError(f"target={target!r}: an edit needs an answer. Pass the new answer as text.")
        before = self.text(image, prompt)
        join = "" if before[-1:].isspace() else " "
        # Tokenized together, because a word at the start of a text and inside it are not the same tokens.
        whole = self.tokenizer(before + join + target.strip(), add_special_tokens=False)["input_ids"]
        head = self.tokenizer(before, add_special_tokens=False)["input_ids"]
        ids = whole[len(head) :] if whole[: len(head)] == head else None
        if not ids:
            ids = self.tokenizer(join + target.strip(), add_special_tokens=False)["input_ids"]
        return torch.tensor([*ids, *([] if eos is None else [eos])], dtype=torch.int64)
