"""The editor: correct what a vision-language model answers, with images and text."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from PIL import Image
from torch import nn
from tqdm.auto import tqdm

from .book import EditBook
from .checking import UNRELATED, EditFailed, ask_back, failure, generate_answers
from .data import EditRequest
from .editing import NOTHING, Edit, Lookup, edit_of, lookup_in, trying
from .exchange import read_requests, write_export
from .folder.writing import held
from .history import Change
from .models.architectures import unwrap
from .models.images import Picture, noted_picture, open_image, picture_notes
from .models.prompting import Prompter, one_question, open_questions
from .overlaps import Policies, nearest_few, shadowed_by
from .records import noted as checked_notes
from .requests import Pictures, Question, Sample, Words, arguments_of, black, brighter, check_samples
from .runtime.context import runtime_of
from .storage import check_folder, is_saved_in, load_edits, refresh_edits, save_edits
from .tuners.adapter import EditAdapter, active_adapter, adapter_of
from .tuners.adapters import disabled, remove_adapter
from .tuners.config import EditConfig
from .tuners.model import inject

_OTHER_QUESTIONS = 2  # asked about an edit's image to see how far another question is


@dataclass(frozen=True)
class Nearby:
    """A stored edit as seen from a question.

    Attributes:
        edit: the edit.
        distance: from the question to its key.
        radius: up to which distance it applies.
        why: what comes of that, in words.
    """

    edit: Edit
    distance: float
    radius: float
    why: str


@dataclass(frozen=True)
class Explanation:
    """Why an input is, or is not, answered by an edit.

    Attributes:
        fired: whether an edit applies.
        edit: the nearest stored edit that may answer, or None when there is none.
        distance: from the input to that edit's key.
        radius: up to which distance that edit applies.
        nearest: up to three edits, nearest first.
        why: in words.
    """

    fired: bool
    edit: Edit | None
    distance: float
    radius: float
    nearest: tuple[Nearby, ...] = ()
    why: str = ""


@dataclass(frozen=True)
class Check:
    """What has become of a stored edit.

    Attributes:
        edit: the edit.
        answers: whether the model answers its question as told; None where it cannot be asked, because its
            picture is not kept or it is not to answer.
        answer: what the model answers.
        shadowed_by: number of the edit that is looked up in its place, or None.
        why: in words.
    """

    edit: Edit
    answers: bool | None
    answer: str | None
    shadowed_by: int | None
    why: str


class Editor(EditBook):
    """Edits, undoes, lists and explains, on a model with an injected edit adapter.

    Args:
        model: from `inject_dualedit`, `inject_balancedit`, `get_peft_model` or `PeftModel.from_pretrained`.
        processor: the model's processor.
        template: see `Prompter`; None uses the processor's chat template.
        fallback: where an edit goes that the model's adapter cannot write: the name of another edit adapter
            on the model, the settings of one (`BalancEditConfig`), or a folder of a saved one. The latter two
            are put on the model when an edit first needs them, under the method's name, and taken off again
            where they do not help either. None: the adapter that saved edits name, if it is there.
        keep_failed: what `edit` and `edit_many` do where they are not told.
        policies: what happens to an edit where a near one is stored already.
        folder: where the edits are saved, each change before it counts; a folder that the model was loaded
            from, or none yet. What others save there is seen at each change, and by `refresh`.
        author: noted with each edit, where `edit` is not told another one.
        keep_pictures: whether edits keep their pictures (PNG), so that `check` and `export` can ask them
            again; None: small ones (32 KiB). A thumbnail and a digest are always kept.

    Raises:
        ValueError: the model has no edit adapter, or no adapter of the fallback's name; or the folder holds
            edits that the model does not have.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        template: str | None = None,
        fallback: str | os.PathLike[str] | EditConfig | None = None,
        keep_failed: bool = False,
        policies: Policies | None = None,
        author: str | None = None,
        keep_pictures: bool | None = None,
        folder: str | os.PathLike[str] | None = None,
    ):
        super().__init__()
        self.policies = policies or Policies()
        self.author = author
        self.keep_pictures = keep_pictures
        self.model = model
        self.processor = processor
        self.prompter = Prompter(processor, template)
        self.keep_failed = keep_failed
        self._fallback: str | None = None  # the name of an adapter on the model
        self._on_demand: Path | EditConfig | None = None
        self._choose_fallback(fallback)
        self.folder: Path | None = None
        if folder is not None:
            self.bind(folder)
        self._warn_of_other_templates()

    def _hold(self, stack: ExitStack) -> None:
        if self.folder is not None:
            stack.enter_context(held(self.folder))
            self.refresh()

    def _commit(self, kind: str = "commit") -> None:
        if self.folder is not None:
            save_edits(self.model, self.folder, kind=kind)

    def bind(self, folder: str | os.PathLike[str]) -> None:
        """Save each change in a folder from now on, as `Editor(folder=...)` does.

        Raises:
            ValueError: the folder holds edits that the model does not have.
        """
        check_folder(self.model, folder)
        self.folder = Path(folder)

    def refresh(self) -> int:
        """Take over what others have saved in the editor's folder; how many edits changed."""
        if self.folder is None or not is_saved_in(self.model, self.folder):
            return 0
        return refresh_edits(self.model)

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
        author: str | None = None,
        note: str | None = None,
        tags: Sequence[str] | None = None,
        expires: str | date | None = None,
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
        noted = checked_notes(self.author if author is None else author, note, tags, expires)
        return self._edit(image, prompt, target, rephrases, negatives, keep_failed, noted)

    def _edit(
        self, image: Any, prompt: str, target: str, rephrases: Any, negatives: Any, keep_failed: bool | None,
        noted: dict[str, Any],
    ) -> Edit:  # fmt: skip
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
        more = _Told(rephrases, negatives, noted, steps)
        before = self._fallback
        try:
            with self._changing():
                edit, failed = self._try(adapter, request, more, keep and not further)
                if edit is None and further:
                    edit, failed = self._fall_back(request, more, keep)
                if edit is None:
                    assert failed is not None
                    raise failed
        except BaseException:
            if self._fallback != before and self._fallback is not None:  # saving it failed
                remove_adapter(self.model, self._fallback)
                self._fallback = self.adapter_config.fallback = None
            raise
        return edit

    def _further_ways(self) -> bool:
        """Whether there is a fallback that may be used now."""
        if self._on_demand is not None and self._fallback is None:
            return True
        return len(self.adapters) > 1

    def _fall_back(
        self, request: EditRequest, more: _Told, keep: bool
    ) -> tuple[Edit | None, EditFailed | None]:
        put = self._put_fallback()
        edit = None
        try:
            edit, failed = self._try(self.adapters[1], request, more, keep)
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
        self, adapter: EditAdapter, request: EditRequest, more: _Told, keep: bool
    ) -> tuple[Edit | None, EditFailed | None]:
        """Write an edit in one adapter and ask it back.

        Args:
            keep: store it whatever the model answers.

        Returns:
            the stored edit or None, and what is to be said where the model did not answer as told.
        """
        image, prompt, target, steps = request.image, request.prompt, request.target, more.steps
        eos = self._eos()
        target_ids = self.prompter.target_ids(image, prompt, target, eos)
        positives, contrasts = self.samples_around(image, prompt, more.rephrases, more.negatives, adapter)
        if adapter.name != self.adapter.name and not more.negatives:
            # Its radius must not reach other questions about the picture, of which there need not be any yet.
            contrasts.append((image, UNRELATED))
        kind = "words" if image is None else "picture"
        note = {
            "prompt": prompt, "target": target.strip(), "template": self.prompter.digest[kind],
            **picture_notes(image, self.keep_pictures), **more.noted,
        }  # fmt: skip
        beside = [other for other in self.adapters if other.name != adapter.name]
        inputs = self.prompter.inputs([(image, prompt)])
        near = [self.prompter.inputs([sample]) for sample in positives]
        far = [self.prompter.inputs([sample]) for sample in contrasts]
        with trying(adapter, inputs, target_ids, near, far, note, beside) as tried:
            self.policies.settle(tried, target, edit_of(adapter, tried.edit_id).radius)
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
        back = [Change(old.group, old.edit_id, None, old.record, old.rows) for old in tried.replaced]
        self._did([Change(adapter.group, edit.id, edit.uid, None), *back])
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

    def _edit_one(self, request: Any, keep_failed: bool | None) -> Edit:
        if not (isinstance(request, Mapping) and "imported" in request):
            return self.edit(**arguments_of(request), keep_failed=keep_failed)
        given = dict(request)
        imported, disabled = given.pop("imported"), given.pop("disabled", False)
        asked = arguments_of(given)
        noted = checked_notes(*(asked.pop(name, None) for name in ("author", "note", "tags", "expires")))
        noted |= {} if imported is None else {"imported": imported}
        rephrases, negatives = asked.pop("rephrases", None), asked.pop("negatives", None)
        edit = self._edit(
            asked["image"], asked["prompt"], asked["target"], rephrases, negatives, keep_failed,
            noted,
        )  # fmt: skip
        return self.disable(edit.id) if disabled else edit

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
                edits.append(self._edit_one(request, keep_failed))
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

    def replace(
        self,
        edit_id: int,
        target: str,
        author: str | None = None,
        note: str | None = None,
        tags: Sequence[str] | None = None,
        expires: str | date | None = None,
    ) -> Edit:
        """Tell a stored edit another answer, to the same picture and question.

        Args:
            author, note, tags, expires: as `edit` takes them; what is not given stays as it was.

        Raises:
            KeyError: an unknown number.
            ValueError: its picture was not kept (`Editor(keep_pictures=True)` keeps it): use `edit`.
            EditFailed: the model does not answer as told. The old edit stays.
        """
        old, record = self.get(edit_id), self.record(edit_id)
        picture = noted_picture(record)
        if picture is None and old.image_sha256 is not None:
            raise ValueError(
                f"edit_id={edit_id}: its picture is not kept. Use edit(image, {old.prompt!r}, {target!r}), "
                "which takes the place of this one."
            )
        kept: dict[str, Any] = {
            name: record[name] for name in ("author", "note", "tags", "expires") if name in record
        }
        kept |= checked_notes(author, note, tags, expires)
        new = self._edit(picture, old.prompt, target, None, None, None, kept)
        if any(each.id == edit_id for each in self.edits):  # another template: it was not seen as the same
            self.remove(edit_id)
        return new

    def export(self, file: str | os.PathLike[str], edits: Sequence[Edit] | None = None) -> int:
        """Write edits to one file of JSON lines, with their pictures where they are kept (else thumbnails).

        Args:
            edits: which (of `filter`); None: all.

        Returns:
            how many were written.

        Raises:
            OSError: the disk refused; an older file is as it was.
        """
        listed = self.edits if edits is None else list(edits)
        write_export(file, [(edit.id, self.record(edit.id)) for edit in listed])
        return len(listed)

    def import_edits(
        self,
        file: str | os.PathLike[str],
        images: Mapping[str, Picture] | None = None,
        progress: bool = True,
        keep_failed: bool | None = None,
    ) -> list[Edit]:
        """Tell this model the edits of a file: of `export` (on any model), or of people (JSON lines, CSV).

        Each is made and asked back as by `edit`. One that this model was told from the same export already is
        passed over.

        Args:
            images: pictures that were not kept in the export, by their digest (`Edit.image_sha256`).
            progress, keep_failed: as in `edit_many`.

        Raises:
            ValueError: names the line. EditFailed: as `edit_many`.
        """
        known = {self.record(edit.id).get("imported", edit.uid) for edit in self.edits}
        known |= {edit.uid for edit in self.edits}
        requests = []
        for number, request in enumerate(read_requests(file)):
            uid, lost = request.pop("uid", None), request.pop("lost", False)
            digest = request.pop("image_sha256", None)
            if uid is not None and uid in known:
                continue
            if lost:
                if digest not in (images or {}):
                    raise ValueError(
                        f"{os.fspath(file)}, edit {number + 1}: the export holds no picture of "
                        f"{request['prompt']!r}. Pass images={{{digest!r}: its picture}}."
                    )
                request["image"] = (images or {})[digest]
            requests.append(request | {"imported": uid})
        return self.edit_many(requests, progress, keep_failed)

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
        """`explain` for a batch of questions, in one forward for each adapter."""
        inputs = self.prompter.inputs(open_questions(questions))
        filled = [each for each in self.adapters if len(each.stored())]
        keys = [each.keys_of(inputs) for each in filled]
        nearest = [lookup_in(each, query) for each, query in zip(filled, keys, strict=True)]
        few = [nearest_few(each, query, 3) for each, query in zip(filled, keys, strict=True)]
        found = []
        for row in range(len(questions)):
            more = [each[row] for each in nearest if each[row].edit_id is not None] or [NOTHING]
            best = next((f for f in more if f.fired), min(more, key=lambda f: f.distance - f.radius))
            edit = None if best.edit_id is None else self._known(best.edit_id)
            fired = best.fired and edit is not None
            near = self._nearby([each[row] for each in few], edit if fired else None)
            why = "no edit is stored that may answer" if edit is None else _why(fired, edit, best)
            found.append(Explanation(fired, edit, best.distance, best.radius, near, why))
        return found

    def _known(self, edit_id: int) -> Edit | None:
        try:
            return self.get(edit_id)
        except KeyError:  # somebody has removed it meanwhile
            return None

    def _nearby(self, few: list[list[tuple[int, float, float]]], fired: Edit | None) -> tuple[Nearby, ...]:
        found = []
        for each in few:
            for edit_id, distance, radius in each:
                edit = self._known(edit_id)
                if edit is None:
                    continue
                if fired is not None and edit.id == fired.id:
                    why = "answers: the nearest, and within its radius"
                elif distance > radius:
                    why = "outside its radius"
                else:
                    why = "within its radius, and another edit is nearer"
                found.append(Nearby(edit, distance, radius, why))
        found.sort(key=lambda near: (fired is None or near.edit.id != fired.id, near.distance))
        return tuple(found[:3])

    def check(
        self, edit_ids: Sequence[int] | None = None, images: Mapping[str, Picture] | None = None
    ) -> list[Check]:
        """Ask stored edits again: whether each still answers, and which are shadowed by others.

        Args:
            edit_ids: which; None: all.
            images: pictures that were not kept with the edits, by their digest (`Edit.image_sha256`).

        Raises:
            KeyError: an unknown number.
        """
        edits = self.edits if edit_ids is None else [self.get(i) for i in edit_ids]
        hidden: dict[int, int] = {}
        for each in self.adapters:
            hidden |= shadowed_by(each, [edit.id for edit in edits])
        return [self._check(edit, hidden.get(edit.id), images or {}) for edit in edits]

    def _check(self, edit: Edit, shadow: int | None, images: Mapping[str, Picture]) -> Check:
        if not edit.enabled:
            return Check(edit, None, None, shadow, "it is disabled or has expired")
        given = images.get(edit.image_sha256 or "")
        picture = noted_picture(self.record(edit.id)) if given is None else open_image(given)
        shadowed = f"edit {shadow} is looked up in its place" if shadow is not None else ""
        if not edit.prompt or (picture is None and edit.image_sha256 is not None):
            why = "its picture or question is not kept, so it cannot be asked"
            return Check(edit, None, None, shadow, shadowed or why)
        answer = self.answer(picture, edit.prompt, max_new_tokens=max(20, 2 * len(edit.target.split()) + 20))
        ids = self.prompter.target_ids(picture, edit.prompt, edit.target, self._eos())
        right = self.prompter.as_told(answer, ids, self._eos() is not None)
        why = shadowed or ("" if right else f"the model answers {answer!r}")
        return Check(edit, right, answer, shadow, why)

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


@dataclass(frozen=True)
class _Told:
    """What `edit` was told beside the fact. `steps`: the ways that were tried; goes on with each."""

    rephrases: Sequence[str | Sample] | None
    negatives: Sequence[Picture | Sample] | None
    noted: dict[str, Any]
    steps: list[dict[str, Any]]


def _why(fired: bool, edit: Edit, found: Lookup) -> str:
    near = f"distance {found.distance:.3g}, radius {found.radius:.3g}"
    if fired:
        return f"edit {edit.id} answers ({near})"
    return f"no edit answers; edit {edit.id} is nearest ({near})"
