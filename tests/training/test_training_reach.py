"""Between the edited layers a training step runs where the first edit reaches; its results stay the same."""

import copy

import pytest
import torch
from dualedit import inject_dualedit
from dualedit.runtime.sequence import describe_prompt
from dualedit.training.asked import _Asked
from dualedit.training.batches import Batch, Part
from dualedit.training.narrow import places_of
from dualedit.training.reach import Listening, Reach, reached, run_reached, worth_it
from dualedit.training.step import TrainingStep
from tiny_models import BLIP2, BOS, IMAGE, LLAVA, QWEN, WORDS, strengthen
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

LOWEST = torch.finfo(torch.float32).min


def test_what_is_reached_goes_from_layer_to_layer():
    closed = torch.ones(8, 8, dtype=torch.bool).triu(1)
    written = torch.tensor([[0, 0, 1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0]], dtype=torch.bool)
    window = closed | torch.ones(8, 8, dtype=torch.bool).tril(-2)  # each sees itself and the one before
    causal, sliding = (torch.zeros(1, 1, 8, 8).masked_fill(c, LOWEST) for c in (closed, window))
    behind = torch.arange(8) >= 2
    assert torch.equal(reached(written, [causal])[0], behind)
    assert reached(written, [sliding])[0].nonzero()[:, 0].tolist() == [2, 3]
    assert reached(written, [sliding, sliding])[0].nonzero()[:, 0].tolist() == [2, 3, 4]
    assert reached(written, [causal == 0, sliding])[0].tolist() == behind.tolist()
    assert not reached(written, [causal])[1].any()
    both = torch.zeros(1, 2, 8, 8).masked_fill(torch.stack([closed, window])[None], LOWEST)
    assert torch.equal(reached(written, [both])[0], behind)  # one head is enough
    nothing = torch.full((1, 1, 8, 8), LOWEST)
    assert torch.equal(reached(written, [nothing]), written)
    assert worth_it(torch.tensor([[True, False], [False, True]]))
    assert not worth_it(torch.tensor([[True, True], [False, False]]))


def test_layers_at_the_reached_positions_give_what_whole_layers_give(generator):
    """Three layers of grouped heads, rows that are reached from different positions on, one padded."""
    torch.manual_seed(int(torch.randint(1 << 30, (), generator=generator)))
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_attention_heads=4, num_key_value_heads=2,
        attn_implementation="eager",
    )  # fmt: skip
    layers = [LlamaDecoderLayer(config, number).double().eval() for number in range(3)]
    states = torch.randn(3, 9, 16, generator=generator).double()
    closed = torch.ones(3, 1, 9, 9, dtype=torch.bool).triu(1)
    closed[1, ..., :2] = True
    positions = torch.arange(9)[None]
    kwargs = {
        "attention_mask": torch.zeros(3, 1, 9, 9).double().masked_fill(closed, LOWEST),
        "position_ids": positions,
        "position_embeddings": LlamaRotaryEmbedding(config)(states, positions),
        "past_key_values": None,
    }
    written = torch.zeros(3, 9, dtype=torch.bool)
    written[0, 6] = written[1, 4] = written[1, 7] = written[2, 8] = True
    at = reached(written, [kwargs["attention_mask"]] * 3)
    assert at.sum(1).tolist() == [3, 5, 1]
    reach, hidden = Reach(at), states
    for layer in layers:
        door = Listening()
        hidden = layer(hidden, **{**kwargs, "past_key_values": door})
        reach.kept.append(door.kept)
    change = torch.randn(3, 9, 16, generator=generator).double() * written[..., None]
    upstream = torch.randn(9, 16, generator=generator).double()
    results = []
    for short in (True, False):
        x = change.clone().requires_grad_()
        if short:
            out = run_reached([(layer, kwargs) for layer in layers], states + x, reach)
        else:
            out = states + x
            for layer in layers:
                out = layer(out, **kwargs)
            out = out[at]
        results.append((out.detach(), torch.autograd.grad(out, x, upstream)[0]))
    (found, gradient), (wanted, expected) = results
    # Llama's softmax is in fp32 whatever the states are.
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient[at], expected[at], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="2 of 3 layers"):
        run_reached([(layer, kwargs) for layer in layers], states, Reach(at, reach.kept[:2]))
    row, places, wanted = places_of(at)
    assert torch.equal(torch.stack([row.expand_as(places), places], -1)[wanted], at.nonzero())


