"""DualEdit as a PEFT method: which layers it wraps, and `inject_dualedit`."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from peft import PeftModel
from torch import nn

from ...memory import MemoryGroup
from ...models import architectures
from ..model import EditTuner, config_from, inject, saved_config, shows_settings
from .config import DualEditConfig
from .layer import DualEditLayer, Role

# Settings of new edits alone: trained adapters may be given others than they were saved with.
_OF_NEW_EDITS = ("threshold", "refine_steps", "refine_rate", "refine_probability", "image_mass", "kv_dtype")


class DualEditModel(EditTuner):
    """Wraps the decoder layers that DualEdit's adapters write to."""

    prefix = "dualedit_"
    tuner_layer_cls = DualEditLayer
    containers = ("dualedit_adapter", "dualedit_router", "dualedit_memory")

    def _targets(self, config: DualEditConfig) -> list[str]:
        model = self.model
        names = []
        for argument in ("vis_layer", "text_layer"):
            layer = getattr(config, argument)
            if layer is not None:
                names.append(architectures.resolve_layer(model, layer, argument))
                architectures.check_image_positions(model, config.image_token_ids, layer, argument)
        return sorted(set(names))

    def _update(
        self, layer: DualEditLayer, adapter_name: str, config: DualEditConfig, group: MemoryGroup, key: str
    ) -> None:
        width = architectures.hidden_size(self.model)
        layer.update_layer(adapter_name, config, self._role(config, key), width, group)

    def _role(self, config: DualEditConfig, key: str) -> Role:
        text, vision = (
            None if layer is None else architectures.resolve_layer(self.model, layer, argument)
            for argument, layer in (("text_layer", config.text_layer), ("vis_layer", config.vis_layer))
        )
        # The decision must exist before either adapter writes: it is made at the earlier layer, which in the
        # paper's setting (16 and 19) is the text layer.
        number = {name: int(name.rpartition(".")[2]) for name in (text, vision) if name is not None}
        return Role(text=key == text, vision=key == vision, gate=key == min(number, key=number.get))


@shows_settings(DualEditConfig)
def inject_dualedit(
    model: nn.Module,
    config: DualEditConfig | None = None,
    *,
    adapter_name: str = "default",
    adapter: str | os.PathLike[str] | None = None,
    **fields: Any,
) -> PeftModel:
    """Put DualEdit's adapters into a vision-language model.

        model = inject_dualedit(model, text_layer=16, vis_layer=19)

    Args:
        model: a Hugging Face decoder-only VLM; or a `PeftModel` of one, LoRA or another editor, beside whose
            adapters this one is put.
        config: a `DualEditConfig`; or, instead, its fields by name.
        adapter_name: PEFT's name of the adapter.
        adapter: folder of trained adapters, as `save_pretrained` or `save_edits` wrote it, instead of new
            ones; layers and widths are theirs and need not be passed. The same as
            `PeftModel.from_pretrained(model, adapter)`, edits included, but for the threshold
            ("calibrated": the one that calibration found and saved with them) and how new edits are refined.
        fields: of `DualEditConfig`, where they are explained.

    Returns:
        a `PeftModel` around the same model (or the one that was passed); without stored edits it answers bit
        for bit as before. Beside adapters of its own method it is not active until
        `model.set_adapter(adapter_name)`, as PEFT has it; beside adapters of other methods it is.

    Raises:
        TypeError: a setting that does not exist.
        ValueError: a layer that does not exist, a `vis_layer` on a model without image positions, a bad
            setting, "calibrated" for adapters that nobody has calibrated, a setting that the saved adapters
            do not have. The model is left as it was.

    Source: DualEdit (COLM 2025, arXiv:2506.13638).
    """
    if adapter is None:
        return inject(model, config_from(DualEditConfig, config, fields, "inject_dualedit"), adapter_name)
    if config is not None:
        raise ValueError("config and adapter are both given: the saved adapters have a config. Leave it out.")
    return _inject_trained(model, adapter, fields, adapter_name)


def _inject_trained(
    model: nn.Module, folder: str | os.PathLike[str], fields: dict[str, Any], adapter_name: str
) -> PeftModel:
    """Saved adapters on a base model, with the settings of new edits that are asked for."""
    if isinstance(model, PeftModel):
        raise ValueError(
            f"model is a {type(model).__name__} already: pass the base model, or add the saved adapters with "
            f"model.load_adapter(folder, adapter_name)."
        )
    config = saved_config(folder, DualEditConfig)
    for name, value in fields.items():
        kept = getattr(config, name, None)
        if name not in _OF_NEW_EDITS and value != kept:
            raise ValueError(
                f"{name}={value!r}: the adapters in {os.fspath(folder)!r} have {kept!r}. Leave {name} out."
            )
    checked = replace(config, **fields)  # and resolved
    holds = any(sizes.get("edits") for sizes in (config.memory_sizes or {}).values())
    if holds and checked.kv_dtype != config.kv_dtype:
        raise ValueError(
            f"kv_dtype={checked.kv_dtype!r}: the edits in {os.fspath(folder)!r} are stored as "
            f"{config.kv_dtype!r}. Leave kv_dtype out, or pass adapters without edits."
        )
    for name in fields:
        setattr(config, name, getattr(checked, name))
    return PeftModel.from_pretrained(model, os.fspath(folder), adapter_name=adapter_name, config=config)
