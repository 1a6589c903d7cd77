"""What a user may set of each baseline, with defaults for models of billions of parameters.

They are starting points, taken from the methods' papers or code where those state them, and have not been
measured on such a model here. Settings for the embedded model, tuned on training facts of its world, are in
`dualedit.toy.baselines`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from ..data import EditSample


def require(condition: bool, argument: str, value: object, remedy: str) -> None:
    """Raises ValueError that names the argument, its value and what to do, unless the condition holds."""
    if not condition:
        raise ValueError(f"{argument}={value!r}: {remedy}.")


def check_note(fact: str, question: str) -> None:
    """Refuse wordings of a note that leave out what it is about. Raises ValueError."""
    require("{target}" in fact, "fact", fact, "put {target} where the new answer goes")
    require("{prompt}" in question, "question", question, "put {prompt} where it goes")


@dataclass(frozen=True)
class FitSettings:
    """How parameters are fitted to one answer, in the model's own dtype (steps far below a weight's rounding
    are lost in half precision: raise the rate or load the model in float32).

    Attributes:
        learning_rate: of Adam.
        max_steps: steps at most.
        stop_probability: stop as soon as every token of the answer, end token included, has this probability.
    """

    learning_rate: float = 1e-4
    max_steps: int = 25
    stop_probability: float = 0.95

    def __post_init__(self) -> None:
        require(self.learning_rate > 0, "learning_rate", self.learning_rate, "pass a positive number")
        require(self.max_steps >= 1, "max_steps", self.max_steps, "pass at least 1")
        require(
            0 < self.stop_probability < 1, "stop_probability", self.stop_probability, "pass a share below 1"
        )


@dataclass(frozen=True)
class FineTuneSettings(FitSettings):
    """FT-L and FT-V.

    Attributes:
        module: name, or unambiguous end of it, of the module whose weights are tuned; None takes the last
            decoder layer (FT-L) or the last layer of the vision tower that reaches the language model (FT-V).
        norm_constraint: how far any weight may move in one edit (an L-infinity ball, as in ROME's
            comparison); None does not bound it.
    """

    module: str | None = None
    norm_constraint: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        bound = self.norm_constraint
        require(bound is None or bound > 0, "norm_constraint", bound, "pass a positive number, or None")


@dataclass(frozen=True)
class LoRASettings(FitSettings):
    """LoRA through peft.

    Attributes:
        rank, scale: r and lora_alpha / r.
        targets: ends of the names of linear layers inside the decoder that are adapted; where none of them
            exists, all linear layers of the decoder are.
        seed: of the random half of the adapter.
    """

    learning_rate: float = 5e-4
    rank: int = 8
    scale: float = 2.0
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.rank >= 1, "rank", self.rank, "pass at least 1")
        require(self.scale > 0, "scale", self.scale, "pass a positive number")
        require(len(self.targets) > 0, "targets", self.targets, "name at least one kind of linear layer")


@dataclass(frozen=True)
class IKESettings:
    """In-context editing.

    Attributes:
        fact: how a retrieved edit is written, with {prompt} and {target}.
        question: how the question follows, with {prompt}.
        retrieved: how many stored edits are put in front, the nearest last.
        demonstrations: training edits from which demonstrations are retrieved, for models that learn in
            context.
        shown: how many demonstrations a question gets (IKE's paper: 32).
        layer: decoder layer whose last prompt token's state is what similarity is taken of; None takes the
            middle one.
    """

    fact: str = "New Fact: {prompt} {target}\n"
    question: str = "Prompt: {prompt}"
    retrieved: int = 1
    demonstrations: tuple[EditSample, ...] = ()
    shown: int = 16
    layer: int | str | None = None

    def __post_init__(self) -> None:
        check_note(self.fact, self.question)
        require(self.retrieved >= 1, "retrieved", self.retrieved, "pass at least 1")
        require(self.shown >= 1, "shown", self.shown, "pass at least 1")


@dataclass(frozen=True)
class RetrievalSettings:
    """The retrieval note.

    Attributes:
        fact: how the retrieved edit is written, with {prompt} and {target}.
        question: how the question follows, with {prompt}.
        adapter: folder of a saved BalancEdit adapter whose pooled key questions are found by; None takes the
            model's own states.
        layer: decoder layer whose entering state is read without an adapter; None takes the one at two thirds
            of the depth.
        radius: how far a question may lie from an edit, a distance between keys of length 1.
    """

    fact: str = "New Fact: {prompt} {target}\n"
    question: str = "Prompt: {prompt}"
    adapter: str | os.PathLike[str] | None = None
    layer: int | str | None = None
    radius: float = 0.7

    def __post_init__(self) -> None:
        check_note(self.fact, self.question)
        require(self.radius > 0, "radius", self.radius, "pass a positive distance")


@dataclass(frozen=True)
class GRACESettings(FitSettings):
    """GRACE's codebook.

    Attributes:
        layer: decoder layer whose output is replaced: its number, name or end of it; None takes the one at
            two thirds of the depth.
        epsilon: deferral radius of a new key, an L2 distance between hidden states.
    """

    learning_rate: float = 1.0
    max_steps: int = 100
    layer: int | str | None = None
    epsilon: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.epsilon > 0, "epsilon", self.epsilon, "pass a positive distance")


@dataclass(frozen=True)
class VisEditSettings:
    """VisEdit.

    Attributes:
        adapters: folder of a trained DualEdit adapter, as `save_edits` writes it; best one that was trained
            with `text_layer=None`.
    """

    adapters: str | os.PathLike[str] = ""
