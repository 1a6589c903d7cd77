"""Writing samples to a JSONL file that `load_samples` reads back."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from ..data import EditSample, Probe
from ..models.images import ImageSource, rgb
from .images import pixel_digest
from .own import KINDS


def to_jsonl(samples: Iterable[EditSample], path: str | os.PathLike) -> Path:
    """Write samples in the library's own layout, one a line; the file appears whole or not at all.

    Args:
        path: of the new file; an existing one is replaced.

    Returns:
        the path. Images given as paths are written as paths, relative where they lie below the file's folder.
        PIL images and bytes are written as RGB PNG files into the folder "<name>_images" beside the file,
        each picture once. Loading the file gives equal samples, except that empty lists of probes are left
        out and a generality probe without an answer gets the edit's target.

    Raises:
        ValueError: generality or locality with names other than "t_gen", "v_gen" and the locality kinds; an
            edit with an image and a generality probe without one; an image that cannot be opened.
    """
    path = Path(path)
    store = _Images(path)
    lines = []
    for number, sample in enumerate(samples):
        unknown = (set(sample.generality) - {"t_gen", "v_gen"}) | (set(sample.locality) - set(KINDS))
        if unknown:
            known = ", ".join(("t_gen", "v_gen", *KINDS))
            raise ValueError(f"samples[{number}] has probes named {sorted(unknown)}: the file knows {known}.")
        blind = [p for probes in sample.generality.values() for p in probes if p.image_source is None]
        if blind and sample.request.image_source is not None:
            raise ValueError(
                f"samples[{number}] asks {blind[0].prompt!r} without an image, but its edit has one: a "
                "generality probe needs an image here too."
            )
        lines.append(json.dumps(_record(sample, store), ensure_ascii=False) + "\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text("".join(lines), encoding="utf-8")
    os.replace(part, path)
    return path


class _Images:
    """Where the images of one file are kept."""

    def __init__(self, path: Path):
        self.home = Path(os.path.abspath(path)).parent
        self.folder = self.home / f"{path.stem}_images"
        self._written: dict[str, str] = {}

    def path_of(self, source: ImageSource) -> str | None:
        """What the file says of an image."""
        if source is None:
            return None
        if not isinstance(source, str):
            return self._stored(source)
        if source not in self._written:
            place = Path(os.path.abspath(source))
            below = place.is_relative_to(self.home)
            self._written[source] = place.relative_to(self.home).as_posix() if below else str(place)
        return self._written[source]

    def _stored(self, source: ImageSource) -> str:
        file = self.folder / f"{pixel_digest(source)[:24]}.png"
        if not file.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            part = file.with_suffix(".part")
            rgb(source).save(part, format="PNG")
            os.replace(part, file)
        return f"{self.folder.name}/{file.name}"


def _record(sample: EditSample, store: _Images) -> dict:
    request = sample.request
    record = {
        "id": sample.id,
        "image": store.path_of(request.image_source),
        "prompt": request.prompt,
        "target": request.target,
        "before": sample.base_answer,
        "rephrases": [_rephrase(probe, sample, store) for probe in sample.generality.get("t_gen", [])],
        "other_images": [_other_image(probe, sample, store) for probe in sample.generality.get("v_gen", [])],
        "keep": [_kept(kind, p, store) for kind, probes in sample.locality.items() for p in probes],
        "portability": [_kept(kind, p, store) for kind, probes in sample.portability.items() for p in probes],
        "companions": [
            {"image": store.path_of(c.image_source), "prompt": c.prompt, "target": c.target}
            for c in sample.companions
        ],
        "edit_rephrases": list(sample.rephrases),
        "family": sample.family,
        "entity": None if sample.entity == -1 else sample.entity,
    }
    return {key: value for key, value in record.items() if value not in (None, "", [])}


def _rephrase(probe: Probe, sample: EditSample, store: _Images) -> str | dict:
    if probe.image_source == sample.request.image_source and probe.answer == sample.request.target:
        return probe.prompt
    return _filled(prompt=probe.prompt, image=store.path_of(probe.image_source), answer=probe.answer)


def _other_image(probe: Probe, sample: EditSample, store: _Images) -> str | dict | None:
    image = store.path_of(probe.image_source)
    if probe.prompt == sample.request.prompt and probe.answer == sample.request.target:
        return image
    return _filled(image=image, prompt=probe.prompt, answer=probe.answer)


def _kept(kind: str, probe: Probe, store: _Images) -> dict:
    image = store.path_of(probe.image_source)
    return _filled(kind=kind, image=image, prompt=probe.prompt, answer=probe.answer)


def _filled(**fields: str | None) -> dict[str, str]:
    return {key: value for key, value in fields.items() if value is not None}
