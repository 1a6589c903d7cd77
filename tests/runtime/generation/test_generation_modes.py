"""Every way to generate gives the edited answer that greedy gives, wherever the unedited model's does."""

import copy
import warnings

import pytest
import torch
import transformers
from dualedit import add_edit
from generation_answers import NEW, edited_pair, first_logits, generate, longer, note_decisions
from packaging.version import Version
from tiny_models import (
    LLAVA,
    METHODS,
    PAD,
    VOCAB,
    WORDS,
    edit_layers,
    editor_of,
    llama_config,
    row_of,
    store,
)
from transformers import DynamicCache, LlamaForCausalLM, StaticCache, TextStreamer


def draft_model():
    """A plain small text model with the tokens of the tiny models."""
    torch.manual_seed(7)
    return LlamaForCausalLM(llama_config()).eval()


class Silent(TextStreamer):
    """A streamer that keeps what it is given."""

    def __init__(self):
        self.tokens = []

    def put(self, value):
        self.tokens.append(value)

    def end(self):
        pass


# Settings of generate, made anew for each call: a cache must not be used twice.
WAYS = {
    "no cache": lambda model: {"use_cache": False},
    "static cache": lambda model: {"cache_implementation": "static"},
    "user's cache": lambda model: {"past_key_values": DynamicCache(config=model.config.get_text_config())},
    "user's static cache": lambda model: {
        "past_key_values": StaticCache(config=model.config.get_text_config(), max_cache_len=64)
    },
    "one beam": lambda model: {"num_beams": 1},
    "sampling from the first": lambda model: {"do_sample": True, "top_k": 1},
    "scores and states": lambda model: {
        "return_dict_in_generate": True, "output_scores": True, "output_hidden_states": True,
        "output_logits": True,
    },
    "prompt lookup": lambda model: {"prompt_lookup_num_tokens": 3},
    "assisted by a plain model": lambda model: {"assistant_model": draft_model()},
    "streamed": lambda model: {"streamer": Silent()},
}  # fmt: skip
BEAMS = {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.0, "pad_token_id": PAD}
ONE_ROW = ("prompt lookup", "assisted by a plain model", "streamed")


def plain(model):
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@pytest.mark.parametrize("way", WAYS)
def test_same_answer_as_greedy(family, method, way, generator):
    base, model, inputs = edited_pair(family, method, generator)
    if way in ONE_ROW:
        inputs = row_of(inputs, 1)
    hit = 0 if way in ONE_ROW else 1
    greedy, edited = generate(base, inputs), generate(model, inputs)
    try:
        found = generate(base, inputs, **WAYS[way](base))
    except Exception as error:
        pytest.skip(f"the unedited {family.name} refuses: {type(error).__name__}: {str(error)[:100]}")
    if not torch.equal(found, greedy):
        pytest.skip(f"the unedited {family.name} answers otherwise than greedy")
    assert torch.equal(generate(model, inputs, **WAYS[way](plain(model))), edited)
    # Six greedy tokens can be the same by chance, logits cannot.
    assert not torch.equal(first_logits(model, inputs)[hit], first_logits(base, inputs)[hit])


def test_the_ways_work_on_the_unedited_model(generator):
    """What the test above may skip on BLIP-2 and Qwen, it does not skip on LLaVA."""
    base, inputs = LLAVA.build(), LLAVA.question(generator)
    greedy = generate(base, inputs)
    refused = set()
    for way, settings in WAYS.items():
        try:
            assert torch.equal(generate(base, inputs, **settings(base)), greedy)
        except ValueError as error:
            refused.add((way, "pixel_values" in str(error)))
    # Older versions of transformers hand the picture on to an assistant that takes none.
    assert refused <= {("assisted by a plain model", True)}
    if Version(transformers.__version__) >= Version("5.23"):
        assert not refused


