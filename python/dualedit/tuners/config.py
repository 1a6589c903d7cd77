"""Configurations of the two editors, as PEFT configs: plain dataclasses that are saved with the adapter."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from peft.config import PeftConfig
from safetensors import SafetensorError, safe_open

from .model_card import how_to_load, write_card


class EditType(str, Enum):
    """The editors' own PEFT types: strings to JSON, with the `.value` that PEFT and transformers ask for."""

    DUALEDIT = "DUALEDIT"
    BALANCEDIT = "BALANCEDIT"


GATES = ("prompt", "published")
METRICS = ("l2", "cosine")
KEYS = ("mean", "last", "pooled")
ROUTING_KEYS = ("last", "pooled", "learned")
RADII = ("threshold", "own")
VALUES = ("low_rank", "full")


def _require(condition: bool, argument: str, value: object, remedy: str) -> None:
    if not condition:
        raise ValueError(f"{argument}={value!r}: {remedy}.")


def check_adapter_file(folder: str | os.PathLike[str]) -> None:
    """Refuse a saved folder whose weights cannot be read in full, before any model is touched.

    A folder without weights is left to PEFT, which has its own message for it.

    Raises:
        ValueError: the safetensors file is cut short or damaged.
    """
    file = Path(folder) / "adapter_model.safetensors"
    if not file.is_file():
        return
    try:
        with safe_open(str(file), framework="pt") as tensors:
            tensors.keys()
    except SafetensorError as error:
        raise ValueError(
            f"{file} is cut short or damaged ({error}); nothing was loaded. Restore the file from a copy "
            f"or save the edits again."
        ) from error


@dataclass
class EditConfig(PeftConfig):
    """What both editors share.

    Attributes:
        target_modules: full names of the wrapped modules; found at injection, never set by hand.
        image_token_ids: ids that stand for image (or video) content in `input_ids`; None reads them from the
            model's config, [] leaves it to `explicit_masks` to say where images are.
        base_fingerprint: what the base model looked like when the edits were made; injection into a model
            that looks different is refused. None skips the check.
        memory_sizes: rows of each layer's tables in the saved file, written by saving; loaders that allocate
            before they read need it.
    """

    target_modules: list[str] | None = field(
        default=None, metadata={"help": "Full names of the wrapped modules; found at injection."}
    )
    image_token_ids: list[int] | None = field(
        default=None, metadata={"help": "Ids of image content in input_ids; None reads the model's config."}
    )
    base_fingerprint: dict[str, object] | None = field(
        default=None, metadata={"help": "What the base model looked like when the edits were made."}
    )
    memory_sizes: dict[str, dict[str, int]] | None = field(
        default=None, metadata={"help": "Rows of each layer's tables in the saved file; set by saving."}
    )

    def save_pretrained(self, save_directory, **kwargs):
        """Write the config, and into the README.md beside it how to load the adapter."""
        mapping = kwargs.get("auto_mapping_dict") or self.auto_mapping or {}
        super().save_pretrained(save_directory, **kwargs)
        section = how_to_load(
            self.peft_type.value,
            self.base_model_name_or_path,
            mapping.get("base_model_class"),
            self.base_fingerprint,
            max((sizes["edits"] for sizes in (self.memory_sizes or {}).values()), default=0),
        )
        write_card(save_directory, section, self.base_model_name_or_path)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, subfolder=None, **kwargs):
        """Read the config of a saved folder, after checking that the weights beside it are whole."""
        folder = Path(pretrained_model_name_or_path) / (subfolder or "")
        if folder.is_dir():
            check_adapter_file(folder)
        return super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)


