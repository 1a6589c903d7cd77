"""Gradients of the adapters: two forwards before one backward, checkpointing, finite differences."""

import pytest
import torch
from dualedit import inject_dualedit
from dualedit.models.targets import append_target
from dualedit.runtime.context import bound
from dualedit.runtime.recording import record_states
from dualedit.tuners.dualedit.modules import EditKV
from tiny_models import BLIP2, FAMILIES, LLAVA, QWEN, WORDS, edit_layers, editor_of, row_of, store, tiny_opt
from torch import nn


def training_batch(family, generator):
    """An edit and an unrelated question, both with a target behind the prompt."""
    inputs = family.questions(2, generator)
    rows = [row_of(inputs, i) for i in range(2)]
    return [append_target(row, torch.randint(3, WORDS, (3,), generator=generator)) for row in rows]


def editor(family, model=None, dtype=torch.float32, layers=(1, 2)):
    model = editor_of(family, "dualedit", model, text_layer=layers[0], vis_layer=layers[1]).to(dtype)
    with torch.no_grad():
        for layer in edit_layers(model):
            for name, parameter in layer.dualedit_adapter.named_parameters():
                if "o_proj" in name:
                    parameter.mul_(0.1)
    return model


def edits_of(model, edit):
    """The edit through the adapters' projections, with gradients: layer name to part to keys and values."""
    states, prompt = record_states(model, edit)
    found = {}
    for layer in edit_layers(model):
        hidden = states[layer.layer_name][0]
        start, length = torch.zeros(1, dtype=torch.int64), torch.tensor([hidden.shape[0]])
        found[layer.layer_name] = {
            part: EditKV(*adapter.project_edit(hidden), start, length)
            for part, adapter in layer.dualedit_adapter["default"].items()
        }
    return found


def training_loss(model, edit, other):
    """Edit loss plus a locality loss on another question, adapters open for both: two forwards."""
    call = [{k: v for k, v in inputs.items() if k != "labels"} for inputs in (edit, other)]
    target = edit["labels"][:, 1:] != -100
    with torch.no_grad(), model.disable_adapter():
        before = model(**call[1], use_cache=False).logits
    edits = edits_of(model, edit)
    with bound(model.get_base_model(), torch.zeros(1, dtype=torch.int64), edits):
        logits = model(**call[0], use_cache=False, labels=edit["labels"]).logits
        after = model(**call[1], use_cache=False, labels=other["labels"]).logits
    loss = nn.functional.cross_entropy(logits[:, :-1][target], edit["labels"][:, 1:][target])
    return loss + nn.functional.mse_loss(after, before)


def gradients(model, batch):
    model.zero_grad(set_to_none=True)
    training_loss(model, *batch).backward()
    return {
        name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None
    }


def with_checkpointing(model, reentrant):
    base = model.get_base_model()
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        base.enable_input_require_grads()
    return model.train()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", [LLAVA, QWEN], ids=lambda family: family.name)
@pytest.mark.parametrize("layers", [(1, 2), (1, None), (None, 1), (2, 1), (1, 1)])
def test_checkpointing_changes_no_gradient(family, reentrant, layers, generator):
    model = editor(family, layers=layers)
    batch = training_batch(family, generator)
    expected = gradients(model, batch)
    calls = []
    layer = model.get_base_model().get_submodule(family.layers)[3]
    layer.mlp.register_forward_pre_hook(lambda *args: calls.append(1))
    found = gradients(with_checkpointing(model, reentrant), batch)
    assert len(calls) > 4  # the layer was computed again in backward: checkpointing was on
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        scale = float(gradient.abs().max())
        assert torch.allclose(found[name], gradient, rtol=1e-4, atol=1e-5 * scale + 1e-9), name


def test_every_adapter_weight_gets_a_gradient(generator):
    model = editor(LLAVA)
    found = gradients(model, training_batch(LLAVA, generator))
    adapters = {n for n, p in model.named_parameters() if p.requires_grad}
    assert set(found) == adapters
    for name, gradient in found.items():
        assert torch.isfinite(gradient).all()
        # A key bias shifts all scores of a query alike, which softmax does not see.
        assert float(gradient.abs().max()) > (0 if "k_proj.bias" not in name else -1), name


