"""The settings of a DualEdit adapter."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...memory import packing
from ..config import EditConfig, EditType, require, require_numbers

DUALEDIT = EditType("DUALEDIT")
GATES = ("prompt", "published")
KEYS = ("last", "pooled")
RADII = ("threshold", "own")


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
            closed form by `training.fit_pooled_key`.
        key_dim: width of a pooled key (P), at most twice that of the residual stream.
        radius: how far an edit reaches. "threshold" is tau for all (the paper's); "own" lets each edit
            measure it, between the farthest sample that must be recognised and the nearest that must not:
            alpha * d(positive) + (1 - alpha) * d(negative), as BalancEdit does (ICML 2025, Eq. 10).
        alpha: of an own radius, in [0, 1].
        refine_steps: above 0, a new edit's own question is run once with the edit written, and where the
            target does not come out, the edit's own keys and values are mended in at most so many steps of
            Adam; the adapters stay as they are. 0 (the paper's): an edit is one forward, and nobody checks.
        refine_rate, refine_probability: Adam's learning rate, and the probability that each target token must
            have.
        kv_dtype: how an edit's cached keys and values are stored: "native", in the model's dtype; "bfloat16";
            "int8" or "float8" (e4m3), eight bits a value with a scale for each token. They are used in the
            model's dtype. The routing key is stored as it is.
        image_mass: of an edit's image tokens, the fewest are stored to which this share of the attention to
            image tokens goes when the edit's own question is asked; 1: all. Not in the paper.
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
    key: str = field(default="last", metadata={"help": "Look inputs up by 'last' token or 'pooled' key."})
    key_dim: int = field(default=128, metadata={"help": "Width of a pooled key."})
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
    kv_dtype: str = field(
        default="native", metadata={"help": f"How edits' keys and values are stored: {packing.KINDS}."}
    )
    image_mass: float = field(
        default=1.0, metadata={"help": "Share of the attention to image tokens that is kept; 1: all tokens."}
    )
    norm_eps: float = field(default=1e-5, metadata={"help": "Epsilon of the adapters' LayerNorms."})
    init_weights: bool = field(default=True, metadata={"help": "Start as the identity (True) or at random."})
    calibrated_threshold: float | None = field(
        default=None, metadata={"help": "tau that calibration found for these adapters."}
    )

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = DUALEDIT
        require_numbers(
            self, "mid_dim", "num_heads", "key_dim", "alpha", "refine_steps", "refine_rate",
            "refine_probability", "norm_eps", "image_mass",
        )  # fmt: skip
        layers = (self.text_layer, self.vis_layer)
        require(layers != (None, None), "text_layer, vis_layer", layers, "name at least one layer to edit")
        for name, layer in zip(("text_layer", "vis_layer"), layers, strict=True):
            fits = layer is None or (isinstance(layer, (int, str)) and not isinstance(layer, bool))
            require(fits, name, layer, "pass a layer number, a module name, or None")
        require(self.mid_dim > 0, "mid_dim", self.mid_dim, "pass a positive width")
        require(
            self.num_heads > 0 and self.mid_dim % self.num_heads == 0,
            "num_heads",
            self.num_heads,
            f"pass a positive divisor of mid_dim={self.mid_dim}",
        )
        if self.threshold == "calibrated":
            require(
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
                require(number, name, value, "a cosine lies in [-1, 1]")
        require(self.gate in GATES, "gate", self.gate, f"choose one of {GATES}")
        require(self.key in KEYS, "key", self.key, f"choose one of {KEYS}")
        require(self.radius in RADII, "radius", self.radius, f"choose one of {RADII}")
        require(0.0 <= self.alpha <= 1.0, "alpha", self.alpha, "pass a number in [0, 1]")
        whole = isinstance(self.refine_steps, int) and self.refine_steps >= 0
        require(whole, "refine_steps", self.refine_steps, "pass a number of steps, 0 for none")
        require(self.refine_rate > 0, "refine_rate", self.refine_rate, "pass a positive number")
        require(
            0 < self.refine_probability < 1,
            "refine_probability",
            self.refine_probability,
            "pass a number in (0, 1)",
        )
        require(self.kv_dtype in packing.KINDS, "kv_dtype", self.kv_dtype, f"choose one of {packing.KINDS}")
        reason = packing.why_not(self.kv_dtype)
        require(reason is None, "kv_dtype", self.kv_dtype, str(reason))
        require(0.0 < self.image_mass <= 1.0, "image_mass", self.image_mass, "pass a share in (0, 1]")
        fits = self.key_dim > 0 and self.key_dim % 2 == 0
        require(fits, "key_dim", self.key_dim, "pass a positive even number")
