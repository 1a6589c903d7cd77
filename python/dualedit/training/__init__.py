"""Training DualEdit's adapters and setting the editors' thresholds, on facts kept apart from the test's.

`train` is the command `dualedit train`: any model, any data set, many processes, checkpoints. `optimise` and
`train_adapters` are the small loop that the embedded model's editors come from.
"""

from .calibration import Curve, calibrate_alpha, calibrate_threshold, measure_curve
from .dualedit import TrainSettings, optimise, train_adapters
from .loop import Outcome, train
from .recipe import Recipe, read_recipe

__all__ = [
    "Curve",
    "Outcome",
    "Recipe",
    "TrainSettings",
    "calibrate_alpha",
    "calibrate_threshold",
    "measure_curve",
    "optimise",
    "read_recipe",
    "train",
    "train_adapters",
]
