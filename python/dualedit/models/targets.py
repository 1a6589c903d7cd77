"""An answer's tokens behind the inputs of a prompt."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

# Tensors over patches or over a Q-Former's own tokens, which may happen to be as long as the prompt.
_OTHER_SEQUENCES = ("input_ids", "pixel_", "qformer_")


def append_target(inputs: Mapping[str, Tensor], target_ids: Tensor, token_type: int = 0) -> dict[str, Tensor]:
    """The inputs of a prompt with the target's tokens behind it, and labels for them.

    Args:
        inputs: what a processor returns for one prompt; `input_ids` [1, P] without padding.
        target_ids: [T] or [1, T] int64.
        token_type: what marks the target's tokens in token types (`architectures.target_token_type`).

    Raises:
        ValueError: no input ids, more than one row, or an empty target.
    """
    ids = inputs.get("input_ids")
    if ids is None or ids.ndim != 2 or ids.shape[0] != 1:
        shape = None if ids is None else tuple(ids.shape)
        raise ValueError(f"inputs['input_ids'] has shape {shape}: pass one prompt of shape [1, P].")
    target = target_ids.reshape(1, -1).to(ids)
    if target.shape[1] == 0:
        raise ValueError("target_ids is empty: an edit needs an answer of at least one token.")
    full = dict(inputs)
    for name, value in inputs.items():
        if not isinstance(value, Tensor) or name.startswith(_OTHER_SEQUENCES):
            continue
        if value.shape == ids.shape:
            # The target is attended text: attention masks continue with 1, masks of pictures with 0.
            more = 1 if "attention" in name else token_type if name == "token_type_ids" else 0
            full[name] = torch.cat([value, torch.full_like(target, more).to(value)], dim=1)
        elif value.shape[:2] == ids.shape and "attention_mask" in name:
            # Which pictures each token sees (Mllama, Idefics): the target sees what the last token saw.
            full[name] = torch.cat([value, value[:, -1:].repeat_interleave(target.shape[1], 1)], dim=1)
    full["input_ids"] = torch.cat([ids, target], dim=1)
    full["labels"] = torch.cat([torch.full_like(ids, -100), target], dim=1)
    return full
