"""Where the answer position looks, layer by layer: text, image tokens, the three image tokens most looked at.

DualEdit (COLM 2025), Figure 1. The last prompt token, whose state becomes the answer's first token, looks at
the prompt with every head; heads are averaged. A layer's matrix is read while the layer runs and dropped with
it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..models.architectures import find_decoder_layers, unwrap
from .asking_layers import Questions

TOP = 3


@contextmanager
def eager_attention(model: nn.Module) -> Iterator[None]:
    """Inside the block, a model computes attention in plain PyTorch, whose weights can be seen."""
    model = unwrap(model)
    configs = {id(part.config): part.config for part in model.modules() if isinstance(part, PreTrainedModel)}
    before = [(config, config._attn_implementation) for config in configs.values()]
    try:
        model.set_attn_implementation("eager")
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation = implementation


@torch.no_grad()
def read_attention(model: nn.Module, questions: Questions) -> list[Tensor | None]:
    """Attention [B, L] float32 from the last prompt token, mean over heads, for each decoder layer.

    None for a layer without attention over the sequence (linear attention, cross-attention).
    """
    model = unwrap(model)
    layers = find_decoder_layers(model)[1]
    found: list[Tensor | None] = [None] * len(layers)
    length = questions.prompt.length
    rows = torch.arange(questions.size)

    def note(number: int, output: Any) -> None:
        if found[number] is not None or not isinstance(output, (tuple, list)):
            return
        for part in output[1:]:
            if isinstance(part, Tensor) and part.ndim == 4 and part.shape[-2:] == (length, length):
                last = part[rows, :, questions.prompt.last.to(rows.device)].float().mean(1)
                if bool((last.sum(1) - 1).abs().max() < 1e-2):  # or it is something else of this shape
                    found[number] = last.cpu()
                    return

    with eager_attention(model), ExitStack() as hooks:
        for number, layer in enumerate(layers):
            for module in layer.modules():
                handle = module.register_forward_hook(lambda m, a, output, n=number: note(n, output))
                hooks.callback(handle.remove)
        model(**questions.inputs, use_cache=False)
    return found


def shares(attention: Tensor, questions: Questions) -> list[dict[str, float]]:
    """What one layer's attention [B, L] goes to, question by question.

    Returns:
        "text" and "image": share of all attention; "first": of the first prompt token, which most models use
        to look at nothing; "text_token", "image_token", "top_image_tokens": share of one token, on average,
        the last of the three image tokens with the most. NaN without a picture.
    """
    found = []
    for row in range(questions.size):
        text, image = (questions.positions(group)[row].cpu() for group in ("text", "image"))
        looked, shown = attention[row], attention[row][image]
        there = len(shown) > 0
        found.append(
            {
                "text": float(looked[text].sum()),
                "image": float(shown.sum()) if there else math.nan,
                "first": float(looked[text | image][0]),
                "text_token": float(looked[text].mean()),
                "image_token": float(shown.mean()) if there else math.nan,
                "top_image_tokens": float(shown.topk(min(TOP, len(shown))).values.mean())
                if there
                else math.nan,
            }
        )
    return found


def heat_map(
    attention: Tensor, questions: Questions, row: int, aspect: float = 1.0
) -> list[list[float]] | None:
    """A row's attention to its image tokens as a grid, top line first; None where they make no grid.

    Args:
        attention: [B, L] of one layer.
        aspect: width / height of the picture; of the grids with this number of tokens the nearest is taken.
    """
    shown = attention[row][questions.positions("image")[row].cpu()]
    count = len(shown)
    grids = [(h, count // h) for h in range(1, count + 1) if count % h == 0]
    if not grids:
        return None
    height, width = min(grids, key=lambda grid: abs(math.log(grid[1] / grid[0] / aspect)))
    if max(height, width) > 4 * min(height, width) * max(aspect, 1 / aspect):
        return None
    return [[round(float(v), 6) for v in line] for line in shown.reshape(height, width)]
