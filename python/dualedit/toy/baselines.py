"""The baselines on the embedded model, with settings that `tune_baselines` chose on training facts."""

from __future__ import annotations

import json
import os
from pathlib import Path

from dualedit.baselines import (
    BASELINES,
    FITTED,
    Baseline,
    FineTuneSettings,
    GRACESettings,
    IKESettings,
    KESettings,
    LiveEditSettings,
    LoRASettings,
    LTESettings,
    MENDSettings,
    RECIPESettings,
    RetrievalSettings,
    SERACSettings,
    Settings,
    TPatcherSettings,
    VisEditSettings,
    WISESettings,
    open_baseline,
)

from .editors import EDITORS
from .model import NOTE, load_embedded

_TUNED: dict[str, type] = {
    "ft-l": FineTuneSettings, "ft-v": FineTuneSettings, "lora": LoRASettings, "grace": GRACESettings,
    "retrieval": RetrievalSettings, "tp": TPatcherSettings, "wise": WISESettings, "mend": MENDSettings,
    "ke": KESettings, "liveedit": LiveEditSettings, "serac": SERACSettings, "recipe": RECIPESettings,
    "lte": LTESettings,
}  # fmt: skip
FILE = "baselines.json"

# The embedded model was taught to answer from a note in front of the question, and it reads no more than one:
# demonstrations would be words to it.
NOTED = {"fact": f"{NOTE} {{target}}. ", "question": "{prompt}"}
# The layer is BalancEdit's, whose last prompt token tells facts apart.
IKE = IKESettings(layer=5, **NOTED)


def baseline_settings(name: str, weights: str | os.PathLike | None = None) -> Settings | None:
    """Settings of a baseline for the embedded model; None where it has none.

    Args:
        name: one of `dualedit.baselines.BASELINES`.
        weights: folder of the editors' weights; those shipped with the package if not given.

    Raises:
        ValueError: an unknown name, or one that was not tuned into this folder.
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
    tuned = json.loads(file.read_text())
    if name not in tuned:
        raise ValueError(
            f"{os.fspath(file)!r} has no settings of {name!r}: tune it with python -m "
            f"recipes.toy.tune_baselines --only {name}"
        )
    settings = {key: tuple(v) if isinstance(v, list) else v for key, v in tuned[name]["settings"].items()}
    if name in FITTED:
        settings["network"] = folder / name
    if settings.get("adapter") is not None:  # another editor's, beside it
        settings["adapter"] = folder / settings["adapter"]
    return _TUNED[name](**settings)


def lacks_settings(name: str, weights: str | os.PathLike | None = None) -> str | None:
    """Why a baseline cannot be opened on the embedded model with these weights, in words; None: it can."""
    folder = Path(weights or EDITORS)
    if name not in _TUNED:
        return None
    file = folder / FILE
    if not file.is_file() or name not in json.loads(file.read_text()):
        return f"it has no settings in {os.fspath(file)}; tune it with recipes.toy.tune_baselines"
    if name in FITTED and not (folder / name).is_dir():
        return f"it has to be fitted into {os.fspath(folder / name)} first (recipes.toy.train_baselines)"
    return None


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