@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_against_finite_differences(checkpointing, generator):
    """In float64: the directional derivative of every adapter weight, with two forwards before one backward.

    On BLIP-2, because OPT computes in float64 throughout, where Llama's norms go through float32.
    """
    model = editor(BLIP2, dtype=torch.float64)
    batch = training_batch(BLIP2, generator)
    if checkpointing is not None:
        with_checkpointing(model, checkpointing)
    found = gradients(model, batch)
    eps = 1e-6
    for name, parameter in model.named_parameters():
        if name not in found:
            continue
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        direction /= direction.norm()
        with torch.no_grad():
            losses = []
            for sign in (1, -1):
                parameter.add_(sign * eps * direction)
                losses.append(float(training_loss(model, *batch)))
                parameter.sub_(sign * eps * direction)
        numeric = (losses[0] - losses[1]) / (2 * eps)
        analytic = float((found[name] * direction).sum())
        assert analytic == pytest.approx(numeric, rel=1e-4, abs=1e-7), name


def test_bound_rows_without_an_edit(generator):
    """Under `bound`, rows with route -1 are the base model's."""
    base, model = LLAVA.build(), editor(LLAVA)
    inputs = LLAVA.questions(3, generator)
    edit = training_batch(LLAVA, generator)[0]
    with torch.no_grad():
        edits = edits_of(model, edit)
        with bound(model.get_base_model(), torch.tensor([-1, 0, -1]), edits):
            ours = model(**inputs).logits
        theirs = base(**inputs).logits
        assert torch.equal(ours[[0, 2]], theirs[[0, 2]]) and not torch.equal(ours[1], theirs[1])
        assert torch.equal(model(**inputs).logits, theirs)


def test_a_stored_edit_is_the_bound_edit(generator):
    """What training optimises is what inference runs: the edit bound, or stored and routed."""
    from dualedit import add_edit

    model = editor(LLAVA)
    question = LLAVA.question(generator)
    target = torch.randint(3, WORDS, (3,), generator=generator)
    with torch.no_grad():
        edits = edits_of(model, append_target(question, target))
        with bound(model.get_base_model(), torch.tensor([0]), edits):
            trained = model(**question).logits
        add_edit(model, question, target)
        assert torch.allclose(model(**question).logits, trained, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("around", [False, True], ids=["alone", "inside a DualEdit layer"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_checkpointing_with_stored_edits_in_a_linear_layer(family, reentrant, around, generator):
    """Backward runs a BalancEdit layer again with the route of the first time, two forwards before it too."""
    model = editor_of(family, "balancedit")
    hit, other = family.questions(2, generator), family.question(generator, words=9)
    store(model, row_of(hit, 1), generator)
    if around:
        number = int(family.linear.split(".")[1])
        model = inject_dualedit(
            model, text_layer=number, vis_layer=None, mid_dim=16, num_heads=2, adapter_name="around"
        )
    base = model.get_base_model()
    soft = {name: torch.nn.Parameter(0.1 * torch.randn(32, generator=generator)) for name in ("hit", "other")}

    def loss(name, inputs):
        embeddings = base.get_input_embeddings()
        handle = embeddings.register_forward_hook(lambda module, args, output: output + soft[name])
        try:
            return base(**inputs, use_cache=False).logits.square().mean()
        finally:
            handle.remove()

    def found():
        losses = [loss("hit", hit), loss("other", other)]
        for parameter in soft.values():
            parameter.grad = None
        (losses[0] + losses[1]).backward()
        return [parameter.grad.clone() for parameter in soft.values()]

    with torch.no_grad():
        assert not torch.equal(base(**hit).logits[1], _without(model, hit)[1])
    expected = found()
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    base.train()
    linear, calls = edit_layers(model)[-1], []
    assert linear.layer_name.endswith(family.linear)
    linear.register_forward_pre_hook(lambda *args: calls.append(1))
    again = found()
    assert len(calls) == 4  # two forwards, and both again in backward
    for one, two in zip(again, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)
    assert base._dualedit_runtime.current_pass() is None


def _without(model, inputs):
    with model.disable_adapter():
        return model(**inputs).logits


def test_gradients_of_something_else(generator):
    """Another trainable part of an edited model (a soft prompt, say) gets right gradients."""
    from dualedit import add_edit

    model = editor_of(LLAVA, "dualedit", tiny_opt(), vis_layer=None).double().requires_grad_(False)
    words = torch.randint(3, WORDS, (1, 6), generator=generator)
    with torch.inference_mode():  # folded weights and stored tensors stay usable for a backward pass
        add_edit(model, {"input_ids": words}, torch.tensor([5]))
        model(input_ids=words)
    embedded = model.get_base_model().get_input_embeddings()(words).clone().requires_grad_()
    direction = torch.randn(embedded.shape, generator=generator, dtype=torch.float64)
    model(inputs_embeds=embedded).logits.sum().backward()
    eps = 1e-6
    with torch.no_grad():
        high, low = (float(model(inputs_embeds=embedded + s * eps * direction).logits.sum()) for s in (1, -1))
    assert float((embedded.grad * direction).sum()) == pytest.approx((high - low) / (2 * eps), rel=1e-5)
