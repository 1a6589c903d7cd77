"""The benchmark `pictures` on made-up concepts: splits, artists' roles, what each kind of question is."""

import io

import numpy as np
import pytest
from dualedit.evaluation import Plan
from dualedit.evaluation.results import results_of
from dualedit.smol.benchmark import SPLITS, Pictures, attributes_of
from dualedit.smol.pictures import SETS, Concept
from dualedit.smol.views import view
from dualedit.smol.wordings import KINDS, QUESTIONS
from PIL import Image, ImageDraw

SIDE = 48
THINGS = ("twemoji", "noto", "emojione", "fxemoji", "fluent-emoji-flat")
FLAGS = ("flag", "cif", "flagpack", "circle-flags")


def drawing(number: int, artist: int) -> Image.Image:
    """A square whose place and colour tell the thing, and whose edge tells the artist."""
    image = Image.new("RGB", (SIDE, SIDE), "white")
    left, top = 6 + 3 * (number % 6), 6 + 3 * (number // 6 % 6)
    colour = (37 * number % 200, 91 * number % 200, 53 * number % 200)
    ImageDraw.Draw(image).rectangle(
        (left, top, left + 16, top + 16), fill=colour, outline=(40 * artist, 0, 0)
    )
    return image


@pytest.fixture(scope="module")
def concepts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    result = []
    for number in range(60):
        flag = number % 3 == 0
        name = f"{'land' if flag else 'thing'} {number}"
        pictures = {}
        for artist, set_name in enumerate(FLAGS if flag else THINGS):
            path = folder / f"{set_name}-{number}.png"
            drawing(number, artist).save(path)
            pictures[set_name] = path
        facts = {"country": name, "capital": f"city {number}"} if flag else {"name": name}
        accepted = {key: (value,) for key, value in facts.items()}
        family = "flags" if flag else ("animals", "food")[number % 2]
        subgroup = "country-flag" if flag else ("animal-bird", "drink")[number % 2]
        result.append(
            Concept(name, family, subgroup, (name,), facts, accepted, pictures, seen=number % 15 != 1)
        )
    return result


@pytest.fixture(scope="module")
def benchmark(concepts):
    return Pictures(concepts)


def test_every_concept_is_in_one_split_and_another_seed_draws_others(benchmark, concepts):
    splits = {split: benchmark.entities(split) for split in SPLITS}
    everything = [entity for entities in splits.values() for entity in entities]
    assert len(everything) == len(set(everything)) == len(concepts)
    assert {concepts[e].seen for e in splits["unseen"]} == {False}
    assert all(concepts[e].seen for split in SPLITS[:3] for e in splits[split])
    assert Pictures(concepts).entities("test") == splits["test"]
    assert Pictures(concepts, seed=1).entities("test") != splits["test"]
    flags = Pictures(concepts, families=("flags",))
    assert flags.entities("test") == [e for e in splits["test"] if concepts[e].family == "flags"]


@pytest.mark.parametrize("split", SPLITS)
def test_an_edit_shows_a_picture_of_its_splits_own_artists_and_no_test_artist_is_trained_on(benchmark, split):
    own = {"training": "training", "validation": "validation"}.get(split, "test")
    for sample in benchmark.samples(split)[:12]:
        shown = set_of(sample.request.image_source)
        assert SETS[shown].role == own
        artists = [set_of(p.image_source) for p in sample.generality["v_gen"] if p.kind == "artist"]
        assert len(artists) == 2 and len({SETS[s].artist for s in (shown, *artists)}) == 3
        assert all(SETS[s].role in ("training", "validation") for s in artists)
        pictures = [p.image_source for p in (*sample.locality["hard_image"], *sample.locality["m_loc"])]
        if split in ("training", "validation"):
            assert all(SETS[set_of(path)].role != "test" for path in pictures)


def set_of(path: str) -> str:
    stem = path.rsplit("/", 1)[1]
    return stem.rsplit("-", 1)[0]


def test_look_alikes_are_other_things_of_the_subgroup_by_the_artist_that_the_kind_says(benchmark, concepts):
    for sample in benchmark.samples("test", 20):
        concept = concepts[sample.entity]
        own = set_of(sample.request.image_source)
        other = next(set_of(p.image_source) for p in sample.generality["v_gen"] if p.kind == "artist")
        found = {p.kind: p for p in sample.locality["hard_image"]}
        assert set(found) == {"random", "nearest", "same_artist"}
        for kind, probe in found.items():
            assert probe.fact[0] != sample.entity and probe.prompt == sample.request.prompt
            assert concepts[probe.fact[0]].subgroup == concept.subgroup
            assert set_of(probe.image_source) == (own if kind == "same_artist" else other)
        apart = {
            kind: np.abs(
                np.asarray(found[kind].image, float) - np.asarray(sample.request.image, float)
            ).mean()
            for kind in ("random", "nearest")
        }
        assert apart["nearest"] <= apart["random"] + 4  # compared on thumbnails, so not to the last pixel


def test_the_new_answer_is_not_true_and_wordings_of_the_test_are_not_the_editors(benchmark, concepts):
    for sample in benchmark.samples("test"):
        concept = concepts[sample.entity]
        true = {text for texts in concept.accepted.values() for text in texts}
        assert sample.request.target not in true | {KINDS.get(concept.subgroup)}
        asked = {p.prompt for p in sample.generality["t_gen"]}
        assert not asked & {sample.request.prompt, *sample.rephrases} and len(asked) == 2
        assert all(p.fact[0] == sample.entity for p in sample.locality["hard_question"])
        for probe in sample.portability.get("in_words", ()):
            assert concept.name in probe.prompt and probe.image_source is None


def test_a_fact_is_drawn_the_same_whatever_else_is_drawn(benchmark, concepts):
    few, many = benchmark.samples("test", 3), Pictures(concepts).samples("test", 9)
    assert few == many[:3]
    assert [sample.fact for sample in few] == benchmark.facts("test")[:3]  # as look-alikes name theirs
    facts = benchmark.facts("test")
    assert len(set(facts)) == len(facts)
    assert all(attribute in attributes_of(concepts[entity]) for entity, attribute in facts)


def test_wrong_names_and_counts_are_told(benchmark, concepts):
    with pytest.raises(ValueError, match="split='all'"):
        benchmark.entities("all")
    with pytest.raises(ValueError, match="has .* facts"):
        benchmark.samples("test", 10**6)
    with pytest.raises(ValueError, match="families=.*choose from"):
        Pictures(concepts, families=("cars",))


@pytest.mark.parametrize("as_card", [False, True])
def test_a_view_has_another_ground_and_the_same_drawing(as_card):
    image = drawing(7, 0)
    rng = np.random.default_rng(3)
    seen = [np.asarray(Image.open(io.BytesIO(view(image, rng, as_card)))) for _ in range(8)]
    assert all(pixels.shape == (SIDE, SIDE, 3) for pixels in seen)
    corners = {tuple(pixels[0, 0]) for pixels in seen}
    assert len(corners) == 8 and (255, 255, 255) not in corners
    white = [float((pixels > 200).all(-1).mean()) for pixels in seen]
    # The white around the drawing stays on a card and goes away without one.
    assert (np.mean(white) > 0.2) == as_card


def test_a_figure_of_a_kind_stands_beside_the_one_of_all_kinds():
    def probe(metric, right, kind=""):
        return {"metric": metric, "kind": kind, "correct": right, "contains": right}

    units = [
        {"phase": "after", "sample": n, "costs": {}, "probes": [
            probe("rel", True), probe("v_gen", True, "view"), probe("v_gen", n == 0, "artist")]}
        for n in range(4)
    ]  # fmt: skip
    row = results_of(units, "any", Plan(more=False, costs=False), 4)[0].row
    assert row.metrics["v_gen_view"] == 100 and row.metrics["v_gen_artist"] == 25
    assert row.metrics["v_gen"] == 62.5 and "hard_image_nearest" not in row.metrics


def test_every_attribute_is_asked_in_words_of_its_own():
    for words in QUESTIONS.values():
        asked = [words.question, *words.rephrases, *words.test]
        assert len(set(asked)) == len(asked) == 7
