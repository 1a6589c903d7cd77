"""Baselines that are fitted to training facts once, before the first edit: how that is done and kept.

A run writes a checkpoint as it goes and goes on from it after a stop, to the same end. What it leaves is a
folder with the network and a report of what the training cost.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..data import EditSample
from ..models.architectures import check_fingerprint, fingerprint
from ..models.placement import place_of
from .baseline import Baseline
from .lessons import Lessons, lessons_of
from .network_settings import NetworkSettings
from .settings import require

NETWORK, REPORT, CHECKPOINT = "network.safetensors", "network.json", "training.pt"


@dataclass(frozen=True)
class TrainingSettings:
    """How a baseline is trained.

    Attributes:
        steps: batches of edits.
        batch_size: edits a batch; each brings a question of every kind that it has.
        learning_rate: of Adam; it falls to zero over the run along a cosine.
        keep_weight: of the loss on answers that have to stay, beside 1 for new answers.
        seed: of the questions that are drawn.
        checkpoint_every: steps between checkpoints.
    """

    steps: int = 400
    batch_size: int = 6
    learning_rate: float = 1e-3
    keep_weight: float = 1.0
    seed: int = 0
    checkpoint_every: int = 50

    def __post_init__(self) -> None:
        require(self.steps >= 0, "steps", self.steps, "pass 0 or more")
        require(self.batch_size >= 2, "batch_size", self.batch_size, "pass at least 2")
        require(self.learning_rate > 0, "learning_rate", self.learning_rate, "pass a positive number")
        require(self.keep_weight >= 0, "keep_weight", self.keep_weight, "pass 0 or more")
        require(self.checkpoint_every >= 1, "checkpoint_every", self.checkpoint_every, "pass at least 1")


class Trained(Baseline):
    """A baseline with a network of its own, beside the frozen model.

    Attributes:
        settings: with the folder of the trained network.
        network: what is trained, float32; built by `_build` and frozen once it is loaded.
        report: what the folder says of the training.
    """

    settings: NetworkSettings
    network: nn.Module

    def __init__(self, model: nn.Module, processor: Any, template: str | None, settings: NetworkSettings):
        super().__init__(model, processor, template)
        self.settings = settings
        self.report: dict[str, Any] = {}
        with torch.random.fork_rng():  # the same settings give the same network, whatever ran before
            torch.manual_seed(settings.seed)
            self.network = self._build()
        self.network.to(place_of(self.model.get_input_embeddings())[0]).requires_grad_(False).eval()
        if settings.network is not None:
            self._load(Path(settings.network))

    @property
    def training_seconds(self) -> float | None:
        """What the network's training took, once for all edits; None where that is not known."""
        return self.report.get("seconds")

    @abstractmethod
    def _build(self) -> nn.Module:
        """The untrained network for this model and these settings."""

    def prepare(self, samples: Sequence[EditSample]) -> None:
        """Whatever is read off training facts before the first step; nothing by default."""

    def training_loss(self, lessons: Lessons, keep_weight: float) -> Tensor:
        """The loss of one batch; called with gradients on.

        Raises:
            TypeError: the network has no weights to train. `fit_baseline` does not call it then.
        """
        raise TypeError(f"{type(self).__name__} has no weights to train before its edits.")

    # ------------------------------------------------------------------ files

    def _load(self, folder: Path) -> None:
        if not (folder / NETWORK).is_file():
            raise ValueError(_missing(self.name, folder))
        self.report = json.loads((folder / REPORT).read_text())
        if self.report["method"] != self.name:
            raise ValueError(
                f"network={os.fspath(folder)!r} was trained for {self.report['method']!r}, not for "
                f"{self.name!r}: pass another folder."
            )
        check_fingerprint(self.model, self.report["base_fingerprint"])
        own, saved = _told(self.settings), self.report["settings"]
        other = [key for key in own if saved.get(key) != own[key]]
        if other:
            told = "; ".join(f"{key}={saved.get(key)!r}, now {own[key]!r}" for key in other)
            raise ValueError(f"network={os.fspath(folder)!r} was trained with {told}: pass those settings.")
        weights = {key: value.float() for key, value in load_file(folder / NETWORK).items()}
        self._take(weights)

    def _take(self, weights: dict[str, Tensor]) -> None:
        """Put saved weights in place; buffers that grew in training take the saved shape."""
        for name, buffer in list(self.network.named_buffers()):
            if name in weights and weights[name].shape != buffer.shape:
                owner, _, own = name.rpartition(".")
                setattr(self.network.get_submodule(owner), own, weights[name].to(buffer))
        self.network.load_state_dict(weights)

    def save(self, folder: Path, report: dict[str, Any], half: bool) -> None:
        """Write the network and its report; the report last, so that a folder with one is whole."""
        weights = {
            key: (value.half() if half else value).contiguous().cpu()
            for key, value in self.network.state_dict().items()
        }
        save_file(weights, folder / f".{NETWORK}")
        os.replace(folder / f".{NETWORK}", folder / NETWORK)
        (folder / REPORT).write_text(json.dumps(report, indent=1) + "\n")


