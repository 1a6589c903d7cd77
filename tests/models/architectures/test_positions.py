"""Which positions are picture and which are text: several pictures, none, videos, masks, embeddings."""

import pytest
import torch
from dualedit import add_edit, explicit_masks, inject_dualedit
from dualedit.models.targets import append_target
from dualedit.runtime.sequence import describe_prompt
from dualedit.tuners.dualedit import DualEditLayer

from .builders import ARCHITECTURES
from .case import Case, logits_of
from .parts import BOS, IMAGE, VIDEO, VISION_END, VISION_START, WORDS, batch

LLAVA, QWEN = ARCHITECTURES["llava"], ARCHITECTURES["qwen2_5_vl"]
NEVER = 10_000


def words(number, generator):
    return torch.randint(3, WORDS, (number,), generator=generator).tolist()


def changed(model, inputs):
    """Where each of the two wrapped layers wrote, by the number of the layer: [B, P] bool."""
    seen, handles = {}, []
    for layer in (module for module in model.modules() if isinstance(module, DualEditLayer)):
        number = int(layer.layer_name.rpartition(".")[2])
        for key, module in (("before", layer.base_layer), ("after", layer)):
            handles.append(module.register_forward_hook(
                lambda m, a, out, key=(number, key): seen.update(
                    {key: out[0] if isinstance(out, tuple) else out})))  # fmt: skip
    logits_of(model, inputs)
    for handle in handles:
        handle.remove()
    return {n: (seen[n, "before"] != seen[n, "after"]).any(-1) for n, key in seen if key == "before"}


def test_several_pictures_in_a_row(generator, seed):
    ids = torch.tensor([[BOS, *LLAVA.image, *words(2, generator), *LLAVA.image, *words(3, generator)]])
    rows = []
    for last in (5, 6):
        row = ids.clone()
        row[0, -1] = last
        pictures = torch.cat([LLAVA.pixels(generator)["pixel_values"] for _ in range(2)])
        rows.append(LLAVA.around(row, {"pixel_values": pictures}))
    case = Case(LLAVA, seed)
    model = case.inject(case.architecture.build(case.seed))
    add_edit(model, rows[0], torch.tensor([7, 8]))
    both = batch(rows)
    hit = torch.tensor([[True], [False]])
    wrote = changed(model, both)
    assert torch.equal(wrote[2], (both["input_ids"] == IMAGE) & hit)
    assert torch.equal(wrote[1], (both["input_ids"] != IMAGE) & hit)
    assert torch.equal(logits_of(model, both)[1], logits_of(case.base, both)[1])


@pytest.mark.parametrize("edited", [0, 1])
def test_a_row_without_a_picture_beside_one_with(edited, generator, seed):
    """Row 1 has no picture. Each is edited in turn (without a picture: text positions only)."""
    one = LLAVA.row(generator)
    other = torch.tensor([[BOS, *words(one["input_ids"].shape[1] - 1, generator)]])
    plain = {"input_ids": other, "attention_mask": torch.ones_like(other)}
    mixed = LLAVA.around(torch.cat([one["input_ids"], other]), {"pixel_values": one["pixel_values"]})
    case = Case(LLAVA, seed)
    model = case.inject(case.architecture.build(case.seed), vision=edited == 0)
    add_edit(model, (one, plain)[edited], torch.tensor([7, 8]))
    ours, theirs = logits_of(model, mixed), logits_of(case.base, mixed)
    assert not torch.allclose(ours[edited, -1], theirs[edited, -1], atol=1e-3)
    assert torch.equal(ours[1 - edited], theirs[1 - edited])
    settings = dict(max_new_tokens=3, eos_token_id=NEVER, do_sample=False, output_logits=True,
                    return_dict_in_generate=True)  # fmt: skip
    ours, theirs = (torch.stack(m.generate(**mixed, **settings).logits) for m in (model, case.base))
    assert torch.equal(ours[:, 1 - edited], theirs[:, 1 - edited])
    assert not torch.allclose(ours[0, edited], theirs[0, edited], atol=1e-3)


def test_a_video_is_edited_where_it_stands(generator, seed):
    case = Case(QWEN, seed)
    rows = []
    for _ in range(2):
        ids = torch.tensor([[BOS, VISION_START, *[VIDEO] * 4, VISION_END, *words(4, generator)]])
        patches = QWEN.pixels(generator)
        rows.append({
            "input_ids": ids, "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": 2 * (ids == VIDEO).long(),
            "pixel_values_videos": patches["pixel_values"], "video_grid_thw": patches["image_grid_thw"],
        })  # fmt: skip
    model = case.inject(case.architecture.build(case.seed))
    add_edit(model, rows[0], torch.tensor([7, 8]))
    wrote = changed(model, rows[0])
    video = rows[0]["input_ids"] == VIDEO
    assert torch.equal(wrote[2], video) and torch.equal(wrote[1], ~video)
    assert torch.equal(logits_of(model, rows[1]), logits_of(case.base, rows[1]))


