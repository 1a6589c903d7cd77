"""Other ways of editing a vision-language model, on one interface, so that one command compares them all."""

from __future__ import annotations

from typing import Any

from torch import nn

from .baseline import Baseline, Unedited
from .finetune import FineTune
from .grace import GRACE
from .ike import IKE
from .lora import LoRA
from .settings import FineTuneSettings, GRACESettings, IKESettings, LoRASettings, Settings, VisEditSettings
from .visedit import VisEdit

BASELINES = ("base", "ft-l", "ft-v", "lora", "ike", "grace", "visedit")
# In the papers' tables, and not built: each needs a network of its own trained first.
NOT_BUILT = ("mend", "serac", "tp", "ke", "lte")

_SETTINGS: dict[str, type | None] = {
    "base": None, "ft-l": FineTuneSettings, "ft-v": FineTuneSettings, "lora": LoRASettings,
    "ike": IKESettings, "grace": GRACESettings, "visedit": VisEditSettings,
}  # fmt: skip


def open_baseline(
    name: str, model: nn.Module, processor: Any, settings: Settings | None = None, template: str | None = None
) -> Baseline:
    """A baseline on a model, without edits.

    Args:
        name: one of `BASELINES`.
        model: a Hugging Face VLM without adapters; it is frozen and put into eval mode.
        processor: the model's processor.
        settings: of that baseline; None takes its defaults ("visedit" has to be told its adapter).
        template: see `dualedit.models.prompting.Prompter`.

    Raises:
        ValueError: an unknown name, one that is not built yet, settings of another baseline, a model with
            adapters.
    """
    known = ", ".join(BASELINES)
    if name in NOT_BUILT:
        raise ValueError(f"method={name!r} is not implemented yet. Known are {known}.")
    if name not in BASELINES:
        raise ValueError(f"method={name!r} is unknown. Known are {known}.")
    kind = _SETTINGS[name]
    if settings is None and kind is not None:
        settings = kind()
    if kind is None and settings is not None or kind is not None and not isinstance(settings, kind):
        wanted = "takes no settings" if kind is None else f"takes {kind.__name__}"
        raise ValueError(f"settings={type(settings).__name__}: {name!r} {wanted}.")
    if name == "base":
        return Unedited(model, processor, template)
    if name in ("ft-l", "ft-v"):
        return FineTune(model, processor, template, settings, vision=name == "ft-v")
    method = {"lora": LoRA, "ike": IKE, "grace": GRACE, "visedit": VisEdit}[name]
    return method(model, processor, template, settings)


__all__ = [
    "BASELINES",
    "NOT_BUILT",
    "Baseline",
    "FineTuneSettings",
    "GRACESettings",
    "IKESettings",
    "LoRASettings",
    "Settings",
    "VisEditSettings",
    "open_baseline",
]
