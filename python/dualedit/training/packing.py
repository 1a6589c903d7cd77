"""Several questions about one image in one row, so that the image is read once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..runtime.sequence import Prompt, last_true
from .losses import IGNORED, KEEP
from .parts import Part
from .questions import Question

# A processor that returns more than this states image positions in ways that packing does not know.
_PACKABLE = {"input_ids", "attention_mask", "pixel_values"}
# The least number that both float32 and bfloat16 hold.
_CLOSED = torch.finfo(torch.bfloat16).min


def packed_rows(
    inputs: dict[str, Tensor],
    labels: Tensor,
    places: Sequence[int],
    rows: Sequence[Question],
    image_ids: Sequence[int],
) -> Part | None:
    """One row for each edit: what its questions begin with, once, and their endings one behind the other.

    Each ending sees the beginning and itself, at the positions that it would have alone. None where the
    processor's outputs are of another kind, or the image does not lie in the common beginning.
    """
    pixels = inputs.get("pixel_values")
    if not set(inputs) <= _PACKABLE or pixels is None or len(pixels) != len(rows):
        return None
    ids, attended = inputs["input_ids"], inputs["attention_mask"] != 0
    edits = sorted({row.edit for row in rows})
    built = []
    for edit in edits:
        members = [number for number, row in enumerate(rows) if row.edit == edit]
        members.sort(key=lambda number: rows[number].term != "reliability")
        prompts = [ids[m][attended[m] & (labels[m] == IGNORED)] for m in members]
        answers = [labels[m][labels[m] != IGNORED] for m in members]
        shared = _common(prompts)
        image = torch.isin(prompts[0], torch.tensor(list(image_ids)))
        if not bool(image.any()) or bool(image[shared:].any()):
            return None
        built.append(_packed_row(prompts, answers, [places[m] for m in members], shared))
    length = max(len(row["ids"]) for row in built)
    stacked = {name: _pad(built, name, length) for name in built[0]}
    segment, label = stacked["segment"], stacked["labels"]
    question = (segment >= 0) & (label == IGNORED)
    image = torch.isin(stacked["ids"], torch.tensor(list(image_ids))) & question
    first = [next(n for n, row in enumerate(rows) if row.edit == edit) for edit in edits]
    call = {
        "input_ids": stacked["ids"],
        "attention_mask": torch.where(_visible(segment), 0.0, _CLOSED)[:, None],
        "position_ids": stacked["positions"],
        "pixel_values": pixels[first],
    }
    return Part(
        call,
        Prompt(question & ~image, image, last_true(question), last_true(segment >= 0)),
        label,
        stacked["answer"],
        torch.tensor(edits),
        (segment == 0) | (segment == 1),
        any(row.term in KEEP for row in rows),
    )


def _visible(segment: Tensor) -> Tensor:
    """[R, L, L] bool: what each position sees, of segments [R, L]: 0 the beginning, -1 padding."""
    column = torch.arange(segment.shape[1])
    visible = (segment[:, None, :] == 0) | (segment[:, None, :] == segment[:, :, None])
    visible = visible & (column <= column[:, None]) & (segment >= 0)[:, None, :]
    return visible | torch.eye(len(column), dtype=torch.bool)  # padding: its softmax would be empty


def _common(prompts: list[Tensor]) -> int:
    """Tokens that all prompts begin with; at least one of each is left over, in front of the answer."""
    shortest = min(len(prompt) for prompt in prompts) - 1
    same = torch.ones(shortest, dtype=torch.bool)
    for prompt in prompts[1:]:
        same &= prompt[:shortest] == prompts[0][:shortest]
    return int(same.int().cumprod(0).sum())


_EMPTY = {"ids": 0, "labels": IGNORED, "answer": -1, "segment": -1, "positions": 0}


def _packed_row(prompts, answers, places, shared: int) -> dict[str, Tensor]:
    pieces: dict[str, list[Tensor]] = {name: [] for name in _EMPTY}

    def add(ids: Tensor, label: Tensor, answer: int, segment: int, begin: int) -> None:
        pieces["ids"].append(ids)
        pieces["labels"].append(label)
        pieces["answer"].append(torch.full_like(ids, answer))
        pieces["segment"].append(torch.full_like(ids, segment))
        pieces["positions"].append(torch.arange(begin, begin + len(ids)))

    head = prompts[0][:shared]
    add(head, torch.full_like(head, IGNORED), -1, 0, 0)
    for number, (prompt, answer, place) in enumerate(zip(prompts, answers, places, strict=True)):
        rest = prompt[shared:]
        add(rest, torch.full_like(rest, IGNORED), -1, number + 1, shared)
        add(answer, answer, place, number + 1, len(prompt))
    return {name: torch.cat(values) for name, values in pieces.items()}


def _pad(rows: list[dict[str, Tensor]], name: str, length: int) -> Tensor:
    padded = [
        torch.nn.functional.pad(row[name], (0, length - len(row[name])), value=_EMPTY[name]) for row in rows
    ]
    return torch.stack(padded)