def image_first(family, generator, dtype):
    """Rows with the image in front of all text, as BLIP-2 has it; the last two words are asked for."""
    prompts = []
    for number in range(3):
        prompt = family.prompt(generator, words=3 + number).tolist()
        prompts.append(torch.tensor([*prompt[1:5], BOS, *prompt[5:]]))
    rows = family.batch(prompts, family.pixels(3, generator))
    rows["pixel_values"] = rows["pixel_values"].to(dtype)
    ids = rows["input_ids"]
    labels = torch.full_like(ids, -100)
    labels[:, -2:] = ids[:, -2:] % WORDS
    answer = torch.where(labels == -100, -1, torch.arange(3)[:, None])
    prompt = describe_prompt(ids, rows["attention_mask"], labels, [IMAGE], tuple(ids.shape), ids.device)
    part = Part(rows, prompt, labels, answer, torch.arange(3), rows["attention_mask"] != 0, True)
    return Batch((part,), torch.tensor([0, 1, 4]), 3)


def step_of(family, layers, dtype, seed):
    torch.manual_seed(seed)
    model = family.build(dtype=dtype)
    if dtype != torch.float64:  # of which eager attention's lowest number becomes -inf, and padding NaN
        model.set_attn_implementation("eager")
    model = inject_dualedit(model, *layers, mid_dim=16, num_heads=2, init_weights=False)
    return TrainingStep(strengthen(model).eval())


def outcome(step, batch):
    """Losses, and all gradients one behind the other."""
    step.zero_grad()
    sums = step(batch)
    sums.sum().backward()
    return sums.detach().double(), torch.cat([p.grad.flatten().double() for p in step.trained().values()])


@pytest.fixture
def always(monkeypatch):
    """Tiny prompts are mostly text."""
    monkeypatch.setattr("dualedit.training.reach._WORTH_IT", 1.0)


@pytest.mark.parametrize("family", [LLAVA, BLIP2], ids=lambda family: family.name)
@pytest.mark.parametrize("layers", [(0, 2), (1, 2), (1, 3), (2, 1), (2, 2)])
def test_losses_and_gradients_are_the_whole_models(family, layers, always, seed, generator):
    step, batch = step_of(family, layers, torch.float64, seed), image_first(family, generator, torch.float64)
    assert step.choose_way(batch) and step.upper.share
    (part,) = batch.parts
    reach = step.upper.lower(part.inputs, part.prompt).reach
    # With the image edited first, or both at one layer, all that follows the image is reached.
    assert (reach is None) == (layers == (2, 2))
    if layers[0] < layers[1]:
        assert reach.at[2].tolist() == [False] * 4 + [True] * 6
    found = outcome(step, batch)
    step.upper.recompute = True
    again = outcome(step, batch)
    step.by_parts = False
    expected = outcome(step, batch)
    for one, other in zip(found, again, strict=True):
        assert torch.equal(one, other)
    assert expected[0][4] > 1e-3 and expected[1].norm() > 1e-3  # there is something to compare
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)
    assert float((found[1] - expected[1]).norm() / expected[1].norm()) < 1e-5


