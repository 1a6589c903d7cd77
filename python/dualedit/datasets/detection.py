"""Telling the format of rows by their fields."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .rows import briefly

_LOOK = 20  # rows looked at


def detect_format(records: Sequence[Mapping], source: str) -> str:
    """The format of rows (at least one): that of the first one whose fields belong to a format.

    Raises:
        ValueError: fields of no known format; says which fields tell each format.
    """
    for record in records[:_LOOK]:
        fields = set(record)
        if {"src", "alt"} <= fields:
            return _easyedit(records)
        if "question" in fields and fields & {"rephrased_images", "locality_image"}:
            return "okedit"
        if {"prompt", "target"} <= fields:
            return "jsonl"
    named = briefly(sorted(map(str, records[0])), 200)
    raise ValueError(
        f"{source}: format='auto' cannot tell the format of a row with the fields {named}. Known are: "
        "prompt and target (jsonl); question and rephrased_images or locality_image (okedit); src and alt "
        "(evqa), with src 'a photo of' (eic), with port_new or images in m.* folders (vlkeb), with "
        "knowledge_type (mmke). "
        "Rename the fields, or pass format= to learn what is missing."
    )


def _easyedit(records: Sequence[Mapping]) -> str:
    """Which of the data sets that share EasyEdit's fields."""
    first = [record for record in records[:_LOOK] if "src" in record]
    if any("knowledge_type" in record for record in first):
        return "mmke"
    # Not every row of VLKEB's portability file has a portability question.
    if any("port_new" in record for record in records):
        return "vlkeb"
    if all(_names_entity(str(record.get("image"))) for record in first):
        return "vlkeb"
    captions = [str(record["src"]).strip().lower().startswith("a photo of") for record in first]
    return "eic" if all(captions) else "evqa"


def _names_entity(image: str) -> bool:
    """Whether a folder of the path is named as VLKEB's are, after an entity (m.0104lr/google_15.jpg)."""
    folders = image.replace("\\", "/").split("/")[:-1]
    return any(folder.startswith("m.") and len(folder) > 3 for folder in folders)
