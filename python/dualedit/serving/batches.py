"""One batch of questions through the model: tokens as they come, and which edit answers each row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import StoppingCriteria, StoppingCriteriaList

from ..models.architectures import unwrap
from ..models.prompting import Prompter
from ..runtime.context import runtime_of
from ..runtime.frames import find
from .settings import Refused


@dataclass(frozen=True)
class Answer:
    """What came of a question.

    Attributes:
        text: the answer, special tokens and outer spaces dropped.
        edit: number of the edit that answered; None: the model as it is.
        prompt_tokens, tokens: of the question and of the answer.
        finish: "stop" where the model ended, or met a stop text; "length" where the limit did.
    """

    text: str
    edit: int | None
    prompt_tokens: int
    tokens: int
    finish: str


@dataclass
class Asked:
    """A question in the queue.

    Attributes:
        question: (image, prompt) or (None, Chat), pictures opened.
        max_new_tokens: of the answer.
        stop: texts that end the answer, and are not part of it.
        on_text: called from the worker's thread with each new piece of the answer and the edit that answers,
            first with an empty piece as soon as the edit is known.
        done: the answer, or the error.
        cancelled: set when nobody waits any more.
    """

    question: tuple[Any, Any]
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    on_text: Callable[[str, int | None], None] | None = None
    done: Future[Answer] = field(default_factory=Future)
    cancelled: bool = False


def answer_batch(model: nn.Module, prompter: Prompter, asked: Sequence[Asked]) -> None:
    """Answer questions together, each by greedy generation; every `done` holds an answer or an error.

    Where a batch fails before its first token, its questions are asked one by one, so that a question that
    the processor cannot read fails alone.
    """
    try:
        _generate(model, prompter, asked)
    except Exception as error:  # whatever it is, it belongs to whoever asked
        waiting = [one for one in asked if not one.done.done()]
        if len(asked) > 1 and not isinstance(error, _Begun):
            for one in waiting:
                answer_batch(model, prompter, [one])
            return
        for one in waiting:
            one.done.set_exception(error.__cause__ if isinstance(error, _Begun) else error)


class _Begun(Exception):
    """A failure behind the first token: pieces of answers are with their readers already."""


def _generate(model: nn.Module, prompter: Prompter, asked: Sequence[Asked]) -> None:
    base = unwrap(model)
    place = base.get_input_embeddings().weight
    inputs = prompter.inputs([one.question for one in asked])
    lengths = inputs["attention_mask"].sum(1).tolist()
    room = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    fitting = []
    for one, length in zip(asked, lengths, strict=True):
        if room is not None and length + one.max_new_tokens > room:
            one.done.set_exception(
                Refused(
                    400, "context_length_exceeded",
                    f"The question has {length} tokens, the answer may have {one.max_new_tokens}, and the "
                    f"model takes {room} together.",
                )
            )  # fmt: skip
        else:
            fitting.append(one)
    if len(fitting) < len(asked):
        if fitting:
            _generate(model, prompter, fitting)
        return
    inputs = {
        name: value.to(place.device, base.dtype) if value.is_floating_point() else value.to(place.device)
        for name, value in inputs.items()
    }
    rows = _Rows(model, prompter.tokenizer, asked, lengths)
    longest = max(one.max_new_tokens for one in asked)
    try:
        with torch.no_grad():
            model.generate(
                **inputs, max_new_tokens=longest, do_sample=False,
                stopping_criteria=StoppingCriteriaList([rows]),
            )  # fmt: skip
    except Exception as error:
        if rows.steps:
            raise _Begun from error
        raise
    rows.end()


class _Rows(StoppingCriteria):
    """Watches a running generation: hands each row's words on, and says which rows are done."""

    def __init__(self, model: nn.Module, tokenizer: Any, asked: Sequence[Asked], lengths: Sequence[int]):
        self.model, self.asked, self.lengths = model, asked, lengths
        ends = getattr(unwrap(model).generation_config, "eos_token_id", None)
        self.ends = set(ends if isinstance(ends, (list, tuple)) else [] if ends is None else [ends])
        self.words = [_Words(tokenizer, one.stop) for one in asked]
        self.finish: list[str | None] = [None] * len(asked)
        self.edits: list[int | None] = [None] * len(asked)
        self.steps = 0

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        if self.steps == 0:
            self.edits = fired_edits(self.model, len(self.asked))
            for one, edit in zip(self.asked, self.edits, strict=True):
                if one.on_text is not None:
                    one.on_text("", edit)
        self.steps += 1
        for row, token in enumerate(input_ids[:, -1].tolist()):
            if self.finish[row] is None:
                self._take(row, token)
        return torch.tensor([finish is not None for finish in self.finish], device=input_ids.device)

    def _take(self, row: int, token: int) -> None:
        one, words = self.asked[row], self.words[row]
        words.tokens.append(token)
        if token in self.ends:
            self.finish[row] = "stop"
        elif len(words.tokens) >= one.max_new_tokens:
            self.finish[row] = "length"
        if one.on_text is not None or one.stop:
            piece = words.piece(last=self.finish[row] is not None)
            if words.stopped:
                self.finish[row] = "stop"
            if piece and one.on_text is not None:
                one.on_text(piece, self.edits[row])
        if one.cancelled:
            self.finish[row] = self.finish[row] or "stop"
        if self.finish[row] is not None:
            self._settle(row)

    def _settle(self, row: int) -> None:
        words = self.words[row]
        answer = Answer(
            words.text(), self.edits[row], int(self.lengths[row]), len(words.tokens),
            self.finish[row] or "length",
        )  # fmt: skip
        if not self.asked[row].done.done():
            self.asked[row].done.set_result(answer)

    def end(self) -> None:
        """The generation is over; a row that is not, was ended by a limit of the model's own."""
        for row, finish in enumerate(self.finish):
            if finish is None:
                self.finish[row] = "length"
                piece = self.words[row].piece(last=True)
                if piece and self.asked[row].on_text is not None:
                    self.asked[row].on_text(piece, self.edits[row])
                self._settle(row)


