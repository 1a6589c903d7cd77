"""A batch of sequences as an editor sees it: its prompt, the image in it, and what was decided about it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Prompt:
    """The prompt of B sequences of P columns (padding and, when scoring, target columns included).

    Attributes:
        text: [B, P] bool, prompt tokens that are not image content (or padding).
        image: [B, P] bool, prompt tokens that stand for image content; None when nothing says where they are
            (no input ids, or a model without ids for pictures).
        last: [B] int64, column of the last prompt token.
        last_input: [B] int64, column of the last input token; differs from `last` only when a target follows.
    """

    text: Tensor
    image: Tensor | None
    last: Tensor
    last_input: Tensor

    @property
    def length(self) -> int:
        """Columns P."""
        return self.text.shape[1]

    def prompt(self) -> Tensor:
        """[B, P] bool: every prompt token, text or image."""
        return self.text if self.image is None else self.text | self.image


def mean_state(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean [B, D] of hidden [B, L, D] over mask [B, L], summed in float32; zero where the mask is empty."""
    mask = mask.to(hidden.device).unsqueeze(-1)
    total = hidden.float().masked_fill(~mask, 0.0).sum(dim=1)  # not times zero: padding may hold NaN
    return total / mask.sum(dim=1).clamp(min=1)


def last_true(mask: Tensor) -> Tensor:
    """Column [B] of the last True of each row [B, P]; 0 where there is none."""
    columns = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    return (mask * columns).argmax(dim=1)


def describe_prompt(
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    labels: Tensor | None,
    image_ids: list[int],
    shape: tuple[int, int],
    device: torch.device,
    image_mask: Tensor | None = None,
) -> Prompt:
    """Sort the columns of a batch into text, image, target and padding.

    Args:
        input_ids: [B, P] or None (the caller passed embeddings): then the image positions stay unknown.
        attention_mask: [B, P] with 0 at padding; anything that is not 2-D (a ready-made 4-D mask) is read as
            "no padding".
        labels: [B, P] with -100 at prompt tokens: the prompt ends before the first other label. None: all
            prompt.
        image_ids: ids of image content.
        shape: (B, P).
        image_mask: [B, P], not 0 at image content, where the model's own inputs say so
            (`architectures.IMAGE_MASK`); it goes before the ids.
    """
    attended = torch.ones(shape, dtype=torch.bool, device=device)
    if attention_mask is not None and attention_mask.ndim == 2:
        attended = attention_mask[:, -shape[1] :].to(device) != 0
    prompt = attended
    if labels is not None and labels.shape == shape:
        prompt = attended & ((labels.to(device) != -100).cumsum(1) == 0)
    image = None
    if image_mask is not None and image_mask.shape == shape:
        image = (image_mask.to(device) != 0) & prompt
    elif input_ids is not None and image_ids:
        ids = torch.tensor(image_ids, dtype=input_ids.dtype, device=input_ids.device)
        image = torch.isin(input_ids, ids).to(device) & prompt
    text = prompt if image is None else prompt & ~image
    return Prompt(text=text, image=image, last=last_true(prompt), last_input=last_true(attended))


@dataclass
class Sequence:
    """A batch of sequences from prefill to its last token: the prompt and what was decided about it.

    `mean_image` [B, D] float32: the mean image token as it entered the decoder, once somebody asked for it.
    """

    prompt: Prompt
    decisions: dict[Any, Any] = field(default_factory=dict)
    mean_image: Tensor | None = None

    def new_ticket(self) -> Tensor:
        """An empty tensor that carries the sequence: what a cache keeps, and a compiled graph can hand on."""
        ticket = torch.empty(0)
        ticket.sequence = self
        return ticket

    def __deepcopy__(self, memo):
        # A copied cache continues the same text with the same decisions; the tensors are never written to.
        return Sequence(self.prompt, dict(self.decisions), self.mean_image)


def _expand(rows: Tensor, batch: int, what: str) -> Tensor:
    """Repeat rows as generation does for beams and several returned sequences."""
    if rows.shape[0] == batch:
        return rows
    if batch % rows.shape[0]:
        raise ValueError(
            f"{what} was decided for {rows.shape[0]} sequences and this call has {batch}: the cache "
            f"belongs to another batch. Pass the cache that this batch was prefilled with."
        )
    return rows.repeat_interleave(batch // rows.shape[0], dim=0)


@dataclass
class ForwardPass:
    """One call of the decoder stack: columns [start, start + length) of a sequence, for B rows.

    `entering`: [B, length, D], what the stack is given; None where that is token ids.
    """

    sequence: Sequence
    start: int
    batch: int
    length: int
    entering: Tensor | None = None

    @property
    def in_prompt(self) -> bool:
        """Whether any column of this pass belongs to the prompt."""
        return self.start < self.sequence.prompt.length

    def columns(self, mask: Tensor) -> Tensor:
        """The part [B, length] of a prompt mask [B0, P] that this pass holds; False behind the prompt."""
        part = _expand(mask, self.batch, "The prompt")[:, self.start : self.start + self.length]
        return nn.functional.pad(part, (0, self.length - part.shape[1]))

    def position(self, column: Tensor) -> Tensor:
        """Where columns [B0] of the sequence lie in this pass, as [B]; negative: in the cache."""
        return _expand(column, self.batch, "The prompt") - self.start

    def mean_image(self) -> Tensor | None:
        """Mean image token [B, D] float32 as it enters the decoder: of this pass, or of an earlier turn where
        this one shows no image; zero where none does. None where there are no images.

        Raises:
            ValueError: there are images, and the decoder is given token ids.
        """
        image, earlier = self.sequence.prompt.image, self.sequence.mean_image
        if image is None:
            return earlier
        if self.entering is None:
            if bool(self.columns(image).any()):
                raise ValueError(
                    "The decoder layers of this model are given token ids, so what its image tokens look "
                    "like before them is not known, and key='pooled' cannot be made. Use key='last'."
                )
            return earlier
        mask = self.columns(image).to(self.entering.device)
        found = mean_state(self.entering.detach(), mask)
        if earlier is not None:
            found = torch.where(mask.any(1, keepdim=True), found, _expand(earlier, self.batch, "The picture"))
        self.sequence.mean_image = found
        return found

    def prompt(self) -> Prompt:
        """The prompt of the columns of this pass, masks [B, length]; a last token in the cache shows as 0."""
        whole = self.sequence.prompt
        image = None if whole.image is None else self.columns(whole.image)
        last, last_input = (self.position(c).clamp(min=0) for c in (whole.last, whole.last_input))
        return Prompt(self.columns(whole.text), image, last, last_input)

    def decision_rows(self, rows: Tensor) -> Tensor:
        """A decision [B0] for the rows of this pass [B]."""
        return _expand(rows, self.batch, "The route")
