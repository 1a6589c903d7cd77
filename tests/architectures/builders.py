"""The shared table of tiny models: every architecture once, by name; `FIRST` run in every test run."""

from __future__ import annotations

from .parts import Architecture
from .tier1 import TIER1
from .tier2_grids import GRIDS
from .tier2_towers import TOWERS

LISTED_FOR = "5.23."  # the version of transformers whose base models' failures the table lists
FIRST = frozenset(architecture.name for architecture in TIER1)
ARCHITECTURES: dict[str, Architecture] = {
    architecture.name: architecture for architecture in (*TIER1, *TOWERS, *GRIDS)
}