def test_rows_that_nothing_is_compared_with_share_too(always, seed, generator):
    """Rows that must change and are no edits run without one only for what is shared."""
    step = step_of(LLAVA, (1, 3), torch.float64, seed)
    (edits,), (others,) = (image_first(LLAVA, generator, torch.float64).parts for _ in range(2))
    answer = torch.where(others.answer < 0, -1, others.answer + 3)
    others = Part(**{**vars(others), "answer": answer, "edit_columns": None, "keeps": False})
    others = Part(**{**vars(others), "route": torch.tensor([2, 0, 0])})
    batch = Batch((others, edits), torch.tensor([0, 0, 4, 1, 2, 2]), 3)
    assert step.choose_way(batch) and step.upper.share
    found = outcome(step, batch)
    step.by_parts = False
    expected = outcome(step, batch)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)
    assert float((found[1] - expected[1]).norm() / expected[1].norm()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_as_near_to_the_truth_as_the_whole_model(dtype, always, seed, generator):
    exact = step_of(LLAVA, (1, 3), torch.float64, seed)
    batch = image_first(LLAVA, generator, torch.float64)
    exact.by_parts = False
    truth = outcome(exact, batch)
    rough = step_of(LLAVA, (1, 3), dtype, seed)
    rough.load_state_dict(exact.state_dict())
    batch = copy.deepcopy(batch)
    batch.parts[0].inputs["pixel_values"] = batch.parts[0].inputs["pixel_values"].to(dtype)
    found = outcome(rough, batch)
    rough.by_parts = False
    whole = outcome(rough, batch)
    for ours, theirs, true in zip(found, whole, truth, strict=True):
        assert float((ours - true).norm()) <= 2 * float((theirs - true).norm()) + 1e-5 * float(true.norm())


def test_nothing_is_asked_of_the_image_below_its_edit(always, seed, generator, monkeypatch):
    """No gradient goes to what the image adapter writes to: nothing that is trained is below it."""
    import dualedit.tuners.dualedit.modules as modules

    step, batch = step_of(LLAVA, (1, 2), torch.float32, seed), image_first(LLAVA, generator, torch.float32)
    asked, real = [], modules.gated_edit_attention

    def noting(hidden, span, *args, **more):
        asked.append(hidden.requires_grad)
        return real(hidden, span, *args, **more)

    monkeypatch.setattr(modules, "gated_edit_attention", noting)
    step(batch)
    assert asked == [False, False]
    asked.clear()
    step.upper.share = False
    step(batch)
    assert asked == [False, True]


class Blurred(nn.Module):
    """A layer whose positions reach one another past the attention mask."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, states):
        return self.inner(states + states.mean(1, keepdim=True))


def test_layers_that_mix_positions_otherwise_run_whole(always, seed, generator):
    step, batch = step_of(LLAVA, (1, 3), torch.float32, seed), image_first(LLAVA, generator, torch.float32)
    layer = step.upper.decoder[2]
    layer.mlp = Blurred(layer.mlp)
    assert step.choose_way(batch) and not step.upper.share
    found = outcome(step, batch)
    step.by_parts = False
    expected = outcome(step, batch)
    torch.testing.assert_close(found[0], expected[0], rtol=2e-4, atol=1e-5)
    assert float((found[1] - expected[1]).norm() / expected[1].norm()) < 1e-3


def test_text_in_front_of_the_image_is_reached_and_all_that_follows(seed, generator):
    step = step_of(QWEN, (1, 2), torch.float32, seed)
    rows = QWEN.questions(3, generator)
    ids = rows["input_ids"]
    labels = torch.full_like(ids, -100)
    labels[:, -2:] = ids[:, -2:] % WORDS
    prompt = describe_prompt(ids, rows["attention_mask"], labels, [IMAGE], tuple(ids.shape), ids.device)
    assert step.upper.lower(rows, prompt).reach is None


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("layers", [(0, 2), (1, 2), (2, 1), (2, 2)])
def test_what_is_not_shared_goes_backward_where_the_edit_writes(
    layers, recompute, seed, generator, monkeypatch
):
    monkeypatch.setattr("dualedit.training.asked._WORTH_IT", 1.0)  # tiny prompts are mostly text
    step = step_of(LLAVA, layers, torch.float64, seed)
    batch = image_first(LLAVA, generator, torch.float64)
    assert step.choose_way(batch)
    step.upper.share, step.upper.recompute = False, recompute
    taken, apply = [], _Asked.apply
    monkeypatch.setattr(_Asked, "apply", lambda *args: taken.append(len(args[3])) or apply(*args))
    found = outcome(step, batch)
    (part,) = batch.parts
    written = int(step.upper.spans(step.upper.first_name, part.prompt).sum())
    calls = 0 if layers == (2, 2) else 6 if recompute else 3  # the last layer is entered at few places
    assert taken == [written] * calls and 0 < written < part.labels.numel()
    step.by_parts = False
    expected = outcome(step, batch)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=1e-9)
    assert float((found[1] - expected[1]).norm() / expected[1].norm()) < 1e-6
