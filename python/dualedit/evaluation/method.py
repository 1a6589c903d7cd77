"""What an editing method has to offer to be measured, and the library's own editors as such a method."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

from torch import Tensor

from ..data import EditSample
from ..editor import Editor, Explanation, Sample
from .forcing import forced_predictions
from .published import PublishedGate, editor_batch

Predictions = list[tuple[Tensor, Tensor]]


@runtime_checkable
class Method(Protocol):
    """An editor of any kind: what `evaluate` asks of it.

    Attributes:
        name: of its rows.
    """

    name: str

    def edit(self, sample: EditSample) -> None:
        """Store one edit beside those already stored."""

    def reset(self) -> None:
        """Back to the unedited model, bit for bit."""

    def unedited(self) -> AbstractContextManager[None]:
        """Answers inside are the unedited model's."""

    def answers(self, questions: Sequence[Sample], max_new_tokens: int = 20) -> list[str]:
        """Greedy answers to one batch of (image or None, prompt)."""

    def explain(self, questions: Sequence[Sample]) -> list[Explanation | None]:
        """Why each question is, or is not, answered by an edit; None where the method has no gate."""

    def predictions(
        self, questions: Sequence[Sample], targets: Sequence[str], sees_answer: bool = False
    ) -> Predictions:
        """Teacher forcing: for each question the most probable token ids [T] and the target's ids [T] (int64,
        the end token excluded), each position with the target's tokens before it given.

        Args:
            sees_answer: the published protocol: a gate reads the last token of prompt + target. A method
                without a gate answers the same either way.
        """

    def memory_bytes(self) -> int:
        """What the stored edits occupy."""


class EditorMethod:
    """`dualedit.Editor` as a `Method`: an edit is its image, question, target and one rephrase, as a user
    gives them.

    Args:
        editor: without stored edits.
        name: of its rows.
        published_threshold: tau of the published gate (DualEdit's code: 0.8). The editor's own was set for
            another token and says nothing about this one.
    """

    def __init__(self, editor: Editor, name: str, published_threshold: float = 0.8):
        self.editor = editor
        self.name = name
        self._published = PublishedGate(editor, published_threshold)

    def edit(self, sample: EditSample) -> None:
        request = sample.request
        stored = self.editor.edit(
            request.image, request.prompt, request.target, rephrases=sample.rephrases[:1] or None,
            keep_failed=True,  # what does not take is counted, not left out
        )  # fmt: skip
        self._published.note(stored.id, sample)

    def reset(self) -> None:
        for edit in self.editor.edits:
            self.editor.remove(edit.id)
        self._published.forget()

    def unedited(self) -> AbstractContextManager[None]:
        return self.editor.model.disable_adapter()

    def answers(self, questions: Sequence[Sample], max_new_tokens: int = 20) -> list[str]:
        return self.editor.answer_many(questions, max_new_tokens)

    def explain(self, questions: Sequence[Sample]) -> list[Explanation | None]:
        return list(self.editor.explain_many(questions))

    def predictions(
        self, questions: Sequence[Sample], targets: Sequence[str], sees_answer: bool = False
    ) -> Predictions:
        model = self.editor.model
        batch = editor_batch(self.editor, questions, targets)
        if not sees_answer:
            return forced_predictions(model, batch)
        with self._published.routing(batch):
            return forced_predictions(model, batch)

    def memory_bytes(self) -> int:
        groups = [adapter.group for adapter in self.editor.adapters]
        memories = [memory for group in groups for memory in group.memories.values()]
        return round(sum(memory.bytes_per_edit() * len(memory) for memory in memories))
