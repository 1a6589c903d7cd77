"""Which answers an editor can write: each is told alone, asked back, and taken back again."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..checking import EditFailed
from ..data import EditRequest
from ..editor import Editor, Sample

OUTCOMES = ("written", "refused", "failed")


@dataclass(frozen=True)
class Told:
    """What came of one answer.

    Attributes:
        answer: as it was told.
        outcome: of `OUTCOMES`: the model answers as told; its tokenizer cannot spell it, or the request is
            bad; or it answers something else, and nothing is stored.
        seconds: until that was known.
        steps: the ways that were tried, as `Edit.steps` has them.
        why: the error's text; "" for an answer that is written.
        changed: watched questions whose answer the edit changed.
    """

    answer: str
    outcome: str
    seconds: float
    steps: Sequence[dict[str, Any]] = ()
    why: str = ""
    changed: Sequence[Sample] = field(default=(), repr=False)


def tell_answers(
    editor: Editor,
    requests: Sequence[EditRequest],
    watched: Sequence[Sample] = (),
    tell: Callable[[Told], None] | None = None,
) -> list[Told]:
    """Tell an editor each answer alone, and see what becomes of it and of other questions.

    Args:
        editor: without stored edits.
        watched: (image, question) pairs that no edit is about; those of an edit's own image and question are
            left out for it.
        tell: called with each result as soon as it is there.
    """
    before = dict(enumerate(editor.answer_many(watched))) if watched else {}
    results = []
    for request in requests:
        began = time.perf_counter()
        try:
            edit = editor.edit(request.image, request.prompt, request.target)
            seconds = round(time.perf_counter() - began, 3)
            others = [
                number
                for number, (image, prompt) in enumerate(watched)
                if not (prompt == request.prompt and image is request.image)
            ]
            now = editor.answer_many([watched[number] for number in others]) if others else []
            changed = [watched[n] for n, answer in zip(others, now, strict=True) if answer != before[n]]
            result = Told(request.target, "written", seconds, edit.steps, changed=changed)
            editor.undo()
        except EditFailed as failed:
            seconds = round(time.perf_counter() - began, 3)
            result = Told(request.target, "failed", seconds, failed.steps, str(failed))
        except ValueError as refused:
            seconds = round(time.perf_counter() - began, 3)
            result = Told(request.target, "refused", seconds, why=str(refused))
        results.append(result)
        if tell is not None:
            tell(result)
    return results
