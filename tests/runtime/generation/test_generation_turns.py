"""Over a kept cache: an answer that goes on keeps its decision, a new turn decides again for what is new."""

import copy

import pytest
import torch
from dualedit import add_edit, remove_edit
from generation_answers import edited_pair, first_logits, generate, longer, note_decisions, text_only
from tiny_models import LLAVA, WORDS, edit_layers, editor_of, store
from transformers import DynamicCache, StaticCache


def new_cache(model, kind="dynamic"):
    text = model.config.get_text_config()
    return DynamicCache(config=text) if kind == "dynamic" else StaticCache(config=text, max_cache_len=64)


def words(generator, count=4, rows=1):
    return torch.randint(3, WORDS, (rows, count), generator=generator)


class Routes:
    """What the gate decides from here on, as lists that compare with lists."""

    def __init__(self, model):
        self.noted = note_decisions(edit_layers(model)[0])

    def __eq__(self, other):
        return [None if d.route is None else d.route.tolist() for d in self.noted] == other

    def clear(self):
        self.noted.clear()


def decided(model):
    """What the gate decides from here on: a list that grows with each decision."""
    return Routes(model)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("pieces", [(3, 3), (1, 2, 3)])
def test_an_answer_continued_in_pieces(method, kind, pieces, generator):
    """generate, then generate again over the same cache, is one generation: the decision stays."""
    base, model, inputs = edited_pair(LLAVA, method, generator)
    for each in (base, model):
        cache, call, found = new_cache(each, kind), dict(inputs), []
        for piece in pieces:
            tokens = generate(each, call, new=piece, past_key_values=cache)
            found.append(tokens)
            call = text_only(longer(call, tokens))
        assert torch.equal(torch.cat(found, dim=1), generate(each, inputs, new=sum(pieces)))


@pytest.mark.parametrize("way", ["whole conversation", "only what is new"])
def test_a_new_turn_decides_again(method, way, generator):
    """The first turn is about an edited question, the second is not: its columns are left alone."""
    base, model, inputs = edited_pair(LLAVA, method, generator, hit=(0,), rows=1)
    cache = new_cache(model)
    first = generate(model, inputs, past_key_values=cache)
    routes = decided(model)
    whole = longer(inputs, torch.cat([first, words(generator)], dim=1))
    call = text_only(whole)
    if way == "only what is new":
        call["input_ids"] = whole["input_ids"][:, cache.get_seq_length() :]
    kept = copy.deepcopy(cache)
    second = generate(model, call, past_key_values=cache)
    assert routes == [[-1]]
    # Nothing applies to what is new: the base model, over the edited cache, says the same.
    assert torch.equal(second, generate(base, call, past_key_values=kept))


def turn_logits(model, call, cache, way):
    """Logits [1, V] of the first token that answers a new turn, over a copy of the cache."""
    cache = copy.deepcopy(cache)
    if way == "generate":
        return first_logits(model, call, past_key_values=cache)
    with torch.no_grad():
        new = call["input_ids"][:, cache.get_seq_length() :]
        return model(input_ids=new, past_key_values=cache).logits[:, -1]


def store_turn(model, question, call, cache, generator):
    """Store an edit, and give it the key that the gate sees of `call` behind a cache."""
    store(model, question, generator)
    layer, states = edit_layers(model)[0], []
    handle = layer.register_forward_hook(lambda module, args, out: states.extend((args[0], out)))
    with model.disable_adapter():
        turn_logits(model, call, cache, "forward")
    handle.remove()
    key = states[1][0, -1] if hasattr(layer, "dualedit_adapter") else states[0][0].mean(0)
    next(iter(layer.groups.values())).first.key[0] = key


@pytest.mark.parametrize("way", ["generate", "forward"])
def test_an_edit_of_a_later_turn(method, way, generator):
    """The edit fires in the second turn only; a third turn with other words goes without it again."""
    base, model = LLAVA.build(), editor_of(LLAVA, method)
    inputs = LLAVA.question(generator)
    plain, cache = new_cache(base), new_cache(base)
    first = generate(base, inputs, past_key_values=plain)
    whole = longer(inputs, torch.cat([first, words(generator)], dim=1))
    call = text_only(whole)
    store_turn(model, whole, call, plain, generator)
    routes = decided(model)
    assert torch.equal(generate(model, inputs, past_key_values=cache), first)
    theirs, ours = turn_logits(base, call, plain, way), turn_logits(model, call, cache, way)
    assert not torch.isclose(ours, theirs, atol=1e-3).all()
    second = generate(model, call, past_key_values=cache)
    generate(model, text_only(longer(whole, torch.cat([second, words(generator)], 1))), past_key_values=cache)
    assert routes == [[-1], [0], [0], [-1]]