@dataclass
class DualEditConfig(EditConfig):
    """Two cross-attention adapters behind a last-token gate (DualEdit, COLM 2025).

    Attributes:
        text_layer: decoder layer whose text positions are edited: its number, full name or name suffix; None
            leaves text positions alone.
        vis_layer: decoder layer whose image positions are edited; None leaves image positions alone.
        mid_dim: width of the adapters' attention (M).
        num_heads: attention heads; divides `mid_dim`.
        threshold: tau, the cosine similarity from which on the gate opens, in [-1, 1]; or "calibrated" for
            `calibrated_threshold`.
        gate: "prompt" compares the last prompt token on both sides (what is known when a question is asked);
            "published" compares the last input token, as the published evaluation does, where that token is
            part of the answer: it sees the label and is for comparison only.
        key: by what the gate looks an input up: "last", the state of the last token (the paper's); "pooled",
            linear maps of that and of the mean image token as it enters the decoder (`PooledKey`), fitted in
            closed form by `training.fit_pooled_key`; "learned", what a `RoutingKey` makes of the prompt's
            states, trained by `training.train_routing_key`.
        key_dim: width of a pooled or learned key (P); a pooled one at most twice that of the residual stream.
        radius: how far an edit reaches. "threshold" is tau for all (the paper's); "own" lets each edit
            measure it, between the farthest sample that must be recognised and the nearest that must not:
            alpha * d(positive) + (1 - alpha) * d(negative), as BalancEdit does (ICML 2025, Eq. 10).
        alpha: of an own radius, in [0, 1].
        refine_steps: above 0, a new edit's own question is run once with the edit written, and where the
            target does not come out, the edit's own keys and values are mended in at most so many steps of
            Adam; the adapters stay as they are. 0 (the paper's): an edit is one forward, and nobody checks.
        refine_rate, refine_probability: Adam's learning rate, and the probability that each target token must
            have.
        norm_eps: epsilon of the adapters' LayerNorms.
        init_weights: True starts the adapters as the identity (output projection zero); False at random.
        calibrated_threshold: the tau that calibration on training facts found for these adapters and this
            model; kept with them, whatever `threshold` is set to. None: nobody has calibrated them.
    """

    text_layer: int | str | None = field(
        default=16, metadata={"help": "Layer whose text positions are edited."}
    )
    vis_layer: int | str | None = field(
        default=19, metadata={"help": "Layer whose image positions are edited."}
    )
    mid_dim: int = field(default=1024, metadata={"help": "Width of the adapters' attention."})
    num_heads: int = field(default=8, metadata={"help": "Attention heads; divides mid_dim."})
    threshold: float | str = field(
        default=0.8, metadata={"help": "tau: cosine similarity that opens the gate; or 'calibrated'."}
    )
    gate: str = field(
        default="prompt", metadata={"help": "'prompt' (honest) or 'published' (sees the answer)."}
    )
    key: str = field(
        default="last", metadata={"help": "Look inputs up by 'last' token, 'pooled' or 'learned' key."}
    )
    key_dim: int = field(default=128, metadata={"help": "Width of a pooled or learned key."})
    radius: str = field(
        default="threshold", metadata={"help": "An edit reaches as far as 'threshold', or its 'own' radius."}
    )
    alpha: float = field(default=0.5, metadata={"help": "Own radius between positive (1), negative (0)."})
    refine_steps: int = field(
        default=0, metadata={"help": "Check a new edit's answer and mend its keys and values; 0: do not."}
    )
    refine_rate: float = field(default=3e-2, metadata={"help": "Adam's learning rate of that mending."})
    refine_probability: float = field(
        default=0.9, metadata={"help": "Least probability of every target token of an edit that is checked."}
    )
    norm_eps: float = field(default=1e-5, metadata={"help": "Epsilon of the adapters' LayerNorms."})
    init_weights: bool = field(default=True, metadata={"help": "Start as the identity (True) or at random."})
    calibrated_threshold: float | None = field(
        default=None, metadata={"help": "tau that calibration found for these adapters."}
    )

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = EditType.DUALEDIT
        layers = (self.text_layer, self.vis_layer)
        _require(layers != (None, None), "text_layer, vis_layer", layers, "name at least one layer to edit")
        for name, layer in zip(("text_layer", "vis_layer"), layers, strict=True):
            fits = layer is None or (isinstance(layer, (int, str)) and not isinstance(layer, bool))
            _require(fits, name, layer, "pass a layer number, a module name, or None")
        _require(self.mid_dim > 0, "mid_dim", self.mid_dim, "pass a positive width")
        _require(
            self.num_heads > 0 and self.mid_dim % self.num_heads == 0,
            "num_heads",
            self.num_heads,
            f"pass a positive divisor of mid_dim={self.mid_dim}",
        )
        if self.threshold == "calibrated":
            _require(
                self.calibrated_threshold is not None,
                "threshold",
                self.threshold,
                "these adapters carry no calibrated threshold. Calibrate them (dualedit.training), pass a "
                'folder of calibrated ones (inject_dualedit(model, adapter="folder", ...)), or a number',
            )
            self.threshold = self.calibrated_threshold
        for name in ("threshold", "calibrated_threshold"):
            value = getattr(self, name)
            if value is not None or name == "threshold":
                number = isinstance(value, (int, float)) and -1.0 <= value <= 1.0
                _require(number, name, value, "a cosine lies in [-1, 1]")
        _require(self.gate in GATES, "gate", self.gate, f"choose one of {GATES}")
        _require(self.key in ROUTING_KEYS, "key", self.key, f"choose one of {ROUTING_KEYS}")
        _require(self.radius in RADII, "radius", self.radius, f"choose one of {RADII}")
        _require(0.0 <= self.alpha <= 1.0, "alpha", self.alpha, "pass a number in [0, 1]")
        whole = isinstance(self.refine_steps, int) and self.refine_steps >= 0
        _require(whole, "refine_steps", self.refine_steps, "pass a number of steps, 0 for none")
        _require(self.refine_rate > 0, "refine_rate", self.refine_rate, "pass a positive number")
        _require(
            0 < self.refine_probability < 1,
            "refine_probability",
            self.refine_probability,
            "pass a number in (0, 1)",
        )
        fits = self.key_dim > 0 and self.key_dim % 4 == 0
        _require(fits, "key_dim", self.key_dim, "pass a positive multiple of 4 (its pooling has 4 heads)")


