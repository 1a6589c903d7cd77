"""The commands on a folder of edits: ask, edit, list, remove; and sample pictures to try them on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .book import plain, say
from .loading import Start, load_base, model_for, open_editor, open_or_start
from .saved_folder import is_saved, writing

if TYPE_CHECKING:
    from ..editor import Explanation

NO_IMAGE = "-"


def picture_of(image: str):
    """The picture behind an argument; None for "-"."""
    from ..models.images import open_image

    return None if image == NO_IMAGE else open_image(image)


def why(found: Explanation) -> str:
    """An explanation in words."""
    from .demo_story import near

    if found.edit is None:
        return "no edit is stored"
    how_near = f"distance {near(found.distance)}, radius {near(found.radius)}"
    if found.fired:
        return f"edit {found.edit.id} answers ({how_near})"
    return f"no edit answers; edit {found.edit.id} is nearest ({how_near})"


def ask(folder: Path, model: Path | None, image: str, question: str, as_json: bool = False) -> None:
    """Print the answer, and which edit gave it."""
    picture = picture_of(image)
    if not is_saved(folder):
        from ..editor import generate_answers
        from ..models.prompting import Prompter

        base, processor = load_base(model_for(folder, model))
        answer = generate_answers(base, Prompter(processor), [(picture, question)])[0]
        if as_json:
            say({"answer": answer, "fired": False, "edit": None, "why": "no edits are saved"})
            return
        print(answer)
        print(f"(the unedited model: no edits are saved in {folder})")
        return
    editor = open_editor(folder, model)
    if as_json:
        from .telling import told

        say({"answer": editor.answer(picture, question), **told(editor.explain(picture, question))})
        return
    print(plain(editor.answer(picture, question)))
    print(f"({why(editor.explain(picture, question))})")


def edit(
    folder: Path,
    model: Path | None,
    start: Start,
    image: str,
    question: str,
    answer: str,
    rephrases: list[str],
    unlike: list[Path],
    keep_failed: bool = False,
    noted: Mapping[str, Any] | None = None,
    as_json: bool = False,
) -> int:
    """Store an edit that takes, save the folder, print the answer before and after.

    Returns:
        exit code: 1 for an edit that is saved (`keep_failed`) and failed.
    """
    picture = picture_of(image)
    with writing(folder):
        from ..checking import told_steps
        from ..storage import save_edits

        editor = open_or_start(folder, model, start)
        before = editor.answer(picture, question)
        if not as_json:
            print(f"before: {plain(before)}")
        made = editor.edit(
            picture, question, answer, rephrases=rephrases or None, negatives=unlike or None,
            keep_failed=keep_failed, **(noted or {}),
        )  # fmt: skip
        save_edits(editor.model, folder)
    if as_json:
        say({"before": before, **made.as_dict()})
        return int(made.failed)
    print(f"after:  {plain(made.answer or '')}")
    for old in made.replaces:
        print(f"(it replaces edit {old['id']}, {old.get('target', '?')!r}, of the same image and question)")
    print(f"(edit {made.id}, {made.seconds:.2f} s: {told_steps(made.steps)}; saved in {folder})")
    if made.failed:
        print("(FAILED: the edit is saved, and the model does not answer as told)")
    return int(made.failed)


def sample(folder: Path, seed: int) -> None:
    """Write example pictures of the embedded model's world, and what can be asked about them."""
    from ..toy.pictures import sample_pictures

    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: pass a folder.")
    folder.mkdir(parents=True, exist_ok=True)
    pictures = sample_pictures(seed)
    for picture in pictures:
        picture.image.save(folder / picture.file)
    listing = [
        {"file": p.file, "shows": p.shows, "questions": [{"ask": q, "answer": a} for q, a in p.questions]}
        for p in pictures
    ]
    (folder / "questions.json").write_text(json.dumps(listing, indent=1) + "\n", encoding="utf-8")
    for picture in pictures:
        print(f"{folder / picture.file}  {picture.shows}")
    print(f"{folder / 'questions.json'}  questions, and the answers that are true in that world")
    first = pictures[0]
    question, truth = first.questions[0]
    print("\nTry:")
    print(f'  dualedit ask {folder / first.file} "{question}"')
    print(f'  dualedit edit {folder / first.file} "{question}" "{first.other_answer}"')
    print(f'  dualedit ask {folder / pictures[1].file} "{question}"')
