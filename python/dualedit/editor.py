"""The editor: correct what a vision-language model answers, with images and text."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image, ImageEnhance
from torch import nn
from tqdm.auto import tqdm

from .data import EditRequest
from .editing import Edit, add_edit, edit_of, list_edits, lookup_many
from .models.architectures import unwrap
from .models.images import Picture, open_image, shown
from .models.prompting import Prompter, open_questions
from .runtime.context import runtime_of
from .tuners.adapter import EditAdapter, active_adapter

Sample = tuple[Picture | None, str]
Question = tuple[Image.Image | None, str]
_ARGUMENTS = ("image", "prompt", "target", "rephrases", "negatives")  # of `edit`
_OTHER_QUESTIONS = 2  # asked about an edit's image to see how far another question is


@dataclass(frozen=True)
class Explanation:
    """Why an input is, or is not, answered by an edit.

    Attributes:
        fired: whether an edit applies.
        edit: the nearest stored edit, or None when there is none.
        distance: from the input to that edit's key.
        radius: up to which distance that edit applies.
    """

    fired: bool
    edit: Edit | None
    distance: float
    radius: float


def _brighter(image: Image.Image) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(1.1)


def _black(image: Image.Image) -> Image.Image:
    return Image.new("RGB", image.size)


class Editor:
    """Edits, undoes, lists and explains, on a model with an injected edit adapter.

    Args:
        model: from `inject_dualedit`, `inject_balancedit`, `get_peft_model` or `PeftModel.from_pretrained`.
        processor: the model's processor.
        template: see `Prompter`; None uses the processor's chat template.

    Raises:
        ValueError: the model has no edit adapter.
    """

    def __init__(self, model: nn.Module, processor: Any, template: str | None = None):
        active_adapter(model)
        self.model = model
        self.processor = processor
        self.prompter = Prompter(processor, template)
        self._undo: list[tuple[EditAdapter, int, list[tuple[int, dict, dict]]]] = []

    # ------------------------------------------------------------------ editing

    def edit(
        self,
        image: Picture | None,
        prompt: str,
        target: str,
        rephrases: Sequence[str | Sample] | None = None,
        negatives: Sequence[Picture | Sample] | None = None,
    ) -> Edit:
        """Make the model answer `target` when asked `prompt` about what `image` shows.

        Args:
            image: PIL image or path; None only for an adapter that edits text positions alone.
            prompt: the question, as a user types it.
            target: the new answer.
            rephrases: other wordings, or (image, wording) pairs, that must be recognised. BalancEdit, and
                DualEdit with `radius="own"`, set the edit's radius by them; without any they take a slightly
                brighter image and "Question: ..." in front.
            negatives: images, or (image, question) pairs, that must not be. Without any, the two take a black
                image; DualEdit also the questions of other stored edits about this image.

        Returns:
            the stored edit.

        Raises:
            ValueError: a missing image, an empty prompt or target, an unreadable file. Nothing is stored.
        """
        adapter = active_adapter(self.model)
        group = adapter.group
        _check_samples(rephrases, negatives)
        picture = open_questions([(image, prompt)])[0][0]
        if picture is None and adapter.method.needs_image(adapter.config):
            raise ValueError(
                "image=None: the edit's image is missing. Pass the image that the question is about (only "
                "a DualEdit adapter with vis_layer=None takes text-only edits)."
            )
        positives, contrasts = self.samples_around(picture, prompt, rephrases, negatives)
        inputs = self.prompter.inputs([(picture, prompt)])
        target_ids = self.prompter.target_ids(picture, prompt, target, self._eos())
        note = {"prompt": prompt, "target": target.strip(), "image_sha256": _image_hash(picture)}
        before = group.snapshot()
        edit = add_edit(
            self.model, inputs, target_ids,
            positives=[self.prompter.inputs([sample]) for sample in positives],
            negatives=[self.prompter.inputs([sample]) for sample in contrasts],
            note=note,
        )  # fmt: skip
        replaced = [(old["id"], {k: v for k, v in old.items() if k != "id"}) for old in edit.replaces]
        self._undo.append((adapter, edit.id, [(i, group.rows(before, i), record) for i, record in replaced]))
        return edit

    def samples_around(
        self,
        image: Image.Image | None,
        prompt: str,
        rephrases: Sequence[str | Sample] | None,
        negatives: Sequence[Picture | Sample] | None,
    ) -> tuple[list[Question], list[Question]]:
        """What an edit has to recognise and what not: the given samples, or those made where there are none.

        Args:
            image, prompt, rephrases, negatives: as in `edit`, the image opened.

        Returns:
            positives and negatives, as (image, question) pairs.
        """
        adapter = active_adapter(self.model)
        needed = adapter.method.needs_samples(adapter.config)
        positives = [(image, s) if isinstance(s, str) else (open_image(s[0]), s[1]) for s in rephrases or ()]
        contrasts = [
            (open_image(s[0]), s[1]) if isinstance(s, tuple) else (open_image(s), prompt)
            for s in negatives or ()
        ]
        if needed and not positives:
            positives = [(image, f"Question: {prompt}")]
            if image is not None:
                positives.append((_brighter(image), prompt))
        if needed and not contrasts:
            contrasts = [] if image is None else [(_black(image), prompt)]
            if adapter.method.asks_other_questions:
                asked = dict.fromkeys(edit.prompt for edit in self.edits if edit.prompt not in ("", prompt))
                contrasts += [(image, other) for other in list(asked)[:_OTHER_QUESTIONS]]
        return positives, contrasts

    def _eos(self) -> int | None:
        config = getattr(unwrap(self.model), "generation_config", None)
        eos = getattr(config, "eos_token_id", None)
        return eos[0] if isinstance(eos, list) else eos

    def edit_many(
        self, requests: Iterable[EditRequest | Mapping[str, Any] | tuple], progress: bool = True
    ) -> list[Edit]:
        """Store many edits, with a progress bar; what was stored before a failure stays stored.

        Args:
            requests: `EditRequest`s, (image, prompt, target) triples, or mappings with these keys. A triple
                may go on, and a mapping may have further keys, with `edit`'s rephrases and negatives.

        Raises:
            ValueError: a bad request; names its place in the list.
        """
        if isinstance(requests, (str, Mapping, EditRequest)):
            raise ValueError(f"requests is one {type(requests).__name__}: pass a list of requests.")
        edits: list[Edit] = []
        listed = list(requests)
        for number, request in enumerate(tqdm(listed, desc="editing", unit="edit", disable=not progress)):
            try:
                edits.append(self.edit(**_arguments(request)))
            except (ValueError, TypeError) as error:
                raise ValueError(
                    f"requests[{number}]: {error} ({len(edits)} of {len(listed)} edits are stored.)"
                ) from error
        return edits

    def remove(self, edit_id: int) -> None:
        """Forget one edit. Raises KeyError for an unknown number; names the stored ones."""
        active_adapter(self.model).group.remove(edit_id)

    def undo(self) -> Edit:
        """Take back this editor's newest edit; an edit that it had replaced comes back under its number.

        Returns:
            the edit that was taken back.

        Raises:
            ValueError: nothing (left) to undo.
        """
        runtime = runtime_of(unwrap(self.model))
        groups = [] if runtime is None else list(runtime.groups.values())
        while self._undo:
            adapter, edit_id, replaced = self._undo.pop()
            group = adapter.group
            if not any(group is known for known in groups) or edit_id not in group.first:
                continue  # removed by hand, or with its adapter
            edit = edit_of(adapter, edit_id)
            group.remove(edit_id)
            for old_id, rows, record in replaced:
                group.add(rows, record, old_id)
            return edit
        raise ValueError("Nothing to undo: this editor has made no edit that is still stored.")

    @property
    def edits(self) -> list[Edit]:
        """The stored edits, oldest first."""
        return list_edits(self.model)

    # ------------------------------------------------------------------ asking

    def explain(self, image: Picture | None, prompt: str) -> Explanation:
        """Which edit answers this input, or which is nearest and how far away it is."""
        return self.explain_many([(image, prompt)])[0]

    def explain_many(self, questions: Sequence[Sample]) -> list[Explanation]:
        """`explain` for a batch of questions, in one forward."""
        adapter = active_adapter(self.model)
        inputs = self.prompter.inputs(open_questions(questions))
        found = lookup_many(self.model, inputs)
        edits = {f.edit_id: None if f.edit_id is None else edit_of(adapter, f.edit_id) for f in found}
        return [Explanation(f.fired, edits[f.edit_id], f.distance, f.radius) for f in found]

    def answer(self, image: Picture | None, prompt: str, max_new_tokens: int = 20) -> str:
        """What the edited model answers: greedy generation, special tokens dropped."""
        return self.answer_many([(image, prompt)], max_new_tokens)[0]

    def answer_many(self, questions: Sequence[Sample], max_new_tokens: int = 20) -> list[str]:
        """Answers to a batch of questions, in one generation."""
        return generate_answers(self.model, self.prompter, questions, max_new_tokens)


def _arguments(request: Any) -> dict[str, Any]:
    """One of `edit_many`'s requests as arguments of `edit`. Raises ValueError."""
    if isinstance(request, EditRequest):
        return {"image": request.image, "prompt": request.prompt, "target": request.target}
    if isinstance(request, (tuple, list)) and 3 <= len(request) <= len(_ARGUMENTS):
        return dict(zip(_ARGUMENTS, request, strict=False))
    if not isinstance(request, Mapping):
        kind = type(request).__name__
        raise ValueError(
            f"the request is a {kind}: pass an EditRequest (of an EditSample its .request), a triple (image, "
            "prompt, target), or a mapping with these keys."
        )
    lacking = [name for name in _ARGUMENTS[:3] if name not in request]
    unknown = sorted(map(str, set(request) - set(_ARGUMENTS)))
    if lacking or unknown:
        raise ValueError(
            f"the request has the keys {sorted(map(str, request))}: "
            + (f"{', '.join(lacking)} is missing" if lacking else f"{', '.join(unknown)} is not known")
            + f". The keys are {', '.join(_ARGUMENTS)} (image None for an edit without one; the last two may "
            "be left out)."
        )
    return dict(request)


