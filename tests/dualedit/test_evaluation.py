"""Metrics and calibration: the arithmetic, on answers made by hand."""

import math
import random

import pytest

from dualedit.evaluation import METRICS, Row, exact_match, summarise
from dualedit.training.calibration import Curve, Point, calibrate_alpha, calibrate_threshold


@pytest.mark.parametrize(
    ("answer", "expected", "same"),
    [
        ("Lenovo", "lenovo", True),
        (" lenovo. ", "lenovo", True),
        ("the  new york", "the new york", True),
        ("lenovo think", "lenovo", False),
        ("", "lenovo", False),
        ("len ovo", "lenovo", False),
    ],
)
def test_exact_match_forgives_case_space_and_full_stop_only(answer, expected, same):
    assert exact_match(answer, expected) is same


def _samples(n, seed):
    rng = random.Random(seed)
    names = METRICS[:7]
    return [{name: [rng.random() < 0.8 for _ in range(rng.randint(1, 3))] for name in names} for _ in range(n)]


def test_a_fact_with_many_probes_counts_no_more_than_another():
    metrics, _ = summarise([{"rel": [True]}, {"rel": [False, False, False]}])
    assert metrics["rel"] == 50.0
    assert metrics["v_gen"] is None and metrics["hm"] is None and metrics["avg"] is None


def test_hm_is_harmonic_over_generality_and_look_alikes_and_avg_the_mean_of_the_five():
    one = {"rel": [True], "t_gen": [True], "v_gen": [True, False], "t_loc": [True], "m_loc": [True, False, False, False],
           "hard_image": [True, False, False, False], "hard_question": [False]}  # fmt: skip
    metrics, _ = summarise([one, one])
    assert metrics["hm"] == pytest.approx(3 / (1 / 100 + 1 / 50 + 1 / 25))
    assert metrics["avg"] == pytest.approx((100 + 100 + 50 + 100 + 25) / 5)
    assert summarise([{**one, "hard_image": [False]}] * 2)[0]["hm"] == 0.0


def test_standard_error_of_one_proportion_is_the_textbook_one():
    rights = [True] * 30 + [False] * 10
    _, stderr = summarise([{"rel": [right]} for right in rights])
    p, n = 0.75, 40
    assert stderr["rel"] == pytest.approx(100 * math.sqrt(p * (1 - p) / (n - 1)), rel=1e-6)


def test_row_is_written_in_the_documented_shape():
    metrics, stderr = summarise(_samples(12, 3))
    row = Row("dualedit", 12, metrics, stderr).to_dict()
    assert list(row) == ["method", "scoring", "protocol", "edits", "n", "metrics", "stderr"]
    assert (row["scoring"], row["protocol"], row["edits"], row["n"]) == ("free", "single", 1, 12)
    assert set(row["metrics"]) == set(row["stderr"]) == set(METRICS)
    assert all(0 <= value <= 100 for value in row["metrics"].values())


def _curve(rng, positive=0.1, negative=0.5):
    """Related probes nearer than `positive`, others farther than `negative`; an open gate is right for the first."""
    points = []
    for sample in range(20):
        for metric in METRICS[:7]:
            related = metric in ("rel", "t_gen", "v_gen")
            distance = rng.uniform(0, positive) if related else rng.uniform(negative, 1)
            points.append(Point(sample, metric, distance, open=related, closed=not related, positive=positive, negative=negative))
    return Curve(tuple(points))


def test_threshold_separates_what_can_be_separated():
    curve = _curve(random.Random(1))
    tau, figures = calibrate_threshold(curve)
    related = max(p.distance for p in curve.points if p.open)
    unrelated = min(p.distance for p in curve.points if p.closed)
    assert related <= 1 - tau < unrelated
    assert all(figures[name] == 100 for name in METRICS)
    # the middle of what works, not its edge
    assert 0.2 * (unrelated - related) < (1 - tau) - related < 0.8 * (unrelated - related)


def test_curve_predicts_the_figures_of_any_threshold():
    points = (
        Point(0, "v_gen", 0.2, open=True, closed=False, positive=0.1, negative=0.4),
        Point(0, "v_gen", 0.6, open=True, closed=False, positive=0.1, negative=0.4),
        Point(0, "hard_image", 0.3, open=False, closed=True, positive=0.1, negative=0.4),
    )
    curve = Curve(points)
    assert curve.figures(lambda point: 0.25)["v_gen"] == 50
    assert curve.figures(lambda point: 0.25)["hard_image"] == 100
    assert curve.figures(lambda point: 0.7)["v_gen"] == 100
    assert curve.figures(lambda point: 0.7)["hard_image"] == 0


def test_alpha_moves_the_radius_between_the_two_samples():
    tight = _curve(random.Random(2), positive=0.1, negative=0.5)
    alpha, figures = calibrate_alpha(tight)
    radius = alpha * 0.1 + (1 - alpha) * 0.5
    assert max(p.distance for p in tight.points if p.open) <= radius
    assert radius <= 0.5 and figures["hard_image"] == 100 and figures["v_gen"] == 100
