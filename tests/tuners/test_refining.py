"""An edit that checks itself: what is mended, what stays as it is, what is told and refused."""

import warnings

import pytest
import torch
from dualedit import DualEditConfig, add_edit, inject_dualedit
from dualedit.models.targets import append_target
from dualedit.toy.editors import load_editor
from dualedit.toy.samples import edit_samples
from dualedit.toy.world import World
from dualedit.tuners.adapter import active_adapter
from peft import PeftModel
from tiny_models import LLAVA, PAD, WORDS, edit_layers, editor_of, sharp

STRONG = dict(refine_steps=400, refine_rate=0.05, refine_probability=0.6)


def answer(model, inputs, tokens):
    found = model.generate(
        **inputs, max_new_tokens=tokens, do_sample=False, eos_token_id=10_000, pad_token_id=PAD
    )
    return found[0, -tokens:]


def least(model, inputs, target):
    """The probability of the least likely target token, by a plain forward of the edited model."""
    full = append_target(inputs, target)
    with torch.no_grad():
        logits = model(**full).logits[0, -len(target) - 1 : -1].float()
    return float(logits.softmax(-1).gather(1, target[:, None]).min())


def tables(model):
    return {
        (layer.layer_name, name): table
        for layer in edit_layers(model)
        for name, table in layer.dualedit_memory["default"].snapshot().tables.items()
    }


def test_a_mended_edit_gives_its_answer(family, generator):
    """One token: what two in a row need is not in every random model's reach."""
    model = editor_of(family, "dualedit", sharp(family), **STRONG)
    inputs = family.question(generator)
    target = torch.randint(3, WORDS, (1,), generator=generator)
    adapters = {name: value.clone() for name, value in model.named_parameters()}
    edit = add_edit(model, inputs, target)
    assert edit.probability >= 0.6
    assert least(model, inputs, target) == pytest.approx(edit.probability, abs=2e-3)
    assert torch.equal(answer(model, inputs, 1), target)
    record = active_adapter(model).group.first.record(edit.id)
    assert 0 < record["steps"] <= 400
    for name, value in model.named_parameters():
        assert torch.equal(value, adapters[name]) and value.grad is None, name


def test_what_weak_adapters_do_not_write_is_mended_word_by_word(seed):
    """The embedded model, names of two tokens among the targets."""
    editor = load_editor(fallback=False)
    with torch.no_grad():
        for layer in edit_layers(editor.model):
            for name, parameter in layer.dualedit_adapter.named_parameters():
                if "o_proj" in name:
                    parameter.mul_(0.2)
    samples = edit_samples(World(0), "train", 12, seed=seed % 1000)
    right = {}
    for steps in (0, 200):
        active_adapter(editor.model).config.refine_steps = steps
        found = []
        for sample in samples:
            request = sample.request
            edit = editor.edit(request.image, request.prompt, request.target, keep_failed=True)
            found.append(editor.answer(request.image, request.prompt) == request.target)
            editor.undo()
        right[steps] = sum(found)
    assert right[0] < right[200] == len(samples)
    assert edit.probability >= active_adapter(editor.model).config.refine_probability


def test_only_keys_and_values_change(family, generator):
    """The same key and radius as without; keys and values of as many tokens."""
    inputs = family.question(generator)
    target = torch.randint(3, WORDS, (2,), generator=generator)
    torch.manual_seed(7)
    plain = editor_of(family, "dualedit", sharp(family))
    torch.manual_seed(7)
    mended = editor_of(family, "dualedit", sharp(family), **STRONG)
    mended.load_state_dict(plain.state_dict(), strict=False)
    assert add_edit(plain, inputs, target).probability is None  # nobody asked
    add_edit(mended, inputs, target)
    before, after = tables(plain), tables(mended)
    assert before.keys() == after.keys() and {name for _, name in before} >= {"k_text", "v_vision", "key"}
    for place, value in before.items():
        assert value.dtype == after[place].dtype and value.shape == after[place].shape
        assert torch.equal(value, after[place]) == (place[1] in ("key", "radius")), place


