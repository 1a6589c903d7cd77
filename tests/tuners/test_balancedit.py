"""BalancEdit: the radius, the fitted value, and running only the upper layers while fitting."""

import warnings

import pytest
import torch
from dualedit import add_edit, inject_balancedit, lookup
from dualedit.models.targets import append_target
from dualedit.runtime.context import bound
from dualedit.runtime.partial import Replay
from dualedit.tuners.balancedit.method import fit_value
from tiny_models import (
    BLIP2,
    FITTING,
    LLAVA,
    PAD,
    QWEN,
    WORDS,
    edit_layers,
    editor_of,
    row_of,
    sharp,
    store,
    tiny_llama,
)  # fmt: skip

from dualedit_kernels import LowRank


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The edit did not take")
        yield


def keys_by_hand(model, family, rows, key):
    """The layer's input of each question, pooled as the paper says, from the base model."""
    found = []
    linear = edit_layers(model)[0].base_layer
    handle = linear.register_forward_pre_hook(
        lambda m, args: found.append(args[0].reshape(-1, args[0].shape[-1]))
    )
    with torch.no_grad(), model.disable_adapter():
        for row in rows:
            model(**row)
    handle.remove()
    return torch.stack([states.mean(0) if key == "mean" else states[-1] for states in found])


def between(one, other, metric):
    if metric == "l2":
        return float((one - other).norm())
    return 1 - float(torch.nn.functional.cosine_similarity(one, other, dim=0))


