"""Samples from the library's own layouts: the plain one for a user's file, and that of OKEDIT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..data import EditRequest, EditSample, Probe
from ..models.images import ImageSource
from .rows import Row, briefly

KEYS = (
    "id", "image", "prompt", "target", "before", "rephrases", "other_images", "keep", "portability",
    "companions", "edit_rephrases", "family", "entity",
)  # fmt: skip
OKEDIT_KEYS = (
    "id", "image", "question", "target", "prediction", "rephrased_questions", "rephrased_images",
    "locality_image", "locality_question", "locality_answer",
)  # fmt: skip
KINDS = ("t_loc", "m_loc", "hard_image", "hard_question")


def own_sample(row: Row, name: str) -> EditSample:
    """A sample of a user's own file; the package's docstring says what the fields mean."""
    row.check_keys(KEYS)
    image = row.optional_image("image")
    request = EditRequest(image, _question(row, image), row.text("target"))
    generality = {
        "t_gen": [_rephrase(row, i, item, request) for i, item in enumerate(row.items("rephrases"))],
        "v_gen": [_other_image(row, i, item, request) for i, item in enumerate(row.items("other_images"))],
    }
    locality: dict[str, list[Probe]] = {}
    for entry in row.children("keep"):
        entry.check_keys(("image", "prompt", "answer", "kind"))
        image = entry.optional_image("image")
        probe = Probe(image, _question(entry, image), entry.optional_text("answer"))
        locality.setdefault(_kind(entry, probe, request), []).append(probe)
    portability: dict[str, list[Probe]] = {}
    for entry in row.children("portability"):
        entry.check_keys(("image", "prompt", "answer", "kind"))
        image = entry.optional_image("image")
        probe = Probe(image, _question(entry, image), entry.text("answer"))
        portability.setdefault(entry.optional_text("kind") or "port", []).append(probe)
    return EditSample(
        request,
        {kind: probes for kind, probes in generality.items() if probes},
        locality,
        _texts(row, "edit_rephrases"),
        row.optional_text("family") or "",
        _number(row, "entity"),
        portability,
        [_companion(entry) for entry in row.children("companions")],
        _id(row, name),
        row.optional_text("before"),
    )


def okedit_sample(row: Row, name: str) -> EditSample:
    """A sample of OKEDIT; the package's docstring says what the fields mean."""
    row.check_keys(OKEDIT_KEYS)
    request = EditRequest(row.image("image"), row.prompt("question"), row.text("target"))
    paths = row.items("rephrased_images")
    images = [row.image_from(f"rephrased_images[{i}]", path) for i, path in enumerate(paths)]
    asked = "locality_question" if row.has("locality_question") else "question"
    hard = Probe(row.image("locality_image"), row.prompt(asked), row.text("locality_answer"))
    wordings = [row.template.apply(text, "image") for text in _texts(row, "rephrased_questions")]
    generality = {
        "t_gen": [Probe(request.image_source, wording, request.target) for wording in wordings],
        "v_gen": [Probe(image, request.prompt, request.target) for image in images],
    }
    if not wordings or None in images or not images:
        empty = "rephrased_images" if wordings else "rephrased_questions"
        raise row.error(empty, "is missing or empty: an OKEDIT row needs at least one of each.")
    return EditSample(
        request,
        generality,
        {"hard_image": [hard]},
        id=_id(row, name),
        base_answer=row.optional_text("prediction"),
    )


def _question(row: Row, image: ImageSource) -> str:
    return row.prompt("prompt", "text" if image is None else "image")


def _texts(row: Row, key: str) -> list[str]:
    items = row.items(key)
    for i, item in enumerate(items):
        if not isinstance(item, str) or not item.strip():
            raise row.error(f"{key}[{i}]", f"is {briefly(item)}: write a text, in quotes.")
    return items


def _number(row: Row, key: str) -> int:
    value = row.record.get(key)
    if value is None:
        return -1
    if not isinstance(value, int) or isinstance(value, bool):
        raise row.mistyped(key, value, "write a whole number")
    return value


def _id(row: Row, name: str) -> str:
    value = row.record.get("id")
    if value is None:
        return name
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        raise row.error("id", f"is {briefly(value)}: write a text or a whole number, or leave it out.")
    return str(value)


def _rephrase(row: Row, i: int, item: Any, request: EditRequest) -> Probe:
    key = f"rephrases[{i}]"
    if isinstance(item, str):
        item = {"prompt": item}
    entry = row.child(key, item)
    entry.check_keys(("prompt", "image", "answer"))
    image = entry.optional_image("image") if entry.has("image") else request.image_source
    return Probe(image, _question(entry, image), entry.optional_text("answer") or request.target)


def _other_image(row: Row, i: int, item: Any, request: EditRequest) -> Probe:
    key = f"other_images[{i}]"
    if item is None:
        raise row.error(key, "is null: write a path.")
    if not isinstance(item, Mapping) or "image" not in item:
        return Probe(row.image_from(key, item), request.prompt, request.target)
    entry = row.child(key, item)
    entry.check_keys(("prompt", "image", "answer"))
    image = entry.image("image")
    prompt = _question(entry, image) if entry.has("prompt") else request.prompt
    return Probe(image, prompt, entry.optional_text("answer") or request.target)


def _kind(entry: Row, probe: Probe, request: EditRequest) -> str:
    kind = entry.optional_text("kind")
    if kind is not None:
        if kind not in KINDS:
            raise entry.error("kind", f"is {kind!r}: choose one of {', '.join(KINDS)}, or leave it out.")
        return kind
    if probe.image_source is None:
        return "t_loc"
    if probe.image_source == request.image_source:
        return "hard_question"
    return "hard_image" if probe.prompt == request.prompt else "m_loc"


def _companion(entry: Row) -> EditRequest:
    entry.check_keys(("image", "prompt", "target"))
    image = entry.optional_image("image")
    return EditRequest(image, _question(entry, image), entry.text("target"))
