"""From an image and a question to the tensors a model is called with, by the model's own processor."""

from __future__ import annotations

import hashlib
import os
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .chats import Chat, is_chat, pictures_and_words, read_chat
from .images import is_file, open_image, shown

LONGEST_TARGET = 128  # tokens of an edit's answer
# A fast tokenizer keeps its padding from one call to the next: a thread would pad as another one asks.
_ALONE: weakref.WeakKeyDictionary[Any, threading.RLock] = weakref.WeakKeyDictionary()
_MAKING = threading.Lock()


def alone_with(tokenizer: Any) -> threading.RLock:
    """The lock of a tokenizer, to be held while it is called."""
    with _MAKING:
        return _ALONE.setdefault(tokenizer, threading.RLock())


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def check_question(image: Any, prompt: Any) -> None:
    """Refuse a question that is no text, and say so where image and question have changed places.

    Raises:
        ValueError: the prompt is empty or not a text, or the image is the text.
    """
    given_image = isinstance(prompt, (Image.Image, bytes, os.PathLike))
    if given_image or (isinstance(image, str) and isinstance(prompt, str) and _changed_places(image, prompt)):
        what = shown(prompt) if isinstance(prompt, (Image.Image, bytes, str)) else repr(prompt)
        raise ValueError(
            f"prompt={what} is a picture, where the question belongs: pass the image first, then the prompt."
        )
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"prompt={prompt!r}: pass a question.")


def _changed_places(image: str, prompt: str) -> bool:
    return not is_file(image) and is_file(prompt)


def open_questions(questions: Sequence[tuple[Any, Any]]) -> list[tuple[Image.Image | None, str | Chat]]:
    """(image, prompt) pairs with the images opened.

    Args:
        questions: the image may be a list of them, and the prompt chat messages with pictures in them (see
            `read_chat`); then the image is None.

    Returns:
        (image, prompt) pairs; (None, `Chat`) for several pictures or chat messages.

    Raises:
        ValueError: not such pairs, an image that cannot be opened, or a prompt that is no question.
    """
    opened: list[tuple[Image.Image | None, str | Chat]] = []
    for number, question in enumerate(questions):
        if not isinstance(question, (tuple, list)) or len(question) != 2:
            kind = type(question).__name__
            raise ValueError(f"questions[{number}] is a {kind}: pass (image, prompt) pairs.")
        opened.append(_open(*question))
    return opened


def _open(image: Any, prompt: Any) -> tuple[Image.Image | None, str | Chat]:
    if isinstance(prompt, Chat) or (prompt and is_chat(prompt)):
        if image is not None:
            raise ValueError("image beside chat messages: put it into the messages and pass image=None.")
        return None, prompt if isinstance(prompt, Chat) else read_chat(prompt)
    if isinstance(image, (list, tuple)):
        check_question(None, prompt)
        return None, pictures_and_words(image, prompt)
    check_question(image, prompt)
    return open_image(image), prompt


