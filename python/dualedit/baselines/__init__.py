"""Other ways of editing a vision-language model, on one interface, so that one command compares them all."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

from torch import nn

from ..data import EditSample
from .baseline import Baseline, Unedited
from .finetune import FineTune
from .grace import GRACE
from .ike import IKE
from .ke import KE
from .liveedit import LiveEdit
from .lora import LoRA
from .lte import LTE
from .mend import MEND
from .network_settings import (
    KESettings,
    LiveEditSettings,
    LTESettings,
    MENDSettings,
    NetworkSettings,
    RECIPESettings,
    SERACSettings,
    TPatcherSettings,
    WISESettings,
)
from .recipe import RECIPE
from .retrieval import Retrieval
from .serac import SERAC
from .settings import (
    FineTuneSettings,
    GRACESettings,
    IKESettings,
    LoRASettings,
    RetrievalSettings,
    VisEditSettings,
)
from .tpatcher import TPatcher
from .trained import Trained, TrainingSettings, shaping_of, train_network
from .visedit import VisEdit
from .wise import WISE

Settings = (
    FineTuneSettings | LoRASettings | IKESettings | RetrievalSettings | GRACESettings | VisEditSettings
    | NetworkSettings
)  # fmt: skip
_KINDS: dict[str, tuple[type[Baseline], type | None]] = {
    "base": (Unedited, None), "ft-l": (FineTune, FineTuneSettings), "ft-v": (FineTune, FineTuneSettings),
    "lora": (LoRA, LoRASettings), "ike": (IKE, IKESettings), "retrieval": (Retrieval, RetrievalSettings),
    "grace": (GRACE, GRACESettings), "visedit": (VisEdit, VisEditSettings),
    "tp": (TPatcher, TPatcherSettings), "wise": (WISE, WISESettings), "mend": (MEND, MENDSettings),
    "ke": (KE, KESettings), "liveedit": (LiveEdit, LiveEditSettings),
    "serac": (SERAC, SERACSettings), "recipe": (RECIPE, RECIPESettings), "lte": (LTE, LTESettings),
}  # fmt: skip
BASELINES = tuple(_KINDS)
# Those that are fitted to training facts before the first edit, by `fit_baseline`.
FITTED = tuple(name for name, (kind, _) in _KINDS.items() if issubclass(kind, Trained))


def open_baseline(
    name: str, model: nn.Module, processor: Any, settings: Settings | None = None, template: str | None = None
) -> Baseline:
    """A baseline on a model, without edits.

    Args:
        name: one of `BASELINES`.
        model: a Hugging Face VLM without adapters; it is frozen and put into eval mode.
        processor: the model's processor.
        settings: of that baseline; None takes its defaults ("visedit" has to be told its adapter, those of
            `FITTED` the folder of their network).
        template: see `dualedit.models.prompting.Prompter`.

    Raises:
        ValueError: an unknown name, settings of another baseline, a model with adapters, a network that is
            missing or was made for another model.
    """
    settings = _checked(name, settings)
    if name in FITTED and settings.network is None:
        raise ValueError(
            f"network=None: {name!r} has to be fitted to training facts first. Call fit_baseline({name!r}, "
            f"model, processor, samples, folder) and pass {type(settings).__name__}(network=folder)."
        )
    return _made(name, model, processor, template, settings)


def fit_baseline(
    name: str,
    model: nn.Module,
    processor: Any,
    samples: Sequence[EditSample],
    folder: str | os.PathLike[str],
    settings: NetworkSettings | None = None,
    training: TrainingSettings | None = None,
    template: str | None = None,
    half: bool = False,
    progress: bool = True,
) -> Baseline:
    """Fit a baseline of `FITTED` to training facts, into a folder, and open it.

    A run that was stopped goes on where its last checkpoint was, to the same end; a finished one is not
    repeated. "tp" and "wise" only note what their layer is given; the others are trained for the steps of
    `training`.

    Args:
        name, model, processor, settings, template: as in `open_baseline`; `settings.network` is not read.
        samples: training edits, with rephrases, generality and locality as far as there are; facts of the
            test must not be among them.
        folder: for network.safetensors and network.json.
        half: save in float16.

    Raises:
        ValueError: a name that is not in `FITTED`, a layer that the method cannot take, too few samples, or a
            folder that was begun with other arguments.
    """
    if name not in FITTED:
        raise ValueError(f"method={name!r} has nothing to fit. Those that have are {', '.join(FITTED)}.")
    settings = dataclasses.replace(_checked(name, settings), network=None)
    method = _made(name, model, processor, template, settings)
    assert isinstance(method, Trained)
    training = TrainingSettings() if training is None else training
    train_network(method, samples, folder, training, half, progress)
    return method


def saved_settings(name: str, folder: str | os.PathLike[str]) -> NetworkSettings:
    """The settings that a folder of `fit_baseline` was fitted with, and the folder; the others are defaults.

    Raises:
        ValueError: a name that is not in `FITTED`, or a folder without a fitted network.
    """
    if name not in FITTED:
        raise ValueError(f"method={name!r} has nothing to fit. Those that have are {', '.join(FITTED)}.")
    kind = _KINDS[name][1]
    return kind(network=folder, **shaping_of(name, folder))


def _checked(name: str, settings: Settings | None) -> Any:
    if name not in BASELINES:
        raise ValueError(f"method={name!r} is unknown. Known are {', '.join(BASELINES)}.")
    kind = _KINDS[name][1]
    if settings is None and kind is not None:
        settings = kind()
    if kind is None and settings is not None or kind is not None and not isinstance(settings, kind):
        wanted = "takes no settings" if kind is None else f"takes {kind.__name__}"
        raise ValueError(f"settings={type(settings).__name__}: {name!r} {wanted}.")
    return settings


def _made(name: str, model: nn.Module, processor: Any, template: str | None, settings: Any) -> Baseline:
    if name == "base":
        return Unedited(model, processor, template)
    if name in ("ft-l", "ft-v"):
        return FineTune(model, processor, template, settings, vision=name == "ft-v")
    return _KINDS[name][0](model, processor, template, settings)


__all__ = [
    "BASELINES",
    "FITTED",
    "Baseline",
    "FineTuneSettings",
    "GRACESettings",
    "IKESettings",
    "KESettings",
    "LiveEditSettings",
    "LoRASettings",
    "LTESettings",
    "MENDSettings",
    "RECIPESettings",
    "RetrievalSettings",
    "SERACSettings",
    "Settings",
    "TPatcherSettings",
    "TrainingSettings",
    "VisEditSettings",
    "WISESettings",
    "fit_baseline",
    "open_baseline",
    "saved_settings",
]
