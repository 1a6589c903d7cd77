"""The command `layers`: what can be edited in a model, read from its config alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .errors import first_line
from .hub import local_folder
from .loading import EMBEDDED, SMOL, is_smol

if TYPE_CHECKING:
    from torch import nn


def show(model: str) -> None:
    """Print a model's decoder layers, hidden size, image token ids, and which layers take an edit.

    Args:
        model: a folder with a config.json (weights are not read), or "embedded".

    Raises:
        ValueError: no such folder, a config that transformers does not build, or a model that cannot be
            edited.
    """
    built = _without_weights(_folder(model))
    for name, value in describe(built):
        print(f"{name:17}{value}")
    print(f"{'which of them':17}dualedit analyze --model {_analysed(model)}")


def _analysed(model: str) -> str:
    """What `dualedit analyze` calls the model, and the facts that it needs."""
    if model in EMBEDDED:
        return "toy"
    return SMOL if is_smol(Path(model)) else f"{model} --data FACTS"


def _folder(model: str) -> Path:
    if model in EMBEDDED or model == "dualedit-embedded":
        from ..toy.model import WEIGHTS

        return WEIGHTS
    folder = Path(model)
    if is_smol(folder):
        from ..smol import smol_folder

        return smol_folder()
    folder = local_folder(folder, "MODEL")
    if not (folder / "config.json").is_file():
        what = "holds no config.json" if folder.is_dir() else "is no folder"
        raise ValueError(
            f"MODEL {model} {what}: pass a local folder of a Hugging Face model, {EMBEDDED[0]} or {SMOL}."
        )
    return folder


def _without_weights(folder: Path) -> nn.Module:
    """The model of a config on the meta device: full size, no memory."""
    import torch
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForSeq2SeqLM,
    )

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        kinds = (AutoModelForImageTextToText, AutoModelForSeq2SeqLM)
        kind = next((k for k in kinds if type(config) in k._model_mapping), AutoModelForCausalLM)
        with torch.device("meta"):
            return kind.from_config(config)
    except Exception as error:  # a config may be wrong in any way, and every one is the user's to mend
        raise ValueError(
            f"{folder / 'config.json'} does not describe a model that transformers can build: "
            f"{first_line(error).rstrip('.:')}."
        ) from error


def describe(model: nn.Module) -> list[tuple[str, str]]:
    """Lines of name and value about a model, on any device.

    Raises:
        ValueError: it cannot be edited at all, with the reason.
    """
    from ..models import architectures

    path, layers = architectures.find_decoder_layers(model)
    ids = architectures.image_token_ids(model)
    whole = _allowed(model, len(layers))
    linear = _linear_names(model, path)
    return [
        ("model", f"{type(model).__name__} ({model.config.model_type})"),
        ("decoder layers", f"{path}.0 to {path}.{len(layers) - 1}"),
        ("hidden size", str(architectures.hidden_size(model))),
        ("image token ids", ", ".join(map(str, ids)) or _without_ids(model)),
        ("text_layer", _unplaced(model, "text_layer") or whole),
        ("vis_layer", _unplaced(model, "vis_layer") or whole),
        ("BalancEdit layer", "layers.N.NAME for N: NAME" if linear else "none: no linear layer to edit"),
        *((f"  {_ranges(found)}", ", ".join(names)) for found, names in linear),
    ]


def _without_ids(model: nn.Module) -> str:
    from ..models import architectures

    if not architectures.has_vision(model):
        return "none: a text-only model"
    if architectures.crosses_attention(model):
        return "none: pictures come in through cross-attention"
    if architectures.takes_image_mask(model):
        return f"none: the model's inputs have {architectures.IMAGE_MASK}"
    return "none in the config: pass image_token_ids=[...]"


def _allowed(model: nn.Module, depth: int) -> str:
    """The decoder layers that DualEdit can write to, or why there is none."""
    from ..models import architectures

    allowed, reason = [], ""
    for number in range(depth):
        try:
            architectures.resolve_layer(model, number)
            allowed.append(number)
        except ValueError as error:
            reason = reason or str(error).partition(": ")[2]
    return _ranges(allowed) if allowed else f"none: {reason}"


def _unplaced(model: nn.Module, argument: str) -> str:
    """Why the positions that this layer would edit cannot be told; empty if they can."""
    from ..models import architectures

    try:
        architectures.check_image_positions(model, None, 0, argument)
    except ValueError as error:
        return f"none: {str(error).partition(': ')[2]}"
    return ""


def _linear_names(model: nn.Module, path: str) -> list[tuple[list[int], list[str]]]:
    """Names of linear layers inside a decoder layer, by the numbers of the layers that have them."""
    having: dict[str, list[int]] = {}
    usable: dict[str, bool] = {}
    for full, module in model.named_modules():
        rest = full.removeprefix(path + ".")
        number, _, name = rest.partition(".")
        # One of several experts sees some tokens only.
        if rest == full or not hasattr(module, "in_features") or "experts" in name.split("."):
            continue
        if number not in usable:
            usable[number] = _resolves(model, full)
        if usable[number]:
            having.setdefault(name, []).append(int(number))
    grouped: dict[tuple[int, ...], list[str]] = {}
    for name, numbers in having.items():
        grouped.setdefault(tuple(numbers), []).append(name)
    return [(list(numbers), names) for numbers, names in grouped.items()]


def _resolves(model: nn.Module, name: str) -> bool:
    from ..models import architectures

    try:
        architectures.resolve_linear(model, name)
    except ValueError:
        return False
    return True


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] as "0-2, 5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
