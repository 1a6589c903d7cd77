"""The pooled routing key: what it reads, that it travels with the adapter, that fitting moves it alone."""

import pytest
import torch
from dualedit import lookup
from dualedit.editing import lookup_many
from dualedit.memory.routing_keys import PooledKey
from dualedit.runtime.context import runtime_of
from dualedit.tuners import BalancEditConfig, DualEditConfig
from peft import PeftModel
from tiny_models import FAMILIES, LLAVA, PAD, WORDS, edit_layers, editor_of, row_of, store

D, P = 24, 16


def trained_like(key: PooledKey, generator: torch.Generator) -> PooledKey:
    """A head whose every weight matters."""
    with torch.no_grad():
        for name, parameter in key.named_parameters():
            parameter.normal_(std=0.4, generator=generator)
            if name == "image_weight":
                parameter.abs_().add_(0.5)
    return key


@pytest.mark.parametrize("width", [None, 3 * D])
def test_a_pooled_key_is_the_formula_in_float64(width, generator):
    """Of states as wide as image tokens, and of BalancEdit's, which a layer's input may make wider."""
    head = trained_like(PooledKey(D, P, state_size=width), generator)
    last = torch.randn(3, width or D, generator=generator)
    mean_image = torch.randn(3, D, generator=generator)

    def unit(x):
        return x / x.norm(dim=1, keepdim=True)

    def half(fitted, x):
        return unit((unit(x.double()) - fitted.centre.double()) @ fitted.map.double().T)

    asked, shown = half(head.question, last), half(head.picture, mean_image)
    weight = float(head.image_weight.detach())
    wanted = torch.cat([asked, weight**0.5 * shown], 1) / (1 + weight) ** 0.5
    found = head(last, mean_image)
    torch.testing.assert_close(found.double(), wanted, atol=1e-6, rtol=1e-5)
    cosine = (asked @ asked.T + weight * shown @ shown.T) / (1 + weight)
    torch.testing.assert_close((found @ found.T).double(), cosine, atol=1e-5, rtol=1e-5)
    # Without an image its half is zero, not minus the mean: no text-only question is near one with an image.
    for nothing in (None, torch.zeros_like(mean_image)):
        alone = torch.cat([asked, torch.zeros_like(shown)], 1)
        torch.testing.assert_close(head(last, nothing).double(), alone, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("method", ["dualedit", "balancedit"])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_pooled_key_reads_image_tokens_where_they_enter_the_decoder(family, method, generator):
    """From padded batches as from single questions, when an edit is stored, looked up and answered."""
    model = editor_of(family, method, key="pooled", key_dim=P)
    base, gate = model.get_base_model(), edit_layers(model)[0]
    trained_like(gate.router("default"), generator)
    inputs = family.questions(3, generator)
    entered, asked = [], []
    stack = base.get_submodule(family.layers.rpartition(".")[0])
    handles = [
        stack.register_forward_pre_hook(
            lambda m, args, kwargs: entered.append(kwargs["inputs_embeds"]), with_kwargs=True
        ),
        gate.router("default").register_forward_pre_hook(lambda m, args: asked.append(args[1])),
    ]
    store(model, row_of(inputs, 1), generator)
    asked.clear()
    with torch.no_grad():
        model(**inputs)
        model.generate(**inputs, max_new_tokens=2, do_sample=False, pad_token_id=PAD)
    for handle in handles:
        handle.remove()
    image = torch.isin(inputs["input_ids"], torch.tensor(runtime_of(base).image_ids))
    wanted = torch.stack([states[mask].mean(0) for states, mask in zip(entered[-3], image, strict=True)])
    assert len(asked) == 2  # once a prompt, not once a token
    for found in asked:
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    assert [found.fired for found in lookup_many(model, inputs)] == [False, True, False]


@pytest.mark.parametrize("method", ["dualedit", "balancedit"])
def test_a_pooled_key_of_a_later_turn_knows_the_picture_of_an_earlier_one(method, generator):
    model = editor_of(LLAVA, method, key="pooled", key_dim=P)
    gate = edit_layers(model)[0]
    trained_like(gate.router("default"), generator)
    first = LLAVA.question(generator)
    store(model, LLAVA.question(generator), generator)
    asked = []
    handle = gate.router("default").register_forward_pre_hook(lambda m, args: asked.append(args[1]))
    with torch.no_grad():
        cache = model(**first, use_cache=True).past_key_values
        more = torch.randint(3, WORDS, (1, 4), generator=generator)
        mask = torch.ones(1, first["input_ids"].shape[1] + 4, dtype=torch.int64)
        model(input_ids=more, attention_mask=mask, past_key_values=cache, use_cache=True)
    handle.remove()
    assert len(asked) == 2 and bool(asked[0].any())
    assert torch.equal(asked[0], asked[1])


@pytest.mark.parametrize("method", ["dualedit", "balancedit"])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_fires_travels_and_leaves_others_bit_for_bit(family, method, generator, tmp_path):
    base = family.build()
    other = family.question(generator, words=8)
    with torch.no_grad():
        before = base(**other).logits
    model = editor_of(family, method, base, key="pooled", key_dim=P)
    gate = edit_layers(model)[0]
    trained_like(gate.router("default"), generator)
    asked = family.question(generator)
    with torch.no_grad():
        unedited = model(**asked).logits
    edit = store(model, asked, generator)
    memory = gate.dualedit_memory if method == "dualedit" else gate.balancedit_memory
    assert memory["default"].key[:1].shape == (1, P)
    found = lookup(model, asked)
    assert found.fired and found.edit_id == edit.id and found.distance < 1e-5
    assert not lookup(model, other).fired
    with torch.no_grad():
        edited = model(**asked).logits
        assert not torch.equal(edited, unedited)
        assert torch.equal(model(**other).logits, before)
        with model.disable_adapter():
            assert torch.equal(model(**asked).logits, unedited)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(family.build(), str(tmp_path))
    with torch.no_grad():
        assert torch.equal(again(**asked).logits, edited)
        assert torch.equal(again.unload()(**other).logits, before)


@pytest.mark.parametrize("method", ["dualedit", "balancedit"])
def test_a_pooled_key_says_when_it_cannot_know_where_the_picture_is(method, generator):
    """Embeddings instead of ids, as a caller of the decoder alone passes them."""
    model = editor_of(LLAVA, method, key="pooled", key_dim=P)
    base, inputs = model.get_base_model(), LLAVA.question(generator)
    embeddings = base.get_input_embeddings()(inputs["input_ids"])
    with torch.no_grad():
        base.model.language_model(inputs_embeds=embeddings)  # nothing stored: nothing to decide
        store(model, inputs, generator)
        with pytest.raises(ValueError, match="image positions are unknown.*explicit_masks"):
            base.model.language_model(inputs_embeds=embeddings)
        with model.disable_adapter():
            base.model.language_model(inputs_embeds=embeddings)


def test_refusals():
    with pytest.raises(ValueError, match="key='first'.*'last', 'pooled'"):
        DualEditConfig(key="first")
    with pytest.raises(ValueError, match="key_dim=7"):
        DualEditConfig(key="pooled", key_dim=7)
    with pytest.raises(ValueError, match="key_dim=7.*even"):
        BalancEditConfig(layer="up_proj", key="pooled", key_dim=7)
    with pytest.raises(ValueError, match="key_dim=4000.*at most"):
        editor_of(LLAVA, "dualedit", key="pooled", key_dim=4000)
