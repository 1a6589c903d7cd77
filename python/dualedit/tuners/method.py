"""What an editing method is to the rest of the library, and how one is registered.

A method is a config, a tuner that wraps layers, and an `EditMethod` that says how edits are stored and looked
up. It is reached from its config (`config.method`), so nothing outside a method's folder asks which it is.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import peft
from torch import Tensor

from ..memory.routing import last_state
from ..runtime.frames import States
from ..runtime.sequence import Prompt
from .config import EditConfig

if TYPE_CHECKING:
    from .adapter import EditAdapter
    from .model import EditTuner

Inputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class NewEdit:
    """An edit as it goes into the memory.

    Attributes:
        rows: layer name to table name to the edit's row, as `EditMemory.add` takes them.
        key: [1, P], by what it is looked up.
        notes: what fitting it found ("steps", "probability", ...), kept with the edit as JSON.
    """

    rows: dict[str, dict[str, Tensor]]
    key: Tensor
    notes: dict[str, Any] = field(default_factory=dict)


class EditMethod(ABC):
    """One editing method; an object without state.

    Attributes:
        name: as in `inject_<name>` and on the command line; its PEFT type is the same in upper case.
        title, paper: for people; the address of the paper.
        config_class, tuner_class: what PEFT registers.
        trains_adapters: whether its adapters are trained before the first edit (`dualedit train`).
        one_threshold: whether one threshold decides for all edits, so that calibration sets it afterwards.
        asks_other_questions: whether other stored questions about an edit's image serve as its negatives.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]
    config_class: ClassVar[type[EditConfig]]
    tuner_class: ClassVar[type[EditTuner]]
    trains_adapters: ClassVar[bool] = False
    one_threshold: ClassVar[bool] = False
    asks_other_questions: ClassVar[bool] = False

    @abstractmethod
    def metric(self, config: EditConfig) -> str:
        """Distance between keys: "l2" or "cosine"."""

    def radii(self, config: EditConfig, stored: Tensor) -> Tensor:
        """How far edits reach [N] float32, from the table "radius" [N]."""
        return stored.float()

    def needs_image(self, config: EditConfig) -> bool:
        """Whether an edit without an image is refused."""
        return True

    def needs_samples(self, config: EditConfig) -> bool:
        """Whether an edit's radius lies between a positive and a negative sample, so that it needs both."""
        return True

    def radius(self, config: EditConfig, positive: Sequence[float], negative: Sequence[float]) -> float:
        """How far an edit reaches, from the distances of its samples; negative: as far as the settings say.

        Raises:
            ValueError: samples that are needed are missing.
        """
        return radius_between(config.alpha, positive, negative)

    @abstractmethod
    def make_edit(
        self, adapter: EditAdapter, inputs: Inputs, full: Inputs, positives: Sequence[Inputs],
        negatives: Sequence[Inputs],
    ) -> NewEdit:  # fmt: skip
        """What is to be stored of an edit. The memory is not changed.

        Args:
            adapter: where it will be stored.
            inputs: of its prompt, `input_ids` [1, P].
            full: the same with the target behind it and labels (`append_target`).
            positives, negatives: inputs that must, and must not, be recognised as this question.

        Raises:
            ValueError: a missing image, samples that are missing, or values that are not finite.
        """

    def untrained(self, adapter: EditAdapter) -> str | None:
        """Why no edit of this adapter can change an answer, where its weights say so; None: they do not."""
        return None

    def advice(self, config: EditConfig) -> str:
        """What to try where an edit was not written."""
        return "Try another wording of the question, or a shorter answer."

    def published_key(self, config: EditConfig, hidden: Tensor, prompt: Prompt) -> Tensor:
        """The key [B, D] that the published evaluation reads of the gate layer's states [B, L, D]."""
        return last_state(hidden, prompt.last)


def register_edit_method(method: EditMethod) -> None:
    """Enter a method in PEFT's tables (PEFT's own registration refuses names that it does not list).

    Raises:
        ValueError: PEFT knows another method by this name.
    """
    kind = method.name.upper()
    known = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING.get(kind)
    if known not in (None, method.config_class):
        raise ValueError(f"method.name={method.name!r}: PEFT has a method of this name. Choose another one.")
    method.config_class.method = method
    peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[kind] = method.config_class
    peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[kind] = method.tuner_class
    peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING[kind] = method.tuner_class.prefix


def check_distances(distances: Sequence[float]) -> None:
    """Refuse distances of an edit's samples that are not finite.

    Raises:
        ValueError: a radius made of them would open the edit to every input.
    """
    if not all(map(math.isfinite, distances)):
        raise ValueError(
            f"positives, negatives: the distances {list(distances)} are not all finite, and a radius made of "
            f"them would open the edit to every input. The forward of a sample overflowed; run the model "
            "in bfloat16 or float32."
        )


def check_mean_image(states: States, prompt: Prompt) -> None:
    """Refuse a pooled key where the picture comes in behind the first layer, over empty places.

    Raises:
        ValueError: the key would not see the picture.
    """
    if states.mean_image is None or prompt.image is None or not bool(prompt.image.any()):
        return
    if not bool(states.mean_image.any()):
        raise ValueError(
            "The image tokens of this model are empty where they enter the decoder, so key='pooled' would "
            "not see the picture. Use key='last'."
        )


def radius_between(alpha: float, positive: Sequence[float], negative: Sequence[float]) -> float:
    """alpha d(positive) + (1 - alpha) d(negative), of the farthest positive and the nearest negative sample.

    A negative sample stays outside whatever alpha is: the widest radius ends just before it.

    Raises:
        ValueError: no positive or no negative sample.

    Source: BalancEdit (ICML 2025), Eq. 10; see `BalancEditConfig.alpha`.
    """
    if not positive or not negative:
        raise ValueError(
            f"positives ({len(positive)}) and negatives ({len(negative)}): the radius of an edit lies "
            f"between at least one of each. Pass a rephrased prompt and, for instance, the prompt "
            "with a black image."
        )
    far, near = max(positive), min(negative)
    radius = max(0.0, min(alpha * far + (1 - alpha) * near, near * (1 - 1e-4)))
    if far >= near:
        warnings.warn(
            f"The positive sample (distance {far:.4g}) is not nearer than the negative one ({near:.4g}); "
            f"the radius is clamped to {radius:.4g}. Rewordings of this edit may not be recognised: pass "
            "closer rephrases.",
            stacklevel=5,
        )
    return radius
