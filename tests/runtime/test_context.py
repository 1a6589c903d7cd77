"""What a forward or a generation knows about itself: padding, beams, caches, labels."""

import copy

import pytest
import torch
from dualedit import explicit_masks, remove_edit
from dualedit.models.targets import append_target
from dualedit.runtime.context import ForwardPass, Sequence, describe_prompt
from dualedit.runtime.frames import FRAMES
from generating import NEVER, NEW, decode, generate, generate_scored
from tiny_models import (
    IMAGE,
    LLAVA,
    PAD,
    QWEN,
    VIDEO,
    WORDS,
    edit_layers,
    editor_of,
    row_of,
    store,
)  # fmt: skip


@pytest.fixture(autouse=True)
def no_frames_left():
    yield
    assert FRAMES.get() == ()


# ---------------------------------------------------------------------- describing a prompt


@pytest.mark.parametrize("side", ["left", "right"])
def test_describe_prompt(side, generator):
    inputs = LLAVA.questions(4, generator, side)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    prompt = describe_prompt(ids, mask, None, [IMAGE], tuple(ids.shape), ids.device)
    assert torch.equal(prompt.image, ids == IMAGE)
    assert torch.equal(prompt.text, mask.bool() & (ids != IMAGE))
    last = torch.tensor([int(row.nonzero().max()) for row in mask])
    assert torch.equal(prompt.last, last) and torch.equal(prompt.last_input, last)


@pytest.mark.parametrize("side", ["left", "right"])
def test_describe_prompt_ends_before_the_target(side, generator):
    prompts = [LLAVA.prompt(generator, words) for words in (3, 5)]
    targets = [torch.randint(3, WORDS, (n,), generator=generator) for n in (2, 1)]
    whole = [torch.cat(pair) for pair in zip(prompts, targets, strict=True)]
    inputs = LLAVA.batch(whole, {}, side)
    labels = torch.full_like(inputs["input_ids"], -100)
    for row, (prompt, target) in enumerate(zip(prompts, targets, strict=True)):
        first = int(inputs["attention_mask"][row].nonzero().min()) + len(prompt)
        labels[row, first : first + len(target)] = target
    ids = inputs["input_ids"]
    found = describe_prompt(ids, inputs["attention_mask"], labels, [IMAGE], tuple(ids.shape), ids.device)
    for row, prompt in enumerate(prompts):
        assert torch.equal(ids[row][found.prompt()[row]], prompt)
        assert int(ids[row, found.last[row]]) == int(prompt[-1])
        assert int(ids[row, found.last_input[row]]) == int(whole[row][-1])


# ---------------------------------------------------------------------- padding, batches, ways to generate


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_is_the_unpadded_row(family, method, side, generator):
    model = editor_of(family, method)
    inputs = family.questions(4, generator, side)
    for row in (0, 2):
        store(model, row_of(inputs, row), generator)
    with torch.no_grad():
        together = model(**inputs).logits
        for row in range(4):
            alone = model(**row_of(inputs, row)).logits[0]
            padded = together[row, inputs["attention_mask"][row].bool()]
            assert torch.allclose(padded, alone, rtol=1e-3, atol=1e-3)
            with model.disable_adapter():
                base = model(**row_of(inputs, row)).logits[0]
            assert torch.equal(alone, base) == (row in (1, 3))


def test_generation_without_cache_is_the_same(family, method, generator):
    model = editor_of(family, method)
    inputs = family.questions(3, generator)
    store(model, row_of(inputs, 1), generator)
    # Without a cache the answer is read again with the prompt: a generated image token would have no image.
    never = {"suppress_tokens": [IMAGE, VIDEO]}
    assert torch.equal(generate(model, inputs, **never), generate(model, inputs, use_cache=False, **never))


def test_each_row_generates_as_alone(family, method, generator):
    model = editor_of(family, method)
    inputs = family.questions(3, generator)
    store(model, row_of(inputs, 0), generator)
    store(model, row_of(inputs, 2), generator)
    together = generate(model, inputs)
    for row in range(3):
        assert torch.equal(together[row], generate(model, row_of(inputs, row))[0])


@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}])
def test_beams(family, method, settings, generator):
    """Beam search gives a row of a batch what it gives the row alone; closed rows are the base's."""
    base, model = family.build(), editor_of(family, method)
    inputs = family.questions(3, generator)
    store(model, row_of(inputs, 1), generator)
    n = settings.get("num_return_sequences", 1)
    together, reached = generate_scored(model, inputs, **settings)
    expected, before = generate_scored(base, inputs, **settings)
    alone = generate(model, row_of(inputs, 1), **settings)
    assert torch.equal(together[n : 2 * n], alone)
    assert torch.equal(together[:n], expected[:n]) and torch.equal(together[2 * n :], expected[2 * n :])
    # In a random model an edit may leave the winning words as they are, but not what they scored.
    moved = (reached != before).view(3, n).all(1)
    assert moved.tolist() == [False, True, False]