def _check_samples(rephrases: Any, negatives: Any) -> None:
    """Refuse one sample where a list of them belongs: a text would be taken letter by letter."""
    for name, samples in (("rephrases", rephrases), ("negatives", negatives)):
        if isinstance(samples, (str, bytes, os.PathLike, Image.Image, Mapping)):
            what = shown(samples) if isinstance(samples, (str, bytes, Image.Image)) else repr(samples)
            raise ValueError(f"{name}={what} is one sample: pass a list with it, {name}=[...].")
        for number, sample in enumerate(samples or ()):
            pair = isinstance(sample, tuple)
            if (pair and len(sample) != 2) or not (pair or name == "negatives" or isinstance(sample, str)):
                kind = "an image" if name == "negatives" else "a text"
                raise ValueError(f"{name}[{number}]={sample!r}: pass {kind} or an (image, question) pair.")


def generate_answers(
    model: nn.Module, prompter: Prompter, questions: Sequence[Sample], max_new_tokens: int = 20
) -> list[str]:
    """Greedy answers to a batch of questions, in one `generate` of any Hugging Face VLM, edited or not."""
    opened = open_questions(questions)
    asked: Any = model
    base: Any = unwrap(model)
    place = base.get_input_embeddings().weight
    inputs = {
        name: value.to(place.device, base.dtype) if value.is_floating_point() else value.to(place.device)
        for name, value in prompter.inputs(opened).items()
    }
    with torch.no_grad():
        tokens = asked.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    length = inputs["input_ids"].shape[1]
    # Some models return the prompt in front of the answer, those fed with embeddings do not.
    if tokens.shape[1] >= length and torch.equal(tokens[:, :length], inputs["input_ids"]):
        tokens = tokens[:, length:]
    return [text.strip() for text in prompter.tokenizer.batch_decode(tokens, skip_special_tokens=True)]


def _image_hash(image: Image.Image | None) -> str | None:
    return None if image is None else hashlib.sha256(image.convert("RGB").tobytes()).hexdigest()[:16]
