"""The studies' statistics on made-up distances, the recommendation, the journal, and the page."""

import json
import math
import re

import numpy as np
import pytest
import torch
from dualedit import inject_balancedit, inject_dualedit
from dualedit.analysis import gate_study as gates
from dualedit.analysis.asking_layers import Questions, layers_to_study
from dualedit.analysis.layer_grid import effect_summary, proxy_of_pairs, rank_correlation
from dualedit.analysis.modality_attention import heat_map
from dualedit.analysis.recommendation import against_the_proxy, recommend_dualedit, sensitivity_peaks
from dualedit.analysis.studies import Plan, Studies
from dualedit.analysis.study_journal import StudyJournal
from dualedit.analysis.study_page import render_analysis
from dualedit.analysis.trained_pairs import pair_summary, train_pair, with_model_answers
from dualedit.runtime.sequence import Prompt
from dualedit.toy.model import load_embedded
from dualedit.toy.samples import edit_samples
from dualedit.toy.world import World
from dualedit.training.recipe import Recipe

SMALL = Plan(questions=2, facts=4, writes=2, batch=2, most_layers=4, heat_maps=1)


def fact(related, hard, unrelated, near=(0.1,), far=(4.0,)):
    names = ["related"] * len(related) + ["hard"] * len(hard) + ["unrelated"] * len(unrelated)
    names += ["near"] * len(near) + ["far"] * len(far)
    return {"relations": names, "key": [[*related, *hard, *unrelated, *near, *far]]}


def test_rates_and_areas():
    units = [fact([0.1, 0.3], [0.2], [0.9, None]), fact([0.1, 0.3], [0.6], [0.8])]
    found = gates.reached(units, "key", 0)
    assert sorted(found.ratio[found.relation == 2]) == [0.8, 0.9]
    # Of the pairs with a hard question 0.3 > 0.2 twice, of eight with all others none.
    assert gates.area(found, ("hard",)) == pytest.approx(6 / 8)
    assert gates.area(found, ("unrelated",)) == 1
    radius, score = gates.best_radius(found)
    assert 0.3 <= radius < 0.6 and score == pytest.approx((1 + (0.5 + 1) / 2) / 2)
    assert gates.rates(found, radius) == {"related": 1, "hard": 0.5, "unrelated": 1}
    curve = np.array(gates.roc(found))
    assert (np.diff(curve, axis=0) >= 0).all() and curve[-1].tolist() == [1, 1]


def test_a_radius_is_judged_by_facts_that_it_was_not_chosen_on():
    # By itself every half is parted by a radius of its own; neither fits the other half.
    units = [fact([0.1], [0.2], [0.2]), fact([0.5], [0.9], [0.9])] * 3
    found = gates.reached(units, "key", 0)
    told = gates.crossed(found)
    assert told["related"] == pytest.approx(0.5) and told["hard"] == pytest.approx(0.5)


def test_alpha_follows_the_radii():
    units = [fact([1.0, 1.5], [3.0], [3.5], near=(0.5,), far=(4.0,)) for _ in range(4)]
    alpha, told = gates.best_alpha(units, "key", 0)
    radius = alpha * 0.5 + (1 - alpha) * 4.0
    assert 1.5 <= radius < 3.0 and told == {"related": 1, "hard": 1, "unrelated": 1}


def test_intervals_count_facts():
    rate, low, high = gates.with_intervals({"related": 0.9, "radius": 3.0}, 10)["related"]
    assert rate == 90 and low == pytest.approx(59.6, abs=0.1) and high == pytest.approx(98.2, abs=0.1)


