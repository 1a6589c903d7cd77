"""Train the baselines that have a network, on the embedded model, all with the same edits and steps.

    python -m recipes.toy.train_baselines --work DIR [--only mend,serac] [--rates 1e-3,3e-3]

writes DIR/<method>-<rate>, one training for each learning rate; what was stopped goes on, what is finished is
left alone. `tune_baselines --work DIR` then chooses among them on facts that none was trained on.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from dualedit.baselines import (
    KESettings,
    LiveEditSettings,
    LTESettings,
    MENDSettings,
    RECIPESettings,
    SERACSettings,
    TrainingSettings,
    fit_baseline,
)
from dualedit.baselines.network_settings import NetworkSettings
from dualedit.data import EditSample
from dualedit.toy.baselines import NOTED
from dualedit.toy.model import load_embedded
from dualedit.toy.world import World

from recipes.toy.train_editors import FreshEdits

RATES = (1e-3, 3e-3)
STEPS, BATCH, SEED = 160, 6, 5
# As wide as the model itself where the papers' networks are as wide as theirs.
NETWORKS: dict[str, NetworkSettings] = {
    "liveedit": LiveEditSettings(width=128, sentinel=8, scale=0.1),  # the states here are long
    "mend": MENDSettings(rank=64),
    "serac": SERACSettings(width=128, heads=4, layers=2, longest=96),
    "recipe": RECIPESettings(width=256),
    "lte": LTESettings(rank=4, **NOTED),
    "ke": KESettings(hidden=64),
}


def run_folder(work: Path, name: str, rate: float) -> Path:
    """Where one training is kept."""
    return work / f"{name}-{rate:g}"


def noted_folder(work: Path, settings: NetworkSettings) -> Path:
    """Where what T-Patcher or WISE notes with some settings is kept."""
    told = "-".join(str(getattr(settings, name)) for name in settings.shaping)
    return work / f"{type(settings).__name__.removesuffix('Settings').lower()}-{told}"


def drawn_edits(steps: int = STEPS) -> Sequence[EditSample]:
    """The edits that every method is trained on, drawn once."""
    edits = FreshEdits(World(0), steps * BATCH, SEED)
    return [edits[place] for place in range(len(edits))]


def train(work: Path, names: Sequence[str], rates: Sequence[float], vlm: Path | None, steps: int) -> None:
    """Train each method with each rate; the first rate of all of them first."""
    samples = drawn_edits(steps)
    for rate in rates:
        for name in names:
            training = TrainingSettings(steps, BATCH, rate, checkpoint_every=20)
            fit_baseline(
                name, *load_embedded(vlm), samples, run_folder(work, name, rate), NETWORKS[name], training,
                half=True,
            )  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of the trainings")
    parser.add_argument("--vlm", type=Path, help="folder of the embedded model; the shipped one if not given")
    parser.add_argument("--only", default=",".join(NETWORKS), help="methods to train")
    parser.add_argument("--rates", default=",".join(f"{rate:g}" for rate in RATES), help="learning rates")
    parser.add_argument("--steps", type=int, default=STEPS)
    given = parser.parse_args(arguments)
    rates = [float(rate) for rate in given.rates.split(",")]
    train(given.work, given.only.split(","), rates, given.vlm, given.steps)


if __name__ == "__main__":
    main()
