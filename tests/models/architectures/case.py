"""One architecture under test: what its base model answers, and the same model with an edit stored."""

from __future__ import annotations

from functools import cached_property

import torch
from dualedit import add_edit, inject_dualedit
from dualedit.editing import Edit
from dualedit.models.architectures import IMAGE_MASK, find_decoder_layers
from dualedit.tuners.dualedit import DualEditLayer
from peft import PeftModel
from torch import Tensor, nn

from .parts import PAD, VOCAB, WORDS, Architecture, batch

NEVER = 10_000  # no token has this id: generations do not end early
NEW = 4
# Generation modes: the arguments of generate, and whether the mode takes a batch.
MODES: dict[str, tuple[dict[str, object], bool]] = {
    "greedy": ({}, True),
    "sampling": (dict(do_sample=True, top_k=1), True),
    "beams": (dict(num_beams=2, length_penalty=0.0), True),
    "no cache": (dict(use_cache=False), True),
    "static cache": (dict(cache_implementation="static"), True),
    "prompt lookup": (dict(prompt_lookup_num_tokens=2), False),
}


def logits_of(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def generated(model: nn.Module, inputs: dict[str, Tensor], mode: str) -> tuple[Tensor, Tensor]:
    """New tokens [B, NEW] and the logits [B, V] of the first of them (of the first beam)."""
    settings = dict(
        max_new_tokens=NEW, eos_token_id=NEVER, do_sample=False, pad_token_id=PAD,
        suppress_tokens=list(range(WORDS, VOCAB)),  # no model could read an image token of its own back
    ) | MODES[mode][0]  # fmt: skip
    out = model.generate(**inputs, **settings, return_dict_in_generate=True, output_logits=True)
    rows = inputs["input_ids"].shape[0]
    first = out.logits[0]
    return out.sequences[:, -NEW:], first[:: first.shape[0] // rows]


class Case:
    """An architecture's tiny model, unedited and edited. Row 0 of three is edited, the others are not.

    Attributes:
        seed: of the weights and the inputs.
        rows: three questions with a picture each, of one length.
    """

    def __init__(self, architecture: Architecture, seed: int):
        self.architecture = architecture
        self.name = architecture.name
        self.seed = seed
        generator = torch.Generator().manual_seed(self.seed)
        self.rows = [architecture.row(generator) for _ in range(3)]
        self.target = torch.randint(3, WORDS, (2,), generator=generator)
        self._base: dict[str, object] = {}

    @cached_property
    def base(self) -> nn.Module:
        """The unedited model."""
        return self.architecture.build(self.seed)

    @cached_property
    def layers(self) -> str:
        """Name of the list of decoder layers."""
        return find_decoder_layers(self.base)[0]

    @cached_property
    def edited(self) -> PeftModel:
        """Another build of the same weights, with DualEdit at layers 1 and 2 and row 0 edited."""
        self.edit, model = self.inject_and_edit(self.architecture.build(self.seed))
        return model

    def inject_and_edit(self, model: nn.Module) -> tuple[Edit, PeftModel]:
        """Put DualEdit into a model of these weights, loud enough to be heard, and store row 0."""
        model = self.inject(model)
        return add_edit(model, self.rows[0], self.target), model

    def inject(
        self,
        model: nn.Module,
        vision: bool = True,
        image_token_ids: list[int] | None = None,
        **more: object,
    ) -> PeftModel:
        """Random adapters that write loudly into the residual stream, the same for the same arguments."""
        torch.manual_seed(self.seed)
        model = inject_dualedit(
            model, text_layer=1, vis_layer=2 if vision and self.architecture.sees == "both" else None,
            mid_dim=16, num_heads=2, threshold=0.999, init_weights=False, image_token_ids=image_token_ids,
            **more,
        )  # fmt: skip
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, DualEditLayer):
                    for name, parameter in module.dualedit_adapter.named_parameters():
                        if "o_proj" in name:
                            parameter.normal_(std=2.0)
        return model

    def marked(self, row: int = 0) -> Tensor:
        """[1, P] bool: where a row's picture stands, by the ids (or the mask) of its inputs."""
        inputs = self.rows[row]
        if IMAGE_MASK in inputs:
            return inputs[IMAGE_MASK] != 0
        return torch.isin(inputs["input_ids"], torch.tensor(self.architecture.image_ids))

    def inputs(self, mode: str = "greedy") -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """A call with the edited row and one without, as far as the mode takes batches."""
        several = MODES[mode][1]
        return (batch(self.rows[:2]) if several else self.rows[0]), (
            batch(self.rows[1:]) if several else self.rows[1]
        )

    def base_generates(self, mode: str) -> list[tuple[Tensor, Tensor]] | str:
        """What the base model generates for `inputs(mode)`; where it fails, its own error in one line."""
        if mode not in self._base:
            try:
                self._base[mode] = [generated(self.base, inputs, mode) for inputs in self.inputs(mode)]
            except Exception as error:  # the base model's own: nothing of ours is in it
                text = str(error).strip().splitlines()
                self._base[mode] = f"{type(error).__name__}: {text[0] if text else ''}"
        return self._base[mode]