@pytest.mark.parametrize("way", ["generate", "forward"])
def test_a_question_behind_a_shared_prefix(method, way, generator):
    """A prefix is read once and kept; each question behind a copy of it decides for itself."""
    base, model = LLAVA.build(), editor_of(LLAVA, method)
    prefix = {"input_ids": words(generator, 6), "attention_mask": torch.ones(1, 6).long()}

    def read(each):
        with torch.no_grad():
            return each(**prefix, past_key_values=new_cache(base)).past_key_values

    asked, other = (longer(prefix, words(generator)) for _ in range(2))
    store_turn(model, LLAVA.question(generator), asked, read(base), generator)
    kept, plain = read(model), read(base)
    assert not torch.isclose(
        turn_logits(model, asked, kept, way), turn_logits(base, asked, plain, way), atol=1e-3
    ).all()
    assert torch.equal(turn_logits(model, other, kept, way), turn_logits(base, other, plain, way))


def test_a_target_scored_behind_a_cache(method, generator):
    """Labels that call every new column target make it the answer of the turn before, not a new turn."""
    base, model, inputs = edited_pair(LLAVA, method, generator, hit=(0,), rows=1)
    target = words(generator)
    labels = torch.cat([torch.full_like(inputs["input_ids"], -100), target], dim=1)
    with torch.no_grad():
        whole = model(**longer(inputs, target), labels=labels).logits[:, -4:]
        plain = base(**longer(inputs, target)).logits[:, -4:]
        cache = model(**inputs, use_cache=True).past_key_values
        behind = model(input_ids=target, past_key_values=cache, labels=target).logits
    assert torch.allclose(behind, whole, atol=1e-4)
    assert not torch.allclose(behind, plain, atol=1e-2)


def test_a_cropped_cache_asks_another_question(generator):
    """Cut back to before the question, a cache takes another one and forgets the edit of the first."""
    base, model, inputs = edited_pair(LLAVA, "balancedit", generator, hit=(0,), rows=1)
    cache = new_cache(model)
    generate(model, inputs, past_key_values=cache)
    other = dict(inputs, input_ids=inputs["input_ids"].clone())
    other["input_ids"][0, -4:] = words(generator)[0]
    cache.crop(inputs["input_ids"].shape[1] - 4 - cache.get_seq_length())
    kept = copy.deepcopy(cache)
    found = generate(model, text_only(other), past_key_values=cache)
    assert torch.equal(found, generate(base, text_only(other), past_key_values=kept))


def test_a_static_cache_used_again(method, generator):
    """After reset(), a cache holds another sequence and nothing of the first one's decision."""
    _, model, inputs = edited_pair(LLAVA, method, generator, hit=(0,), rows=1)
    other = LLAVA.question(generator)
    cache = new_cache(model, "static")
    expected = [generate(model, each) for each in (inputs, other)]
    for _ in range(2):
        for question, answer in zip((inputs, other), expected, strict=True):
            cache.reset()
            assert torch.equal(generate(model, question, past_key_values=cache), answer)


def test_edits_made_between_turns(method, generator):
    """A turn under way keeps the edits it was decided with; the next one sees those of its own moment."""
    _, model, inputs = edited_pair(LLAVA, method, generator, hit=(), rows=1)
    edit = store(model, inputs, generator)
    cache = new_cache(model)
    expected = generate(model, inputs, new=6)
    begun = generate(model, inputs, new=3, past_key_values=cache)
    remove_edit(model, edit.id)
    rest = generate(model, text_only(longer(inputs, begun)), new=3, past_key_values=cache)
    assert torch.equal(torch.cat([begun, rest], dim=1), expected)


def test_a_second_image(generator):
    """A new turn with an image of its own: the edit writes to that image, and the first stays as it was."""
    model = editor_of(LLAVA, "dualedit")
    first, second = LLAVA.question(generator), LLAVA.question(generator)
    both = longer(first, second["input_ids"])
    pixels = torch.cat([first["pixel_values"], second["pixel_values"]])
    add_edit(model, {**both, "pixel_values": pixels}, torch.tensor([5, 6]))
    cache = new_cache(model)
    with torch.no_grad():
        model(**first, past_key_values=cache)
    before = [layer.keys[:, :, : first["input_ids"].shape[1]].clone() for layer in cache.layers]
    layer = edit_layers(model)[1]  # the one that writes to images
    seen = []
    layer.base_layer.register_forward_hook(lambda module, args, out: seen.append(out))
    layer.register_forward_hook(lambda module, args, out: seen.append(out))
    call = {**both, "pixel_values": second["pixel_values"]}
    out = generate(model, call, new=1, past_key_values=cache)
    assert out.shape == (1, 1)
    changed = (seen[0] != seen[1]).any(dim=-1)
    assert torch.equal(changed, second["input_ids"] == 110)
    for layer, old in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.keys[:, :, : old.shape[2]], old)


def test_rows_of_a_new_turn(method, generator):
    """In a batch, each row decides for itself in each turn."""
    base, model, inputs = edited_pair(LLAVA, method, generator, hit=(1,))
    cache = new_cache(model)
    first = generate(model, inputs, past_key_values=cache)
    whole = longer(inputs, torch.cat([first, words(generator, rows=3)], dim=1))
    kept = copy.deepcopy(cache)
    second = generate(model, text_only(whole), past_key_values=cache)
    assert torch.equal(second, generate(base, text_only(whole), past_key_values=kept))
