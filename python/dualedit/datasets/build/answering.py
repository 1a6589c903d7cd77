"""The unedited model as the builder asks it: answers, and pictures as vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...models.architectures import find_decoder_layers, fingerprint, unwrap
from ...models.images import ImageSource, open_image
from ...models.placement import to_device
from ...models.prompting import Prompter
from ...runtime.partial import leaving
from ...runtime.sequence import describe_prompt, mean_state

_BATCH = 8


class Answerer:
    """Asks a model, greedily.

    Args:
        model: a Hugging Face vision-language model.
        processor: of the model.
        template: as in `Prompter`.
        new_tokens: of an answer at most.
    """

    def __init__(self, model: nn.Module, processor: Any, template: str | None = None, new_tokens: int = 20):
        self.model, self.prompter, self.new_tokens = (
            unwrap(model).eval(),
            Prompter(processor, template),
            new_tokens,
        )
        self.settings = f"{fingerprint(self.model)} {self.prompter.digest} {new_tokens}"

    @torch.no_grad()
    def answers(self, questions: Sequence[tuple[ImageSource, str]]) -> list[str]:
        """What the model answers to (image, question) pairs."""
        found: list[str] = []
        for start in range(0, len(questions), _BATCH):
            some = [(open_image(image), prompt) for image, prompt in questions[start : start + _BATCH]]
            inputs = to_device(self.prompter.inputs(some), self.model)
            out = self.model.generate(  # type: ignore[operator]
                **inputs, max_new_tokens=self.new_tokens, do_sample=False
            )
            new = out[:, inputs["input_ids"].shape[1] :]
            found += [t.strip() for t in self.prompter.tokenizer.batch_decode(new, skip_special_tokens=True)]
        return found

    @torch.no_grad()
    def vectors(self, images: Sequence[ImageSource]) -> Tensor:
        """Unit vectors [N, D] of pictures: the mean image token of the model's own vision tower, as it enters
        the decoder.

        Raises:
            ValueError: the model's pictures do not enter its decoder as tokens.
        """
        from ...models.architectures import IMAGE_MASK, image_token_ids

        first = find_decoder_layers(self.model)[1][0]
        found = []
        for start in range(0, len(images), _BATCH):
            some = [open_image(image) for image in images[start : start + _BATCH]]
            inputs = to_device(self.prompter.inputs([(image, "?") for image in some]), self.model)
            entering: list[Tensor] = []

            def note(module: nn.Module, args: tuple, kwargs: dict, entering: list = entering) -> None:
                entering.append(args[0] if args else kwargs["hidden_states"])

            handle = first.register_forward_pre_hook(note, with_kwargs=True)
            try:
                with leaving(first, before=True):
                    self.model(**inputs, use_cache=False)
            finally:
                handle.remove()
            ids = inputs["input_ids"]
            prompt = describe_prompt(
                ids, inputs.get("attention_mask"), None, image_token_ids(self.model), tuple(ids.shape),
                ids.device, inputs.get(IMAGE_MASK),
            )  # fmt: skip
            if prompt.image is None or not bool(prompt.image.any()):
                raise ValueError(
                    f"{type(self.model).__name__} holds no image tokens in its decoder, so that pictures "
                    "cannot be compared by its vision tower."
                )
            found.append(nn.functional.normalize(mean_state(entering[0], prompt.image), dim=-1).cpu())
        return torch.cat(found)
