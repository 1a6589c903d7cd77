"""Fine-tuning one layer: of the language model (FT-L) or of the vision tower (FT-V).

FT-L and FT-V are what the papers' tables (VisEdit, DualEdit) call fine-tuning the last layer of the language
model and of the vision tower. FT-L stems from ROME's comparison (Meng et al. 2022, after Zhu et al. 2020),
where an L-infinity ball around the old weights bounds each edit (`norm_constraint`), on the down projection
of one layer (EasyEdit; here `module="layers.21.mlp.down_proj"`). Departures: steps end when the answer is
likely enough instead of at a loss of 0.01, and from a tuned decoder layer upward only that part of the model
runs again at each step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..data import EditSample
from ..models.architectures import find_decoder_layers
from ..runtime.partial import Replay
from .gradient import fit
from .layers import named_module
from .settings import FineTuneSettings
from .weights import WeightEditor

_VISION = {"vision", "visual", "vit", "image"}


def vision_layers(model: nn.Module) -> list[str]:
    """Names of the vision tower's layers, first to last: those of the longest list inside it.

    Raises:
        ValueError: no list of layers stands under a name that speaks of vision.
    """
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and {token for part in name.split(".") for token in part.split("_")} & _VISION
        and all(next(child.parameters(), None) is not None for child in module)
    }
    if not lists:
        raise ValueError(
            f"{type(model).__name__} has no vision tower that can be told by its name: pass "
            f"FineTuneSettings(module=...) with the name of the module to tune."
        )
    name, layers = max(lists.items(), key=lambda item: len(item[1]))
    return [f"{name}.{i}" for i in range(len(layers))]


class FineTune(WeightEditor):
    """Adam on the weights of one module, edit after edit.

    Args:
        vision: whether `settings.module=None` means the vision tower's last layer or the decoder's.
    """

    def __init__(self, model: nn.Module, processor: Any, template: str | None, settings: FineTuneSettings,
                 vision: bool):  # fmt: skip
        super().__init__(model, processor, template)
        self.name = "ft-v" if vision else "ft-l"
        self.settings = settings
        self.vision = vision
        path, layers = find_decoder_layers(self.model)
        if settings.module is not None:
            self._modules = [named_module(self.model, settings.module)]
        else:
            # Some models take the tower's last layer but one; the first edit finds out.
            self._modules = vision_layers(self.model)[::-1] if vision else [f"{path}.{len(layers) - 1}"]
        self._decoder = path
        self._before: dict[str, Tensor] = {}

    def edit(self, sample: EditSample) -> None:
        """Tune the weights until the question is answered with the target; earlier edits may suffer."""
        if self.vision and sample.request.image_source is None:
            raise ValueError("image=None: FT-V tunes the vision tower, which this edit does not use.")
        inputs = self._lesson(sample)
        labels = inputs.pop("labels")
        logits_of = self._upward(inputs)
        name = self._tuned(logits_of)
        weights = dict(self.model.get_submodule(name).named_parameters(prefix=name))
        self._keep(list(weights))
        fit(list(weights.values()), logits_of, labels, self.settings, self._bounded(weights))

    def _upward(self, inputs: dict[str, Tensor]):
        name = self._modules[0]
        if name.startswith(self._decoder + "."):
            return Replay(self.model, inputs, int(name.removeprefix(self._decoder + ".").split(".")[0]))
        return lambda: self.model(**inputs, use_cache=False).logits

    def _tuned(self, logits_of) -> str:
        """The module that is tuned: the first candidate on which the answer depends."""
        while len(self._modules) > 1:
            weights = list(self.model.get_submodule(self._modules[0]).parameters())
            for weight in weights:
                weight.requires_grad_(True)
            with torch.enable_grad():
                reached = logits_of().requires_grad
            for weight in weights:
                weight.requires_grad_(False)
            if reached:
                break
            self._modules.pop(0)
        del self._modules[1:]
        return self._modules[0]

    def _bounded(self, weights: dict[str, nn.Parameter]):
        bound = self.settings.norm_constraint
        if bound is None:
            return None
        start = {name: weight.detach().clone() for name, weight in weights.items()}

        def clamp() -> None:
            with torch.no_grad():
                for name, weight in weights.items():
                    weight.copy_(weight.clamp(start[name] - bound, start[name] + bound))

        return clamp
