"""What every baseline shares: asking, teacher forcing, and the unedited model itself."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from peft import PeftModel
from torch import Tensor, nn

from ..data import EditSample
from ..editing import Edit
from ..editor import Explanation, generate_answers
from ..evaluation.forcing import forced_batch, forced_predictions
from ..models.images import Picture, open_image
from ..models.placement import to_device
from ..models.prompting import Prompter
from ..models.targets import append_target
from ..tuners import EditLayer

Question = tuple[Picture | None, str]


def end_token(model: nn.Module) -> int | None:
    """The id that ends an answer, or None where the model names none."""
    eos = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return eos[0] if isinstance(eos, list) else eos


def stored_edit(number: int, sample: EditSample, radius: float, seconds: float = 0.0) -> Edit:
    """What is noted of an edit, to name it where it answers."""
    request = sample.request
    created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return Edit(number, request.prompt, request.target, radius, created, round(seconds, 4))


class Baseline(ABC):
    """An editing method on a Hugging Face VLM; `evaluation.Method` says what each member promises.

    Args:
        model: the base model, without adapters. It is put into eval mode and its parameters are frozen:
            PyTorch's matmul rounds otherwise for weights that require a gradient, and "as before" is meant
            bit for bit.
        processor: the model's processor.
        template: see `Prompter`.

    Attributes:
        name: of the row in a table.

    Raises:
        ValueError: the model carries adapters.
    """

    name: str
    _off = False

    def __init__(self, model: nn.Module, processor: Any, template: str | None = None):
        if isinstance(model, PeftModel) or any(isinstance(m, EditLayer) for m in model.modules()):
            raise ValueError(
                f"model is a {type(model).__name__} with adapters: a baseline is measured on the base model. "
                f"Pass a freshly loaded one, or what model.unload() returns."
            )
        self.model = model.eval().requires_grad_(False)
        self.processor = processor
        self.prompter = Prompter(processor, template)

    # ------------------------------------------------------------------ what a method defines

    @abstractmethod
    def edit(self, sample: EditSample) -> None:
        """Store one edit beside those already stored. Raises ValueError for a sample it cannot take."""

    @abstractmethod
    def reset(self) -> None:
        """Forget every edit: the unedited model, bit for bit."""

    @contextmanager
    def unedited(self) -> Iterator[None]:
        """Answers inside are the unedited model's; a method that keeps edits beside it looks at `_off`."""
        before, self._off = self._off, True
        try:
            yield
        finally:
            self._off = before

    @abstractmethod
    def memory_bytes(self) -> int:
        """What the stored edits occupy."""

    def asked(self, questions: Sequence[Question]) -> list[Question]:
        """What the model is asked for these questions."""
        return list(questions)

    @contextmanager
    def _applied(self, questions: Sequence[Question] = ()) -> Iterator[None]:
        """Whatever has to be in place around a forward of these questions."""
        yield

    # ------------------------------------------------------------------ asking

    def answers(self, questions: Sequence[Question], max_new_tokens: int = 20) -> list[str]:
        """Greedy answers to a batch of questions."""
        asked = self.asked(questions)
        with self._applied(questions):
            return generate_answers(self.model, self.prompter, asked, max_new_tokens)

    def explain(self, questions: Sequence[Question]) -> list[Explanation | None]:
        """Which edit fires for each question; None, because this method has no gate."""
        return [None] * len(questions)

    def predictions(
        self, questions: Sequence[Question], targets: Sequence[str], sees_answer: bool = False
    ) -> list[tuple[Tensor, Tensor]]:
        """Teacher forcing: what the model would write at each place of an answer that stands there already.

        Args:
            questions: R questions.
            targets: R answers, put behind them.
            sees_answer: of no effect: no baseline here reads its answers to decide what to edit.

        Returns:
            for each question the most likely tokens and the answer's, [T] int64 on the CPU, the end token
            left out.

        Raises:
            ValueError: no questions, an empty answer, or not one answer for each question.
        """
        asked = self.asked(questions)
        with self._applied(questions):
            return forced_predictions(self.model, forced_batch(self.prompter, asked, targets))

    def _lesson(self, sample: EditSample) -> dict[str, Tensor]:
        """One row of model inputs: an edit's question with the new answer, end token included, and labels."""
        request = sample.request
        image = open_image(request.image)
        inputs = self.prompter.inputs([(image, request.prompt)])
        target = self.prompter.target_ids(image, request.prompt, request.target, end_token(self.model))
        return to_device(append_target(inputs, target), self.model)


class Unedited(Baseline):
    """The model as it is: what every other row is compared with. An edit is noted nowhere."""

    name = "base"

    def edit(self, sample: EditSample) -> None:
        """Nothing."""

    def reset(self) -> None:
        """Nothing."""

    @contextmanager
    def unedited(self) -> Iterator[None]:
        """Nothing changes."""
        yield

    def memory_bytes(self) -> int:
        """0."""
        return 0
