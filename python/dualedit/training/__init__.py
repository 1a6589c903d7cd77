"""Training DualEdit's adapters and setting the editors' thresholds, on facts kept apart from the test's.

`train` is the command `dualedit train`: any model, any data set, many processes, checkpoints. `optimise` and
`train_adapters` are the small loop that the embedded model's editors come from.
"""

from .calibration import (
    Curve,
    Sweep,
    calibrate_alpha,
    calibrate_threshold,
    load_calibration,
    measure_curve,
    plot_calibration,
    save_calibration,
    sweep_alpha,
    sweep_threshold,
    with_threshold,
)
from .dualedit import TrainSettings, optimise, train_adapters
from .loop import Outcome, train
from .recipe import Recipe, read_recipe
from .routing_key import fit_pooled_key, train_routing_key

__all__ = [
    "Curve",
    "Outcome",
    "Recipe",
    "Sweep",
    "TrainSettings",
    "calibrate_alpha",
    "calibrate_threshold",
    "load_calibration",
    "measure_curve",
    "optimise",
    "plot_calibration",
    "save_calibration",
    "sweep_alpha",
    "sweep_threshold",
    "read_recipe",
    "train",
    "train_adapters",
    "fit_pooled_key",
    "train_routing_key",
    "with_threshold",
]
