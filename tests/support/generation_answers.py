"""How the tests of generation ask: a fixed number of tokens, and a plain model beside the edited one."""

from __future__ import annotations

import torch
from tiny_models import IMAGE, PAD, VIDEO, Family, editor_of, row_of, store
from torch import Tensor, nn

NEVER = 10_000  # no token has this id: generations do not end early
NEW = 6


def generate(model: nn.Module, inputs: dict, new: int = NEW, **more: object) -> Tensor:
    """The generated tokens [B, new], greedy unless `more` says otherwise."""
    settings = dict(
        max_new_tokens=new,
        min_new_tokens=new,
        eos_token_id=NEVER,
        do_sample=False,
        pad_token_id=PAD,
        # Read back without a cache, a generated image token would have no image.
        suppress_tokens=[IMAGE, VIDEO],
    )
    out = model.generate(**inputs, **(settings | more))
    return (out if isinstance(out, Tensor) else out.sequences)[:, -new:]


def first_logits(model: nn.Module, inputs: dict, **more: object) -> Tensor:
    """Logits [B, V] of the first generated token: two answers can agree by chance, these cannot."""
    more = {"return_dict_in_generate": True, "output_logits": True, "max_new_tokens": 1, **more}
    return model.generate(**inputs, do_sample=False, pad_token_id=PAD, **more).logits[0]


def edited_pair(
    family: Family, method: str, generator: torch.Generator, hit: tuple[int, ...] = (1,), rows: int = 3
) -> tuple[nn.Module, nn.Module, dict]:
    """A plain model, the same with an edit for each row in `hit`, and the batch of questions [rows, P]."""
    base, model = family.build(), editor_of(family, method)
    inputs = family.questions(rows, generator)
    for row in hit:
        store(model, row_of(inputs, row), generator)
    return base, model, inputs


def text_only(inputs: dict) -> dict:
    """The same call without its pixels."""
    return {name: value for name, value in inputs.items() if name not in ("pixel_values", "image_grid_thw")}


def longer(inputs: dict, tokens: Tensor) -> dict:
    """The call for a whole conversation: `tokens` [B, T] behind what was asked, pixels included."""
    more = dict(inputs)
    more["input_ids"] = torch.cat([inputs["input_ids"], tokens], dim=1)
    more["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(tokens)], dim=1)
    if "mm_token_type_ids" in inputs:
        more["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(tokens)], dim=1)
    return more


def note_decisions(layer) -> list:
    """What a wrapped layer decides from here on, beforehand or while it edits: a list that grows."""
    noted = []

    def noting(decide):
        def note(*args):
            result = decide(*args)
            name, forward = next(arg for arg in args if isinstance(arg, str)), args[-1]
            noted.append(forward.sequence.decisions[layer.groups[name]])
            return result

        return note

    for way in ("_decide", "_decide_and_write"):
        if hasattr(type(layer), way):
            setattr(layer, way, noting(getattr(layer, way)))
    return noted
