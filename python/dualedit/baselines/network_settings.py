"""What a user may set of each baseline that is fitted to training facts first.

Defaults are for models of billions of parameters, from the papers or their code where those state them; they
have not been measured on such a model here.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import ClassVar

from .settings import FitSettings, check_note, require


@dataclass(frozen=True)
class NetworkSettings:
    """What every trained baseline has.

    Attributes:
        network: folder that `fit_baseline` wrote; None where it is still to be trained.
        seed: of the untrained network.
    """

    network: str | os.PathLike[str] | None = None
    seed: int = 0
    shaping: ClassVar[tuple[str, ...]] = ()  # settings that a saved network has to agree with


@dataclass(frozen=True)
class TPatcherSettings(NetworkSettings, FitSettings):
    """T-Patcher.

    Attributes:
        module: name, or unambiguous end of it, of the feed-forward part that gets the neurons (states in,
            states out); None takes the last decoder layer's.
        activation_weight, memory_weight: of the losses that open a neuron at its own token, and keep it shut
            at the queries noted from training facts (the paper's a and m).
        beta, gamma: how far below zero, and below the neuron's own activation, theirs has to be.
        noted: how many queries `fit_baseline` notes.
        hardest: of these the loss counts so many, those with the highest activation (the paper's k).
    """

    learning_rate: float = 1e-2
    max_steps: int = 100
    module: str | None = None
    activation_weight: float = 1.0
    memory_weight: float = 1.0
    beta: float = -3.0
    gamma: float = -3.0
    noted: int = 512
    hardest: int = 128
    shaping = ("module", "noted")

    def __post_init__(self) -> None:
        FitSettings.__post_init__(self)
        require(self.activation_weight >= 0, "activation_weight", self.activation_weight, "pass 0 or more")
        require(self.memory_weight >= 0, "memory_weight", self.memory_weight, "pass 0 or more")
        require(self.noted >= 1, "noted", self.noted, "pass at least 1")
        require(self.hardest >= 1, "hardest", self.hardest, "pass at least 1")


@dataclass(frozen=True)
class WISESettings(NetworkSettings, FitSettings):
    """WISE.

    Attributes:
        module: name, or unambiguous end of it, of the value matrix of a feed-forward part (a linear layer);
            None takes the last linear layer of the decoder layer at five sixths of the depth.
        routed_by: "prompt", the mean over the prompt's tokens, or "last", the last of them.
        alpha, beta, gamma: the margins of the activation loss, in mean lengths of the layer's own output on
            unrelated questions.
        act_ratio: share of the smallest activation of a memory's edits from which on a question goes to it.
        mask_ratio: share of the matrix that the edits of one shard may change (the paper's rho).
        shard_edits: edits a shard.
        shards: shards that are merged into one side memory (the paper's k).
        density: share of each shard's change that merging keeps, the largest (TIES).
        noted: how many unrelated inputs `fit_baseline` notes.
    """

    learning_rate: float = 1e-3
    max_steps: int = 70
    module: str | None = None
    routed_by: str = "prompt"
    alpha: float = 0.05
    beta: float = 0.2
    gamma: float = 0.1
    act_ratio: float = 0.88
    mask_ratio: float = 0.2
    shard_edits: int = 500
    shards: int = 2
    density: float = 0.53
    noted: int = 512
    shaping = ("module", "routed_by", "noted")

    def __post_init__(self) -> None:
        FitSettings.__post_init__(self)
        require(self.routed_by in ("prompt", "last"), "routed_by", self.routed_by, "pass 'prompt' or 'last'")
        for name in ("alpha", "beta", "gamma", "act_ratio"):
            require(getattr(self, name) > 0, name, getattr(self, name), "pass a positive number")
        for name in ("mask_ratio", "density"):
            require(0 < getattr(self, name) <= 1, name, getattr(self, name), "pass a share above 0")
        for name in ("shard_edits", "shards", "noted"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "pass at least 1")


@dataclass(frozen=True)
class MENDSettings(NetworkSettings):
    """MEND.

    Attributes:
        modules: names, or unambiguous ends of them, of the linear layers that are edited; None takes the last
            one of each of the last `layers` decoder layers.
        rank, hidden: of the network's low-rank layers, and how many there are beside the last.
        edit_rate: where the learned rate of each layer begins.
    """

    modules: tuple[str, ...] | None = None
    layers: int = 3
    rank: int = 1920
    hidden: int = 1
    edit_rate: float = 1e-2
    shaping = ("modules", "layers", "rank", "hidden")

    def __post_init__(self) -> None:
        require(self.modules is None or len(self.modules) > 0, "modules", self.modules, "name at least one")
        require(self.layers >= 1, "layers", self.layers, "pass at least 1")
        require(self.rank >= 1, "rank", self.rank, "pass at least 1")
        require(self.hidden >= 0, "hidden", self.hidden, "pass 0 or more")
        require(self.edit_rate > 0, "edit_rate", self.edit_rate, "pass a positive number")


@dataclass(frozen=True)
class KESettings(NetworkSettings):
    """KnowledgeEditor.

    Attributes:
        modules, layers: as of MEND.
        hidden: width of the LSTM, in each direction.
        edit_rate: where the learned rate begins.
        margin: KL that answers may move by before the multiplier of that constraint grows.
    """

    modules: tuple[str, ...] | None = None
    layers: int = 2
    hidden: int = 128
    edit_rate: float = 1.0
    margin: float = 1e-3
    shaping = ("modules", "layers", "hidden")

    def __post_init__(self) -> None:
        require(self.modules is None or len(self.modules) > 0, "modules", self.modules, "name at least one")
        require(self.layers >= 1, "layers", self.layers, "pass at least 1")
        require(self.hidden >= 1, "hidden", self.hidden, "pass at least 1")
        require(self.edit_rate > 0, "edit_rate", self.edit_rate, "pass a positive number")
        require(self.margin > 0, "margin", self.margin, "pass a positive number")


@dataclass(frozen=True)
class LiveEditSettings(NetworkSettings):
    """LiveEdit; defaults as in its code.

    Attributes:
        layer: decoder layer whose output is edited; None takes the one at two thirds of the depth.
        width, heads: of the attention that reads an edit and a question.
        queries: features of a picture and of a question.
        rank, scale: of an expert; its halves are divided by scale * sqrt(rank).
        sentinel: picture states that the sentinel consists of.
    """

    layer: int | str | None = None
    width: int = 1024
    heads: int = 8
    queries: int = 4
    rank: int = 4
    scale: float = 5.0
    sentinel: int = 32
    shaping = ("layer", "width", "heads", "queries", "rank", "scale", "sentinel")

    def __post_init__(self) -> None:
        for name in ("width", "heads", "queries", "rank", "sentinel"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "pass at least 1")
        require(self.width % self.heads == 0, "heads", self.heads, f"pass a divisor of width={self.width}")
        require(self.scale > 0, "scale", self.scale, "pass a positive number")


@dataclass(frozen=True)
class SERACSettings(NetworkSettings):
    """SERAC.

    Attributes:
        layer: decoder layer whose entering states the classifier reads; None takes the one at two thirds of
            the depth.
        width, heads, layers: of the counterfactual model; the classifier's vectors are as wide.
        longest: words that it reads, of edit and question together.
    """

    layer: int | str | None = None
    width: int = 768
    heads: int = 8
    layers: int = 4
    longest: int = 512
    shaping = ("layer", "width", "heads", "layers", "longest")

    def __post_init__(self) -> None:
        for name in ("width", "heads", "layers", "longest"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "pass at least 1")
        require(self.width % self.heads == 0, "heads", self.heads, f"pass a divisor of width={self.width}")


@dataclass(frozen=True)
class RECIPESettings(NetworkSettings):
    """RECIPE; defaults as in its code.

    Attributes:
        layer: decoder layer whose entering states are read; None takes the one at two thirds of the depth.
        width: of the vectors of questions and edits.
        tokens: of a prompt.
    """

    layer: int | str | None = None
    width: int = 4096
    tokens: int = 3
    shaping = ("layer", "width", "tokens")

    def __post_init__(self) -> None:
        for name in ("width", "tokens"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "pass at least 1")


@dataclass(frozen=True)
class LTESettings(NetworkSettings):
    """LTE.

    Attributes:
        fact, question: how the retrieved edit and the question behind it are written.
        layer: decoder layer whose entering state notes are found by; None takes the one at two thirds of the
            depth.
        radius: how far a question may lie from an edit, a distance between keys of length 1.
        rank, scale: of the adapters of the decoder's linear layers.
    """

    fact: str = "[Updated Information] {prompt} {target}\n"
    question: str = "[Query] {prompt}"
    layer: int | str | None = None
    radius: float = 0.7
    rank: int = 8
    scale: float = 2.0
    shaping = ("fact", "question", "rank", "scale")

    def __post_init__(self) -> None:
        check_note(self.fact, self.question)
        require(self.radius > 0, "radius", self.radius, "pass a positive distance")
        require(self.rank >= 1, "rank", self.rank, "pass at least 1")
        require(self.scale > 0, "scale", self.scale, "pass a positive number")
