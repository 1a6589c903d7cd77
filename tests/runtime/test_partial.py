"""Layers run on their own: from states that a forward has left, as far as it went."""

import threading

import pytest
import torch
from dualedit.runtime.partial import PartialForward, leaving
from tiny_models import BLIP2, LLAVA, QWEN

FAMILIES = pytest.mark.parametrize("family", [LLAVA, QWEN, BLIP2], ids=lambda family: family.name)


def ran(model, family):
    """The numbers of the decoder layers that run from now on."""
    found = []
    for number, layer in enumerate(model.get_submodule(family.layers)):
        layer.register_forward_hook(lambda *_, number=number: found.append(number))
    return found


@FAMILIES
@pytest.mark.parametrize("start", [0, 2, 4])
@torch.no_grad()
def test_layers_and_head_give_the_models_logits(family, start, generator):
    model, inputs = family.build(), family.questions(3, generator)
    partial = PartialForward(model, inputs, start)
    real = inputs["attention_mask"] != 0
    assert torch.equal(partial.logits, model(**inputs, use_cache=False).logits)
    found = partial.run(partial.states)
    torch.testing.assert_close(found[real], partial.end[real])
    torch.testing.assert_close(partial.head(found)[real], partial.logits[real], rtol=1e-4, atol=1e-4)
    assert partial.reproduces(partial.logits, real)
    assert not partial.reproduces(partial.logits.roll(1, -1), real)


@FAMILIES
@pytest.mark.parametrize(("start", "stop"), [(1, 1), (1, 3), (2, 2), (4, 4)])
@torch.no_grad()
def test_layers_that_are_left_out_run_later(family, start, stop, generator):
    model, inputs = family.build(), family.question(generator)
    whole, seen = model(**inputs, use_cache=False).logits, ran(model, family)
    partial = PartialForward(model, inputs, start, stop)
    # A layer that is left out passes its states on; that it was called shows, that it did nothing does not.
    assert partial.logits is None and (partial.end is None) == (stop < 4)
    assert not any("forward" in layer.__dict__ for layer in model.get_submodule(family.layers))
    seen.clear()
    torch.testing.assert_close(partial.head(partial.run(partial.states)), whole, rtol=1e-4, atol=1e-4)
    assert seen == list(range(start, 4))


@torch.no_grad()
def test_layers_that_are_left_out_compute_nothing(generator):
    model, inputs = LLAVA.build(), LLAVA.question(generator)
    products = []
    for number, layer in enumerate(model.get_submodule(LLAVA.layers)):
        layer.mlp.register_forward_hook(lambda *_, number=number: products.append(number))
    PartialForward(model, inputs, 1, 2)
    assert products == [0, 1]


def test_layers_are_whole_again_after_an_error(generator):
    model, inputs = LLAVA.build(), LLAVA.question(generator)
    inputs["pixel_values"] = inputs["pixel_values"][:, :2]
    with pytest.raises((RuntimeError, ValueError)):
        PartialForward(model, inputs, 1, 1)
    assert not any("forward" in layer.__dict__ for layer in model.get_submodule(LLAVA.layers))


def test_recomputed_layers_give_the_same_gradient(generator):
    model, inputs = LLAVA.build(), LLAVA.question(generator)
    with torch.no_grad():
        partial = PartialForward(model, inputs, 2, 2)
    found = []
    for recompute in (False, True):
        states = partial.states.clone().requires_grad_(True)
        partial.head(partial.run(states, recompute)).sum().backward()
        found.append(states.grad)
    assert found[0].any() and torch.equal(*found)


@torch.no_grad()
def test_on_another_device_and_back(generator):
    model, inputs = LLAVA.build(), LLAVA.question(generator)
    partial = PartialForward(model, inputs, 2, 2)
    wanted = partial.run(partial.states)
    away = partial.to("meta")
    assert away.states.device.type == "meta" and partial.states.device.type == "cpu"
    again = partial.to("cpu")
    assert torch.equal(again.run(again.states), wanted)


@torch.no_grad()
def test_a_forward_ends_where_it_is_left_and_others_go_on(generator):
    model, inputs = LLAVA.build(), LLAVA.question(generator)
    layers = model.get_submodule(LLAVA.layers)
    seen = ran(model, LLAVA)
    with leaving(layers[2]):
        model(**inputs)
    with leaving(layers[2], before=True):
        model(**inputs)
    assert seen == [0, 1, 2, 0, 1]
    other = []
    thread = threading.Thread(target=lambda: other.append(model(**inputs).logits))
    with leaving(layers[1]):
        thread.start()
        thread.join()
    assert other[0].shape[:2] == inputs["input_ids"].shape
