"""The commands on a folder of edits that ask its model: many edits, replace, merge, explain, check."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .book import plain, say, tell
from .edits import picture_of
from .loading import Start, open_editor, open_or_start
from .saved_folder import writing
from .terminal import shows_progress

if TYPE_CHECKING:
    from ..editor import Explanation


def told(found: Explanation) -> dict[str, Any]:
    """An explanation as JSON."""

    def number(value: float) -> float | None:
        return value if math.isfinite(value) else None

    nearest = [
        {"id": n.edit.id, "prompt": n.edit.prompt, "target": n.edit.target, "distance": number(n.distance),
         "radius": number(n.radius), "why": n.why}
        for n in found.nearest
    ]  # fmt: skip
    edit = None if found.edit is None else found.edit.id
    return {
        "fired": found.fired, "edit": edit, "distance": number(found.distance),
        "radius": number(found.radius), "why": found.why, "nearest": nearest,
    }  # fmt: skip


def explain(folder: Path, model: Path | None, image: str, question: str, as_json: bool) -> None:
    """Say which edit answers a question, the three that are nearest, and why."""
    found = open_editor(folder, model).explain(picture_of(image), question)
    if as_json:
        say(told(found))
        return
    print(found.why)
    for near in found.nearest:
        what = f"{plain(near.edit.prompt)} -> {plain(near.edit.target)}"
        print(
            f"  edit {near.edit.id}: {what} (distance {near.distance:.3g}, radius {near.radius:.3g}): "
            f"{near.why}"
        )


def import_edits(
    folder: Path, model: Path | None, start: Start, file: Path, keep_failed: bool, as_json: bool
) -> int:
    """Tell the model the edits of a file; those that take are saved, one by one.

    Returns:
        exit code: 1 where some failed.
    """
    from ..checking import EditFailed
    from ..exchange import read_requests

    if not file.is_file():
        raise ValueError(f"{file}: no such file.")
    count = len(read_requests(file))  # says what is wrong with it before a model is loaded
    failures: list[dict[str, Any]] = []
    with writing(folder):
        editor = open_or_start(folder, model, start)
        editor.bind(folder)
        try:
            made = editor.import_edits(file, progress=shows_progress(), keep_failed=keep_failed)
        except EditFailed as failed:
            made = failed.edits
            failures = [
                {
                    "place": place + 1,
                    "prompt": f.prompt,
                    "target": f.target,
                    "answer": f.answer,
                    "why": str(f),
                }
                for place, f in failed.failures.items()
            ]
    if as_json:
        say({"edits": [edit.as_dict() for edit in made], "failed": failures, "lines": count})
    else:
        print(f"{len(made)} of {count} edits of {file} are saved in {folder}")
        for failure in failures:
            print(f"FAILED: {plain(failure['why'])}")
    return int(bool(failures))


def replace(folder: Path, model: Path | None, edit_id: int, answer: str, as_json: bool = False) -> None:
    """Tell a saved edit another answer, to its own picture and question."""
    with writing(folder):
        editor = open_editor(folder, model)
        editor.bind(folder)
        edit = editor.replace(edit_id, answer)
    words = f"edit {edit.id} takes the place of edit {edit_id}: {plain(edit.prompt)} -> {plain(edit.target)}"
    tell(as_json, words, replaced=edit_id, **edit.as_dict())


def merge(folder: Path, model: Path | None, other: Path, as_json: bool = False) -> None:
    """Take over another folder's edits of the same base model, bit for bit."""
    with writing(folder):
        theirs = open_editor(other, model)
        editor = open_editor(folder, model)
        editor.bind(folder)
        found = editor.merge(theirs)
    tell(
        as_json,
        f"{len(found.added)} edits of {other} are in {folder} now; {found.known} were there already, "
        f"{len(found.older)} are older than what is there, {len(found.replaced)} made room",
        added=[edit.id for edit in found.added], known=found.known, older=[edit.id for edit in found.older],
        replaced=[edit.id for edit in found.replaced],
    )  # fmt: skip


def check(folder: Path, model: Path | None, as_json: bool) -> int:
    """Ask every saved edit again.

    Returns:
        exit code: 1 where one does not answer as told, or is shadowed.
    """
    found = open_editor(folder, model).check()
    bad = [each for each in found if each.answers is False or each.shadowed_by is not None]
    if as_json:
        say([
            {"id": c.edit.id, "answers": c.answers, "answer": c.answer, "shadowed_by": c.shadowed_by,
             "why": c.why}
            for c in found
        ])  # fmt: skip
    else:
        right = sum(each.answers is True for each in found)
        unasked = sum(each.answers is None for each in found)
        print(f"{right} of {len(found)} edits answer as told; {unasked} cannot be asked or are off")
        for each in found:
            if each.why:
                print(
                    f"  edit {each.edit.id}: {plain(each.edit.prompt)} -> {plain(each.edit.target)}: "
                    f"{plain(each.why)}"
                )
    return int(bool(bad))


def conflicts(folder: Path, model: Path | None, as_json: bool) -> int:
    """List pairs of edits that are near each other and answer otherwise.

    Returns:
        exit code: 1 where there are any.
    """
    found = open_editor(folder, model).conflicts()
    if as_json:
        say([
            {"first": c.first.id, "second": c.second.id, "distance": c.distance,
             "same_question": c.same_question}
            for c in found
        ])  # fmt: skip
    else:
        print(f"{len(found)} pair{'' if len(found) == 1 else 's'} of edits contradict each other")
        for each in found:
            one, other = each.first, each.second
            print(
                f"  edits {one.id} and {other.id} (distance {each.distance:.3g}): {plain(one.prompt)} -> "
                f"{plain(one.target)}; {plain(other.prompt)} -> {plain(other.target)}"
            )
    return int(bool(found))
