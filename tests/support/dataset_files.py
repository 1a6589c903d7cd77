"""The small data sets of `data_files`, one in each real layout, and pictures for tests."""

from __future__ import annotations

import io
import json
from pathlib import Path

import PIL.Image

FILES = Path(__file__).parents[1] / "datasets" / "data_files"
EVQA = [FILES / "evqa/images", FILES / "evqa/rephrased"]
VLKEB = FILES / "vlkeb/VLKEB_images"
MMKE = FILES / "mmke/data_image"
LAYOUTS = [
    ("evqa/vqa_eval.json", EVQA, "evqa", 3),
    ("evqa/vqa_train.json", EVQA, "evqa", 2),
    ("eic/caption_eval_edit.json", None, "eic", 1),
    ("vlkeb/eval.json", VLKEB, "vlkeb", 2),
    ("vlkeb/eval_multihop.json", VLKEB, "vlkeb", 2),
    ("vlkeb/eval_edit_onehop.json", VLKEB, "vlkeb", 1),
    ("mmke/data_json/entity/eval.json", MMKE, "mmke", 1),
    ("mmke/data_json/visual/eval.json", MMKE, "mmke", 1),
    ("mmke/data_json/user/eval.json", MMKE, "mmke", 1),
    ("okedit/okedit.json", None, "okedit", 1),
    ("own/facts.jsonl", None, "jsonl", 2),
]
OWN = {"prompt": "What brand?", "target": "lenovo"}


def asked(probes) -> list[tuple]:
    """Image file name, prompt and answer of probes."""
    return [(p.image_source and Path(p.image_source).name, p.prompt, p.answer) for p in probes]


def evqa_rows() -> list[dict]:
    return json.loads((FILES / "evqa/vqa_eval.json").read_text())


def picture(colour: int = 40, size: int = 9) -> PIL.Image.Image:
    return PIL.Image.new("RGB", (size, size), (colour, 10, 200))


def png_bytes(image: PIL.Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def write(path: Path, rows: list | str) -> Path:
    path.write_text(rows if isinstance(rows, str) else json.dumps(rows))
    return path


def write_lines(path: Path, rows: list[dict]) -> Path:
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))