def test_pairs_take_the_gate_of_the_earlier_layer():
    unit = {group: [[0.1, 0.1], [0.4, 0.2]] for group in ("text", "image", "all")}
    rows = proxy_of_pairs(effect_summary([unit, unit]), [0.6, None], [2, 5])
    by = {(row["text_layer"], row["vis_layer"]): row for row in rows}
    assert by[5, 2]["gate"] == by[2, 5]["gate"] == by[2, 2]["gate"] == 0.6 and by[5, 5]["gate"] == 0.5
    assert by[5, 5]["effect"] == pytest.approx(1 - 0.7 * 0.7)
    assert rows[0] is by[5, 5] and rows[-1] is by[2, 2]


def test_rank_correlation():
    assert rank_correlation([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert rank_correlation([1, 1, 2, 3], [5, 6, 7, 8]) == pytest.approx(0.9486833)
    assert math.isnan(rank_correlation([1, 1], [1, 2]))


def test_trained_pairs_go_before_the_proxy():
    pairs = [
        {"text_layer": t, "vis_layer": 1, "proxy": p, "effect": 0.5, "gate": 0.5}
        for t, p in ((0, 1.9), (1, 1))
    ]
    row = {"vis_layer": 1, "score_stderr": 1.0, "reliability": 50.0}
    trained = [row | {"text_layer": 0, "score": 40.0}, row | {"text_layer": 1, "score": 80.0}]
    units = [fact([0.1], [0.5], [0.9]) for _ in range(4)]
    units = [{"relations": u["relations"], "cosine/last": u["key"] * 2} for u in units]
    told = recommend_dualedit(pairs, trained, units, [0, 1])
    assert told["arguments"] == {"text_layer": 1, "vis_layer": 1, "threshold": pytest.approx(0.7)}
    assert told["gate"]["related"][0] == 100
    assert recommend_dualedit(pairs, [], units, [0, 1])["arguments"]["text_layer"] == 0
    useless = [r | {"reliability": 0.0} for r in trained]
    assert recommend_dualedit(pairs, useless, units, [0, 1])["arguments"]["text_layer"] == 0
    assert against_the_proxy(pairs * 2, trained * 2)["rank_correlation"] == -1


def test_peaks():
    units = [{"text": [[0.1], [0.9]], "image": [[0.5], [0.2]], "all": [[1.0], [0.3]]} for _ in range(6)]
    told = sensitivity_peaks(units, [4, 8], 0)
    assert told == {"peak": {"text": 8, "image": 4, "all": 4}, "apart": 1.0}


def test_layers_are_spread():
    assert layers_to_study(8, 12) == list(range(8))
    found = layers_to_study(30, 12)
    assert len(found) == 12 and found[0] == 0 and found[-1] == 29


def test_heat_maps_are_grids_of_the_picture():
    image = torch.ones(1, 12, dtype=torch.bool)
    questions = Questions({}, Prompt(~image, image, torch.tensor([11]), torch.tensor([11])))
    attention = torch.arange(12.0)[None]
    assert np.array(heat_map(attention, questions, 0, aspect=4 / 3)).shape == (3, 4)
    assert (
        heat_map(
            attention[:, :11],
            Questions({}, Prompt(~image[:, :11], image[:, :11], torch.tensor([10]), torch.tensor([10]))),
            0,
        )
        is None
    )  # a prime


# ---------------------------------------------------------------------- the journal


def test_a_journal_goes_on(tmp_path):
    file, asked = tmp_path / "j.jsonl", []

    def measure():
        asked.append(1)
        return {"value": 1.5, "none": None}

    first = StudyJournal(file, {"--model": "toy", "sigmas": (1, 2)})
    assert first.get("gate", "0", measure) == first.get("gate", "0", measure) == {"value": 1.5, "none": None}
    with file.open("a") as opened:
        opened.write('{"study": "gate", "na')  # stopped while it wrote
    again = StudyJournal(file, {"--model": "toy", "sigmas": [1, 2]})
    assert again.knows("gate", "0") and again.get("gate", "0", measure)["value"] == 1.5 and len(asked) == 1
    again.get("gate", "1", measure)
    assert set(StudyJournal(file, {"--model": "toy", "sigmas": [1, 2]}).of("gate")) == {"0", "1"}
    with pytest.raises(ValueError, match="--model 'toy', now 'smol'"):
        StudyJournal(file, {"--model": "smol", "sigmas": [1, 2]})
    file.write_text("something else\n")
    with pytest.raises(ValueError, match="something else"):
        StudyJournal(file, {})


# ---------------------------------------------------------------------- all of it on the embedded model


@pytest.fixture(scope="module")
def world():
    return load_embedded(), edit_samples(World(0), "train", 4)


class Stopped(Exception):
    pass


@pytest.fixture(scope="module")
def analysed(world, tmp_path_factory):
    """A run that was stopped in each study, and went on."""
    (model, processor), samples = world
    file = tmp_path_factory.mktemp("studies") / "records.jsonl"
    before = {name: p.clone() for name, p in model.named_parameters()}
    attention = model.config.text_config._attn_implementation
    for limit in (1, 3, 3):
        journal, count = StudyJournal(file, {"a": 1}), [0]
        own = journal._line

        def stopping(record, own=own, count=count, limit=limit):
            own(record)
            count[0] += 1
            if count[0] == limit:
                raise Stopped

        journal._line = stopping
        with pytest.raises(Stopped):
            Studies(model, processor, samples, SMALL, journal, progress=False).run()
    found = Studies(model, processor, samples, SMALL, StudyJournal(file, {"a": 1}), progress=False).run()
    whole = Studies(model, processor, samples, SMALL, StudyJournal(None, {}), progress=False).run()
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert model.config.text_config._attn_implementation == attention
    return found, whole


def test_a_stopped_run_finds_the_same(analysed):
    found, whole = ({**told, "seconds": 0} for told in analysed)
    assert json.loads(json.dumps(found)) == json.loads(json.dumps(whole))


def test_recommendations_are_arguments(analysed, world):
    (model, processor), _ = world
    told = analysed[0]["recommendation"]
    for method, inject in (("dualedit", inject_dualedit), ("balancedit", inject_balancedit)):
        arguments = told[method]["arguments"]
        inject(model, **arguments).unload()
        assert told[method]["reasons"] and told[method]["gate"]["facts"] == 4
    assert told["dualedit"]["arguments"]["text_layer"] in analysed[0]["layers"]


def test_fewer_layer_runs(analysed):
    told = analysed[0]["sensitivity"]
    assert told["resumed"] and 2 * told["layer_runs"] <= told["layer_runs_of_a_plain_way"]


def test_the_page_holds_the_figures(analysed, world):
    page = render_analysis(analysed[0] | {"arguments": {"--model": "<toy>"}}, world[1])
    assert (
        "<script" not in page
        and "&lt;toy&gt;" in page
        and "http" not in re.sub(r"http://www.w3.org[^\"]*", "", page)
    )
    assert page.count("<svg class") >= 8
    for value in analysed[0]["recommendation"]["dualedit"]["arguments"].values():
        assert repr(value) in page


def test_a_pair_is_trained_and_measured(world):
    (model, processor), samples = world
    weights = {name: p.clone() for name, p in model.named_parameters()}
    recipe = Recipe(
        text_layer=2, vis_layer=5, mid_dim=16, num_heads=2, steps=2, batch_size=2, learning_rate=1e-3,
        text_locality=0.0, image_locality=0.0,
    )  # fmt: skip
    held_out = with_model_answers(None, samples)
    assert all(len(probes) == 1 for s in held_out for probes in s.locality.values())
    unit = train_pair(model, processor, samples, held_out, recipe)
    assert unit["steps"] == 2 and all(len(unit[name]) == 4 for name in ("reliability", "locality", "open"))
    told = pair_summary(unit)
    assert told["locality"] > 90 and told["reliability"] < 50  # two steps teach nothing, and break little
    assert {name: p for name, p in model.named_parameters()}.keys() == weights.keys()
    assert all(torch.equal(weights[name], p) for name, p in model.named_parameters())
