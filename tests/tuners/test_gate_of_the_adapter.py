"""DualEdit's text adapter decides the gate itself where its key is the last token's state."""

import pytest
import torch
from dualedit.tuners.dualedit import modules
from interpreter import Launches, on_triton
from tiny_models import LLAVA, edit_layers, editor_of, row_of, store

from dualedit_kernels import backend, nearest_key

LOOKED_UP, DECIDED = False, True


@pytest.fixture(params=[LOOKED_UP, DECIDED], ids=["looked up", "decided by the operator"])
def decides(request, monkeypatch):
    """As on a CPU, where the adapter looks up first, and as on a GPU, where the operator does all of it."""
    monkeypatch.setattr(modules, "decides_gate", lambda hidden, gate: request.param)
    return request.param


@pytest.fixture
def calls(monkeypatch):
    """(states, gate, route given, states returned, route returned) of every call of an adapter."""
    seen, forward = [], modules.EditCrossAttention.forward

    def noted(self, hidden, span, edits, route=None, gate=None):
        out = forward(self, hidden, span, edits, route, gate)
        seen.append((hidden, gate, route, *out))
        return out

    monkeypatch.setattr(modules.EditCrossAttention, "forward", noted)
    return seen


def edited(generator, stored=(1, 3), **settings):
    """An editor with edits of some of four questions, and the questions."""
    model = editor_of(LLAVA, "dualedit", **settings)
    inputs = LLAVA.questions(4, generator)
    for row in stored:
        store(model, row_of(inputs, row), generator)
    return model, inputs


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("settings", [{}, {"vis_layer": 1}], ids=["two layers", "one layer"])
def test_the_text_adapter_decides_and_the_visual_one_gets_the_route(generator, decides, calls, settings):
    model, inputs = edited(generator, **settings)
    calls.clear()
    out = logits(model, inputs)
    (hidden, gate, given, _, route), (_, no_gate, handed, _, _) = calls
    assert given is None and no_gate is None and torch.equal(handed, route)
    query = hidden[:, -1]  # prompts are padded on the left
    assert torch.equal(nearest_key(query, gate.keys, gate.radius, "cosine")[0], route)
    assert route.tolist() == [-1, 0, -1, 1]
    base = logits(LLAVA.build(), inputs)
    assert torch.equal(out[[0, 2]], base[[0, 2]]) and not torch.equal(out[[1, 3]], base[[1, 3]])


def test_both_ways_give_the_same_bits(generator, monkeypatch):
    model, inputs = edited(generator)
    answers = []
    for way in (LOOKED_UP, DECIDED):
        monkeypatch.setattr(modules, "decides_gate", lambda hidden, gate, way=way: way)
        answers.append(logits(model, inputs))
    assert torch.equal(*answers)


def test_where_nothing_fires_nothing_is_folded(generator, decides, calls, monkeypatch):
    """The first question to no edit costs a CPU a lookup, not the product of two weights."""
    model, inputs = edited(generator, stored=(1,))
    others, folds = row_of(inputs, 0), []
    monkeypatch.setattr(modules, "fold_query", lambda *parts: folds.append(1))
    for layer in edit_layers(model):
        layer.train(False)  # forgets what the edit has folded
    calls.clear()
    if decides is LOOKED_UP:
        assert torch.equal(logits(model, others), logits(LLAVA.build(), others)) and folds == []
        assert len(calls) == 1 and calls[0][3] is calls[0][0]  # the visual adapter is not even asked


def test_another_key_is_looked_up_before(generator, decides, calls):
    model, inputs = edited(generator, stored=(), key="pooled", key_dim=8)
    store(model, row_of(inputs, 1), generator)
    calls.clear()
    logits(model, inputs)
    assert calls and all(gate is None and route is not None for _, gate, route, _, _ in calls)


def test_disabled_adapters_are_not_asked(generator, decides, calls):
    model, inputs = edited(generator)
    calls.clear()
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), logits(LLAVA.build(), inputs))
    assert calls == []
    assert not torch.equal(logits(model, inputs), logits(LLAVA.build(), inputs))


def test_codes_of_the_keys_are_used(generator, decides, calls, monkeypatch):
    """Where they pay: the gate carries them, and the lookup gets them."""
    from dualedit_kernels import encode_keys
    from dualedit_kernels.gated_edit_attention import op

    model, inputs = edited(generator)
    layer, coded = edit_layers(model)[0], []
    snapshot = type(layer.groups["default"].snapshot()[layer.layer_name])
    monkeypatch.setattr(snapshot, "codes", lambda self, keys, metric: encode_keys(keys, metric))
    lookup = op.nearest_key
    monkeypatch.setattr(op, "nearest_key", lambda *args: coded.append(args[4]) or lookup(*args))
    calls.clear()
    logits(model, inputs)
    assert len(coded) == 1 and coded[0] is calls[0][1].codes


@on_triton
def test_launches_of_an_edited_model(seed):
    """Four for the text adapter, which decides; three behind the statistics of the visual one: eight."""
    generator = torch.Generator().manual_seed(seed)
    model, inputs = edited(generator)
    want = logits(model, inputs)
    with backend.use_backend("triton"), Launches() as seen:
        out = logits(model, inputs)
    kernels = [name for name in seen.names if name.endswith("_kernel")]
    assert kernels == ["statistics_kernel", "project_kernel", "attend_kernel", "output_kernel"] * 2
    base = logits(LLAVA.build(), inputs)
    assert torch.equal(out[[0, 2]], base[[0, 2]])
    torch.testing.assert_close(out, want, rtol=1e-3, atol=1e-3)
