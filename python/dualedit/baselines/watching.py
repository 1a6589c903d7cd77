"""What one forward of a base model is about: which columns are prompt, which are image, whether it begins."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..models.architectures import image_token_ids


class Watch:
    """The sequence that a model is running: its prompt, from the forward that reads it, and what was decided.

    Attributes:
        begins: whether the running forward reads the prompt; False for the later steps of an answer.
        attended: [R, L] bool, the columns that are no padding.
        prompt: [R, L] bool, the columns of the prompt: those without an answer that teacher forcing gives.
        image: [R, L] bool, those of them that hold image features.
        ids: [R, L] int64, the input ids.
        decided: what a method decides at the prompt and keeps for the answer; None as a prompt begins.
    """

    def __init__(self, model: nn.Module):
        self._image_ids = torch.tensor(image_token_ids(model), dtype=torch.int64)
        self.begins = True
        self.attended: Tensor
        self.prompt: Tensor
        self.image: Tensor
        self.ids: Tensor
        self.decided: Any = None

    @property
    def last(self) -> Tensor:
        """[R] int64, the column of each prompt's last token."""
        columns = torch.arange(self.prompt.shape[1], device=self.prompt.device)
        return (self.prompt * columns).argmax(1)

    def _note(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        past = kwargs.get("past_key_values")
        self.ids = kwargs["input_ids"] if kwargs.get("input_ids") is not None else args[0]
        self.begins = past is None or past.get_seq_length() == 0
        if not self.begins:
            return
        self.decided = None
        mask = kwargs.get("attention_mask")
        self.attended = torch.ones_like(self.ids, dtype=torch.bool) if mask is None else mask.bool()
        labels = kwargs.get("labels")
        self.prompt = self.attended if labels is None else self.attended & (labels == -100)
        self.image = image_columns(self.ids, self._image_ids) & self.prompt


def image_columns(ids: Tensor, image_ids: Tensor) -> Tensor:
    """[R, L] bool, where image features stand among input ids [R, L]."""
    return torch.isin(ids, image_ids.to(ids.device))


@contextmanager
def watching(model: nn.Module) -> Iterator[Watch]:
    """Inside the block, a `Watch` of whatever the model runs."""
    watch = Watch(model)
    handle = model.register_forward_pre_hook(watch._note, with_kwargs=True)
    try:
        yield watch
    finally:
        handle.remove()


def mean_over(states: Tensor, columns: Tensor) -> Tensor:
    """[R, D] float32 mean of states [R, L, D] over columns [R, L] bool; zero where there are none."""
    weight = columns.to(states.device).float()
    total = torch.einsum("rl,rld->rd", weight, states.float())
    return total / weight.sum(1, keepdim=True).clamp(min=1)


def first_of(output: Any) -> Tensor:
    """The hidden states of what a layer returns."""
    return output[0] if isinstance(output, tuple) else output


def with_first(output: Any, hidden: Tensor) -> Any:
    """What a layer returns, with other hidden states."""
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden
