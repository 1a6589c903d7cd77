"""Intervals, differences and the kinder match, by hand."""

import math
import random

import pytest
import torch
from dualedit.evaluation import METRICS, contains_match, difference, intervals, summarise, wilson
from dualedit.evaluation.forcing import token_accuracy
from dualedit.evaluation.metrics import figures_of, retention


@pytest.mark.parametrize(
    ("answer", "expected", "there"),
    [
        ("It is a Lenovo.", "lenovo", True),
        ("lenovo, i think", "Lenovo", True),
        ("lenovos", "lenovo", False),
        ("new york city", "york", True),
        ("new  york", "new york", True),
        ("c++", "c++", True),
        ("written in c++ then", "c++", True),
        ("anything", "", False),
        ("", "", True),
        ("", "lenovo", False),
    ],
)
def test_contains_match_wants_whole_words(answer, expected, there):
    assert contains_match(answer, expected) is there


def test_token_accuracy_is_a_share_of_positions():
    assert token_accuracy(torch.tensor([4, 5, 6, 7]), torch.tensor([4, 9, 6, 8])) == 0.5


def _scores(rights):
    return [{"rel": [right]} for right in rights]


def test_wilson_as_tables_have_it():
    """Of Brown, Cai and DasGupta (2001) and by the closed form for none wrong: n / (n + z²)."""
    assert wilson(100.0, 100) == pytest.approx([100 * 100 / (100 + 1.959964**2), 100.0])
    assert wilson(0.0, 10) == pytest.approx([0.0, 100 * 1.959964**2 / (10 + 1.959964**2)])
    assert wilson(75.0, 40) == pytest.approx([59.81, 85.81], abs=0.01)


def test_a_proportion_has_wilsons_interval_over_facts():
    # Each fact one probe: of 40 facts; five probes that agree within each fact: still 40.
    one = _scores([1.0] * 30 + [0.0] * 10)
    alike = [{"rel": [right] * 5} for right in [1.0] * 30 + [0.0] * 10]
    expected = wilson(75.0, 40)
    for scores in (one, alike):
        assert intervals(scores)["rel"] == pytest.approx(expected, abs=1e-9)
    # Probes that have nothing to do with each other are worth more, up to their number.
    rng = random.Random(3)
    loose = [{"rel": [float(rng.random() < 0.75) for _ in range(5)]} for _ in range(400)]
    low, high = intervals(loose)["rel"]
    wide = wilson(figures_of(loose)["rel"], 400)
    assert high - low < 0.6 * (wide[1] - wide[0])


def test_all_right_is_not_certain():
    scores = [{name: [1.0, 1.0] for name in METRICS[:7]} for _ in range(100)]
    found = intervals(scores)
    assert all(found[name] == pytest.approx([96.3, 100.0], abs=0.01) for name in METRICS)


def test_intervals_are_drawn_alike_for_the_same_seed():
    rng = random.Random(7)
    scores = [{name: [rng.random()] for name in METRICS[:7]} for _ in range(30)]
    assert intervals(scores, seed=3) == intervals(scores, seed=3)
    assert intervals(scores, seed=3)["avg"] != intervals(scores, seed=4)["avg"]
    nothing = intervals(_scores([0.5] * 30))
    assert nothing["hm"] is None and nothing["t_gen"] is None
    assert intervals(scores[:1]) == dict.fromkeys(METRICS)


def test_the_intervals_of_combined_figures_hold_the_figures():
    rng = random.Random(5)
    scores = [{name: [rng.random() < 0.7] * 2 for name in METRICS[:7]} for _ in range(50)]
    figures, bounds = figures_of(scores), intervals(scores, ("no_image",))
    assert bounds["no_image"] is None
    for name in METRICS:
        low, high = bounds[name]
        assert low < figures[name] < high
    assert bounds["avg"][1] - bounds["avg"][0] < bounds["rel"][1] - bounds["rel"][0]  # a mean of five


def test_a_difference_is_taken_in_pairs():
    """One method is right wherever the other is, and once more: the pairs leave little doubt."""
    one = [1.0, 0.0] * 50
    other = [*one[:10], *(0.0,) * 10, *one[20:]]
    gap, (low, high) = difference(_scores(one), _scores(other), "rel")
    assert gap == pytest.approx(5)
    assert 0 < low < 5 < high < 12  # unpaired, two deviations of 7 would hold zero
    assert difference(_scores(other), _scores(one), "rel")[0] == pytest.approx(-5)
    with pytest.raises(ValueError, match="not measured"):
        difference(_scores(one), _scores(other), "v_gen")
    with pytest.raises(ValueError, match="pass the same"):
        difference(_scores(one), _scores(other[1:]), "rel")


def test_the_jackknife_leaves_out_a_fact_at_a_time():
    rng = random.Random(2)
    scores = [
        {name: [rng.random() for _ in range(rng.randint(0, 3))] for name in (*METRICS[:7], "no_image")}
        for _ in range(9)
    ]
    metrics, stderr = summarise(scores, ("no_image",))
    for name in metrics:
        out = [figures_of([*scores[:i], *scores[i + 1 :]], ("no_image",))[name] for i in range(9)]
        centre = sum(out) / 9
        assert stderr[name] == pytest.approx(math.sqrt(8 / 9 * sum((x - centre) ** 2 for x in out)))


def test_retention_of_shares_of_tokens():
    after = [{"rel": [1.0], "t_gen": [0.5, 1.0]}, {"rel": [0.0]}, {"rel": [0.5], "m_loc": [1.0]}]
    end = [{"rel": [0.5], "t_gen": [1.0, 0.0]}, {"rel": [1.0]}, {"rel": [1.0], "m_loc": [0.0]}]
    # (0.5 + 0.5 + 0) / 2.5; nothing learned; more than was learned counts as all of it
    assert retention(after, end) == [pytest.approx(0.4), None, 1.0]
