"""The studies on tiny builds of many architectures: attention, noise, writes and keys, against plain
computations."""

import math

import pytest
import torch
from dualedit.analysis.asking_layers import (
    LayerStates,
    Questions,
    counted,
    last_positions,
    linear_of,
    questions_from,
)
from dualedit.analysis.gate_study import KEYS, read_distances
from dualedit.analysis.layer_grid import effects
from dualedit.analysis.modality_attention import read_attention, shares
from dualedit.analysis.sensitivity import SIGMAS, disturbed, noise_for, runs_of_a_plain_way, sensitivity_at
from dualedit.models.architectures import find_decoder_layers
from dualedit.models.targets import append_target
from seeds import seed_of
from transformers import PreTrainedModel

from tests.models.architectures.builders import ARCHITECTURES, FIRST

NAMES = sorted(name for name in FIRST if ARCHITECTURES[name].sees != "nothing")


@pytest.fixture(scope="module", params=NAMES)
def tiny(request):
    """An architecture, its model and one question to it."""
    architecture, seed = ARCHITECTURES[request.param], seed_of(f"studies {request.param}")
    model = architecture.build(seed)
    inputs = architecture.row(torch.Generator().manual_seed(seed))
    return model, inputs, questions_from(model, inputs, list(architecture.image_ids) or None)


def plain_attention(model, questions):
    """By the model's own switch, keeping all matrices; in float64, position by position."""
    configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
    before = {key: config._attn_implementation for key, config in configs.items()}
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            found = model(**questions.inputs, use_cache=False, output_attentions=True)
            found = getattr(found, "language_model_outputs", found).attentions
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]
    last = int(questions.prompt.last[0])
    return [
        sum(float(a) for a in matrix[0, :, last, 0].double()) / matrix.shape[1] for matrix in found
    ], found


def test_there_are_fifteen_architectures():
    assert len(NAMES) >= 15


def test_attention_is_the_plain_one(tiny):
    model, _, questions = tiny
    configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
    before = {key: config._attn_implementation for key, config in configs.items()}
    read = read_attention(model, questions)
    assert {key: config._attn_implementation for key, config in configs.items()} == before
    assert all(not module._forward_hooks for module in find_decoder_layers(model)[1])
    seen = [a for a in read if a is not None]
    assert seen
    _, whole = plain_attention(model, questions)
    square = [m for m in whole or [] if m is not None and m.ndim == 4 and m.shape[-1] == m.shape[-2]]
    last = int(questions.prompt.last[0])
    if len(square) == len(seen):
        for ours, matrix in zip(seen, square, strict=True):
            torch.testing.assert_close(
                ours[0], matrix[0, :, last].double().mean(0).float(), atol=1e-5, rtol=0
            )
    else:
        assert len(square) == 0  # the architecture does not report attention itself
    for told in shares(seen[0], questions):
        parts = [told[name] for name in ("text", "image") if not math.isnan(told[name])]
        assert sum(parts) == pytest.approx(1, abs=1e-3)


def plain_divergence(model, questions, layer, group, sigma):
    """The whole model twice, with noise put in by a hook; KL summed in float64."""
    at = last_positions(questions)
    with torch.no_grad():
        clean = model(**questions.inputs, use_cache=False).logits[at][0].double()

        def exchange(module, args, output):
            states = output[0] if isinstance(output, tuple) else output
            noise = noise_for(states.shape, 7, 3, layer)
            moved = disturbed(states, noise, questions.positions(group), sigma)
            return (moved, *output[1:]) if isinstance(output, tuple) else moved

        handle = find_decoder_layers(model)[1][layer].register_forward_hook(exchange)
        try:
            other = model(**questions.inputs, use_cache=False).logits[at][0].double()
        finally:
            handle.remove()
    p = clean.softmax(0)
    return float((p * (clean.log_softmax(0) - other.log_softmax(0))).sum())


def test_noise_is_the_plain_one_in_fewer_runs(tiny):
    model, _, questions = tiny
    depth = len(find_decoder_layers(model)[1])
    with counted(model) as runs:
        known = LayerStates(model, questions)
        found = [sensitivity_at(known, layer, 7, 3) for layer in range(depth)]
    for layer in {0, depth - 1}:
        for group in ("text", "image", "all"):
            for place, sigma in enumerate(SIGMAS):
                value = found[layer][group][place][0]
                if math.isnan(value):
                    assert not questions.positions(group).any()
                else:
                    plain = plain_divergence(model, questions, layer, group, sigma)
                    assert value == pytest.approx(plain, abs=1e-5, rel=1e-4)
    variants = 6 if not questions.positions("image").any() else 9
    if known.resumed:
        assert 2 * runs[0] <= runs_of_a_plain_way(depth, depth, variants)


def test_layers_resume_in_ordinary_models():
    for name in ("llava", "qwen2_5_vl"):
        architecture = ARCHITECTURES[name]
        model = architecture.build(1)
        questions = questions_from(model, architecture.row(torch.Generator().manual_seed(1)))
        assert LayerStates(model, questions).resumed


def test_writes_and_keys(tiny):
    model, inputs, _ = tiny
    path, layers = find_decoder_layers(model)
    image_ids = None
    full = append_target(inputs, torch.tensor([5]))
    questions = questions_from(model, full, image_ids)
    found = effects(model, questions, [0, len(layers) - 1])
    assert set(found) == {"text", "image", "all"}
    assert all(-1 <= v <= 1 for rows in found.values() for row in rows for v in row)
    assert max(found["text"][0]) > 0  # a step down the gradient, found on the very question
    name, names = linear_of(model, path)
    told = read_distances(model, questions_from(model, inputs, image_ids), [0, 1], name)
    assert set(told) == {*(f"cosine/{key}" for key in KEYS), "l2/last", "l2/mean"}
    assert abs(told["cosine/last"][0][0]) < 1e-6
    assert not names or names[0].startswith(path)


def test_several_states_a_token_are_refused(monkeypatch):
    architecture = ARCHITECTURES["llava"]
    model = architecture.build(0)
    questions = questions_from(model, architecture.row(torch.Generator().manual_seed(0)))
    layers = find_decoder_layers(model)[1]
    own = layers[1].forward
    monkeypatch.setattr(layers[1], "forward", lambda *a, **k: torch.stack([own(*a, **k)] * 2)[0].mean(0))
    with pytest.raises((ValueError, RuntimeError)):
        LayerStates(model, questions)


def test_positions():
    from dualedit.runtime.sequence import Prompt

    text, image = torch.tensor([[True, False, True]]), torch.tensor([[False, True, False]])
    questions = Questions({}, Prompt(text, image, torch.tensor([2]), torch.tensor([2])))
    assert questions.positions("all").tolist() == [[True] * 3]
    assert last_positions(questions).tolist() == [[False, False, True]]
