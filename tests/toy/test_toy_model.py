"""The shipped embedded model: loads like any other, answers its world, has states that a gate can use."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from dualedit.toy.model import IMAGE_TOKENS, NOTE, WEIGHTS, format_prompt, load_embedded
from dualedit.toy.samples import edit_samples
from dualedit.toy.world import ATTRIBUTES, QUESTIONS, World, answer_vocabulary
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from recipes.toy.train_vlm import Checkpoint, Recipe, Seeing, train_vision
from recipes.toy.vlm_batches import (
    FAMILY,
    IGNORE,
    STRANGE_QUESTIONS,
    UNSEEN_WORLDS,
    RowBatches,
    VisionBatches,
    pixels,
)
from recipes.toy.vlm_losses import VisionHeads, image_tokens, language_states, shown_tokens
from recipes.toy.vlm_measures import accuracies, answers, gate_cosines, held_out_cases

GATE_LAYER, GATE_THRESHOLD = 4, 0.6


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def world() -> World:
    return World(0)


@pytest.fixture(scope="module")
def embedded():
    return load_embedded()


def test_loads_as_float32_llava_in_eval_mode(embedded):
    model, processor = embedded
    assert isinstance(model, LlavaForConditionalGeneration) and isinstance(processor, LlavaProcessor)
    assert not model.training and {p.dtype for p in model.parameters()} == {torch.float32}
    assert len(model.model.language_model.layers) == 8
    again, _ = load_embedded()
    assert again.lm_head.weight.data_ptr() != model.lm_head.weight.data_ptr()


def test_weights_file_is_small_and_half_precision():
    (file,) = WEIGHTS.glob("*.safetensors")
    assert file.stat().st_size <= 7.5e6
    from safetensors import safe_open

    with safe_open(file, "pt") as found:
        assert {found.get_tensor(name).dtype for name in found.keys()} == {torch.float16}


def test_missing_weights_say_how_to_train(tmp_path):
    with pytest.raises(FileNotFoundError, match="recipes.toy.train_vlm"):
        load_embedded(tmp_path)


def test_training_pictures_are_what_the_processor_makes(world, embedded):
    picture = world.render(7, np.random.default_rng(0))
    made = embedded[1](images=[picture], text=["<image> x"], return_tensors="pt")
    assert made["input_ids"].eq(embedded[1].image_token_id).sum() == IMAGE_TOKENS
    torch.testing.assert_close(made["pixel_values"], pixels([picture]), atol=1e-5, rtol=0)


def test_packed_training_rows_agree_with_the_model(world, embedded):
    """A question packed among others has the logits it has when asked alone."""
    model, processor = embedded
    rows = RowBatches(world, processor, seed=1).draw(1, 0, 0, 1)
    rows.blind[:] = False
    with torch.no_grad():
        packed, kept, _ = language_states(model, rows, (2, 4))
    assert [len(states) for states in kept] == [len(rows.ids)] * 2 == [5, 5]
    for row in (0, len(rows.ids) - 1):
        for group in (1, 2, 3):
            at = (rows.group[row] == group).nonzero().flatten()
            inputs = {"input_ids": rows.ids[row, at][None]}
            if row == 0:
                picture = torch.full((1, IMAGE_TOKENS), processor.image_token_id)
                inputs = {"input_ids": torch.cat([picture, inputs["input_ids"]], dim=1),
                          "pixel_values": rows.pixel_values[:1]}  # fmt: skip
            with torch.no_grad():
                alone = model(**inputs).logits[0, -len(at) :]
            wanted = rows.label[row, at] != IGNORE
            assert wanted.any()
            torch.testing.assert_close(model.lm_head(packed[row, at]), alone, atol=2e-3, rtol=1e-3)


def test_strangers_have_the_states_that_the_model_gives_them(world, embedded):
    """They stop behind the last gate, with what the whole model has there for the question alone."""
    model, processor = embedded
    rows = RowBatches(world, processor, seed=2).strange(1)
    with torch.no_grad():
        last, kept, _ = language_states(model, rows, (2, 4), answered=False)
    assert last is None and [len(states) for states in kept] == [8, 8]
    asked = (rows.fact >= 0).nonzero()
    assert len(asked) == 8 * STRANGE_QUESTIONS
    for row, place in asked[::5].tolist():
        question = rows.ids[row, (rows.group[row] == rows.group[row, place])]
        inputs = torch.cat([torch.full((IMAGE_TOKENS,), processor.image_token_id), question])[None]
        with torch.no_grad():
            alone = model(
                input_ids=inputs, pixel_values=rows.pixel_values[row : row + 1], output_hidden_states=True
            ).hidden_states
        for states, layer in zip(kept, (2, 4), strict=True):
            torch.testing.assert_close(states[row, place], alone[layer][0, -1], atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize(("stage", "families"), [("focus", 0), ("compare", 1)])
def test_the_last_stages_move_what_sees_alone_and_not_far(stage, families, world, tmp_path):
    def run(staying, file, steps=8):
        torch.manual_seed(3)
        model, _ = load_embedded()
        model.set_attn_implementation("eager")
        heads = VisionHeads(model.config.vision_config.hidden_size)
        seeing = Seeing(
            steps, 1e-3, 0.2, 0.6, 0.1, batch=16, reading=2, staying=staying, families=families
        )
        train_vision(model, heads, world, Recipe(**{stage: seeing}), stage, Checkpoint(file))
        return model

    before, _ = load_embedded()
    images = pixels([world.render(entity, np.random.default_rng(entity)) for entity in range(24)])

    def shown(model):
        seen = image_tokens(model, images)
        return shown_tokens(model, seen) if families else seen

    def moved_far(model):
        with torch.no_grad():
            return float((shown(model) - shown(before)).norm())

    held, free = run(20.0, tmp_path / "held.pt"), run(0.0, tmp_path / "free.pt")
    weights = dict(before.named_parameters())
    moved = {name for name, p in held.named_parameters() if not torch.equal(p, weights[name])}
    moving = {".vision_tower.", ".multi_modal_projector."} if families else {".vision_tower."}
    assert all(any(part in name for part in moving) for name in moved)
    assert all(any(part in name for name in moved) for part in moving)
    assert 0 < moved_far(held) < moved_far(free)
    # A stopped run goes on from its file, and stays near the tokens before the stage, not before the stop.
    saved = torch.load(tmp_path / "held.pt", weights_only=False)
    assert all(torch.equal(saved["state"]["before"][name], value) for name, value in weights.items())
    again = run(20.0, tmp_path / "held.pt")  # the file is of the last step
    assert all(torch.equal(p, dict(held.named_parameters())[n]) for n, p in again.named_parameters())


def test_answers_its_world(world, embedded):
    """New pictures, held-out digits and scene combinations, every family, by processor and generate."""
    cases = held_out_cases(world, per_family=12, seed=11)
    found = accuracies(*embedded, cases)
    assert len(cases) >= 200 and found["overall"] >= 0.95, found
    assert np.mean([found[attribute] for attribute in ATTRIBUTES]) >= 0.95, found
    for family in (
        "capital",
        "opposite",
        "sum",
        "badge_shape",
        "badge_colour",
        "line_colour",
        "scene_colour",
    ):
        assert found[family] >= 0.9, (family, found)


def test_knows_both_halves_of_every_brand_name(world, embedded):
    """Two-token answers end to end, over the logos that editing methods are tested on."""
    rng, entities = np.random.default_rng(8), list(world.entities("test"))[::4]
    questions = [(world.render(entity, rng), QUESTIONS["brand"].canonical) for entity in entities]
    found = answers(*embedded, questions)
    assert np.mean([a == world.answer(e, "brand") for a, e in zip(found, entities, strict=True)]) >= 0.95


def test_batches_do_not_change_answers(world, embedded):
    cases = held_out_cases(world, per_family=2, seed=12)[:24]
    questions = [(case.image, case.question) for case in cases]
    assert answers(*embedded, questions) == answers(*embedded, questions, batch_size=1)


def test_a_note_overrides_what_the_model_knows(world, embedded):
    """Context decides, two-token names included: a model that cannot copy an answer cannot be edited."""
    rng, questions, wanted = np.random.default_rng(0), [], []
    for entity in range(0, 520, 13):
        attribute = ATTRIBUTES[entity % 5]
        options = [a for a in answer_vocabulary(attribute) if a != world.answer(entity, attribute)]
        wanted.append(options[int(rng.integers(len(options)))])
        question = f"{NOTE} {wanted[-1]}. {QUESTIONS[attribute].canonical}"
        questions.append((world.render(entity, rng), question))
    right = [a == b for a, b in zip(answers(*embedded, questions), wanted, strict=True)]
    assert np.mean(right) >= 0.9


def test_gate_can_tell_edits_from_look_alikes(world, embedded):
    """One cosine threshold on the last prompt token accepts new pictures and refuses look-alikes."""
    cosine = {
        kind: found[:, GATE_LAYER] for kind, found in gate_cosines(*embedded, world, "test", 30).items()
    }
    accepted = {kind: float((found >= GATE_THRESHOLD).float().mean()) for kind, found in cosine.items()}
    assert accepted["v_gen"] >= 0.85 and accepted["t_gen"] >= 0.85, accepted
    assert accepted["hard_image"] <= 0.2 and accepted["hard_question"] <= 0.1, accepted
    assert accepted["m_loc"] <= 0.05 and accepted["t_loc"] <= 0.05 and accepted["same_question"] <= 0.05, (
        accepted
    )


def test_prompts_of_edit_samples_fit_the_template(world, embedded):
    _, processor = embedded
    for sample in edit_samples(world, "test", 3):
        text = format_prompt(processor, sample.request.prompt, True)
        assert text == f"<image> {sample.request.prompt} answer :"


def test_training_report_is_complete(embedded):
    report = json.loads((WEIGHTS / "training.json").read_text())
    assert report["parameters"] == sum(p.numel() for p in embedded[0].parameters())
    assert report["accuracy"]["overall"] >= 0.95
    assert all(report["accuracy"][attribute] >= 0.97 for attribute in ATTRIBUTES)
    assert {"recipe", "seconds", "versions", "gate"} <= set(report)
    assert len(report["gate"]) == 9


def test_families_to_compare_come_first_and_in_pairs(world):
    """Two pictures of a logo side by side, four look-alikes a family; the rest of the batch behind them."""
    batches = VisionBatches(world, 4, (0.0, 0.0, 1.0))  # all others are scenes
    images, labels, bits = batches.draw(3, families=2)
    assert images.shape == (2 * FAMILY * 2 + 3, 3, 48, 48)
    looks = torch.cat([labels, bits], 1)[:-3].view(2, FAMILY, 2, -1)
    assert torch.equal(looks[:, :, 0], looks[:, :, 1])
    assert not torch.equal(images[0], images[1])
    assert all(len(family.unique(dim=0)) == FAMILY for family in looks[:, :, 0])
    assert (bits[-3:] == -1).all() and (bits[:-3] >= 0).all()


def test_loss_of_comparing_by_hand(seed):
    """Two families; the first two logos of the first are mistaken for each other."""
    torch.manual_seed(seed)
    heads = VisionHeads(128)
    away = torch.nn.functional.one_hot(torch.arange(8).repeat_interleave(2), 128).float()
    with torch.no_grad():
        heads.alike.weight.copy_(torch.eye(64, 128))
        heads.alike.bias.zero_()
        good, right, pairs = heads.alike_loss(away)
        away[2] = away[0]  # one picture of the second logo looks like the first
        bad, fewer, _ = heads.alike_loss(away)
    scale, offset = float(heads.scale.detach().exp()), float(heads.offset.detach())
    kept, apart = (float(np.log1p(np.exp(x))) for x in (-(scale + offset), offset))
    assert pairs == right == 2 * (FAMILY + 24)
    assert float(good) == pytest.approx(2 * kept + 2 * apart, rel=1e-5)
    assert fewer == right - 1 - 2  # its pair, and the two of the other logo
    wrong = float(np.log1p(np.exp(scale + offset)))
    lost = float(np.log1p(np.exp(-offset)))
    # The hardest four of 48 look-alike pairs: two mistaken, two apart.
    same, kin = 2 * (7 * kept + lost) / 8, (2 * wrong + 2 * apart) / 4
    assert float(bad) == pytest.approx(same + kin + apart, rel=1e-5)


def test_strangers_belong_to_no_world_and_have_no_answers(world, embedded):
    """Logos for the gate loss alone: never one of a world that is evaluated, never a label."""
    batches = RowBatches(world, embedded[1], seed=3)
    in_worlds = {logo for seed in (0, *UNSEEN_WORLDS) for logo in World(seed).logos}
    rng = np.random.default_rng(5)
    for _ in range(200):
        family = batches.strangers.family(rng, 4)
        assert len(set(family)) == 4 and not in_worlds & set(family)
    rows, strange = batches.draw(1, 0, 0, 0), batches.strange(2)
    stranger = strange.fact >= len(world.logos) * len(ATTRIBUTES)
    assert int(stranger.sum()) == int((strange.fact >= 0).sum()) == 2 * 4 * 2 * STRANGE_QUESTIONS
    known = rows.fact >= 0
    assert (strange.label == IGNORE).all() and (rows.label[known] != IGNORE).all()
