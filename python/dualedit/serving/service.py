"""One edited model as a service: its worker, its saved edits, and who changed them."""

from __future__ import annotations

import io
import logging
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..editing import Edit
from ..editor import Editor, Explanation
from ..models.images import noted_picture
from ..records import timestamp
from ..storage import save_edits
from ..tuners.adapters import disabled
from .batches import Answer, Asked
from .history import Change, History
from .metrics import Metrics
from .page_parts import Compared
from .settings import Refused, Settings
from .worker import Worker

log = logging.getLogger("dualedit.serving")


@dataclass(frozen=True)
class Example:
    """A picture that visitors of the page may choose.

    Attributes:
        title: of it, in a word or two.
        shows: what it shows, for people who do not see it.
        questions: that can be asked about it.
    """

    image: Image.Image
    title: str
    shows: str
    questions: tuple[str, ...] = ()


class Service:
    """What the HTTP interface and the page share. All methods may be called from any thread.

    Args:
        editor: used by nobody else while the service runs.
        folder: where the edits are saved after each change, before the change is confirmed; None keeps them
            in this process.
        settings: see `Settings`; None takes its defaults.
        examples: pictures for visitors of the page.
    """

    def __init__(
        self,
        editor: Editor,
        folder: Path | None = None,
        settings: Settings | None = None,
        examples: Sequence[Example] = (),
    ):
        settings = settings or Settings()
        self.examples = list(examples)
        self.editor, self.folder, self.settings = editor, folder, settings
        if folder is not None:
            editor.bind(folder)
        self.history = History(folder)
        self.metrics = Metrics(lambda: len(self.edits), lambda: self.worker.waiting)
        limits = settings.limits
        editor.remembered = limits.undo
        self.worker = Worker(
            editor.model, editor.prompter, limits.batch, limits.questions, watch=self.metrics.batch
        )

    def start(self) -> None:
        """Begin to work."""
        self.worker.start()

    def close(self) -> None:
        """Refuse what waits and end the worker. What was confirmed is saved already."""
        self.worker.close()

    @property
    def edits(self) -> list[Edit]:
        """The stored edits, oldest first."""
        return self.editor.edits

    # ------------------------------------------------------------------ asking

    def ask(self, asked: Asked) -> Future[Answer]:
        """Queue a question. Raises Refused where too many wait."""
        began = time.perf_counter()
        self.worker.ask(asked)
        asked.done.add_done_callback(lambda done: self.metrics.answered(done, time.perf_counter() - began))
        return asked.done

    def answer(self, image: Image.Image | None, prompt: str, tokens: int | None = None) -> Answer:
        """Ask and wait."""
        return self.ask(Asked((image, prompt), tokens or self.settings.limits.tokens)).result()

    def explain(self, image: Image.Image | None, prompt: Any) -> Explanation:
        """Which edit answers, or which is nearest."""
        return self.worker.call(lambda: self.editor.explain(image, prompt)).result()

    def compare(
        self, questions: Sequence[tuple[Image.Image | None, str]], shows: Sequence[str]
    ) -> list[Compared]:
        """Questions to the model without its edits and with them; `shows`: what the pictures show."""
        return self.worker.call(lambda: self._compare(questions, shows)).result()

    def _compare(self, questions, shows) -> list[Compared]:
        tokens = self.settings.limits.tokens
        with disabled(self.editor.model, *(adapter.name for adapter in self.editor.adapters)):
            before = self.editor.answer_many(questions, tokens)
        after = self.editor.answer_many(questions, tokens)
        found = self.editor.explain_many(questions)
        return [
            Compared(*question, was, now, why, what)
            for question, was, now, why, what in zip(questions, before, after, found, shows, strict=True)
        ]

    # ------------------------------------------------------------------ changing

    def edit(self, edit_id: int) -> Edit:
        """A stored edit. Raises Refused, 404, for an unknown number."""
        found = next((edit for edit in self.edits if edit.id == edit_id), None)
        if found is None:
            raise Refused(404, "edit_not_found", f"There is no edit {edit_id}.")
        return found

    def add(self, who: str, image: Image.Image | None, prompt: str, target: str, **more: Any) -> Edit:
        """Make an edit, have it asked back, and save it.

        Args:
            who: made it, as she names herself.
            image, prompt, target, more: as `Editor.edit` takes them.

        Raises:
            EditFailed: the model does not answer as told; nothing is stored.
            ValueError: as `Editor.edit`.
            Refused: read-only, too many wait, or the disk refused; nothing is stored.
        """
        return self._change(lambda: self._add(who, image, prompt, target, more))

    def remove(self, who: str, edit_id: int) -> Edit:
        """Forget an edit. Raises Refused as `add`, and 404 for an unknown number."""
        return self._change(lambda: self._done(who, "remove", edit_id))

    def enable(self, who: str, edit_id: int, on: bool = True) -> Edit:
        """Let an edit answer again or, with `on` False, no longer. Raises Refused as `remove`."""
        return self._change(lambda: self._done(who, "enable" if on else "disable", edit_id))

    def undo(self, who: str, again: bool = False) -> Edit:
        """Take back what was done last, or with `again` do again what was taken back last.

        Returns:
            the edit that is gone, changed or back.

        Raises:
            Refused: as `add`, and 409 where there is nothing to take back.
        """
        return self._change(lambda: self._taken_back(who, again))

    def export(self, whole: bool = False) -> bytes:
        """The edits in one file.

        Args:
            whole: the saved folder as a zip file, which `load_edits` reads when it is unpacked; else JSON
                lines, which `Editor.import_edits` tells any model.
        """
        return self.worker.call(self._zipped if whole else self._lines).result()

    def picture(self, edit_id: int) -> Image.Image | None:
        """The picture that an edit is about, or a thumbnail of it. Raises Refused, 404."""
        self.edit(edit_id)
        record = self.editor.record(edit_id)
        return noted_picture(record) or noted_picture(record, thumbnail=True)

    def _change(self, function: Callable[[], Edit]) -> Edit:
        if self.settings.read_only:
            raise Refused(403, "read_only", "The service is read-only: its edits cannot be changed.")
        return self.worker.call(function).result()

    def _add(self, who: str, image: Any, prompt: str, target: str, more: dict[str, Any]) -> Edit:
        with _saving():
            edit = self.editor.edit(image, prompt, target, author=who or None, **more)
        return self._noted(who, "add", edit)

    def _done(self, who: str, what: str, edit_id: int) -> Edit:
        before = self.edit(edit_id)
        with _saving():
            after = getattr(self.editor, what)(edit_id)
        return after if after == before else self._noted(who, what, after or before)

    def _taken_back(self, who: str, again: bool) -> Edit:
        what = "redo" if again else "undo"
        try:
            with _saving():
                edit = self.editor.redo() if again else self.editor.undo()
        except ValueError as error:
            raise Refused(409, f"nothing_to_{what}", str(error)) from error
        return self._noted(who, what, edit)

    def _noted(self, who: str, what: str, edit: Edit) -> Edit:
        """The change is saved; who made it is noted beside it."""
        try:
            self.history.note(Change(timestamp(), who, what, edit.id, edit.prompt, edit.target))
        except OSError as error:
            log.warning("who changed edit %s is not noted: %s", edit.id, error)
        self.metrics.changed(what)
        return edit

    def _lines(self) -> bytes:
        with tempfile.TemporaryDirectory() as place:
            self.editor.export(Path(place, "edits.jsonl"))
            return Path(place, "edits.jsonl").read_bytes()

    def _zipped(self) -> bytes:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place, "edits")
            save_edits(self.editor.model, folder)
            packed = io.BytesIO()
            with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
                for file in sorted(f for f in folder.rglob("*") if f.is_file()):
                    archive.write(file, file.relative_to(folder))
        return packed.getvalue()


@contextmanager
def _saving() -> Iterator[None]:
    """A change that the editor saves before it counts: what the disk refuses has not happened."""
    try:
        yield
    except OSError as error:
        said = f"The edits cannot be saved: {error.strerror or error}. Nothing is changed."
        raise Refused(507, "not_saved", said) from error
