"""Checkpoints of a training run: whole or not there, and enough to go on exactly where it stopped.

A checkpoint is one file: the adapters' weights, the optimizer's state, the step (from which schedule and
order of the edits follow), the random generators, the best held-out loss, and its settings. The
frozen model is not in it. Weights that FSDP has cut up are put together first, so that a run may go on with
another number of processes.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_NAME = re.compile(r"step-(\d+)\.pt")
_FORMAT = 2


@dataclass(frozen=True)
class Checkpoint:
    """What a run needs to go on.

    Attributes:
        step: optimiser steps done.
        weights: of the adapters, by name.
        optimizer: of each weight, by name: AdamW's state.
        random: states of the random generators of each process.
        best: (step, held-out loss) of the best adapters so far, or None.
        recipe: the settings, by name.
        samples: fingerprint of the training edits.
        model: fingerprint of the frozen model.
    """

    step: int
    weights: dict[str, Tensor]
    optimizer: dict[str, dict[str, Tensor]]
    random: list[dict[str, Any]]
    best: tuple[int, float] | None
    recipe: dict[str, Any]
    samples: str
    model: dict[str, Any]


def full(tensor: Tensor) -> Tensor:
    """A copy on the CPU, put together from its pieces where FSDP has cut it up (all processes take part)."""
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach().to("cpu", copy=True)


def weights_of(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Copies of parameters, by name."""
    return {name: full(parameter) for name, parameter in parameters.items()}


def optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> dict[str, dict[str, Tensor]]:
    """Copies of an optimizer's state, by the parameters' names."""
    return {
        name: {key: full(torch.as_tensor(value)) for key, value in optimizer.state[parameter].items()}
        for name, parameter in parameters.items()
        if parameter in optimizer.state
    }


def _like(value: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, cut up and placed as a parameter is."""
    if value.ndim == 0:
        return value.clone()  # AdamW's count of steps
    value = value.to(parameter.device, copy=True)
    if not hasattr(parameter, "placements"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, parameter.device_mesh, parameter.placements)


def restore(
    checkpoint: Checkpoint, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    """Put a checkpoint's weights and optimizer state into a run.

    Raises:
        ValueError: the weights have other names or shapes.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    saved = {name: tuple(tensor.shape) for name, tensor in checkpoint.weights.items()}
    if shapes != saved:
        differs = sorted(name for name in shapes.keys() | saved.keys() if shapes.get(name) != saved.get(name))
        raise ValueError(
            f"The checkpoint's adapters have other layers or sizes than this run's: {differs[0]} is "
            f"{saved.get(differs[0])} there and {shapes.get(differs[0])} here. Use the settings of that run."
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(_like(checkpoint.weights[name], parameter))
    for name, state in checkpoint.optimizer.items():
        optimizer.state[parameters[name]] = {
            key: _like(value, parameters[name]) for key, value in state.items()
        }


def random_state() -> dict[str, Any]:
    """The states of Python's and PyTorch's random generators in this process."""
    version, numbers, gauss = random.getstate()
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": [version, list(numbers), gauss]}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Undo what has been drawn since `random_state`."""
    torch.set_rng_state(state["torch"])
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = {
        int(match[1]): file for file in folder.glob("step-*.pt") if (match := _NAME.fullmatch(file.name))
    }
    return [found[step] for step in sorted(found)]


def write_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write a checkpoint, whole or not at all, and remove the oldest beyond `keep`."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"step-{checkpoint.step:08d}.pt"
    part = folder / f".writing-{os.getpid()}"
    try:
        with part.open("wb") as opened:
            torch.save({"format": _FORMAT, **vars(checkpoint)}, opened)
            opened.flush()
            os.fsync(opened.fileno())
        os.replace(part, file)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    for old in checkpoints(folder)[:-keep]:
        old.unlink()
    for left in folder.glob(".writing-*"):
        left.unlink(missing_ok=True)  # of a run that was killed while writing
    return file


def read_checkpoint(file: Path) -> Checkpoint:
    """A checkpoint's content, on the CPU.

    Raises:
        ValueError: the file is damaged, or of a later version of this library.
    """
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{file} is damaged ({' '.join(str(error).split())[:120]}): delete it, and the run goes on from "
            "the one before."
        ) from error
    if content.pop("format", None) != _FORMAT:
        raise ValueError(f"{file} was written by another version of this library; it cannot be read here.")
    return Checkpoint(**content)