@pytest.mark.parametrize("alpha", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("key", ["mean", "last"])
def test_radius(family, alpha, metric, key, generator):
    """alpha times the farthest positive plus 1 - alpha times the nearest negative sample."""
    model = editor_of(family, "balancedit", alpha=alpha, metric=metric, key=key, max_steps=1)
    inputs = family.questions(5, generator)
    question, *others = (row_of(inputs, row) for row in range(5))
    centre, *rest = keys_by_hand(model, family, [question, *others], key)
    ordered = sorted(zip([between(centre, other, metric) for other in rest], range(4), strict=True))
    near, far = [i for _, i in ordered[:2]], [i for _, i in ordered[2:]]
    edit = add_edit(
        model,
        question,
        torch.tensor([5]),
        positives=[others[i] for i in near],
        negatives=[others[i] for i in far],
    )
    expected = alpha * ordered[1][0] + (1 - alpha) * ordered[2][0]
    assert edit.radius == pytest.approx(expected, rel=1e-3, abs=1e-6)
    for distance, i in ordered:
        found = lookup(model, others[i])
        assert found.distance == pytest.approx(distance, rel=1e-3, abs=1e-6)
        if abs(distance - edit.radius) > 1e-3 * distance:
            assert found.fired == (distance < edit.radius)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_radius_is_clamped_below_a_nearer_negative(alpha, generator):
    model = editor_of(LLAVA, "balancedit", alpha=alpha, max_steps=1)
    inputs = LLAVA.questions(3, generator)
    question, *others = (row_of(inputs, row) for row in range(3))
    centre, *rest = keys_by_hand(model, LLAVA, [question, *others], "mean")
    distances = [between(centre, other, "l2") for other in rest]
    nearer = distances.index(min(distances))
    with pytest.warns(UserWarning, match="radius is clamped"):
        edit = add_edit(
            model, question, torch.tensor([5]), positives=[others[1 - nearer]], negatives=[others[nearer]]
        )
    assert 0 < edit.radius < min(distances)
    assert lookup(model, question).fired
    assert not lookup(model, others[nearer]).fired


@pytest.mark.parametrize("share", [0.5, 2.0])
def test_no_edit_reaches_farther_than_the_largest_radius(share, generator):
    """The limit counts where it is below the edit's own radius, and nowhere else."""
    inputs = LLAVA.questions(3, generator)
    question, *others = (row_of(inputs, row) for row in range(3))
    free = editor_of(LLAVA, "balancedit", alpha=0.0, max_steps=1)
    samples = {"positives": [others[0]], "negatives": [others[1]]}
    own = add_edit(free, question, torch.tensor([5]), **samples).radius
    model = editor_of(LLAVA, "balancedit", alpha=0.0, max_steps=1, max_radius=share * own)
    edit = add_edit(model, question, torch.tensor([5]), **samples)
    assert edit.radius == pytest.approx(min(1.0, share) * own, rel=1e-5)


@pytest.mark.parametrize("limit", [0.0, -1.0, "1"])
def test_a_largest_radius_is_a_positive_number(limit):
    with pytest.raises(ValueError, match="max_radius"):
        editor_of(LLAVA, "balancedit", max_radius=limit)


@pytest.mark.parametrize("missing", ["positives", "negatives"])
def test_samples_are_needed(missing, generator):
    model = editor_of(LLAVA, "balancedit")
    question = LLAVA.question(generator)
    samples = {"positives": [question], "negatives": [question]} | {missing: []}
    with pytest.raises(ValueError, match="at least one of each"):
        add_edit(model, question, torch.tensor([5]), **samples)
    assert lookup(model, question).edit_id is None


def test_a_sample_that_overflows_is_refused(generator):
    """An infinite distance would make an infinite radius: an edit for every input."""
    model = editor_of(LLAVA, "balancedit")
    question = LLAVA.question(generator)
    broken = question | {"pixel_values": question["pixel_values"] * float("inf")}
    with pytest.raises(ValueError, match="not all finite"):
        add_edit(model, question, torch.tensor([5]), positives=[question], negatives=[broken])
    assert lookup(model, question).edit_id is None


@pytest.mark.parametrize("value", ["low_rank", "full"])
def test_fitting_makes_the_target_the_answer(family, value, generator):
    model = editor_of(family, "balancedit", sharp(family), value=value, **FITTING)
    inputs = family.questions(3, generator)
    target = torch.randint(3, WORDS, (2,), generator=generator)
    settings = dict(max_new_tokens=2, do_sample=False, eos_token_id=10_000, pad_token_id=PAD)
    before = model.generate(**inputs, **settings)[:, -2:]
    weights = {name: p.clone() for name, p in model.get_base_model().named_parameters()}
    store(model, row_of(inputs, 1), generator, target)
    after = model.generate(**inputs, **settings)[:, -2:]
    assert torch.equal(after[1], target)
    assert torch.equal(after[[0, 2]], before[[0, 2]])
    for name, p in model.get_base_model().named_parameters():
        assert torch.equal(p, weights[name]) and p.grad is None, name


def test_fitting_stops_early_and_says_when_it_fails(generator):
    question = LLAVA.question(generator)
    target = append_target(question, torch.randint(3, WORDS, (2,), generator=generator))
    layers = {}
    for steps, rate in ((300, 0.03), (1, 1e-6)):
        settings = FITTING | dict(max_steps=steps, learning_rate=rate)
        model = editor_of(LLAVA, "balancedit", sharp(LLAVA), **settings)
        layers[steps] = (model, edit_layers(model)[0])
    model, layer = layers[300]
    _, fit = fit_value(model, layer, layer.configs["default"], target)
    assert 0 < fit["steps"] < 300 and fit["probability"] >= 0.6
    model, layer = layers[1]
    _, fit = fit_value(model, layer, layer.configs["default"], target)
    assert fit["steps"] == 1 and fit["probability"] < 0.6 and not fit["written"]
    samples = {"positives": [question], "negatives": [LLAVA.question(generator)]}
    with pytest.warns(UserWarning, match="The edit did not take: after 1 steps"):
        add_edit(model, question, target["labels"][target["labels"] != -100], **samples)


def test_fitting_in_inference_mode(generator):
    model = editor_of(LLAVA, "balancedit", max_steps=5, learning_rate=0.05)
    with torch.inference_mode():
        question = {name: value.clone() for name, value in LLAVA.question(generator).items()}
        edit = store(model, question, generator)
        assert lookup(model, question).edit_id == edit.id
    assert edit_layers(model)[0].balancedit_memory["default"].record(edit.id)["steps"] == 5


def test_fitting_leaves_other_gradients_alone(generator):
    """A trainable part beside the editor (an adapter in training) keeps the gradient it has."""
    model = editor_of(LLAVA, "balancedit")
    head = model.get_base_model().lm_head.weight.requires_grad_()
    head.grad = torch.ones_like(head)
    store(model, LLAVA.question(generator), generator)
    assert torch.equal(head.grad, torch.ones_like(head))


# ---------------------------------------------------------------------- replay


def bound_value(model, generator, scale=0.3):
    layer = edit_layers(model)[0]
    inputs, outputs = layer.base_layer.in_features, layer.base_layer.out_features
    value = LowRank(
        scale * torch.randn(1, 2, inputs, generator=generator),
        scale * torch.randn(1, outputs, 2, generator=generator),
    )
    return layer, value


def test_replay_is_the_model(family, generator):
    model = editor_of(family, "balancedit")
    base = model.get_base_model()
    inputs = family.question(generator)
    layer, value = bound_value(model, generator)
    route = torch.zeros(1, dtype=torch.int64)
    with torch.no_grad(), bound(base, route, {}):
        replay = Replay(model, inputs, first=2)
        plain = base(**inputs).logits
    assert replay.exact
    ran = []
    stack = base.get_submodule(family.layers)
    handles = [m.register_forward_pre_hook(lambda *a, i=i: ran.append(i)) for i, m in enumerate(stack)]
    with torch.no_grad(), bound(base, route, {layer.layer_name: value}):
        upper = replay()
        assert ran == [2, 3]
        whole = base(**inputs).logits
    for handle in handles:
        handle.remove()
    assert torch.allclose(upper, whole, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(upper, plain, rtol=1e-2, atol=1e-2)


def test_replay_falls_back_to_the_whole_model(generator):
    """Where the upper layers are not all (here: logits are capped behind the head), the model runs."""
    model = editor_of(LLAVA, "balancedit", sharp(LLAVA), **FITTING)
    base = model.get_base_model()

    def cap(module, args, output):
        output.logits = 20.0 * torch.tanh(output.logits / 20.0)
        return output

    base.register_forward_hook(cap)
    inputs = LLAVA.question(generator)
    layer, value = bound_value(model, generator)
    route = torch.zeros(1, dtype=torch.int64)
    with torch.no_grad():
        with bound(base, route, {}):
            replay = Replay(model, inputs, first=2)
        assert not replay.exact
        with bound(base, route, {layer.layer_name: value}):
            assert torch.equal(replay(), base(**inputs, use_cache=False).logits)
    target = torch.randint(3, WORDS, (2,), generator=generator)
    store(model, inputs, generator, target)
    answer = model.generate(
        **inputs, max_new_tokens=2, do_sample=False, eos_token_id=10_000, pad_token_id=PAD
    )
    assert torch.equal(answer[0, -2:], target)


def test_replay_falls_back_where_layers_cannot_be_chained(generator):
    """Features that the stack adds between its layers (as DeepStack models do) are in no layer's call."""
    model = editor_of(QWEN, "balancedit")
    base = model.get_base_model()
    stack = base.model.language_model
    added = torch.randn(stack.config.hidden_size, generator=generator)
    calls = []

    def between_layers(module, args, kwargs):
        calls.append(1)
        if len(calls) % 2 == 1:  # as if the stack did it: only when the whole model runs
            return (args[0] + added, *args[1:]), kwargs

    handle = stack.layers[3].register_forward_pre_hook(between_layers, with_kwargs=True)
    with torch.no_grad(), bound(base, torch.zeros(1, dtype=torch.int64), {}):
        replay = Replay(model, QWEN.question(generator), first=2)
    handle.remove()
    assert not replay.exact


def test_linear_layers_that_see_flattened_tokens(generator):
    """OPT flattens batch and tokens before its linear layers: rows are told apart all the same."""
    base, model = BLIP2.build(), editor_of(BLIP2, "balancedit")
    inputs = BLIP2.questions(4, generator)
    shapes = []
    edit_layers(model)[0].register_forward_pre_hook(lambda m, args: shapes.append(args[0].ndim))
    store(model, row_of(inputs, 2), generator)
    with torch.no_grad():
        ours, theirs = model(**inputs).logits, base(**inputs).logits
    assert set(shapes) == {2}
    assert [torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)] == [True, True, False, True]


def test_a_layer_that_sees_some_tokens_only(generator):
    """A mixture of experts hands each expert its own tokens: refused, for there are no rows to decide on."""
    model = inject_balancedit(tiny_llama(), layer="layers.1.mlp.up_proj", max_steps=1)
    mlp = model.get_base_model().model.layers[1].mlp
    whole = mlp.forward
    mlp.forward = lambda x: torch.cat(
        [whole(x[:, :-1].flatten(0, 1)).view(x.shape[0], -1, x.shape[2]), x[:, -1:]], 1
    )
    words = torch.randint(3, WORDS, (1, 6), generator=generator)
    inputs = {"input_ids": words, "attention_mask": torch.ones_like(words)}
    with torch.no_grad():
        model(**inputs)  # without edits nothing is asked of it
    with pytest.raises(ValueError, match="rows of a batch cannot be told apart"):
        add_edit(model, inputs, torch.tensor([5]), positives=[inputs], negatives=[inputs])