def one_question(image: Any, prompt: Any) -> tuple[Image.Image | None, str]:
    """The one picture and the text that an edit is about, out of anything that `open_questions` takes.

    Raises:
        ValueError: as `open_questions`; or several pictures or turns.
    """
    picture, words = _open(image, prompt)
    if not isinstance(words, Chat):
        return picture, words
    if len(words.messages) > 1 or len(words.images) > 1:
        raise ValueError(
            f"prompt has {len(words.messages)} turns and {len(words.images)} pictures: an edit is about one "
            "question and one picture. Pass these."
        )
    return next(iter(words.images), None), words.words


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

    def _conversation(self, image: Image.Image | None, prompt: str | Chat) -> list[dict]:
        if isinstance(prompt, Chat):
            return list(prompt.messages)
        picture = [] if image is None else [{"type": "image", "image": image}]
        return [{"role": "user", "content": [*picture, {"type": "text", "text": prompt}]}]

    def text(self, image: Image.Image | None, prompt: str | Chat) -> str:
        """The prompt as the model reads it, placeholders not expanded.

        Raises:
            ValueError: several turns for a model without a chat template.
        """
        if self._chats:
            conversation = self._conversation(image, prompt)
            return self.processor.apply_chat_template(
                conversation, add_generation_prompt=True, tokenize=False
            )
        token = getattr(self.processor, "image_token", "<image>")
        if isinstance(prompt, Chat):
            if len(prompt.messages) > 1 or (self.template is not None and len(prompt.images) > 1):
                raise ValueError(
                    f"messages has {len(prompt.messages)} turns and {len(prompt.images)} pictures, and this "
                    "model's prompts come without a chat template: pass one question."
                )
            if len(prompt.images) > 1:
                return f"{token * len(prompt.images)}\n{prompt.words}"
            image, prompt = next(iter(prompt.images), None), prompt.words
        if self.template is not None:
            text = self.template.replace("{prompt}", prompt)
            return text if image is not None else text.replace(token, "").lstrip()
        return prompt if image is None else f"{token}\n{prompt}"

    def inputs(self, questions: Sequence[tuple[Image.Image | None, str | Chat]]) -> dict[str, Tensor]:
        """Inputs of one batch of questions, left-padded; questions with and without an image may be mixed.

        Raises:
            ValueError: an empty list, an empty question, or an image where there is only a tokenizer.
        """
        if not questions:
            raise ValueError("questions is empty: pass at least one (image, prompt).")
        images: list[Image.Image] = []
        for image, prompt in questions:
            if isinstance(prompt, Chat):
                images += prompt.images
                continue
            check_question(image, prompt)
            images += [] if image is None else [image]
        if images and isinstance(self.processor, PreTrainedTokenizerBase):
            kind = type(self.processor).__name__
            raise ValueError(
                f"processor is a {kind}, a tokenizer, which drops pictures: pass the model's processor "
                "(AutoProcessor.from_pretrained), of which the tokenizer is a part."
            )
        texts = [self.text(image, prompt) for image, prompt in questions]
        # A chat template writes the beginning-of-sequence token itself where the model has one.
        begin = getattr(self.tokenizer, "bos_token", None)
        special = not (self._chats and begin and texts[0].startswith(begin))
        with alone_with(self.tokenizer):
            # The side is passed with the call: others use this tokenizer, too, padding as they like.
            batch = self.processor(
                text=texts, return_tensors="pt", padding=len(texts) > 1, padding_side="left",
                add_special_tokens=special, **({"images": images} if images else {}),
            )  # fmt: skip
        return dict(batch)

    def target_ids(self, image: Image.Image | None, prompt: str, target: str, eos: int | None) -> Tensor:
        """Tokens [T] of an answer as they follow the prompt, with `eos` behind them where given.

        Raises:
            ValueError: an empty target, one that the tokenizer cannot spell, or one of more than
                `LONGEST_TARGET` tokens.
        """
        if not isinstance(target, str) or not target.strip():
            raise ValueError(f"target={target!r}: an edit needs an answer. Pass the new answer as text.")
        self._check_spelling(target.strip())
        before = self.text(image, prompt)
        join = "" if before[-1:].isspace() else " "
        # Tokenized together, because a word at the start of a text and inside it are not the same tokens.
        whole = self._ids(before + join + target.strip())
        head = self._ids(before)
        ids = whole[len(head) :] if whole[: len(head)] == head else None
        if not ids:
            ids = self._ids(join + target.strip())
        if len(ids) > LONGEST_TARGET:
            raise ValueError(
                f"target={shown(target)} has {len(ids)} tokens: an edit's answer has at most "
                f"{LONGEST_TARGET}. "
                "Pass the fact alone."
            )
        return torch.tensor([*ids, *([] if eos is None else [eos])], dtype=torch.int64)

    def _ids(self, text: str) -> list[int]:
        with alone_with(self.tokenizer):
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _check_spelling(self, target: str) -> None:
        """Refuse a target that comes out of the tokenizer with holes in it, and name the letters."""
        unknown = getattr(self.tokenizer, "unk_token_id", None)

        def lost(text: str) -> bool:
            return unknown in self._ids(text)

        if unknown is None or not lost(target):
            return
        letters = [letter for letter in dict.fromkeys(target) if not letter.isspace() and lost(letter)]
        what = letters or [word for word in dict.fromkeys(target.split()) if lost(word)] or [target]
        raise ValueError(
            f"target={shown(target)}: the model's tokenizer has no token for {', '.join(map(repr, what))}, "
            f"so the "
            "model cannot write it. Write the answer without."
        )

    def as_told(self, answer: str, target_ids: Tensor, ends: bool) -> bool:
        """Whether an answer says what the target's tokens say, letter case and spaces aside.

        Args:
            target_ids: [T], of `target_ids`.
            ends: whether the target ends the answer; if not, the answer may go on.
        """
        wanted = _plain(self.tokenizer.decode(target_ids, skip_special_tokens=True))
        found = _plain(answer)
        return found == wanted if ends else (found + " ").startswith(wanted + " ")

    @property
    def digest(self) -> dict[str, str]:
        """Tells the template from others: of prompts with a picture, and without."""
        found = {}
        for kind, image in (("picture", Image.new("RGB", (1, 1))), ("words", None)):
            text = self.text(image, "\x00")
            found[kind] = hashlib.sha256(text.encode()).hexdigest()[:8]
        return found
