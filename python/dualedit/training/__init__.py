"""Training DualEdit's adapters and setting the editors' thresholds, on facts kept apart from the test's."""

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

__all__ = [
    "Curve",
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
    "train_adapters",
    "with_threshold",
]