@dataclass
class BalancEditConfig(EditConfig):
    """A codebook at one linear layer: nearest key, its own radius, its own weight (BalancEdit, ICML 2025).

    Attributes:
        layer: name (or unambiguous suffix) of the linear layer that is edited.
        alpha: where the radius lies between the positive and the negative sample:
            alpha * d(positive) + (1 - alpha) * d(negative). The paper's Eq. 3 and Eq. 10 contradict each
            other; its experiments (Fig. 5, Table 10: alpha = 0 is the widest scope) match this one.
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
        self.peft_type = EditType.BALANCEDIT
        _require(
            isinstance(self.layer, str) and self.layer != "",
            "layer",
            self.layer,
            "name the linear layer to edit",
        )
        _require(0.0 <= self.alpha <= 1.0, "alpha", self.alpha, "pass a number in [0, 1]")
        _require(self.metric in METRICS, "metric", self.metric, f"choose one of {METRICS}")
        _require(self.key in KEYS, "key", self.key, f"choose one of {KEYS}")
        fits = self.key_dim > 0 and self.key_dim % 2 == 0
        _require(fits, "key_dim", self.key_dim, "pass a positive even number")
        _require(self.value in VALUES, "value", self.value, f"choose one of {VALUES}")
        _require(self.rank > 0, "rank", self.rank, "pass a positive rank")
        _require(self.learning_rate > 0, "learning_rate", self.learning_rate, "pass a positive number")
        _require(self.max_steps > 0, "max_steps", self.max_steps, "pass a positive number of steps")
        _require(
            0 < self.stop_probability < 1,
            "stop_probability",
            self.stop_probability,
            "pass a number in (0, 1)",
        )
