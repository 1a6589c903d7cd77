"""Training DualEdit's adapters and setting the editors' thresholds, on facts kept apart from the test's.

`train` is the command `dualedit train`: any model, any data set, many processes, checkpoints. The embedded
model's editors are trained by it, too.
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
    sweep_reach,
    sweep_threshold,
    with_threshold,
)
from .copying import Copying, start_by_copying
from .loop import Outcome, train
from .pooled_key import fit_pooled_key
from .recipe import Recipe, read_recipe

__all__ = [
    "Copying",
    "Curve",
    "Outcome",
    "Recipe",
    "Sweep",
    "calibrate_alpha",
    "calibrate_threshold",
    "load_calibration",
    "measure_curve",
    "plot_calibration",
    "save_calibration",
    "sweep_alpha",
    "sweep_reach",
    "sweep_threshold",
    "read_recipe",
    "train",
    "fit_pooled_key",
    "start_by_copying",
    "with_threshold",
]
