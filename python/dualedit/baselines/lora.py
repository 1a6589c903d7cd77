"""LoRA (Hu et al. 2022) through peft: a low-rank change of the decoder's attention, tuned at each edit.

The adapter is injected at the first edit and taken out by `reset`, so that the model is then the very one
that it was. Departure from how peft is used for training: a single question is fitted, until its answer is
likely enough.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from ..data import EditSample
from ..models.architectures import find_decoder_layers
from ..runtime.partial import Replay
from .baseline import Baseline
from .gradient import fit
from .settings import LoRASettings


class LoRA(Baseline):
    """One adapter for all edits, tuned on each in turn."""

    name = "lora"

    def __init__(self, model: nn.Module, processor: Any, template: str | None, settings: LoRASettings):
        super().__init__(model, processor, template)
        self.settings = settings
        path, _ = find_decoder_layers(self.model)
        linear = [
            name
            for name, module in self.model.named_modules()
            if name.startswith(path + ".")
            and hasattr(module, "in_features")
            and hasattr(module, "out_features")
        ]
        named = [name for name in linear if name.rpartition(".")[2] in settings.targets]
        self._targets = named or linear
        self._first = min(int(name.removeprefix(path + ".").split(".")[0]) for name in self._targets)
        self._peft: PeftModel | None = None

    def _inject(self) -> PeftModel:
        config = LoraConfig(
            r=self.settings.rank, lora_alpha=self.settings.scale * self.settings.rank,
            target_modules=self._targets, lora_dropout=0.0,
        )  # fmt: skip
        with torch.random.fork_rng():  # the same edit gives the same adapter, whatever ran before
            torch.manual_seed(self.settings.seed)
            return get_peft_model(self.model, config).eval()

    def _weights(self) -> list[nn.Parameter]:
        return [weight for name, weight in self.model.named_parameters() if "lora_" in name]

    def edit(self, sample: EditSample) -> None:
        """Tune the adapter until the question is answered with the target; earlier edits may suffer."""
        inputs = self._lesson(sample)
        labels = inputs.pop("labels")
        if self._peft is None:
            self._peft = self._inject()
        fit(self._weights(), Replay(self.model, inputs, self._first), labels, self.settings)

    def reset(self) -> None:
        """Take the adapter out of the model."""
        if self._peft is not None:
            self._peft.unload()
            self._peft = None
            self.model.__dict__.pop("peft_config", None)  # peft would warn of a second adapter

    @contextmanager
    def unedited(self) -> Iterator[None]:
        """The adapter is off inside."""
        if self._peft is None:
            yield
        else:
            try:
                with self._peft.disable_adapter():
                    yield
            finally:
                self.model.requires_grad_(False)  # peft makes an adapter that it enables trainable

    def memory_bytes(self) -> int:
        """The adapter's weights; 0 without an edit."""
        return sum(weight.nbytes for weight in self._weights())
