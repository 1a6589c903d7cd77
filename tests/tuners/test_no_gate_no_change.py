"""The promise that users buy: where no edit applies, the model is bit for bit the model it was."""

import pytest
import torch
from dualedit import remove_edit
from tiny_models import LLAVA, PAD, QWEN, edit_layers, editor_of, row_of, store

NEVER = 10_000  # no token has this id: generations do not end early
NEW = 5


def logits_of(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def generated(model, inputs, **more):
    """Tokens [B, T] and logits [B, NEW, V] of a greedy generation of exactly NEW tokens."""
    settings = dict(max_new_tokens=NEW, eos_token_id=NEVER, do_sample=False, pad_token_id=PAD)
    out = model.generate(
        **inputs, **(settings | more), return_dict_in_generate=True, output_logits=True, output_scores=True
    )
    return out.sequences[:, -NEW:], torch.stack(out.logits, dim=1)


def test_empty_memory(family, method, generator):
    base, model = family.build(), editor_of(family, method)
    inputs = family.questions(3, generator)
    assert torch.equal(logits_of(model, inputs), logits_of(base, inputs))
    for ours, theirs in zip(generated(model, inputs), generated(base, inputs), strict=True):
        assert torch.equal(ours, theirs)


def test_no_row_hit(family, method, generator):
    base, model = family.build(), editor_of(family, method)
    inputs = family.questions(6, generator)
    for row in (3, 4, 5):
        store(model, row_of(inputs, row), generator)
    others = family.batch(
        [row_of(inputs, row)["input_ids"][0] for row in range(3)], family.pixels(3, generator)
    )
    assert torch.equal(logits_of(model, others), logits_of(base, others))
    for ours, theirs in zip(generated(model, others), generated(base, others), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("side", ["left", "right"])
def test_closed_rows_of_a_mixed_batch(family, method, side, generator):
    base, model = family.build(), editor_of(family, method)
    inputs = family.questions(4, generator, side)
    for row in (1, 3):
        store(model, row_of(inputs, row), generator)
    ours, theirs = logits_of(model, inputs), logits_of(base, inputs)
    ours_new, theirs_new = generated(model, inputs)[1], generated(base, inputs)[1]
    for row in (0, 2):
        assert torch.equal(ours[row], theirs[row])
        assert torch.equal(ours_new[row], theirs_new[row])
    for row in (1, 3):
        last = int(inputs["attention_mask"][row].nonzero().max())
        assert not torch.allclose(ours[row, last], theirs[row, last], atol=1e-2)
        assert not torch.allclose(ours_new[row, 0], theirs_new[row, 0], atol=1e-2)


def test_switched_off_removed_and_unloaded(family, method, generator):
    base, model = family.build(), editor_of(family, method)
    inputs = family.questions(2, generator)
    expected = logits_of(base, inputs)
    edit = store(model, row_of(inputs, 0), generator)
    assert not torch.equal(logits_of(model, inputs), expected)
    with model.disable_adapter():
        assert torch.equal(logits_of(model, inputs), expected)
        assert torch.equal(generated(model, inputs)[1], generated(base, inputs)[1])
    assert not torch.equal(logits_of(model, inputs), expected)
    remove_edit(model, edit.id)
    assert torch.equal(logits_of(model, inputs), expected)
    store(model, row_of(inputs, 0), generator)
    assert torch.equal(logits_of(model.unload(), inputs), expected)


def test_unload_leaves_no_trace(family, method, generator):
    def traces(model):
        hooks = {
            (name, kind): len(hooked) if hasattr(hooked, "__len__") else hooked
            for name, module in model.named_modules()
            for kind, hooked in vars(module).items()
            if "hooks" in kind and hooked
        }
        return hooks, [name for name, _ in model.named_modules()], list(model.state_dict())

    model, inputs = family.build(), family.question(generator)
    before = traces(model), set(vars(model))
    edited = editor_of(family, method, model)
    store(edited, inputs, generator)
    assert traces(model) != before[0]
    unloaded = edited.unload()
    assert unloaded is model
    assert traces(model) == before[0]
    assert set(vars(model)) - before[1] <= {"peft_config"}  # PEFT's own, which its methods all leave
    assert "generate" not in vars(model)


def test_a_hit_writes_to_its_positions_only(family, generator):
    model = editor_of(family, "dualedit")
    inputs = family.questions(3, generator)
    store(model, row_of(inputs, 1), generator)
    seen = {}
    for layer in edit_layers(model):
        layer.base_layer.register_forward_hook(
            lambda m, a, out, name=layer.layer_name: seen.update({(name, 0): out})
        )
        layer.register_forward_hook(lambda m, a, out, name=layer.layer_name: seen.update({(name, 1): out}))
    logits_of(model, inputs)
    image = inputs["input_ids"] == family.image_tokens[0]
    text = inputs["attention_mask"].bool() & ~image
    hit = torch.tensor([False, True, False])[:, None]
    for number, positions in ((1, text), (2, image)):
        before, after = (seen[f"{family.layers}.{number}", i] for i in (0, 1))
        changed = (before != after).any(dim=-1)
        assert torch.equal(changed, positions & hit)


@pytest.mark.parametrize("use_cache", [True, False])
def test_generated_tokens_pass_through(generator, use_cache):
    """The adapters write at prefill, on the prompt; what is generated after it goes past them."""
    model = editor_of(LLAVA, "dualedit")
    inputs = LLAVA.question(generator)
    store(model, inputs, generator)
    layer = edit_layers(model)[0]
    before, after = [], []
    layer.base_layer.register_forward_hook(lambda m, a, out: before.append(out))
    layer.register_forward_hook(lambda m, a, out: after.append(out))
    generated(model, inputs, use_cache=use_cache)
    prompt = inputs["input_ids"].shape[1]
    assert len(before) == NEW
    assert not torch.equal(before[0], after[0])
    for step, (old, new) in enumerate(zip(before, after, strict=True)):
        changed = (old != new).any(dim=-1)[0]
        if use_cache and step > 0:
            assert old.shape[1] == 1 and not changed.any()
        else:
            assert old.shape[1] == prompt + step
            assert changed[:prompt].any() and not changed[prompt:].any()


@pytest.mark.parametrize("layers", [{"vis_layer": None}, {"text_layer": None}])
def test_one_adapter_alone(layers, generator):
    base, model = QWEN.build(), editor_of(QWEN, "dualedit", **layers)
    inputs = QWEN.questions(3, generator)
    store(model, row_of(inputs, 2), generator)
    ours, theirs = logits_of(model, inputs), logits_of(base, inputs)
    assert torch.equal(ours[:2], theirs[:2])
    assert not torch.allclose(ours[2], theirs[2], atol=1e-2)
    assert len(edit_layers(model)) == 1


def test_text_only_edit_leaves_image_questions(generator):
    """A text-only edit, on an adapter of text positions, on a model that also takes images."""
    from dualedit import add_edit

    base, model = LLAVA.build(), editor_of(LLAVA, "dualedit", vis_layer=None)
    words = torch.randint(3, 100, (1, 6), generator=generator)
    question = {"input_ids": words, "attention_mask": torch.ones_like(words)}
    add_edit(model, question, torch.tensor([5, 6]))
    assert not torch.allclose(logits_of(model, question)[0, -1], logits_of(base, question)[0, -1], atol=1e-2)
    images = LLAVA.questions(3, generator)
    assert torch.equal(logits_of(model, images), logits_of(base, images))
