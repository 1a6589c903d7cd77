"""Metrics and calibration: the arithmetic, on answers made by hand."""

import math
import random

import pytest
from dualedit import Edit, EditRequest, EditSample, Probe
from dualedit.evaluation import METRICS, Asked, Row, evaluate_batch, exact_match, summarise
from dualedit.evaluation.single import probes_of
from dualedit.training.calibration import Curve, Point, calibrate_alpha, calibrate_threshold
from PIL import Image


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
    return [
        {name: [rng.random() < 0.8 for _ in range(rng.randint(1, 3))] for name in names} for _ in range(n)
    ]


def test_a_fact_with_many_probes_counts_no_more_than_another():
    metrics, _ = summarise([{"rel": [True]}, {"rel": [False, False, False]}])
    assert metrics["rel"] == 50.0
    assert metrics["v_gen"] is None and metrics["hm"] is None and metrics["avg"] is None


def test_hm_is_harmonic_over_generality_and_look_alikes_and_avg_the_mean_of_the_five():
    quarter = [True, False, False, False]
    one = {"rel": [True], "t_gen": [True], "v_gen": [True, False], "t_loc": [True], "m_loc": quarter,
           "hard_image": quarter, "hard_question": [False]}  # fmt: skip
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
    """Related probes nearer than `positive`, others farther than `negative`; an open gate suits the first."""
    points = []
    for sample in range(20):
        for metric in METRICS[:7]:
            related = metric in ("rel", "t_gen", "v_gen")
            distance = rng.uniform(0, positive) if related else rng.uniform(negative, 1)
            points.append(
                Point(
                    sample,
                    metric,
                    distance,
                    open=related,
                    closed=not related,
                    positive=positive,
                    negative=negative,
                )
            )
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


# ---------------------------------------------------------------------- many edits at once


class FakeEditor:
    """Answers a stored edit's target to every question about the same (image, prompt), else "old"."""

    def __init__(self, leaks=False):
        self.stored, self.leaks, self._next = {}, leaks, 0

    @property
    def edits(self):
        return list(self.stored.values())

    def edit(self, image, prompt, target, rephrases=None, keep_failed=False):
        self._next += 1
        self.stored[self._next] = Edit(self._next, prompt, target, 0.0, "", 0.0)
        self.key = {**getattr(self, "key", {}), (image.getpixel((0, 0)), prompt): target}
        return self.stored[self._next]

    def remove(self, edit_id):
        del self.stored[edit_id]

    def answer_many(self, questions, max_new_tokens=20):
        hits = self.key if self.stored else {}
        return [
            hits.get((image.getpixel((0, 0)), prompt), "leak" if self.leaks else "old")
            for image, prompt in questions
        ]


def _sample(entity, target):
    image = Image.new("RGB", (2, 2), (entity, 0, 0))
    other = Image.new("RGB", (2, 2), (entity + 1, 0, 0))
    return EditSample(
        EditRequest(image, "who ?", target),
        {"v_gen": [Probe(image, "who ?", target)]},
        {"hard_image": [Probe(other, "who ?", "x", (entity + 1, "who"))], "t_loc": [Probe(image, "what ?")]},
        family="who",
        entity=entity,
    )


def _before(samples):
    return [[Asked(metric, probe, "old") for metric, probe in probes_of(sample)] for sample in samples]


def test_a_look_alike_with_an_edit_of_its_own_has_to_get_that_answer():
    samples = [_sample(1, "ann"), _sample(2, "bob")]
    editor = FakeEditor()
    found = evaluate_batch(editor, samples, "fake", progress=False, before=_before(samples))
    assert found.row.edits == 2 and found.row.protocol == "batch" and not editor.edits
    expected = {(r["sample"], r["metric"]): r["expected"] for r in found.records}
    assert expected[0, "hard_image"] == "bob"  # entity 2 is edited too
    assert expected[1, "hard_image"] == "old"  # entity 3 is not
    assert found.row.metrics["v_gen"] == found.row.metrics["hard_image"] == found.row.metrics["t_loc"] == 100


def test_batch_figures_fall_when_edits_leak_and_only_what_is_asked_is_counted():
    samples = [_sample(entity, "ann") for entity in (10, 20, 30)]
    found = evaluate_batch(
        FakeEditor(leaks=True), samples, "f", asked=2, progress=False, before=_before(samples)
    )
    assert (found.row.n, found.row.edits) == (2, 3)
    assert found.row.metrics["t_loc"] == found.row.metrics["hard_image"] == 0
    assert found.row.metrics["rel"] == 100


def test_a_fact_edited_twice_is_refused():
    with pytest.raises(ValueError, match="twice"):
        evaluate_batch(FakeEditor(), [_sample(1, "ann"), _sample(1, "bob")], "f", progress=False)