def test_an_edit_that_is_written_is_left_as_it_is(generator):
    inputs = LLAVA.question(generator)
    plain = editor_of(LLAVA, "dualedit", sharp(LLAVA))
    weights = plain.state_dict()
    probe = editor_of(LLAVA, "dualedit", sharp(LLAVA), refine_steps=5, refine_probability=1e-9)
    probe.load_state_dict(weights, strict=False)
    target = torch.randint(3, WORDS, (2,), generator=generator)
    add_edit(plain, inputs, target)
    edit = add_edit(probe, inputs, target)
    assert edit.probability == pytest.approx(least(plain, inputs, target), rel=1e-3, abs=1e-7)
    assert active_adapter(probe).group.first.record(edit.id)["steps"] == 0
    for place, value in tables(plain).items():
        assert torch.equal(value, tables(probe)[place])


def test_an_edit_that_stays_unwritten_says_so_and_is_stored(generator):
    model = editor_of(LLAVA, "dualedit", refine_steps=1, refine_rate=1e-6, refine_probability=0.999)
    target = torch.randint(3, WORDS, (3,), generator=generator)
    with pytest.warns(UserWarning, match=r"did not take: after 1 steps .*Try more refine_steps"):
        edit = add_edit(model, LLAVA.question(generator), target)
    assert edit.probability < 0.5 and len(active_adapter(model).group) == 1


def test_in_half_precision_what_is_checked_is_what_is_stored(generator):
    model = editor_of(LLAVA, "dualedit", sharp(LLAVA).to(torch.bfloat16), **STRONG)
    inputs = LLAVA.question(generator)
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    target = torch.randint(3, WORDS, (1,), generator=generator)
    edit = add_edit(model, inputs, target)
    assert tables(model)[edit_layers(model)[0].layer_name, "k_text"].dtype == torch.bfloat16
    # Two forwards in bfloat16, one of them of the upper layers alone: 8 bits of a probability.
    assert least(model, inputs, target) == pytest.approx(edit.probability, abs=2e-2)
    assert torch.equal(answer(model, inputs, 1), target)


def test_other_inputs_and_the_rest_of_the_training_are_untouched(generator):
    """Gradients that somebody is accumulating stay, and questions no edit applies to keep their bits."""
    base = sharp(LLAVA)
    other = LLAVA.question(generator, words=8)
    with torch.no_grad():
        before = base(**other).logits
    model = editor_of(LLAVA, "dualedit", base, **STRONG)
    adapter = next(p for n, p in model.named_parameters() if "dualedit_adapter" in n)
    adapter.requires_grad_(True)
    adapter.grad = torch.ones_like(adapter)
    add_edit(model, LLAVA.question(generator), torch.randint(3, WORDS, (2,), generator=generator))
    assert torch.equal(adapter.grad, torch.ones_like(adapter))
    with torch.no_grad():
        assert torch.equal(model(**other).logits, before)


def test_settings_travel_and_may_be_chosen_for_saved_adapters(generator, tmp_path):
    model = editor_of(LLAVA, "dualedit", refine_steps=3, refine_probability=0.7)
    model.save_pretrained(tmp_path)
    config = PeftModel.from_pretrained(LLAVA.build(), str(tmp_path)).peft_config["default"]
    assert (config.refine_steps, config.refine_probability) == (3, 0.7)
    chosen = inject_dualedit(LLAVA.build(), adapter=tmp_path, refine_steps=9).peft_config["default"]
    assert (chosen.refine_steps, chosen.refine_probability) == (9, 0.7)
    off = inject_dualedit(LLAVA.build(), adapter=tmp_path, refine_steps=0).peft_config["default"]
    assert (off.refine_steps, off.refine_probability) == (0, 0.7)
    with pytest.raises(ValueError, match="refine_steps=-1"):
        inject_dualedit(LLAVA.build(), adapter=tmp_path, refine_steps=-1)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (dict(refine_steps=-1), "refine_steps=-1: pass a number of steps"),
        (dict(refine_steps=1.5), "refine_steps=1.5"),
        (dict(refine_rate=0.0), "refine_rate=0.0: pass a positive number"),
        (dict(refine_probability=1.0), r"refine_probability=1.0: pass a number in \(0, 1\)"),
    ],
)
def test_refusals(given, told):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=told):
            DualEditConfig(**given)
