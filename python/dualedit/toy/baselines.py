"""The baselines on the embedded model, with settings that `tune_baselines` chose on training facts."""

from __future__ import annotations

import json
import os
from pathlib import Path

from dualedit.baselines import (
    BASELINES,
    Baseline,
    FineTuneSettings,
    GRACESettings,
    IKESettings,
    LoRASettings,
    Settings,
    VisEditSettings,
    open_baseline,
)

from .editors import EDITORS
from .model import NOTE, load_embedded

_TUNED = {"ft-l": FineTuneSettings, "ft-v": FineTuneSettings, "lora": LoRASettings, "grace": GRACESettings}
FILE = "baselines.json"

# The embedded model was taught to answer from a note in front of the question, and it reads no more than one:
# demonstrations would be words to it. The layer is BalancEdit's, whose last prompt token tells facts apart.
IKE = IKESettings(fact=f"{NOTE} {{target}}. ", question="{prompt}", layer=5)


def baseline_settings(name: str, weights: str | os.PathLike | None = None) -> Settings | None:
    """Settings of a baseline for the embedded model; None where it has none.

    Args:
        name: one of `dualedit.baselines.BASELINES`.
        weights: folder of the editors' weights; those shipped with the package if not given.

    Raises:
        ValueError: an unknown name.
        FileNotFoundError: the folder holds no tuned settings.
    """
    folder = Path(weights or EDITORS)
    if name == "ike":
        return IKE
    if name == "visedit":
        alone = folder / "visedit"  # from `train_visedit`; else half of what was trained for both
        return VisEditSettings(adapters=alone if alone.is_dir() else folder / "dualedit")
    if name not in _TUNED:
        if name not in BASELINES:
            raise ValueError(f"method={name!r} is unknown. Known are {', '.join(BASELINES)}.")
        return None
    file = folder / FILE
    if not file.is_file():
        raise FileNotFoundError(
            f"{os.fspath(file)!r} is missing: tune the baselines with python -m recipes.toy.tune_baselines"
        )
    return _TUNED[name](**json.loads(file.read_text())[name]["settings"])


def load_baseline(
    name: str, vlm: str | os.PathLike | None = None, weights: str | os.PathLike | None = None
) -> Baseline:
    """A freshly loaded embedded model with one baseline, without edits.

    Args:
        name: one of `dualedit.baselines.BASELINES`.
        vlm, weights: folders of the model and of the editors; those shipped with the package if not given.

    Raises:
        ValueError: an unknown name.
        FileNotFoundError: a folder without a model or settings.
    """
    settings = baseline_settings(name, weights)
    model, processor = load_embedded(vlm)
    return open_baseline(name, model, processor, settings)