class _Words:
    """The text of a growing answer, in pieces that are never taken back."""

    def __init__(self, tokenizer: Any, stop: tuple[str, ...]):
        self.tokenizer, self.stop = tokenizer, stop
        self.tokens: list[int] = []
        self.stopped = False
        self._said = ""

    def text(self) -> str:
        """The whole answer so far, outer spaces and what follows a stop text dropped."""
        text = self.tokenizer.decode(self.tokens, skip_special_tokens=True).strip()
        found = [place for place in (text.find(word) for word in self.stop if word) if place >= 0]
        self.stopped = bool(found)
        return text[: min(found)].rstrip() if found else text

    def piece(self, last: bool) -> str:
        """What is new. The last word waits: the next token may go on with it, or with a stop text."""
        text = self.text()
        last = last or self.stopped
        sure = text if last else text[: max(text.rfind(" "), text.rfind("\n"), 0)].rstrip()
        if not last and self.stop:
            sure = sure[: max(len(sure) - max(map(len, self.stop)), 0)].rstrip()
        if not sure.startswith(self._said):  # a tokenizer that rewrote what it had written
            return ""
        new, self._said = sure[len(self._said) :], sure
        return new


def fired_edits(model: nn.Module, rows: int) -> list[int | None]:
    """Inside a generation: the number of the edit that answers each row, None for the model as it is."""
    found: list[int | None] = [None] * rows
    runtime = runtime_of(unwrap(model))
    frame = None if runtime is None else find(runtime, "generate")
    sequence = None if frame is None else frame.content.sequence
    if sequence is None:
        return found
    for group, decision in sequence.decisions.items():
        if decision.nothing:
            continue
        stored = decision.snapshots[group.gate_name]
        for row, place in enumerate(decision.route.tolist()):
            if place >= 0 and found[row] is None:
                found[row] = stored.id_of(place)
    return found
