"""Asking an edit back before it counts: what the model answers now, how sure it is, and why it does not
obey."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import nn

from .data import EditRequest
from .editing import Edit, Lookup, TriedEdit, lookup_in, target_probability
from .models.architectures import unwrap
from .models.prompting import Prompter, open_questions
from .tuners.adapter import EditAdapter

_TOKENS = 20  # of an answer, where the target is not longer
# Asked to see whether an edit answers everything: nothing that an edit is about.
UNRELATED = "is it raining in the town tomorrow morning?"


class EditFailed(Exception):
    """An edit that the model does not answer as told; it is not stored.

    Attributes:
        prompt, target: the question and the answer that it was told.
        answer: what it answers instead, with the edit written.
        probability: of the least likely token of the target; None where the model does not tell.
        steps: the ways that were tried, as `Edit.steps` has them.
        edits: of `edit_many`: those that are stored.
        failures: of `edit_many`: place in the list to its `EditFailed`.
        exit_code: of the command line.
    """

    exit_code = 1

    def __init__(
        self,
        message: str,
        prompt: str = "",
        target: str = "",
        answer: str = "",
        probability: float | None = None,
        steps: Sequence[Mapping[str, Any]] = (),
        edits: Sequence[Edit] = (),
        failures: Mapping[int, EditFailed] | None = None,
    ):
        super().__init__(message)
        self.prompt, self.target, self.answer, self.probability = prompt, target, answer, probability
        self.steps, self.edits, self.failures = tuple(steps), list(edits), dict(failures or {})


@dataclass(frozen=True)
class Verdict:
    """What came of asking an edit back.

    Attributes:
        right: whether the model answers as told.
        answer, probability: what it answers, and how probable the least likely token of the target is.
        reach: of the edit's own question.
    """

    right: bool
    answer: str
    probability: float | None
    reach: Lookup


def ask_back(
    model: nn.Module, prompter: Prompter, tried: TriedEdit, image: Image.Image | None, prompt: str, ends: bool
) -> Verdict:
    """Ask a tried edit's own question as `Editor.answer` does: by free generation, through the gate.

    Args:
        ends: whether the target ends with the end token, so that nothing may come behind it.
    """
    labels = tried.full["labels"][0]
    wanted = labels[labels != -100]
    length = max(_TOKENS, len(wanted) + 1)
    answer = generate_answers(model, prompter, [(image, prompt)], length)[0]
    right = prompter.as_told(answer, wanted, ends)
    reach = _reach(prompter, tried.adapter, image, prompt, tried.edit_id)
    return Verdict(right, answer, target_probability(model, tried.full), reach)


def _reach(
    prompter: Prompter, adapter: EditAdapter, image: Image.Image | None, prompt: str, edit_id: int
) -> Lookup:
    """How far the edit's own question is from the edit that answers it, and a word where that is odd."""
    own = lookup_in(adapter, adapter.keys_of(prompter.inputs([(image, prompt)])))[0]
    if not own.fired:
        warnings.warn(
            f"The edit answers nothing, not even its own question: that is {own.distance:.3g} away from its "
            f"key, and the edit reaches {own.radius:.3g}. {_gate_of(adapter)}",
            stacklevel=4,
        )
        return own
    other = None if image is None else Image.new("RGB", image.size)
    found = lookup_in(adapter, adapter.keys_of(prompter.inputs([(other, UNRELATED)])))[0]
    if found.fired and found.edit_id == edit_id and prompt != UNRELATED:
        warnings.warn(
            "The edit answers everything: an unrelated question about a black picture is "
            f"{found.distance:.3g} "
            f"away from its key, and the edit reaches {found.radius:.3g}. {_gate_of(adapter)}",
            stacklevel=4,
        )
    return own


def _gate_of(adapter: EditAdapter) -> str:
    settings = ("threshold", "gate", "radius", "alpha", "key")
    said = [f"{name}={getattr(adapter.config, name)!r}" for name in settings if hasattr(adapter.config, name)]
    return f"That is what these settings make of it: {', '.join(said)}." if said else ""


def failure(
    request: EditRequest, adapter: EditAdapter, verdict: Verdict, steps: Sequence[dict]
) -> EditFailed:
    """The exception of an edit that was tried in all ways, the last of them by `adapter`."""
    probable = verdict.probability
    sure = "" if probable is None else f" Its least likely token has probability {probable:.2g}."
    reason = adapter.method.untrained(adapter)
    if reason is not None:
        advice = f"Why: {reason}."
    elif not verdict.reach.fired:
        advice = f"Why: its own question lies outside its radius. {_gate_of(adapter)}"
    elif verdict.reach.edit_id is not None and verdict.reach.distance > 1e-3:
        advice = f"Why: edit {verdict.reach.edit_id} is nearer to the question. Remove it first."
    else:
        advice = adapter.method.advice(adapter.config)
    return EditFailed(
        f"The edit is not stored: asked {request.prompt!r}, the model answers {verdict.answer!r}, not "
        f"{request.target.strip()!r}.{sure} Tried: {told_steps(steps)}. {advice}",
        request.prompt, request.target.strip(), verdict.answer, probable, steps,
    )  # fmt: skip


def told_steps(steps: Sequence[Mapping[str, Any]]) -> str:
    """The ways that were tried for an edit, in words, with what each took."""
    return "; ".join(
        f"{step.get('method', '?')}, {_count(step.get('steps', 0))}, {step.get('seconds', 0.0):.2f} s"
        for step in steps
    )


def _count(steps: int) -> str:
    return "one forward" if not steps else f"{steps} step{'' if steps == 1 else 's'}"


def generate_answers(
    model: nn.Module,
    prompter: Prompter,
    questions: Sequence[tuple[Any, Any]],
    max_new_tokens: int = 20,
) -> list[str]:
    """Greedy answers to a batch of questions, in one `generate` of any Hugging Face VLM, edited or not."""
    opened = open_questions(questions)
    base = unwrap(model)
    place = base.get_input_embeddings().weight
    inputs = {
        name: value.to(place.device, base.dtype) if value.is_floating_point() else value.to(place.device)
        for name, value in prompter.inputs(opened).items()
    }
    with torch.no_grad():
        tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    length = inputs["input_ids"].shape[1]
    # Some models return the prompt in front of the answer, those fed with embeddings do not.
    if tokens.shape[1] >= length and torch.equal(tokens[:, :length], inputs["input_ids"]):
        tokens = tokens[:, length:]
    return [text.strip() for text in prompter.tokenizer.batch_decode(tokens, skip_special_tokens=True)]