def test_several_sampled_sequences(family, method, generator, seed):
    base, model = family.build(), editor_of(family, method)
    inputs = family.questions(2, generator)
    store(model, row_of(inputs, 0), generator)
    draws = []
    for each in (model, base):
        torch.manual_seed(seed)
        out = each.generate(
            **inputs, do_sample=True, num_return_sequences=3, max_new_tokens=NEW, eos_token_id=NEVER,
            pad_token_id=PAD, return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        draws.append(out.logits[0])
    ours, theirs = draws
    assert ours.shape[0] == 6
    assert torch.equal(ours[3:], theirs[3:])
    assert not torch.isclose(ours[:3], theirs[:3], atol=1e-3).all(dim=-1).any()
    assert torch.equal(ours[:1].expand(3, -1), ours[:3])


def test_mask_that_generate_infers(generator):
    """Without an attention mask, generate infers it from the padding token; so does the context."""
    model = editor_of(LLAVA, "balancedit")
    inputs = LLAVA.questions(3, generator)
    store(model, row_of(inputs, 0), generator)
    without = {name: value for name, value in inputs.items() if name != "attention_mask"}
    for more in ({}, {"num_beams": 2}):
        assert torch.equal(generate(model, inputs, **more), generate(model, without, **more))


def test_prompt_lookup_decoding(method, generator):
    """Assisted decoding prefills prompt and candidates together: the last prompt token is not the last."""
    model = editor_of(LLAVA, method)
    inputs = LLAVA.question(generator, words=8)
    inputs["input_ids"][0, -4:] = inputs["input_ids"][0, -8:-4]
    store(model, inputs, generator)
    plain = generate(model, inputs)
    assert torch.equal(generate(model, inputs, prompt_lookup_num_tokens=3), plain)
    with model.disable_adapter():
        assert not torch.equal(generate(model, inputs), plain)


def test_static_cache(method, generator):
    model = editor_of(LLAVA, method)
    inputs = LLAVA.questions(2, generator)
    store(model, row_of(inputs, 1), generator)
    assert torch.equal(generate(model, inputs), generate(model, inputs, cache_implementation="static"))


# ---------------------------------------------------------------------- decoding by hand


@pytest.mark.parametrize("family", [LLAVA, QWEN], ids=lambda family: family.name)
@pytest.mark.parametrize("more", [{}, {"return_dict": False}], ids=["output", "tuple"])
def test_manual_decode(family, method, more, generator):
    model = editor_of(family, method)
    inputs = family.questions(3, generator)
    if family is QWEN:  # its forward wants no mask beside a cache, so no padding here
        inputs = row_of(inputs, 1)
    store(model, row_of(inputs, inputs["input_ids"].shape[0] - 1), generator)
    tokens, _ = decode(model, inputs, **more)
    assert torch.equal(tokens, generate(model, inputs))


def test_manual_decode_keeps_its_edits(method, generator):
    """Edits removed and added while a sequence is decoded do not change it; new sequences see them."""
    model = editor_of(LLAVA, method)
    inputs = LLAVA.questions(3, generator)
    edit = store(model, row_of(inputs, 1), generator)
    tokens, logits = decode(model, inputs)

    def meddle(step):
        if step == 1:
            remove_edit(model, edit.id)
            store(model, row_of(inputs, 0), generator)
            store(model, row_of(inputs, 1), generator, torch.tensor([9, 9]))
        if step == 3:
            for number in range(9):  # past the tables' first capacity
                store(model, LLAVA.question(generator), generator, torch.tensor([number + 3]))

    again, same = decode(model, inputs, between=meddle)
    assert torch.equal(tokens, again) and torch.equal(logits, same)
    assert not torch.equal(decode(model, inputs)[1][0], logits[0])


def test_balancedit_is_sticky_in_decode(generator):
    """The routed rows use their value at every generated token, not only at the prompt."""
    model = editor_of(LLAVA, "balancedit")
    inputs = LLAVA.questions(2, generator)
    store(model, row_of(inputs, 0), generator)
    layer = edit_layers(model)[0]
    seen = []
    layer.base_layer.register_forward_hook(lambda m, a, out: seen.append([out]))
    layer.register_forward_hook(lambda m, a, out: seen[-1].append(out))
    generate(model, inputs)
    assert len(seen) == NEW
    for before, after in seen:
        assert (before[0] != after[0]).any(dim=-1).all()
        assert torch.equal(before[1], after[1])


def test_switched_on_in_the_middle(method, generator):
    """A sequence whose prompt went by with the adapter off has no decision, so it stays without edits."""
    base, model = (
        LLAVA.build(),
        editor_of(LLAVA, method, **({"alpha": 0.0} if method == "balancedit" else {})),
    )
    inputs = LLAVA.question(generator)
    store(model, inputs, generator)
    expected = decode(base, inputs)[1]
    model.base_model.disable_adapter_layers()
    steps = decode(
        model, inputs, between=lambda step: step == 1 and model.base_model.enable_adapter_layers()
    )[1]
    assert torch.equal(steps, expected)


def test_a_cache_can_be_copied(method, generator):
    model = editor_of(LLAVA, method)
    inputs = LLAVA.question(generator)
    store(model, inputs, generator)
    with torch.no_grad():
        out = model(**inputs, use_cache=True)
        other = copy.deepcopy(out.past_key_values)
        token = out.logits[:, -1].argmax(-1)[:, None]
        one, two = (model(input_ids=token, past_key_values=c).logits for c in (out.past_key_values, other))
    assert torch.equal(one, two)


def test_cache_of_another_batch(generator):
    inputs = LLAVA.questions(2, generator)
    ids = inputs["input_ids"]
    prompt = describe_prompt(ids, inputs["attention_mask"], None, [IMAGE], tuple(ids.shape), ids.device)
    beams = ForwardPass(Sequence(prompt), start=0, batch=4, length=ids.shape[1])
    assert torch.equal(beams.columns(prompt.image), prompt.image.repeat_interleave(2, dim=0))
    with pytest.raises(ValueError, match="cache belongs to another batch"):
        ForwardPass(Sequence(prompt), start=0, batch=3, length=ids.shape[1]).columns(prompt.image)


# ---------------------------------------------------------------------- labels, embeddings


@pytest.mark.parametrize("gate", ["prompt", "published"])
def test_published_gate_needs_the_answer_in_the_input(gate, generator):
    """With the answer in the input both gates open; only the honest one opens for the question alone."""
    family = LLAVA
    model = editor_of(family, "dualedit", gate=gate)
    question, target = family.question(generator), torch.randint(3, WORDS, (1, 3), generator=generator)
    store(model, question, generator, target[0])
    full = append_target(question, target)
    call = {name: value for name, value in full.items() if name != "labels"}

    def opens(inputs, labels=None):
        with torch.no_grad():
            edited = model(**inputs, labels=labels).logits
            with model.disable_adapter():
                return not torch.equal(edited, model(**inputs).logits)

    assert opens(call, full["labels"])
    assert opens(question) == (gate == "prompt")
    # Without labels the whole input counts as the question, and the two gates read the same token.
    assert opens(call) == (gate == "published")


def test_labels_end_the_prompt(family, method, generator):
    """Scoring a target: the route is that of the prompt alone, whatever the target is."""
    model = editor_of(family, method)
    question = family.question(generator)
    store(model, question, generator)
    target = torch.randint(3, WORDS, (1, 4), generator=generator)
    full = dict(question)
    for name in ("attention_mask", "mm_token_type_ids"):
        if name in full:
            full[name] = torch.cat(
                [full[name], torch.full_like(target, int(name == "attention_mask"))], dim=1
            )
    full["input_ids"] = torch.cat([question["input_ids"], target], dim=1)
    labels = torch.cat([torch.full_like(question["input_ids"], -100), target], dim=1)
    with torch.no_grad():
        out = model(**full, labels=labels)
        prompt = model(**question).logits
        with model.disable_adapter():
            base = model(**full).logits
    length = prompt.shape[1]
    assert torch.allclose(out.logits[:, :length], prompt, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(out.logits[:, length - 1], base[:, length - 1], atol=1e-2)
    assert out.loss is not None


def test_a_row_that_is_all_target(method, generator):
    """Labels everywhere leave no prompt: nothing is asked, so no edit applies."""
    model = editor_of(LLAVA, method, **({"alpha": 0.0, "key": "mean"} if method == "balancedit" else {}))
    inputs = LLAVA.question(generator)
    store(model, inputs, generator)
    for layer in edit_layers(model):
        for group in layer.groups.values():
            group.first.radius.fill_(1e6)
            group.first._snapshot = None
    with torch.no_grad():
        ours = model(**inputs, labels=inputs["input_ids"].clone()).logits
        with model.disable_adapter():
            base = model(**inputs).logits
    assert torch.equal(ours, base)


def test_embeddings_instead_of_ids(generator):
    model = editor_of(LLAVA, "dualedit")
    inputs = LLAVA.question(generator)
    store(model, inputs, generator)
    seen = {}
    stack = model.get_base_model().model.language_model
    handle = stack.register_forward_pre_hook(lambda m, a, k: seen.update(k), with_kwargs=True)
    with torch.no_grad():
        expected = model(**inputs).logits
        handle.remove()
        call = {"inputs_embeds": seen["inputs_embeds"], "attention_mask": inputs["attention_mask"]}
        with pytest.raises(ValueError, match="explicit_masks"):
            model(**call)
        image = inputs["input_ids"] == IMAGE
        with explicit_masks(model.get_base_model(), ~image, image):
            stated = model(**call).logits
    assert torch.equal(stated, expected)
