"""Training DualEdit's adapters and setting the editors' thresholds, on facts kept apart from the test's."""

from .calibration import Curve, calibrate_alpha, calibrate_threshold, measure_curve
from .dualedit import TrainSettings, optimise, train_adapters
from .routing_key import train_routing_key

__all__ = [
    "Curve",
    "TrainSettings",
    "calibrate_alpha",
    "calibrate_threshold",
    "measure_curve",
    "optimise",
    "train_adapters",
    "train_routing_key",
]
