"""The shared table of tiny models: every architecture once, by name; `FIRST` run in every test run."""

from __future__ import annotations

from .parts import Architecture
from .tier1 import TIER1
from .tier2_grids import GRIDS
from .tier2_newest import NEWEST
from .tier2_towers import TOWERS

LISTED_FOR = "5.23."  # the version of transformers whose base models' failures the table lists
FIRST = frozenset(architecture.name for architecture in TIER1)
ARCHITECTURES: dict[str, Architecture] = {
    architecture.name: architecture for architecture in (*TIER1, *TOWERS, *GRIDS, *NEWEST)
}

_ENCODER_DECODER = ("encoder-decoder", False)
# What is refused: a piece of the reason, and whether DualEdit alone is (BalancEdit has not been tried there).
REFUSED: dict[str, tuple[str, bool]] = {
    "blip": ("cross-attention", False),
    "git": ("no id marks them", False),
    "pi0": ("actions of a robot", False),
    "blip-2+t5": _ENCODER_DECODER,
    "florence2": _ENCODER_DECODER,
    "pix2struct": _ENCODER_DECODER,
    "t5gemma2": _ENCODER_DECODER,
    "udop": _ENCODER_DECODER,
    "vision-encoder-decoder": _ENCODER_DECODER,
    "glm5_next": ("carries 4 states for every token", True),
}
