"""Fitted baselines on tiny models: settings that are quick, and folders of a few training steps."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
from dualedit import EditRequest, EditSample, Probe
from dualedit.baselines import (
    FITTED,
    KESettings,
    LiveEditSettings,
    LTESettings,
    MENDSettings,
    RECIPESettings,
    SERACSettings,
    TPatcherSettings,
    TrainingSettings,
    WISESettings,
    fit_baseline,
    liveedit,
)
from dualedit.baselines.recipe import RECIPE
from pytest import MonkeyPatch
from tiny_models import IMAGE, VISION_END, VISION_START, random_image, tiny_tokenizer

FIT = dict(learning_rate=0.03, max_steps=200, stop_probability=0.6)
TRAINING = TrainingSettings(steps=3, batch_size=3, checkpoint_every=1)
_SETTINGS = {
    "tp": TPatcherSettings(noted=16, hardest=8, memory_weight=0.01, **FIT),
    "wise": WISESettings(noted=16, mask_ratio=0.9, alpha=1.0, beta=0.1, gamma=0.01, **FIT),
    "mend": MENDSettings(layers=2, rank=8, edit_rate=1.0),
    "ke": KESettings(layers=2, hidden=8, edit_rate=30.0),
    "liveedit": LiveEditSettings(layer=1, width=16, heads=2, queries=2, sentinel=3, scale=0.05),
    "serac": SERACSettings(layer=1, width=16, heads=2, layers=1, longest=64),
    "recipe": RECIPESettings(layer=1, width=16, tokens=2),
    "lte": LTESettings(layer=1, rank=2, radius=2.0),
}
_WORDS = "red blue green lenovo acer dell apple cat dog".split()


def network_settings(name: str, folder: Path | None = None):
    """Settings of a fitted baseline for a tiny model."""
    return dataclasses.replace(_SETTINGS[name], network=folder)


def training_edits(count: int, seed: int = 0) -> list[EditSample]:
    """Edits with random pictures, a question of each kind with an answer."""
    generator = torch.Generator().manual_seed(seed)

    def image():
        return random_image(generator)

    def word() -> str:
        return _WORDS[int(torch.randint(len(_WORDS), (1,), generator=generator))]

    found = []
    for _ in range(count):
        request = EditRequest(image(), f"what brand is this {word()} ?", word())
        generality = {"v_gen": [Probe(image(), request.prompt, request.target)]}
        locality = {
            "t_loc": [Probe(None, f"what color is the {word()} ?", word())],
            "m_loc": [Probe(image(), "who made it ?", word())],
            "hard_image": [Probe(image(), request.prompt, word())],
        }
        found.append(EditSample(request, generality, locality, rephrases=["name this old computer ?"]))
    return found


def fitted_folders(model, processor, folder: Path) -> dict[str, Path]:
    """A folder for each fitted baseline, of three training steps."""
    samples = training_edits(6)
    for name in FITTED:
        fit_baseline(name, model, processor, samples, folder / name, network_settings(name), TRAINING,
                     progress=False)  # fmt: skip
    return {name: folder / name for name in FITTED}


class TinyQwenProcessor:
    """Words and pictures for the tiny Qwen2.5-VL, whose own processor needs torchvision."""

    image_token = "<image>"

    def __init__(self):
        self.tokenizer = tiny_tokenizer()

    def __call__(self, text, images=(), **options):
        shown = f"w{VISION_START} {' '.join([self.image_token] * 4)} w{VISION_END}"
        texts = [one.replace(self.image_token, shown) for one in text]
        batch = dict(self.tokenizer(texts, **options))
        if images:
            pixels = [torch.from_numpy(np.array(image.convert("RGB").resize((16, 16)))) for image in images]
            whole = torch.stack(pixels).permute(0, 3, 1, 2).float() / 64 - 2  # [N, 3, 16, 16]
            patches = whole.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5)  # [N, 4, 4, 3, 4, 4]
            twice = patches[:, :, :, :, None].expand(-1, -1, -1, -1, 2, -1, -1)
            batch["pixel_values"] = twice.reshape(len(images) * 16, 96)
            batch["image_grid_thw"] = torch.tensor([[1, 4, 4]] * len(images))
        batch["mm_token_type_ids"] = (batch["input_ids"] == IMAGE).long()
        batch.pop("token_type_ids", None)
        return batch


def always_routed(monkeypatch: MonkeyPatch) -> None:
    """Routers that three steps have taught nothing take every question to its most similar edit."""
    def unfiltered(near, nothing, asked):
        return liveedit.weighed(asked, torch.ones_like(asked).bool())

    monkeypatch.setattr(liveedit, "fusion", unfiltered)
    routes = RECIPE._routes

    def nearest(self: RECIPE, questions):
        index, behind = routes(self, questions)
        return index, -behind.abs() - 1

    monkeypatch.setattr(RECIPE, "_routes", nearest)
    monkeypatch.setattr("dualedit.baselines.serac.Scope.forward", lambda self, one, other: one @ other.T + 2)
