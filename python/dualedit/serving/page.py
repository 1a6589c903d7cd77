"""The page: ask about a picture, see who answers, correct it, and compare before with after."""

from __future__ import annotations

import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI
from PIL import Image

from ..checking import EditFailed
from ..editing import Edit
from . import page_parts as parts
from .edits import may_change
from .pictures import decode
from .service import Service
from .settings import Refused

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
_EVERY = 4.0  # seconds between two looks for what others have changed
_SHOWN = 30  # edits in the list


def mount_page(app: FastAPI, service: Service) -> FastAPI:
    """The application with the page at /, behind its own routes. Raises ImportError without gradio."""
    fonts = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]  # none from the web
    theme = gr.themes.Default(
        primary_hue="blue", neutral_hue="stone", font=fonts, font_mono=["ui-monospace", "monospace"],
        text_size=gr.themes.sizes.text_lg,
    )  # fmt: skip
    return gr.mount_gradio_app(
        app, build_page(service), path="/", footer_links=[], ssr_mode=False, theme=theme, css=parts.STYLE,
        max_file_size=service.settings.limits.body, show_error=True,
    )  # fmt: skip


def build_page(service: Service) -> gr.Blocks:
    """The page of a service."""
    work = _Work(service)
    settings = service.settings
    with gr.Blocks(title="DualEdit", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        token, seen = gr.State(""), gr.State(-1)
        gr.HTML(parts.block(
            "<h1>Ask, correct, and see what changes</h1><p class=soft>Model: "
            f"{settings.name}. A correction is stored beside the model and can be taken back.</p>"
        ))  # fmt: skip
        with gr.Row():
            with gr.Column(min_width=320):
                picture = gr.Image(
                    type="filepath", label="Picture", height=300, sources=["upload", "clipboard"],
                    elem_id="picture", alt_text="the picture that is asked about", buttons=[],
                    placeholder="Drop a picture here, or click to choose one",
                )  # fmt: skip
                if service.examples:
                    gr.HTML(parts.block("<p class=soft>Or choose one of these:</p>"))
                gallery = gr.Gallery(
                    [(work.enlarged(e.image), e.title) for e in service.examples], label="Pictures to choose",
                    columns=3, height="auto", allow_preview=False, visible=bool(service.examples),
                    elem_id="examples", buttons=[], interactive=False, show_label=False,
                    object_fit="contain", format="png",
                )  # fmt: skip
            with gr.Column(min_width=320):
                question = gr.Textbox(
                    label="Question", placeholder="What is this?", elem_id="question", lines=1
                )
                hints = gr.Dataset(
                    components=[gr.Textbox(visible=False)], samples=[["What is this?"]], label="For example",
                    type="values", elem_id="hints", visible=bool(service.examples),
                )  # fmt: skip
                ask = gr.Button("Ask", variant="primary", elem_id="ask")
                answer = gr.HTML(parts.block("", live=True), elem_id="answer")
                with gr.Group(visible=not settings.read_only):
                    target = gr.Textbox(
                        label="Wrong? Write the right answer", elem_id="target", lines=1,
                        placeholder="The right answer, as short as it can be",
                    )  # fmt: skip
                    who = gr.Textbox(
                        label="Your name, shown beside your changes", max_length=80, elem_id="who", lines=1
                    )
                    typed = gr.Textbox(
                        label="Token for changes, as dualedit serve printed it", type="password", lines=1,
                        elem_id="token", visible=False,
                    )  # fmt: skip
                    with gr.Accordion("Other wordings that should get it, too (may be left out)", open=False):
                        rephrases = gr.Textbox(label="One a line", lines=2, elem_id="rephrases")
                    correct = gr.Button("Correct it", variant="primary", elem_id="correct")
                said = gr.HTML(parts.note(""), elem_id="said")
        gr.HTML(parts.block("<h2>Try it on others</h2>"))
        with gr.Row():
            wordings = gr.Textbox(label="Other wordings, one a line", lines=3, elem_id="wordings")
            others = gr.File(
                label="Other pictures: new ones of the same thing, and look-alikes", file_count="multiple",
                file_types=["image"], type="filepath", elem_id="others", height=190,
            )  # fmt: skip
        examples_too = gr.Checkbox(
            bool(service.examples), label="Also ask about the pictures above", visible=bool(service.examples)
        )
        compare = gr.Button("Compare before and after", elem_id="compare")
        compared = gr.HTML(parts.comparison([]), elem_id="compared")
        gr.HTML(parts.block("<h2>Edits</h2>"))
        with gr.Row(visible=not settings.read_only):
            undo = gr.Button("Undo the last change", elem_id="undo")
            redo = gr.Button("Redo", elem_id="redo")
            export = gr.Button("Export all edits", elem_id="export")
        done = gr.HTML(parts.note(""), elem_id="done")
        exported = gr.File(visible=False, label="The edits", elem_id="exported")

        @gr.render(inputs=[seen], triggers=[seen.change])
        def edits(_: int) -> None:
            _list(work, (who, token, typed), (done, seen))

        with gr.Accordion("Who changed what", open=False):
            changes = gr.HTML(parts.history(service.history.changes), elem_id="changes")

        asking = dict(inputs=[picture, question], outputs=[answer, said])
        ask.click(work.ask, **asking)
        question.submit(work.ask, **asking)
        correcting = dict(
            inputs=[picture, question, target, rephrases, who, token, typed],
            outputs=[answer, said, target, seen],
        )
        correct.click(work.correct, **correcting)
        target.submit(work.correct, **correcting)
        gallery.select(work.choose, None, [picture, hints, question])
        hints.click(lambda chosen: chosen[0], hints, question).then(work.ask, **asking)
        compare.click(work.compare, [picture, question, wordings, others, examples_too], [compared, said])
        undo.click(work.undo, [who, token, typed], [done, seen])
        redo.click(work.redo, [who, token, typed], [done, seen])
        export.click(work.export, [token, typed], [exported, done])
        seen.change(lambda: parts.history(service.history.changes), None, changes)
        page.load(work.opened, None, [token, typed, seen])
        gr.Timer(_EVERY).tick(lambda now: work.version if work.version != now else gr.skip(), seen, seen)
    return page


def _list(work: _Work, given: tuple[Any, Any, Any], told: tuple[Any, Any]) -> None:
    """The stored edits, newest first, each with what can be done about it."""
    edits = work.service.edits[::-1]
    if not edits:
        gr.HTML(parts.block("<p class=soft>No edit is stored.</p>"))
    for edit in edits[:_SHOWN]:
        with gr.Row(elem_classes="edit-row"):
            gr.HTML(work.edit_card(edit))
            if not work.service.settings.read_only:
                switch = "Switch off" if edit.enabled else "Switch on"
                for does, label in (("switch", switch), ("remove", "Remove")):
                    button = gr.Button(f"{label} edit {edit.id}", size="sm", min_width=130, scale=0)
                    button.click(partial(work.act, does, edit.id), list(given), list(told))
    if len(edits) > _SHOWN:
        gr.HTML(parts.block(f"<p class=soft>And {len(edits) - _SHOWN} older ones.</p>"))


class _Work:
    """What the page's buttons do. Problems become messages; nothing is raised to the visitor."""

    def __init__(self, service: Service):
        self.service = service
        # Examples are shown enlarged and asked about as they are.
        self._shown = {self.enlarged(e.image).convert("RGB").tobytes(): e.image for e in service.examples}

    @property
    def version(self) -> int:
        """Changes with every change of the edits."""
        return len(self.service.history.changes)

    @staticmethod
    def enlarged(image: Image.Image) -> Image.Image:
        """A picture that was drawn pixel by pixel, large enough to be looked at."""
        if max(image.size) > 96:
            return image
        factor = 192 // max(image.size)
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)

    def opened(self, request: gr.Request) -> tuple[Any, Any, int]:
        token = request.query_params.get("token", "") if request is not None else ""
        asks = not self.service.settings.read_only and not may_change(self.service, token)
        return token, gr.update(visible=asks), self.version

    def choose(self, event: gr.SelectData) -> tuple[Any, Any, Any]:
        example = self.service.examples[event.index]
        file = self._file(example.image)
        samples = [[question] for question in example.questions] or [["What is this?"]]
        return file, gr.Dataset(samples=samples), example.questions[0] if example.questions else gr.skip()

    def ask(self, picture: str | None, question: str) -> tuple[str, str]:
        try:
            image, question = self._asked(picture, question)
            return self._answer(image, question), parts.note("")
        except _SAID as error:
            return parts.block("", live=True), parts.note(_words(error), "bad")

    def correct(self, picture, question, target, rephrases, who, token, typed) -> tuple[Any, ...]:
        try:
            self._allowed(token, typed)
            image, question = self._asked(picture, question)
            if not (target or "").strip():
                raise ValueError("Write the right answer first.")
            lines = [line.strip() for line in (rephrases or "").splitlines() if line.strip()]
            edit = self.service.add(_name(who), image, question, target.strip(), rephrases=lines or None)
        except _SAID as error:
            return gr.skip(), parts.note(_words(error), "bad"), gr.skip(), gr.skip()
        done = f"Stored as edit {edit.id}. Asked again, the model answers {edit.answer}."
        if edit.replaces:
            done += f" It takes the place of edit {edit.replaces[0]['id']}."
        return self._answer(image, question), parts.note(done, "good"), "", self.version

    def compare(self, picture, question, wordings, others, examples) -> tuple[str, str]:
        try:
            image, question = self._asked(picture, question)
            lines = [line.strip() for line in (wordings or "").splitlines() if line.strip()]
            asked = [(image, question, "the picture above")]
            asked += [(image, line, "the picture above, another wording") for line in lines]
            for file in others or []:
                asked.append((self._open(file), question, f"your picture {Path(file).name}"))
            if examples:
                asked += [(e.image, question, e.shows) for e in self.service.examples if e.image is not image]
            rows = self.service.compare([(i, q) for i, q, _ in asked], [shows for *_, shows in asked])
            return parts.comparison(rows), gr.skip()
        except _SAID as error:
            return parts.comparison([]), parts.note(_words(error), "bad")

    def undo(self, who, token, typed) -> tuple[str, Any]:
        back = partial(self.service.undo, _name(who))
        return self._changed(token, typed, back, "The last change, of edit {}, is taken back.")

    def redo(self, who, token, typed) -> tuple[str, Any]:
        again = partial(self.service.undo, _name(who), again=True)
        return self._changed(token, typed, again, "What was taken back of edit {} is done again.")

    def act(self, does: str, number: int, who, token, typed) -> tuple[str, Any]:
        if does == "remove":
            removed = partial(self.service.remove, _name(who), number)
            return self._changed(token, typed, removed, "Edit {} is removed.")
        on = not next((edit.enabled for edit in self.service.edits if edit.id == number), False)
        words = "Edit {} answers again." if on else "Edit {} is kept and answers nothing."
        return self._changed(token, typed, partial(self.service.enable, _name(who), number, on), words)

    def _changed(self, token, typed, change, words: str) -> tuple[str, Any]:
        try:
            self._allowed(token, typed)
            edit = change()
        except _SAID as error:
            return parts.note(_words(error), "bad"), gr.skip()
        return parts.note(words.format(edit.id), "good"), self.version

    def export(self, token, typed) -> tuple[Any, str]:
        try:
            self._allowed(token, typed)
            folder = Path(tempfile.mkdtemp(dir=_temporary()))
            file = folder / "edits.jsonl"
            file.write_bytes(self.service.export())
        except _SAID as error:
            return gr.skip(), parts.note(_words(error), "bad")
        return gr.update(value=str(file), visible=True), parts.note("")

    def edit_card(self, edit: Edit) -> str:
        """A stored edit in the list."""
        return parts.edit_card(edit, self.service.picture(edit.id))

    # ------------------------------------------------------------------ the visitor's words and pictures

    def _asked(self, picture: str | None, question: str | None) -> tuple[Image.Image | None, str]:
        if not (question or "").strip():
            raise ValueError("Write a question first.")
        return (None if picture is None else self._open(picture)), question.strip()

    def _open(self, file: str) -> Image.Image:
        image = decode(Path(file).read_bytes(), self.service.settings.limits.pixels)
        return self._shown.get(image.tobytes(), image)

    def _answer(self, image: Image.Image | None, question: str) -> str:
        answer = self.service.answer(image, question)
        found = self.service.explain(image, question)
        return parts.answer_card(question, answer.text, found)

    def _allowed(self, token: str, typed: str) -> None:
        if not (may_change(self.service, token) or may_change(self.service, typed)):
            raise Refused(401, "invalid_token", "Changes need the token that dualedit serve printed.")

    def _file(self, image: Image.Image) -> str:
        folder = Path(tempfile.mkdtemp(dir=_temporary()))
        self.enlarged(image).convert("RGB").save(folder / "picture.png")
        return str(folder / "picture.png")


def _temporary() -> str:
    """Where gradio may serve files from."""
    from gradio.utils import get_upload_folder

    folder = get_upload_folder()
    os.makedirs(folder, exist_ok=True)
    return folder


_SAID = (EditFailed, Refused, ValueError, OSError, KeyError)


def _words(error: Exception) -> str:
    return str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)


def _name(who: str | None) -> str:
    return " ".join((who or "").split())[:80]
