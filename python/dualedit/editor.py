"""The editor: correct what a vision-language model answers, with images and text."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import nn
from tqdm.auto import tqdm

from .checking import UNRELATED, EditFailed, ask_back, failure, generate_answers
from .data import EditRequest
from .editing import Edit, Replaced, bring_back, edit_of, edits_of, lookup_in, trying
from .models.architectures import unwrap
from .models.images import Picture, open_image
from .models.prompting import Prompter, one_question, open_questions
from .requests import Pictures, Question, Sample, Words, arguments_of, black, brighter, check_samples
from .runtime.context import runtime_of
from .storage import load_edits
from .tuners.adapter import EditAdapter, active_adapter, adapter_of
from .tuners.adapters import disabled, remove_adapter
from .tuners.config import EditConfig
from .tuners.model import inject

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


class Editor:
    """Edits, undoes, lists and explains, on a model with an injected edit adapter.

    Args:
        model: from `inject_dualedit`, `inject_balancedit`, `get_peft_model` or `PeftModel.from_pretrained`.
        processor: the model's processor.
        template: see `Prompter`; None uses the processor's chat template.
        fallback: where an edit goes that the model's adapter cannot write: the name of another edit
        adapter on
            the model, the settings of one (`BalancEditConfig`), or a folder of a saved one. The latter two
            are
            put on the model when an edit first needs them, under the method's name, and taken off again
            where they do not help either. None: the adapter that saved edits name, if it is there.
        keep_failed: what `edit` and `edit_many` do where they are not told.

    Raises:
        ValueError: the model has no edit adapter, or no adapter of the fallback's name.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        template: str | None = None,
        fallback: str | os.PathLike[str] | EditConfig | None = None,
        keep_failed: bool = False,
    ):
        self.model = model
        self.processor = processor
        self.prompter = Prompter(processor, template)
        self.keep_failed = keep_failed
        self._fallback: str | None = None  # the name of an adapter on the model
        self._on_demand: Path | EditConfig | None = None
        self._choose_fallback(fallback)
        self._undo: list[tuple[EditAdapter, int, list[Replaced]]] = []
        self._warn_of_other_templates()

    def _choose_fallback(self, fallback: str | os.PathLike[str] | EditConfig | None) -> None:
        known = getattr(unwrap(self.model), "peft_config", {})
        if isinstance(fallback, EditConfig):
            self._on_demand = fallback
        elif fallback is not None and str(fallback) not in known:
            if not (Path(fallback) / "adapter_config.json").is_file():
                raise ValueError(
                    f"fallback={os.fspath(fallback)!r} is neither an adapter on this model "
                    f"({sorted(known)}) nor "
                    "a folder of a saved one."
                )
            self._on_demand = Path(fallback)
        elif fallback is not None:
            self._fallback = str(fallback)
        named = [c.fallback for c in known.values() if isinstance(c, EditConfig) and c.fallback in known]
        if self._fallback is None and named:
            self._fallback = named[0]
        _ = self.adapter  # says what is wrong with the model

    @property
    def adapter(self) -> EditAdapter:
        """The adapter that edits go to first. Raises ValueError where there is none, or more than one."""
        if self._fallback is None:
            return active_adapter(self.model)
        with disabled(self.model, self._fallback):
            return active_adapter(self.model)

    @property
    def adapters(self) -> list[EditAdapter]:
        """The adapters that hold this editor's edits: the first one, and the fallback where it is on the
        model."""
        base: Any = unwrap(self.model)
        first, runtime = self.adapter, runtime_of(base)
        if self._fallback is None or runtime is None or self._fallback not in base.peft_config:
            return [first]
        off = runtime.switched_off()
        return [first] if self._fallback in off else [first, adapter_of(base, self._fallback)]

    # ------------------------------------------------------------------ editing

    def edit(
        self,
        image: Picture | None,
        prompt: str,
        target: str,
        rephrases: Sequence[str | Sample] | None = None,
        negatives: Sequence[Picture | Sample] | None = None,
        keep_failed: bool | None = None,
    ) -> Edit:
        """Make the model answer `target` when asked `prompt` about what `image` shows.

        The edit is asked back before it counts: it is stored where the model then answers as told, and
        else it
        was never there. While it is asked, this thread alone sees it.

        Args:
            image: as `answer` takes one; None only for an adapter that edits text positions alone.
            prompt: the question, as a user types it.
            target: the new answer.
            rephrases: other wordings, or (image, wording) pairs, that must be recognised. BalancEdit, and
                DualEdit with `radius="own"`, set the edit's radius by them; without any they take a slightly
                brighter image and "Question: ..." in front.
            negatives: images, or (image, question) pairs, that must not be. Without any, the two take a black
                image; DualEdit also the questions of other stored edits about this image.
            keep_failed: store an edit that failed, too, with a mark (`Edit.failed`). None: as the editor
            was told.

        Returns:
            the stored edit.

        Raises:
            ValueError: a missing image, an empty prompt or target, an unreadable file, a target that the
                tokenizer cannot spell. Nothing is stored.
            EditFailed: the model does not answer as told. Nothing is stored.
        """
        adapter = self.adapter
        check_samples(rephrases, negatives)
        picture, prompt = one_question(image, prompt)
        if picture is None and adapter.method.needs_image(adapter.config):
            raise ValueError(
                "image=None: the edit's image is missing. Pass the image that the question is about (only "
                "a DualEdit adapter with vis_layer=None takes text-only edits)."
            )
        request = EditRequest(picture, prompt, target)
        keep = self.keep_failed if keep_failed is None else keep_failed
        further = self._further_ways()
        steps: list[dict[str, Any]] = []
        edit, failed = self._try(adapter, request, rephrases, negatives, steps, keep and not further)
        if edit is None and further:
            edit, failed = self._fall_back(request, rephrases, negatives, steps, keep)
        if edit is None:
            assert failed is not None
            raise failed
        return edit

    def _further_ways(self) -> bool:
        """Whether there is a fallback that may be used now."""
        if self._on_demand is not None and self._fallback is None:
            return True
        return len(self.adapters) > 1

    def _fall_back(
        self, request: EditRequest, rephrases: Any, negatives: Any, steps: list[dict[str, Any]], keep: bool
    ) -> tuple[Edit | None, EditFailed | None]:
        put = self._put_fallback()
        edit = None
        try:
            edit, failed = self._try(self.adapters[1], request, rephrases, negatives, steps, keep)
        finally:
            if put and edit is None:
                remove_adapter(self.model, put)
                self._fallback = self.adapter_config.fallback = None
        return edit, failed

    @property
    def adapter_config(self) -> EditConfig:
        """The settings of the adapter that edits go to first."""
        return self.adapter.config

    def _put_fallback(self) -> str | None:
        """Put the fallback on the model where it is not; its name, or None where it was there."""
        wanted, config = self._on_demand, self.adapter_config
        if self._fallback is not None or wanted is None:
            return None
        name = wanted.name if isinstance(wanted, Path) else wanted.method.name
        if isinstance(wanted, Path):
            load_edits(self.model, wanted, adapter_name=name)
        else:
            inject(self.model, wanted, name)
        self._fallback = config.fallback = name
        return name

    def _try(
        self,
        adapter: EditAdapter,
        request: EditRequest,
        rephrases: Any,
        negatives: Any,
        steps: list[dict[str, Any]],
        keep: bool,
    ) -> tuple[Edit | None, EditFailed | None]:
        """Write an edit in one adapter and ask it back.

        Args:
            steps: what was tried; goes on with this one.
            keep: store it whatever the model answers.

        Returns:
            the stored edit or None, and what is to be said where the model did not answer as told.
        """
        image, prompt, target = request.image, request.prompt, request.target
        eos = self._eos()
        target_ids = self.prompter.target_ids(image, prompt, target, eos)
        positives, contrasts = self.samples_around(image, prompt, rephrases, negatives, adapter)
        if adapter.name != self.adapter.name and not negatives:
            # Its radius must not reach other questions about the picture, of which there need not be any yet.
            contrasts.append((image, UNRELATED))
        kind = "words" if image is None else "picture"
        note = {
            "prompt": prompt, "target": target.strip(), "image_sha256": _image_hash(image),
            "template": self.prompter.digest[kind],
        }  # fmt: skip
        beside = [other for other in self.adapters if other.name != adapter.name]
        inputs = self.prompter.inputs([(image, prompt)])
        near = [self.prompter.inputs([sample]) for sample in positives]
        far = [self.prompter.inputs([sample]) for sample in contrasts]
        with trying(adapter, inputs, target_ids, near, far, note, beside) as tried:
            verdict = ask_back(self.model, self.prompter, tried, image, prompt, ends=eos is not None)
            found = {"probability": verdict.probability, "answer": verdict.answer}
            count = tried.record.get("steps", 0)
            steps.append(
                {"method": adapter.method.title, "steps": count, "seconds": tried.seconds, **found}
            )
            failed = None if verdict.right else failure(request, adapter, verdict, steps)
            if not (verdict.right or keep):
                return None, failed
            seconds = round(sum(step["seconds"] for step in steps), 4)
            tried.record.update(found, failed=not verdict.right, tried=steps, seconds=seconds)
            edit = tried.keep()
        self._undo.append((adapter, edit.id, tried.replaced))
        return edit, failed

    def samples_around(
        self,
        image: Image.Image | None,
        prompt: str,
        rephrases: Sequence[str | Sample] | None,
        negatives: Sequence[Picture | Sample] | None,
        adapter: EditAdapter | None = None,
    ) -> tuple[list[Question], list[Question]]:
        """What an edit has to recognise and what not: the given samples, or those made where there are none.

        Args:
            image, prompt, rephrases, negatives: as in `edit`, the image opened.
            adapter: that the edit goes to; None: the first one.

        Returns:
            positives and negatives, as (image, question) pairs.
        """
        adapter = self.adapter if adapter is None else adapter
        needed = adapter.method.needs_samples(adapter.config)
        positives = [(image, s) if isinstance(s, str) else (open_image(s[0]), s[1]) for s in rephrases or ()]
        contrasts = [
            (open_image(s[0]), s[1]) if isinstance(s, tuple) else (open_image(s), prompt)
            for s in negatives or ()
        ]
        if needed and not positives:
            positives = [(image, f"Question: {prompt}")]
            if image is not None:
                positives.append((brighter(image), prompt))
        if needed and not contrasts:
            contrasts = [] if image is None else [(black(image), prompt)]
            if adapter.method.asks_other_questions:
                asked = dict.fromkeys(edit.prompt for edit in self.edits if edit.prompt not in ("", prompt))
                contrasts += [(image, other) for other in list(asked)[:_OTHER_QUESTIONS]]
        return positives, contrasts

    def _eos(self) -> int | None:
        config = getattr(unwrap(self.model), "generation_config", None)
        eos = getattr(config, "eos_token_id", None)
        return eos[0] if isinstance(eos, list) else eos

    def edit_many(
        self,
        requests: Iterable[EditRequest | Mapping[str, Any] | tuple],
        progress: bool = True,
        keep_failed: bool | None = None,
    ) -> list[Edit]:
        """Store many edits, with a progress bar; what was stored before a failure stays stored.

        Args:
            requests: `EditRequest`s, (image, prompt, target) triples, or mappings with these keys. A triple
                may go on, and a mapping may have further keys, with `edit`'s rephrases and negatives.
            keep_failed: as in `edit`.

        Raises:
            ValueError: a bad request; names its place in the list.
            EditFailed: some of them failed. Raised at the end: the others are stored, and in its `edits`.
        """
        if isinstance(requests, (str, Mapping, EditRequest)):
            raise ValueError(f"requests is one {type(requests).__name__}: pass a list of requests.")
        edits: list[Edit] = []
        failures: dict[int, EditFailed] = {}
        listed = list(requests)
        for number, request in enumerate(tqdm(listed, desc="editing", unit="edit", disable=not progress)):
            try:
                edits.append(self.edit(**arguments_of(request), keep_failed=keep_failed))
            except EditFailed as failed:
                failures[number] = failed
            except (ValueError, TypeError) as error:
                raise ValueError(
                    f"requests[{number}]: {error} ({len(edits)} of {len(listed)} edits are stored.)"
                ) from error
        if failures:
            said = " ".join(f"requests[{number}]: {failed}" for number, failed in failures.items())
            raise EditFailed(
                f"{len(failures)} of {len(listed)} edits failed, {len(edits)} are stored. {said}",
                edits=edits, failures=failures,
            )  # fmt: skip
        return edits

    def remove(self, edit_id: int) -> None:
        """Forget one edit. Raises KeyError for an unknown number; names the stored ones."""
        adapters = self.adapters
        holder = next((each for each in adapters if edit_id in each.group), adapters[0])
        holder.group.remove(edit_id)

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
            adapter, edit_id, replaced = self._undo[-1]
            try:
                known = any(adapter.group is group for group in groups)
                edit = edit_of(adapter, edit_id) if known else None
            except KeyError:
                edit = None  # removed by hand, or with its adapter
            if edit is not None:
                bring_back([(adapter.group, edit_id)], [old for old in replaced if old.group in groups])
            self._undo.pop()
            if edit is not None:
                return edit
        raise ValueError("Nothing to undo: this editor has made no edit that is still stored.")

    @property
    def edits(self) -> list[Edit]:
        """The stored edits, oldest first."""
        return sorted((edit for each in self.adapters for edit in edits_of(each)), key=lambda edit: edit.id)

    def _warn_of_other_templates(self) -> None:
        """Say so where stored edits were made with another prompt template: their questions look
        different."""
        now = set(self.prompter.digest.values())
        made = [r.get("template") for each in self.adapters for r in each.group.records().values()]
        other = sum(digest is not None and digest not in now for digest in made)
        if other:
            warnings.warn(
                f"{other} of {len(made)} stored edits were made with another prompt template (a system "
                f"prompt, "
                "another chat template or processor). Asked with this one, their questions may not "
                "reach them. Use the template that they were made with, or make them again.",
                stacklevel=3,
            )

    # ------------------------------------------------------------------ asking

    def explain(self, image: Pictures, prompt: Words) -> Explanation:
        """Which edit answers this input, or which is nearest and how far away it is."""
        return self.explain_many([(image, prompt)])[0]

    def explain_many(self, questions: Sequence[tuple[Pictures, Words]]) -> list[Explanation]:
        """`explain` for a batch of questions, in one forward for each adapter that holds edits."""
        inputs = self.prompter.inputs(open_questions(questions))
        edits = {edit.id: edit for edit in self.edits}
        first, *others = [lookup_in(each, inputs) for each in self.adapters]
        found = []
        for row, nearest in enumerate(first):
            more = [nearest, *(other[row] for other in others if other[row].edit_id is not None)]
            best = next((f for f in more if f.fired), min(more, key=lambda f: f.distance - f.radius))
            edit = None if best.edit_id is None else edits.get(best.edit_id)
            found.append(Explanation(best.fired and edit is not None, edit, best.distance, best.radius))
        return found

    def answer(self, image: Pictures, prompt: Words, max_new_tokens: int = 20) -> str:
        """What the edited model answers: greedy generation, special tokens dropped.

        Args:
            image: a PIL image, a path, an http address, a data URL, the bytes of a file, an array [H, W, 3]
                of uint8; several of them in a list; or None.
            prompt: the question, or chat messages with the pictures in them (`models.chats.read_chat`).
        """
        return self.answer_many([(image, prompt)], max_new_tokens)[0]

    def answer_many(self, questions: Sequence[tuple[Pictures, Words]], max_new_tokens: int = 20) -> list[str]:
        """Answers to a batch of questions, in one generation."""
        return generate_answers(self.model, self.prompter, questions, max_new_tokens)


def _image_hash(image: Image.Image | None) -> str | None:
    return None if image is None else hashlib.sha256(image.convert("RGB").tobytes()).hexdigest()[:16]
