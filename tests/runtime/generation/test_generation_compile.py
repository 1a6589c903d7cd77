"""torch.compile: the same answers, and graphs as whole as the base model's."""

import copy
import gc
import warnings
import weakref

import pytest
import torch
from dualedit import add_edit
from generation_answers import edited_pair, first_logits, generate, longer
from tiny_models import BLIP2, LLAVA, METHODS, WORDS, edit_layers, editor_of, row_of, store, tiny_llama
from torch import _dynamo as dynamo
from transformers import DynamicCache

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.slow]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def breaks(model, inputs):
    with torch.no_grad():
        return dynamo.explain(model)(**inputs).graph_break_count


@pytest.mark.slow
def test_graph_breaks(generator):
    """No more than the base model's, plus one for each edited layer."""
    base, inputs = LLAVA.build(), LLAVA.question(generator)
    theirs = breaks(base, inputs)
    for method in METHODS:
        model = editor_of(LLAVA, method)
        store(model, inputs, generator)
        assert breaks(model.get_base_model(), inputs) <= theirs + len(edit_layers(model))


def test_whole_graph(method, generator):
    """BLIP-2 compiles as one graph, and so does the edited one: prefill and steps, hit rows and others."""
    base, model, inputs = edited_pair(BLIP2, method, generator)
    plain = model.get_base_model()
    compiled = torch.compile(plain, backend="eager", fullgraph=True)
    with torch.no_grad():
        ours = compiled(**inputs).logits
        assert torch.equal(ours, plain(**inputs).logits)
        theirs = base(**inputs).logits
    assert torch.equal(ours[[0, 2]], theirs[[0, 2]])
    assert not torch.isclose(ours[1, -1], theirs[1, -1], atol=1e-3).all()


def test_many_questions_one_graph(generator):
    """Other routes, other edits and other questions need no new graph."""
    base, model, inputs = edited_pair(BLIP2, "dualedit", generator, hit=(1,), rows=2)
    graphs = []

    def backend(graph, example):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model.get_base_model(), backend=backend, fullgraph=True)
    other = {**inputs, "pixel_values": BLIP2.pixels(2, generator)["pixel_values"]}
    with torch.no_grad():
        for call in (inputs, other):
            assert torch.equal(compiled(**call).logits, model(**call).logits)
        store(model, row_of(other, 0), generator)
        assert torch.equal(compiled(**other).logits, model(**other).logits)
        assert not torch.equal(compiled(**other).logits[0], base(**other).logits[0])
        with model.disable_adapter():
            assert torch.equal(compiled(**other).logits, base(**other).logits)
    assert len(graphs) <= 2  # switching the adapter off may need another


def test_a_compiled_copy_asks_its_own_layers(generator):
    model = editor_of(BLIP2, "dualedit")
    inputs = BLIP2.questions(2, generator)
    other = copy.deepcopy(model)
    store(other, row_of(inputs, 1), generator)
    answers = []
    for one in (model, other):
        plain = one.get_base_model()
        compiled = torch.compile(plain, backend="eager", fullgraph=True)
        with torch.no_grad():
            answers.append(compiled(**inputs).logits)
            assert torch.equal(answers[-1], plain(**inputs).logits)
    assert torch.equal(answers[0][0], answers[1][0])
    assert not torch.equal(answers[0][1], answers[1][1])


def test_handles_keep_no_layer_alive():
    model = editor_of(BLIP2, "dualedit")
    layer = edit_layers(model)[0]
    gone, handle = weakref.ref(layer), layer.handle
    assert handle.owner.thing() is layer
    del model, layer
    gc.collect()
    assert gone() is None and handle.owner.thing() is None


def test_generation_with_a_compiled_forward(method, generator):
    base, model, inputs = edited_pair(LLAVA, method, generator)
    expected = generate(model, inputs)
    plain = model.get_base_model()
    plain.forward = torch.compile(plain.forward, backend="eager", dynamic=True)
    try:
        assert torch.equal(generate(model, inputs), expected)
        assert torch.equal(first_logits(model, inputs)[[0, 2]], first_logits(base, inputs)[[0, 2]])
    finally:
        del plain.forward


def test_decoding_by_hand_over_a_cache(method, generator):
    """The cache that a compiled prefill makes carries the decision, to compiled steps and to others."""
    model = editor_of(LLAVA, method)
    inputs = LLAVA.question(generator)
    store(model, inputs, generator)
    plain = model.get_base_model()
    compiled = torch.compile(plain, backend="eager", dynamic=True)
    token = torch.tensor([[7]])
    with torch.no_grad():
        want = plain(**longer(inputs, token.repeat(1, 3)), labels=labels_of(inputs, 3)).logits[:, -3:]
        for first, then in ((compiled, compiled), (compiled, plain), (plain, compiled)):
            cache = DynamicCache(config=plain.config.get_text_config())
            first(**inputs, past_key_values=cache)
            steps = [then(input_ids=token, past_key_values=cache).logits for _ in range(3)]
            assert torch.allclose(torch.cat(steps, dim=1), want, atol=1e-4)
        made = compiled(**inputs, use_cache=True).past_key_values
        steps = [plain(input_ids=token, past_key_values=made).logits for _ in range(3)]
        assert torch.allclose(torch.cat(steps, dim=1), want, atol=1e-4)


def labels_of(inputs, new):
    ids = inputs["input_ids"]
    return torch.cat([torch.full_like(ids, -100), torch.full((ids.shape[0], new), 7)], dim=1)


@pytest.mark.slow
def test_inductor(method, generator):
    """The whole way down: inductor's code runs the operators once and in order, and hands on the ticket."""
    model = editor_of(LLAVA, method, tiny_llama(), **({"vis_layer": None} if method == "dualedit" else {}))
    ids = torch.randint(3, WORDS, (3, 6), generator=generator)
    rows = [{"input_ids": row[None], "attention_mask": torch.ones(1, 6).long()} for row in ids]
    samples = {"positives": [rows[0]], "negatives": [rows[2]]} if method == "balancedit" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        add_edit(model, rows[0], torch.tensor([5, 6]), **samples)
    plain, token = model.get_base_model(), torch.full((2, 1), 7)
    compiled = torch.compile(plain, fullgraph=True)
    with torch.no_grad():
        out, want = compiled(input_ids=ids[:2], use_cache=True), plain(input_ids=ids[:2], use_cache=True)
        assert torch.allclose(out.logits, want.logits, atol=1e-3)
        with model.disable_adapter():
            base = plain(input_ids=ids[:2]).logits
        assert torch.allclose(out.logits[1], base[1], atol=1e-3)
        assert not torch.isclose(out.logits[0, -1], base[0, -1], atol=1e-2).all()
        step = plain(input_ids=token, past_key_values=out.past_key_values).logits
        same = plain(input_ids=token, past_key_values=want.past_key_values).logits
        assert torch.allclose(step, same, atol=1e-3)