def shaping_of(name: str, folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The settings that a saved network was made with. Raises ValueError where there is none."""
    folder = Path(folder)
    if not (folder / NETWORK).is_file() or not (folder / REPORT).is_file():
        raise ValueError(_missing(name, folder))
    saved = json.loads((folder / REPORT).read_text())["settings"]
    return {key: tuple(value) if isinstance(value, list) else value for key, value in saved.items()}


def _told(settings: NetworkSettings) -> dict[str, Any]:
    """The settings that shape a network, as JSON holds them."""
    shaping = {key: getattr(settings, key) for key in settings.shaping}
    return json.loads(json.dumps(shaping))


def _missing(name: str, folder: Path) -> str:
    remedy = f"dualedit.baselines.fit_baseline({name!r}, model, processor, samples, folder)"
    if (folder / CHECKPOINT).is_file():
        return (
            f"network={os.fspath(folder)!r}: the training of {name!r} was stopped before its end. Call "
            f"{remedy} again with the same arguments; it goes on where it was."
        )
    return f"network={os.fspath(folder)!r} holds no trained {name!r}: train it with {remedy}."


def train_network(
    method: Trained,
    samples: Sequence[EditSample],
    folder: str | os.PathLike[str],
    training: TrainingSettings,
    half: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Train a baseline's network into a folder; a run that was stopped goes on, a finished one is left alone.

    Args:
        method: from `open_untrained`; it holds the trained network afterwards, and can edit.
        samples: training edits; each step takes the next `batch_size` of them, from the first one again after
            the last. Facts of the test must not be among them.
        half: save the network in float16.

    Returns:
        what network.json says: "method", "settings", "training", "facts", "seconds" (of the training, all
        its parts), "parameters", "loss" (mean over the last tenth of the steps) and the model's fingerprint.

    Raises:
        ValueError: fewer samples than a batch, or a folder whose training was begun with other arguments.
    """
    folder = Path(folder)
    if len(samples) < training.batch_size:
        raise ValueError(f"samples has {len(samples)} edits: pass at least batch_size={training.batch_size}.")
    told = {
        "method": method.name, "settings": _told(method.settings),
        "training": dataclasses.asdict(training), "facts": len(samples),
        "base_fingerprint": fingerprint(method.model),
    }  # fmt: skip
    told = json.loads(json.dumps(told))
    if (folder / NETWORK).is_file() and (folder / REPORT).is_file():
        report = json.loads((folder / REPORT).read_text())
        _check_same(folder, {key: report[key] for key in told}, told)
        method._load(folder)
        return report
    folder.mkdir(parents=True, exist_ok=True)
    run = _Run(method, samples, training, folder, told)
    run.go(progress)
    report = told | {
        "seconds": round(run.seconds, 1), "parameters": sum(p.numel() for p in method.network.parameters()),
        "loss": run.loss(),
    }  # fmt: skip
    method.save(folder, report, half)
    (folder / CHECKPOINT).unlink(missing_ok=True)
    method._load(folder)
    return report


def _check_same(folder: Path, began: dict[str, Any], told: dict[str, Any]) -> None:
    other = [key for key in told if began.get(key) != told[key]]
    if other:
        what = "; ".join(f"{key} {began.get(key)!r}, now {told[key]!r}" for key in other)
        raise ValueError(
            f"folder={os.fspath(folder)!r} holds a training with other arguments ({what}): pass those again, "
            f"or another folder."
        )


class _Run:
    """One training, as far as it has come."""

    def __init__(
        self, method: Trained, samples: Sequence[EditSample], training: TrainingSettings, folder: Path,
        told: dict[str, Any],
    ):  # fmt: skip
        self.method, self.samples, self.training = method, samples, training
        self.folder, self.told = folder, told
        self.step, self.seconds, self.losses = 0, 0.0, []
        self.optimizer: torch.optim.Optimizer | None = None

    def loss(self) -> float | None:
        tail = self.losses[-max(1, len(self.losses) // 10) :]
        return round(sum(tail) / len(tail), 4) if tail else None

    def go(self, progress: bool) -> None:
        began = time.perf_counter()
        method, training = self.method, self.training
        saved = self._saved()
        if saved is None:
            method.prepare(self.samples)
        else:
            method._take(saved["network"])
        method.network.requires_grad_(True).train()
        parameters = list(method.network.parameters())
        if parameters and training.steps:
            self.optimizer = torch.optim.Adam(parameters, lr=training.learning_rate)
            if saved is not None:
                self.optimizer.load_state_dict(saved["optimizer"])
        before = 0.0
        if saved is not None:
            self.step, self.losses, before = saved["step"], saved["losses"], saved["seconds"]
        try:
            steps = range(self.step, training.steps if self.optimizer else 0)
            for _ in tqdm(steps, desc=f"training {method.name}", disable=not progress, mininterval=5):
                self._one_step(parameters)
                self.seconds = before + time.perf_counter() - began
                if self.step % training.checkpoint_every == 0 and self.step < training.steps:
                    self._checkpoint()
        finally:
            method.network.requires_grad_(False).eval()
        self.seconds = before + time.perf_counter() - began

    def _one_step(self, parameters: list[nn.Parameter]) -> None:
        training = self.training
        share = self.step / training.steps
        for group in self.optimizer.param_groups:
            group["lr"] = training.learning_rate * 0.5 * (1 + math.cos(math.pi * share))
        size, count = training.batch_size, len(self.samples)
        places = [(self.step * size + i) % count for i in range(size)]
        generator = torch.Generator().manual_seed(1_000_003 * training.seed + self.step)
        lessons = lessons_of([self.samples[place] for place in places], generator)
        with torch.random.fork_rng():
            torch.manual_seed(1_000_003 * training.seed + self.step)
            with torch.enable_grad():
                loss = self.method.training_loss(lessons, training.keep_weight)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        self.optimizer.step()
        self.losses.append(float(loss.detach()))
        self.step += 1

    def _checkpoint(self) -> None:
        state = {
            "told": self.told, "network": self.method.network.state_dict(), "step": self.step,
            "optimizer": self.optimizer.state_dict(), "losses": self.losses, "seconds": self.seconds,
        }  # fmt: skip
        part = self.folder / f".{CHECKPOINT}"
        torch.save(state, part)
        os.replace(part, self.folder / CHECKPOINT)

    def _saved(self) -> dict[str, Any] | None:
        file = self.folder / CHECKPOINT
        if not file.is_file():
            return None
        saved = torch.load(file, weights_only=True)
        _check_same(self.folder, saved["told"], self.told)
        return saved