def test_sampling(family, method, generator, seed):
    """With one seed, rows without an edit draw what the base draws; the edited row draws from its own."""
    base, model, inputs = edited_pair(family, method, generator)
    drawn = {}
    for name, each in (("base", base), ("edited", model), ("again", model)):
        torch.manual_seed(seed)
        out = each.generate(
            **inputs, do_sample=True, temperature=1.5, max_new_tokens=NEW, min_new_tokens=NEW,
            pad_token_id=PAD, return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        drawn[name] = out.sequences[:, -NEW:], torch.stack(out.logits, dim=1)
    for ours, theirs, again in zip(drawn["edited"], drawn["base"], drawn["again"], strict=True):
        assert torch.equal(ours[[0, 2]], theirs[[0, 2]])
        assert torch.equal(ours, again)
    greedy = generate(model, inputs, suppress_tokens=None, return_dict_in_generate=True)
    first = drawn["edited"][1][1, 0]
    assert int(first.argmax()) == int(greedy[1, 0])
    assert not torch.isclose(first, drawn["base"][1][1, 0], atol=1e-3).all()


@pytest.mark.parametrize("main", ["edited", "base"])
def test_assisted_by_an_edited_model(method, main, generator):
    """The drafting model may be edited: it changes no answer, and it keeps its edit from round to round.

    The question has no image: transformers gives a drafting model none.
    """
    base = LLAVA.build()
    helper = editor_of(LLAVA, method, **({"vis_layer": None} if method == "dualedit" else {}))
    words = torch.randint(3, WORDS, (3, 7), generator=generator)
    mask = torch.ones(1, 7, dtype=torch.int64)
    question, near, far = ({"input_ids": row[None], "attention_mask": mask} for row in words)
    near["input_ids"][0, 1:] = question["input_ids"][0, 1:]
    samples = {"positives": [near], "negatives": [far]} if method == "balancedit" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        add_edit(helper, question, torch.tensor([5, 6]), **samples)
    model = helper if main == "edited" else base
    greedy = generate(model, question)
    assert not torch.isclose(first_logits(helper, question), first_logits(base, question), atol=1e-3).all()
    assistant = copy.deepcopy(helper).get_base_model()
    decisions = note_decisions(edit_layers(assistant)[0])
    rounds = []
    assistant.register_forward_pre_hook(lambda module, args, kwargs: rounds.append(kwargs), with_kwargs=True)
    assert torch.equal(generate(model, question, assistant_model=assistant), greedy)
    assert len(rounds) > 1
    assert [decision.route.tolist() for decision in decisions] == [[0]]  # decided in the first round only


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_side(family, method, side, generator):
    """Greedy over a padded batch gives each row what it gives the row alone, as far as the base does."""
    base, model = family.build(), editor_of(family, method)
    inputs = family.questions(4, generator, side)
    for row in (1, 2):
        store(model, row_of(inputs, row), generator)
    expected, found = generate(base, inputs), generate(model, inputs)
    for row in range(4):
        alone = generate(base, row_of(inputs, row))
        if torch.equal(alone[0], expected[row]):  # right padding is not what models are made to continue
            assert torch.equal(generate(model, row_of(inputs, row))[0], found[row])
        if row in (0, 3):
            assert torch.equal(found[row], expected[row])


@pytest.mark.parametrize("method", METHODS)
def test_two_returned_of_four_beams(method, generator):
    base, model, inputs = edited_pair(LLAVA, method, generator)
    ours, theirs = generate(model, inputs, **BEAMS), generate(base, inputs, **BEAMS)
    assert ours.shape[0] == 6 and int(ours.max()) < VOCAB
    assert torch.equal(ours[[0, 1, 4, 5]], theirs[[0, 1, 4, 5]])
    scores = {"return_dict_in_generate": True, "output_scores": True}
    ours_scored, theirs_scored = (each.generate(**inputs, **scores, **BEAMS) for each in (model, base))
    assert not torch.equal(ours_scored.sequences_scores[2:4], theirs_scored.sequences_scores[2:4])


def test_which_states_are_shown(method, generator):
    """`output_hidden_states` and `output_attentions` show what came before the edit of the same layer.

    transformers records the states on the inner layer, so entry i + 1 is the output of the base layer i;
    entry i + 2 is computed from the edited one.
    """
    base, model, inputs = edited_pair(LLAVA, method, generator, hit=(0,), rows=1)
    layers = edit_layers(model)
    with torch.no_grad():
        ours = model(**inputs, output_hidden_states=True).hidden_states
        theirs = base(**inputs, output_hidden_states=True).hidden_states
    first = int(layers[0].layer_name.split("layers.")[1].split(".")[0])
    assert len(ours) == len(theirs) == 5
    # A decoder layer shows its output before the edit; a linear layer inside it, edited, has its part in it.
    same = first + 1 if method == "dualedit" else first
    for i, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        assert torch.equal(mine, other) == (i <= same)


def test_a_conversation_read_whole_is_one_prompt(method, generator):
    """Without a kept cache, an earlier answer in the input is prompt like the rest of it."""
    base, model, inputs = edited_pair(LLAVA, method, generator, hit=(), rows=1)
    first = generate(base, inputs)
    words = torch.tensor([[5, 6, 7]])
    whole = longer(inputs, torch.cat([first, words], dim=1))
    store(model, whole, generator)
    assert torch.equal(generate(model, inputs), first)
    assert not torch.isclose(first_logits(model, whole), first_logits(base, whole), atol=1e-3).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, i: m.generate(**i, prefill_chunk_size=2), "prefill_chunk_size=2"),
        (lambda m, i: m.generate_batch([[1, 2]]), "generate_batch"),
        (lambda m, i: m(**i, cu_seq_lens_q=torch.tensor([0, 3])), "packed into one row"),
    ],
    ids=["chunked prefill", "generate_batch", "packed"],
)
def test_refused(method, call, message, generator):
    """What cannot be edited is refused with its reason, and the model goes on as before."""
    _, model, inputs = edited_pair(LLAVA, method, generator)
    before = generate(model, inputs)
    with pytest.raises(ValueError, match=message):
        call(model.get_base_model(), inputs)
    assert torch.equal(generate(model, inputs), before)


def test_refused_in_the_generation_config(generator):
    """The chunk size may also come in a config, given or the model's own."""
    _, model, inputs = edited_pair(LLAVA, "dualedit", generator)
    config = copy.deepcopy(model.get_base_model().generation_config)
    config.prefill_chunk_size = 4
    with pytest.raises(ValueError, match="prefill_chunk_size=4"):
        model.generate(**inputs, generation_config=config)
