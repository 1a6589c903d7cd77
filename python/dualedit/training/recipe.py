"""The settings of a training run of DualEdit's adapters: one dataclass, one YAML file."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

PRECISIONS = ("auto", "bf16", "fp32")
SCHEDULES = ("constant", "cosine", "linear")
TERMS = (
    "reliability", "text_generality", "image_generality", "text_locality", "image_locality", "hard_locality",
)  # fmt: skip


def _about(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Recipe:
    """Settings of `dualedit train`; the defaults are the paper's (DualEdit, COLM 2025, for LLaVA-1.5).

    What the paper leaves open is the published code's choice where it has one: a constant learning rate and
    token means. Weight decay and clipping are off by default, as neither names them.
    """

    model: str | None = _about(None, "Folder of a Hugging Face vision-language model, or 'embedded'.")
    data: str | None = _about(None, "File with training edits, or 'embedded'.")
    format: str = _about("auto", "Format of the data files: auto, evqa, eic, vlkeb, mmke, okedit or jsonl.")
    image_root: str | None = _about(None, "Folder that image paths start from; several with : between them.")
    prompt_template: str | None = _about(
        None, "How a data set's questions are worded; see dualedit.datasets."
    )
    template: str | None = _about(
        None, "Text around a question, with {prompt}, instead of the chat template."
    )
    limit: int | None = _about(None, "Read at most this many edits.")
    skip_bad: bool = _about(False, "Leave bad rows out instead of stopping.")
    held_out: str | None = _about(None, "File with held-out edits for the best checkpoint.")
    held_out_edits: int | None = _about(
        None, "Held-out edits, from the end of the data if there is no file; null for 64, at most a tenth."
    )
    adapters: str | None = _about(
        None, "Folder of trained adapters to begin with; layers and widths are theirs."
    )
    text_layer: int | str | None = _about(16, "Decoder layer whose text positions are edited; null for none.")
    vis_layer: int | str | None = _about(19, "Decoder layer whose image positions are edited; null for none.")
    mid_dim: int = _about(1024, "Width of the adapters' attention.")
    num_heads: int = _about(8, "Attention heads; divides mid_dim.")
    threshold: float = _about(0.8, "tau that the adapters are saved with; calibrate it afterwards.")
    copying: int = _about(
        0, "Random tokens that the text adapter learns to write in closed form before step 0; 0 for none."
    )
    learning_rate: float = _about(1e-4, "Of AdamW.")
    batch_size: int = _about(4, "Edits in an optimiser step, over all processes.")
    accumulate: int = _about(1, "Parts in which a process works through its share of a batch.")
    steps: int = _about(50_000, "Optimiser steps.")
    shuffle: bool = _about(True, "Take the edits in a new order each time they have all come.")
    schedule: str = _about("constant", "Learning rate after the warmup: constant, cosine or linear.")
    warmup: int = _about(0, "Steps in which the learning rate rises from 0.")
    weight_decay: float = _about(0.0, "Of AdamW.")
    beta1: float = _about(0.9, "Of AdamW.")
    beta2: float = _about(0.999, "Of AdamW.")
    grad_clip: float | None = _about(None, "Largest norm of the gradient; null for no limit.")
    reliability: float = _about(1.0, "Weight of the edit's own question.")
    text_generality: float = _about(1.0, "Weight of other wordings.")
    image_generality: float = _about(1.0, "Weight of other images.")
    text_locality: float = _about(1.0, "Weight of the KL on questions without an image.")
    image_locality: float = _about(1.0, "Weight of the KL on questions about other images.")
    hard_locality: float = _about(
        0.0, "Weight of the KL on look-alikes and other questions about the same image; 0 leaves them out."
    )
    by_difficulty: bool = _about(
        False, "Weigh each token of a new answer by how wrong it still is (focal loss)."
    )
    precision: str = _about("auto", "bf16, fp32 or auto (bf16 on a GPU). The adapters stay in fp32.")
    pack: bool = _about(True, "Read an image once for all questions about it, where the model can.")
    keep_gib: float = _about(
        0.0,
        "Main memory (GiB) for what the frozen layers make of each question, so that they run once; 0: none.",
    )
    recompute: bool = _about(False, "Compute the layers again in backward: less memory, more time.")
    seed: int = _about(0, "Of the adapters' start, the order of the edits and the choice of questions.")
    checkpoint_every: int = _about(1000, "Steps between checkpoints.")
    keep_checkpoints: int = _about(2, "Checkpoints that are kept, the newest.")
    evaluate_every: int = _about(1000, "Steps between measurements of the held-out loss.")
    log_every: int = _about(10, "Steps between lines of metrics.jsonl.")
    tensorboard: bool = _about(False, "Write the metrics for TensorBoard too.")

    def __post_init__(self):
        for name in ("batch_size", "accumulate", "steps", "checkpoint_every", "keep_checkpoints",
                     "evaluate_every", "log_every", "mid_dim", "num_heads"):  # fmt: skip
            _require(getattr(self, name) >= 1, name, getattr(self, name), "pass a whole number from 1 up")
        for name in ("weight_decay", "warmup", "held_out_edits", "keep_gib", "copying", *TERMS):
            _require((getattr(self, name) or 0) >= 0, name, getattr(self, name), "pass 0 or more")
        for name in ("beta1", "beta2"):
            _require(0 <= getattr(self, name) < 1, name, getattr(self, name), "pass a number in [0, 1)")
        _require(self.learning_rate > 0, "learning_rate", self.learning_rate, "pass a positive number")
        _require(self.precision in PRECISIONS, "precision", self.precision, f"choose one of {PRECISIONS}")
        _require(self.schedule in SCHEDULES, "schedule", self.schedule, f"choose one of {SCHEDULES}")
        clip = self.grad_clip
        _require(clip is None or clip > 0, "grad_clip", clip, "pass a positive number, or null for no limit")
        _require(any(self.weights().values()), "weights", 0, f"give at least one of {TERMS} a weight")
        _require(
            self.warmup < self.steps, "warmup", self.warmup, f"it must be shorter than steps={self.steps}"
        )

    def weights(self) -> dict[str, float]:
        """The weight of each term of the loss."""
        return {term: getattr(self, term) for term in TERMS}


def _require(condition: bool, argument: str, value: object, remedy: str) -> None:
    if not condition:
        raise ValueError(f"{argument}={value!r}: {remedy}.")


def nearest(name: str, names: Iterable[str]) -> str:
    """The known name that a mistyped one probably means."""
    known = list(names)
    close = difflib.get_close_matches(name.replace("-", "_"), known, n=1, cutoff=0.0)
    return close[0] if close else known[0]


_TYPES = typing.get_type_hints(Recipe)


def _allowed(name: str) -> tuple[type, ...]:
    kind = _TYPES[name]
    return typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)


def _converted(name: str, value: Any, where: str) -> Any:
    """A value from a file in the type of its field; YAML reads 1e-4 as text, and 1 as a whole number."""
    allowed = _allowed(name)
    if value is None and type(None) in allowed:
        return None
    if isinstance(value, bool) or value is None:
        if bool in allowed and value is not None:
            return value
    elif type(value) in allowed:
        return value
    elif float in allowed and isinstance(value, (int, str)):
        try:
            return float(value)
        except ValueError:
            pass
    kinds = {
        int: "a whole number",
        float: "a number",
        str: "a text",
        bool: "true or false",
        type(None): "null",
    }
    wanted = " or ".join(kinds[kind] for kind in allowed)
    raise ValueError(f"{where}: {name}={value!r} should be {wanted}.")


# What may differ when a run goes on: how often it reports, and how its work is divided.
FREE_ON_RESUME = frozenset(
    {"steps", "accumulate", "recompute", "checkpoint_every", "keep_checkpoints", "log_every", "tensorboard"}
)


def changed_settings(recipe: Recipe, saved: Mapping[str, Any]) -> list[str]:
    """The settings of a stopped run that a recipe would change, although they shape what comes out."""
    now = dataclasses.asdict(recipe)
    free = FREE_ON_RESUME if recipe.schedule == "constant" else FREE_ON_RESUME - {"steps"}
    then = {name: saved.get(name, now[name]) for name in now}
    if bool(now["keep_gib"]) == bool(then["keep_gib"]):
        free = free | {"keep_gib"}  # whether rows run one by one changes rounding; how many are kept does not
    return [name for name in now if name not in free and now[name] != then[name]]


def learning_rate_at(recipe: Recipe, step: int) -> float:
    """The learning rate of a step (from 0)."""
    if step < recipe.warmup:
        return recipe.learning_rate * (step + 1) / recipe.warmup
    if recipe.schedule == "constant":
        return recipe.learning_rate
    done = min(1.0, (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup))
    return recipe.learning_rate * (
        0.5 * (1 + math.cos(math.pi * done)) if recipe.schedule == "cosine" else 1 - done
    )


def recipe_from(given: Mapping[str, Any], where: str, start: Recipe | None = None) -> Recipe:
    """A recipe with some settings given by name.

    Args:
        given: field name to value.
        where: what errors call the source.
        start: what the others are; the defaults if None.

    Raises:
        ValueError: an unknown name (the nearest known one is named), or a value of the wrong type or range.
    """
    changes = {}
    for name, value in given.items():
        if name not in _TYPES:
            raise ValueError(
                f"{where}: {name!r} is no setting of a training run; the nearest is "
                f"{nearest(name, _TYPES)!r}."
            )
        changes[name] = _converted(name, value, where)
    try:
        return dataclasses.replace(start or Recipe(), **changes)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def read_recipe(file: str | os.PathLike[str], start: Recipe | None = None) -> tuple[Recipe, set[str]]:
    """The recipe in a YAML file, and the names that the file sets.

    Raises:
        ValueError: no such file, no YAML, an unknown key (names the nearest), or a bad value.
    """
    import yaml

    path = Path(file)
    if not path.is_file():
        raise ValueError(f"{os.fspath(file)!r}: no such file.")
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    given = {} if given is None else given
    if not isinstance(given, dict):
        raise ValueError(f"{path} holds a {type(given).__name__}: write lines of the form 'name: value'.")
    named = {str(name): value for name, value in given.items()}
    return recipe_from(named, str(path), start), set(named)


def recipe_text(recipe: Recipe) -> str:
    """A recipe as YAML with a comment on each line, as `read_recipe` reads it."""
    import yaml

    lines = []
    for each in fields(recipe):
        value = (
            yaml.safe_dump(getattr(recipe, each.name), default_flow_style=True).removesuffix("...\n").strip()
        )
        lines.append(f"{each.name}: {value}  # {each.metadata['help']}")
    return "\n".join(lines) + "\n"
