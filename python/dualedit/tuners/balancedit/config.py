"""The settings of a BalancEdit codebook."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..config import EditConfig, EditType, require, require_numbers

BALANCEDIT = EditType("BALANCEDIT")
METRICS = ("l2", "cosine")
KEYS = ("mean", "last", "pooled")
VALUES = ("low_rank", "full")


@dataclass
class BalancEditConfig(EditConfig):
    """A codebook at one linear layer: nearest key, its own radius, its own weight (BalancEdit, ICML 2025).

    Attributes:
        layer: name (or unambiguous suffix) of the linear layer that is edited.
        alpha: where the radius lies between the positive and the negative sample:
            alpha * d(positive) + (1 - alpha) * d(negative). The paper's Eq. 3 and Eq. 10 contradict each
            other; its experiments (Fig. 5, Table 10: alpha = 0 is the widest scope) match this one.
        max_radius: no edit reaches farther than this, in units of `metric`; None: its two samples decide
            alone. Not in the paper: distances of a fitted pooled key mean the same for every edit, and what
            other pictures of a thing need is known from calibration facts, where one edit has only its own
            rewordings and a black image.
        metric: "l2" or "cosine", the distance between keys.
        key: "mean" pools the layer's input over the prompt tokens (the paper's), "last" takes the last prompt
            token, "pooled" linear maps of that and of the mean image token as it enters the decoder
            (`PooledKey`), fitted in closed form by `training.fit_pooled_key`.
        key_dim: width of a pooled key (P): at most twice the layer's input or the residual stream.
        value: "low_rank" stores W + up @ down, "full" a whole weight.
        rank: rank of a low-rank value.
        learning_rate, max_steps, stop_probability: the fine-tuning of a value: Adam until every target token
            is the most probable one with at least `stop_probability`, or `max_steps`.
    """

    layer: str | None = field(default=None, metadata={"help": "Name of the linear layer that is edited."})
    alpha: float = field(
        default=0.2, metadata={"help": "Radius between positive (1) and negative (0) sample."}
    )
    max_radius: float | None = field(
        default=None, metadata={"help": "Largest radius of an edit; None: its samples decide alone."}
    )
    metric: str = field(default="l2", metadata={"help": "'l2' or 'cosine'."})
    key: str = field(
        default="mean", metadata={"help": "'mean' over prompt tokens, the 'last' one, or a 'pooled' key."}
    )
    key_dim: int = field(default=128, metadata={"help": "Width of a pooled key."})
    value: str = field(default="low_rank", metadata={"help": "'low_rank' or 'full'."})
    rank: int = field(default=8, metadata={"help": "Rank of a low-rank value."})
    learning_rate: float = field(default=3e-3, metadata={"help": "Adam's learning rate for a value."})
    max_steps: int = field(default=50, metadata={"help": "Most fine-tuning steps for a value."})
    stop_probability: float = field(
        default=0.9, metadata={"help": "Least probability of every target token."}
    )

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = BALANCEDIT
        require_numbers(
            self, "alpha", "key_dim", "rank", "learning_rate", "max_steps", "stop_probability"
        )
        require(
            isinstance(self.layer, str) and self.layer != "",
            "layer",
            self.layer,
            "name the linear layer to edit",
        )
        require(0.0 <= self.alpha <= 1.0, "alpha", self.alpha, "pass a number in [0, 1]")
        if self.max_radius is not None:
            require_numbers(self, "max_radius")
            require(self.max_radius > 0, "max_radius", self.max_radius, "pass a positive number, or None")
        require(self.metric in METRICS, "metric", self.metric, f"choose one of {METRICS}")
        require(self.key in KEYS, "key", self.key, f"choose one of {KEYS}")
        fits = self.key_dim > 0 and self.key_dim % 2 == 0
        require(fits, "key_dim", self.key_dim, "pass a positive even number")
        require(self.value in VALUES, "value", self.value, f"choose one of {VALUES}")
        require(self.rank > 0, "rank", self.rank, "pass a positive rank")
        require(self.learning_rate > 0, "learning_rate", self.learning_rate, "pass a positive number")
        require(self.max_steps > 0, "max_steps", self.max_steps, "pass a positive number of steps")
        require(
            0 < self.stop_probability < 1,
            "stop_probability",
            self.stop_probability,
            "pass a number in (0, 1)",
        )
