"""The demo world keeps its promises: determinism, splits, look-alikes, vocabulary, honest edit samples."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from dualedit.toy import words as world_text
from dualedit.toy.logos import STROKES, differences, has_contrast, look_alike
from dualedit.toy.model import AGAIN, NOTE, build_processor, format_prompt
from dualedit.toy.samples import edit_samples
from dualedit.toy.scenes import HELD_OUT, digit_images, draw_digit, draw_scene
from dualedit.toy.world import ATTRIBUTES, QUESTIONS, World, answer_vocabulary


@pytest.fixture(scope="module")
def world() -> World:
    return World(0)


@pytest.fixture(scope="module")
def tokenizer():
    return build_processor().tokenizer


def test_without_scikit_learn_only_digits_are_missing(world, monkeypatch):
    from dualedit.toy.pictures import sample_pictures

    whole = sample_pictures()
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    digit_images.cache_clear()
    fewer = sample_pictures()
    assert [p.file for p in whole] == [*(p.file for p in fewer), "digit.png"]
    assert all(one.image.tobytes() == other.image.tobytes() for one, other in zip(whole, fewer, strict=False))
    with pytest.raises(ImportError, match=r"scikit-learn is missing.*dualedit-kernels\[toy\]"):
        edit_samples(world, "test", 20)


def _facts(world: World) -> list[dict[str, str]]:
    return [{a: world.answer(e, a) for a in ATTRIBUTES} for e in range(len(world.logos))]


def _pixels(world: World, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    pictures = [world.render(5, rng), world.scene(rng)[0], world.digit(rng)[0]]
    return np.stack([np.asarray(picture) for picture in pictures])


def test_same_seed_same_world_and_pictures(world):
    again = World(0)
    assert again.logos == world.logos and again.family == world.family and _facts(again) == _facts(world)
    assert (_pixels(world, 3) == _pixels(again, 3)).all()
    assert (_pixels(world, 3) != _pixels(world, 4)).any(axis=(1, 2, 3)).all()


def test_other_seed_other_logos_and_facts_same_words(world):
    other = World(1)
    assert not set(other.logos) & set(world.logos)
    same = [a == b for a, b in zip(_facts(world), _facts(other), strict=True)]
    assert not any(same)
    for attribute in ATTRIBUTES:
        words = set(answer_vocabulary(attribute))
        assert {fact[attribute] for fact in _facts(world)} | {
            fact[attribute] for fact in _facts(other)
        } <= words


def test_splits_and_families_are_disjoint(world):
    train, test = world.entities("train"), world.entities("test")
    assert (len(train), len(test)) == (320, 200)
    assert not set(train) & set(test) and len(world.logos) == 520
    assert not {world.family[e] for e in train} & {world.family[e] for e in test}
    with pytest.raises(ValueError, match="split='dev'"):
        world.entities("dev")


def test_no_two_logos_look_the_same_and_lines_can_be_seen(world):
    assert len(set(world.logos)) == len(world.logos)
    assert all(has_contrast(logo) and 4 <= len(logo.strokes) <= 6 for logo in world.logos)
    # Unit segments between neighbouring points never cover one another, so other strokes are another drawing.
    assert len({frozenset(ends) for ends in STROKES}) == len(STROKES) == 20
    assert all(max(abs(a - c), abs(b - d)) == 1 for (a, b), (c, d) in STROKES)


def test_look_alikes_differ_in_one_thing_within_the_family_only(world):
    for entity, logo in enumerate(world.logos):
        alike = world.look_alikes(entity)
        assert alike and entity not in alike
        for other in alike:
            (change,) = differences(logo, world.logos[other])
            assert world.family[other] == world.family[entity]
            assert len(logo.strokes ^ world.logos[other].strokes) == (2 if change == "strokes" else 0)
    strangers = [
        (a, b)
        for a in range(len(world.logos))
        for b in range(a)
        if world.family[a] != world.family[b] and look_alike(world.logos[a], world.logos[b])
    ]
    assert strangers == []


def test_a_look_alike_is_another_picture(world):
    """Drawn under the same conditions, a logo is the same picture and a look-alike is not."""
    for entity in range(0, 520, 40):
        other = world.look_alikes(entity)[0]
        one, same, changed = (
            np.asarray(world.render(e, np.random.default_rng(9)), dtype=int) for e in (entity, entity, other)
        )
        assert (one == same).all()
        assert (abs(one - changed).max(axis=2) > 40).sum() >= 8, (entity, other)


def test_facts_differ_within_a_family_and_brands_are_unique(world):
    for family in set(world.family):
        members = [e for e, f in enumerate(world.family) if f == family]
        assert 3 <= len(members) <= 5
        for attribute in ATTRIBUTES:
            assert len({world.answer(e, attribute) for e in members}) == len(members)
    assert len({world.answer(e, "brand") for e in range(520)}) == 520


def test_wordings_are_enough_and_distinct():
    every = [wording for wordings in QUESTIONS.values() for wording in wordings.all]
    assert len(set(every)) == len(every)
    assert all(len(w.test) == 2 and len(w.rephrases) >= 3 for w in QUESTIONS.values())
    assert len(world_text.text_facts()) >= 60
    assert all(len(set(fact.questions)) >= 3 for fact in world_text.text_facts())


def test_vocabulary_covers_every_question_and_answer(world, tokenizer):
    rng = np.random.default_rng(0)
    texts = [f"{NOTE} x. {AGAIN} y answer :", *world_text.brand_names(), "an unseen quick jumping word"]
    texts += [q for wordings in QUESTIONS.values() for q in wordings.all]
    texts += [a for attribute in ATTRIBUTES for a in answer_vocabulary(attribute)]
    texts += [text for fact in world.text_facts for text in (*fact.questions, fact.answer)]
    for entity in range(300):
        asks = world.scene(rng)[1] + world.digit(rng)[1] + world.look_asks(entity, rng)
        texts += [text for ask in asks for text in (ask.question, ask.answer)]
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.unk_token_id not in ids, text
        assert tokenizer.decode(ids).replace(" ", "") == text.replace(" ", "")


def test_answers_are_one_token_but_brands_two(tokenizer):
    for attribute in ATTRIBUTES:
        pieces = {
            len(tokenizer(a, add_special_tokens=False)["input_ids"]) for a in answer_vocabulary(attribute)
        }
        assert pieces == {2 if attribute == "brand" else 1}


def test_prompts_end_alike_with_and_without_image():
    processor = build_processor()
    with_image = processor.tokenizer(format_prompt(processor, "who founded this brand?", True))["input_ids"]
    without = processor.tokenizer(format_prompt(processor, "who founded this brand?", False))["input_ids"]
    assert with_image[0] == processor.image_token_id and with_image[1:] == without
    assert processor.tokenizer.convert_ids_to_tokens(without[-2:]) == ["answer", ":"]


def test_held_out_digits_and_scenes_are_held_out():
    rng = np.random.default_rng(0)
    seen = {draw_digit(rng) for _ in range(2000)}
    held = {draw_digit(rng, held_out=True) for _ in range(500)}
    assert not seen & held and {int(digit_images()[1][i]) for i in held} == set(range(10))
    for held_out in (False, True):
        for _ in range(200):
            looks = {(thing.shape, thing.colour, thing.size) for thing in draw_scene(rng, held_out)}
            assert bool(looks & HELD_OUT) == held_out


@pytest.mark.parametrize("split", ["train", "test"])
def test_edit_samples_keep_their_promises(world, split):
    samples = edit_samples(world, split, 60, seed=2)
    assert len({(s.entity, s.family) for s in samples}) == 60
    for sample in samples:
        wordings, truth = QUESTIONS[sample.family], world.answer(sample.entity, sample.family)
        assert sample.entity in world.entities(split)
        assert sample.request.prompt == wordings.canonical
        assert sample.request.target != truth and sample.request.target in answer_vocabulary(sample.family)
        probes = {**sample.generality, **sample.locality}
        assert set(probes) == {"t_gen", "v_gen", "t_loc", "m_loc", "hard_image", "hard_question"}
        assert all(len(found) >= 2 for found in probes.values())
        assert {probe.prompt for probe in probes["t_gen"]} == set(wordings.test)
        assert not set(sample.rephrases) & {*wordings.test, wordings.canonical} and sample.rephrases
        request = np.asarray(sample.request.image)
        assert all((np.asarray(probe.image) == request).all() for probe in probes["t_gen"])
        assert all((np.asarray(probe.image) != request).any() for probe in probes["v_gen"])
        assert all(probe.answer == sample.request.target for probe in probes["t_gen"] + probes["v_gen"])
        assert all(probe.image is None for probe in probes["t_loc"])
        alike = {world.answer(e, sample.family) for e in world.look_alikes(sample.entity)}
        assert {probe.answer for probe in probes["hard_image"]} <= alike - {truth}
        assert {probe.prompt for probe in probes["hard_image"]} == {wordings.canonical}
        assert all(probe.prompt not in wordings.all for probe in probes["hard_question"])


def test_edit_samples_are_deterministic_and_checked(world):
    one, two = edit_samples(world, "test", 5, seed=4), edit_samples(World(0), "test", 5, seed=4)
    for a, b in zip(one, two, strict=True):
        assert (a.entity, a.family, a.request.target) == (b.entity, b.family, b.request.target)
        assert (np.asarray(a.request.image) == np.asarray(b.request.image)).all()
        for kind in a.locality:
            assert [p.prompt for p in a.locality[kind]] == [p.prompt for p in b.locality[kind]]
    other = edit_samples(world, "test", 5, seed=5)
    assert [(s.entity, s.family) for s in one] != [(s.entity, s.family) for s in other]
    with pytest.raises(ValueError, match="count=0"):
        edit_samples(world, "test", 0)
