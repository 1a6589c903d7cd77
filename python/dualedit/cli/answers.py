"""`dualedit eval --answers FILE`: which answers can be told, how long that takes, and by what steps."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import write_whole
from .loading import Start, start_editor

if TYPE_CHECKING:
    from ..data import EditRequest
    from ..editor import Sample
    from ..evaluation.answers import Told

_KEYS = {"image", "question", "answer"}


def run(file: Path, model: Path | None, start: Start, out: Path | None) -> int:
    """Tell every answer of a file alone; print what becomes of it.

    Args:
        file: an answer a line, or JSON lines with image, question and answer.
        out: the results as JSON, or None.

    Returns:
        exit code: 1 where an answer failed.
    """
    from ..evaluation.answers import OUTCOMES, tell_answers

    requests, watched = _requests(file, model)
    results = tell_answers(start_editor(model, start), requests, watched, _tell)
    counts = {outcome: sum(result.outcome == outcome for result in results) for outcome in OUTCOMES}
    changed = sum(len(result.changed) for result in results)
    slowest = max((result.seconds for result in results), default=0.0)
    told = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    print(f"{len(results)} answers: {told}; slowest {slowest:.1f} s; {changed} other answers changed")
    if out is not None:
        rows = [{**asdict(result), "changed": [q for _, q in result.changed]} for result in results]
        write_whole(out, json.dumps({"counts": counts, "answers": rows}, indent=1) + "\n")
    return int(counts["failed"] > 0)


def _tell(result: Told) -> None:
    from ..checking import told_steps

    how = result.why or told_steps(result.steps)
    changed = f"; {len(result.changed)} OTHER ANSWERS CHANGED" if result.changed else ""
    print(f"{result.outcome:8} {result.seconds:6.1f} s  {result.answer}  ({how}{changed})", flush=True)


def _requests(file: Path, model: Path | None) -> tuple[list[EditRequest], list[Sample]]:
    """What is told, and the questions to be left alone."""
    from ..data import EditRequest
    from ..models.images import open_image

    lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"--answers {file} is empty: write an answer a line.")
    if lines[0].startswith("{"):
        rows = [_row(file, number, line) for number, line in enumerate(lines, 1)]
        requests = [
            EditRequest(open_image(_place(file, row["image"])), row["question"], row["answer"])
            for row in rows
        ]
        return requests, [(request.image, request.prompt) for request in requests]
    if model is not None:
        raise ValueError(
            f"--answers {file}: with --model, write JSON lines with image, question and answer; the sample "
            "picture belongs to the embedded model."
        )
    from ..toy.pictures import sample_pictures

    pictures = sample_pictures()
    question = pictures[0].questions[0][0]
    watched = [(p.image, q) for p in pictures for q, _ in p.questions if "again" not in p.file]
    watched = [(i, q) for i, q in watched if not (i is pictures[0].image and q == question)]
    return [EditRequest(pictures[0].image, question, line) for line in lines], watched


def _row(file: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"--answers {file}, line {number}: no JSON ({error}).") from error
    if not isinstance(row, dict) or not _KEYS <= set(row):
        raise ValueError(f"--answers {file}, line {number}: the keys are image, question and answer.")
    return row


def _place(file: Path, image: Any) -> Any:
    """A picture's path, which starts from the file's folder."""
    return str(file.parent / image) if isinstance(image, str) else image