def test_the_models_own_mask_says_where_the_picture_is(seed):
    """Kosmos names no image id: its processor hands the model a mask."""
    case = Case(ARCHITECTURES["kosmos-2"], seed)
    wrote = changed(case.edited, case.rows[0])
    assert torch.equal(wrote[2], case.marked()) and torch.equal(wrote[1], ~case.marked())
    mixed = batch(case.rows)
    assert torch.equal(logits_of(case.edited, mixed)[1:], logits_of(case.base, mixed)[1:])


def test_a_mask_goes_before_the_ids():
    ids = torch.tensor([[1, 9, 9, 4, 5]])
    mask = torch.tensor([[0, 1, 0, 1, 0]])
    prompt = describe_prompt(ids, None, None, [9], (1, 5), ids.device, mask)
    assert prompt.image.tolist() == [[False, True, False, True, False]]
    assert describe_prompt(ids, None, None, [9], (1, 5), ids.device, mask[:, :4]).image.tolist() == [
        [False, True, True, False, False]
    ]
    assert describe_prompt(ids, None, None, [], (1, 5), ids.device).image is None


def test_embeddings_with_masks(generator, seed):
    """A caller that embeds by itself states the positions, and gets the answer of the ids."""
    case = Case(LLAVA, seed)
    row, image = case.rows[0], case.marked()
    with torch.no_grad():
        embedded = case.base.get_input_embeddings()(row["input_ids"])
        features = case.base.get_image_features(row["pixel_values"]).pooler_output
        embedded[image] = torch.cat(list(features)).view(-1, embedded.shape[-1])
    model = case.edited
    with pytest.raises(ValueError, match="explicit_masks"):
        logits_of(model, {"inputs_embeds": embedded})
    with explicit_masks(model.get_base_model(), ~image, image):
        ours = logits_of(model, {"inputs_embeds": embedded})
    assert torch.allclose(ours, logits_of(model, row), atol=1e-4, rtol=1e-4)


def test_a_config_without_an_image_id(seed, monkeypatch):
    """An id or a mask is asked for, and with either the edit is the one that the config's id gives."""
    case = Case(LLAVA, seed)
    expected = logits_of(case.edited, case.rows[0])
    monkeypatch.setattr("dualedit.models.architectures.image_token_ids", lambda model: [])
    model = case.architecture.build(case.seed)
    for layers in (dict(text_layer=1, vis_layer=2), dict(text_layer=1, vis_layer=None)):
        with pytest.raises(ValueError, match=r"names no image token.*image_token_ids=\[\.\.\.\]"):
            inject_dualedit(model, **layers)
    with_id = case.inject(case.architecture.build(case.seed), image_token_ids=[IMAGE])
    add_edit(with_id, case.rows[0], case.target)
    assert torch.equal(logits_of(with_id, case.rows[0]), expected)

    model = case.inject(model, image_token_ids=[])
    with pytest.raises(ValueError, match="image positions of inputs are unknown.*explicit_masks"):
        add_edit(model, case.rows[0], case.target)
    image = case.marked()
    with explicit_masks(model.get_base_model(), ~image, image):
        add_edit(model, case.rows[0], case.target)
        assert torch.equal(logits_of(model, case.rows[0]), expected)
    with pytest.raises(ValueError, match="image positions are unknown"):
        logits_of(model, case.rows[0])


def test_a_target_behind_the_prompt():
    """Masks along the prompt grow with it; what only happens to be as long does not."""
    ids = torch.tensor([[1, 9, 4]])
    inputs = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids),
        "image_embeds_position_mask": (ids == 9).long(), "qformer_input_ids": torch.tensor([[5, 6, 7]]),
        "pixel_attention_mask": torch.ones(1, 3), "pixel_values": torch.zeros(1, 3, 4),
        "cross_attention_mask": torch.tensor([[[0], [1], [1]]]),
    }  # fmt: skip
    full = append_target(inputs, torch.tensor([7, 8]), token_type=1)
    assert full["input_ids"].tolist() == [[1, 9, 4, 7, 8]]
    assert full["attention_mask"].tolist() == [[1] * 5]
    assert full["token_type_ids"].tolist() == [[0, 0, 0, 1, 1]]
    assert full["image_embeds_position_mask"].tolist() == [[0, 1, 0, 0, 0]]
    assert full["cross_attention_mask"].tolist() == [[[0], [1], [1], [1], [1]]]
    for name in ("qformer_input_ids", "pixel_attention_mask", "pixel_values"):
        assert full[name] is inputs[name]
