"""What a user's program looks like to a type checker: read by `make lint`, never run."""

import torch
from dualedit import Edit, Editor, EditSample, Explanation, list_edits, load_edits
from dualedit.datasets import LoadedSamples, load_samples
from dualedit.storage import save_edits
from PIL import Image
from torch import Tensor, nn
from typing_extensions import assert_type

from dualedit_kernels import KeyCodes, encode_keys, nearest_key


def edit(base: nn.Module, processor: object, photo: Image.Image) -> None:
    editor = Editor(load_edits(base, "edits"), processor)
    assert_type(editor.edit(photo, "who?", "maria", rephrases=["who is it?"], negatives=["a.png"]), Edit)
    assert_type(editor.edit_many([(photo, "who?", "maria"), {"image": "a.png"}]), list[Edit])
    assert_type(editor.answer("photo.png", "who?"), str)
    assert_type(editor.explain(photo, "who?"), Explanation)
    assert_type(editor.undo(), Edit)
    assert_type(list_edits(editor.model), list[Edit])
    save_edits(load_edits(base, "edits"), "more")


def read(file: str) -> EditSample:
    samples = load_samples(file, image_root="photos")
    assert_type(samples, LoadedSamples)
    assert_type(samples[0].request.image, Image.Image | None)
    return samples[0]


def look_up(query: Tensor, keys: Tensor) -> Tensor:
    codes = encode_keys(keys)
    assert_type(codes, KeyCodes)
    index, distance = nearest_key(query, keys, torch.ones(len(keys)), "l2", codes)
    return torch.where(index >= 0, distance, torch.inf)
