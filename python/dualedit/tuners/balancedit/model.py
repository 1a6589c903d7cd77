"""BalancEdit as a PEFT method: which layer it wraps, and `inject_balancedit`."""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from torch import nn

from ...memory import MemoryGroup
from ...models import architectures
from ..model import EditTuner, config_from, inject, shows_settings
from .config import BalancEditConfig
from .layer import BalancEditLayer


class BalancEditModel(EditTuner):
    """Wraps the linear layer that holds BalancEdit's codebook."""

    prefix = "balancedit_"
    tuner_layer_cls = BalancEditLayer
    containers = ("balancedit_adapter", "balancedit_memory")

    def _targets(self, config: BalancEditConfig) -> list[str]:
        return [architectures.resolve_linear(self.model, config.layer, "layer")]

    def _update(
        self,
        layer: BalancEditLayer,
        adapter_name: str,
        config: BalancEditConfig,
        group: MemoryGroup,
        key: str,
    ) -> None:
        width = architectures.hidden_size(self.model) if config.key == "pooled" else None
        layer.update_layer(adapter_name, config, group, width)
        layer.runtime.watch(*architectures.layer_around(self.model, layer.layer_name))


@shows_settings(BalancEditConfig)
def inject_balancedit(
    model: nn.Module,
    config: BalancEditConfig | None = None,
    *,
    adapter_name: str = "default",
    **fields: Any,
) -> PeftModel:
    """Put BalancEdit's codebook at one linear layer of a vision-language model.

        model = inject_balancedit(model, layer="layers.20.mlp.up_proj")

    Args:
        model: a Hugging Face decoder-only VLM; or a `PeftModel` of one, beside whose adapters this one is
            put.
        config: a `BalancEditConfig`; or, instead, its fields by name.
        adapter_name: PEFT's name of the adapter.
        fields: of `BalancEditConfig`, where they are explained; `layer` is needed.

    Returns:
        a `PeftModel` around the same model (or the one that was passed); without stored edits it answers bit
        for bit as before. Beside adapters of its own method it is not active until
        `model.set_adapter(adapter_name)`, as PEFT has it; beside adapters of other methods it is.

    Raises:
        TypeError: a setting that does not exist.
        ValueError: no such layer, or a bad setting. The model is left as it was.

    Source: BalancEdit (ICML 2025, arXiv:2505.01343).
    """
    config = config_from(BalancEditConfig, config, fields, "inject_balancedit")
    return inject(model, config, adapter_name)
