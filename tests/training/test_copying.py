"""The closed-form start of the text adapter: what it writes, what it leaves alone, what it is worth."""

import pytest
import torch
from dualedit.data import EditSample
from dualedit.models.prompting import Prompter
from dualedit.toy.model import load_embedded
from dualedit.toy.samples import edit_samples
from dualedit.toy.world import World
from dualedit.training import Recipe, start_by_copying, train
from dualedit.training.metrics import read_metrics
from dualedit.tuners import inject_dualedit
from dualedit.tuners.dualedit.modules import EditKV
from tiny_models import LLAVA, edit_layers, editor_of, store

LAYER = 2


def toy(**more):
    base, processor = load_embedded()
    given = {"text_layer": LAYER, "vis_layer": LAYER, "mid_dim": 96, "num_heads": 4} | more
    model = inject_dualedit(base, **given).eval()
    return model, Prompter(processor).inputs([(None, "which brand is this?")])


def plain_states(model, prompt, tokens):
    """States behind the layer at tokens put behind the prompt, by the whole model; and its end."""
    base = model.get_base_model()
    ids = prompt["input_ids"].expand(len(tokens), -1)
    with torch.no_grad():
        found = base(input_ids=torch.cat([ids, tokens[:, None]], 1), output_hidden_states=True)
    states = found.hidden_states[LAYER + 1]
    return states[:, -1], states[0, -2]


def plain_directions(model, prompt):
    """[V, D] the gradient of each token's logit at the final states of the prompt's end, from its mean."""
    base = model.get_base_model()
    ends = []
    stack = base.model.language_model
    hook = stack.norm.register_forward_pre_hook(lambda module, args: ends.append(args[0][0, -1]))
    with torch.no_grad():
        base(**prompt)
    hook.remove()

    def logits(end):
        return base.get_output_embeddings()(stack.norm(end[None, None]))[0, 0]

    found = torch.autograd.functional.jacobian(logits, ends[0])
    return torch.nn.functional.normalize(found - found.mean(0), dim=1)


def test_an_adapter_that_starts_by_copying_writes_the_token_that_it_looks_at(seed):
    model, prompt = toy()
    told = start_by_copying(model, prompt, strength=1.5, seed=seed % 1000)
    size = model.get_base_model().get_input_embeddings().weight.shape[0]
    assert told.tokens + told.tested == size and told.found > 0.2  # chance: 0.002
    (layer,) = edit_layers(model)
    attention = layer.dualedit_adapter["default"]["text"]
    states, end = plain_states(model, prompt, torch.arange(size))
    with torch.no_grad():
        k, v = attention.project_edit(states)
        edits = EditKV(k, v, torch.arange(size), torch.ones(size, dtype=torch.int64))
        hidden = end.expand(size, 1, -1).contiguous()
        span = torch.ones(size, 1, dtype=torch.bool)
        written, _ = attention(hidden, span, edits, route=torch.arange(size))
    change = (written - hidden)[:, 0]
    nearest = (change @ plain_directions(model, prompt).T).argmax(1)
    assert (nearest == torch.arange(size)).float().mean() > 0.8  # those that it was fitted on among them
    assert change.norm(dim=1).mean() == pytest.approx(1.5 * float(end.norm()), rel=0.1)


def test_the_start_changes_the_text_adapters_value_and_output_alone():
    model, prompt = toy()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    start_by_copying(model, prompt, tokens=60)
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert moved and all(".text." in name for name in moved)
    parts = {name.partition(".text.")[2] for name in moved}
    assert parts == {"v_proj.weight", "v_proj.bias", "o_proj.weight"}


def test_bad_input_is_refused():
    model, prompt = toy()
    with pytest.raises(ValueError, match=r"tokens=5: pass at least 20"):
        start_by_copying(model, prompt, tokens=5)
    pictures, prompt = toy(text_layer=None)
    with pytest.raises(ValueError, match="edits no text positions"):
        start_by_copying(pictures, prompt)
    filled = editor_of(LLAVA, "dualedit")
    store(filled, LLAVA.question(torch.Generator()), torch.Generator())
    with pytest.raises(ValueError, match="model holds 1 edits"):
        start_by_copying(filled, prompt)
    with pytest.raises(ValueError, match="copying=-1"):
        Recipe(copying=-1)


@pytest.mark.slow
def test_training_learns_sooner_from_it(tmp_path):
    """The same steps on the same edits, whose answers no two share."""
    losses = {}
    samples: list[EditSample] = edit_samples(World(100), "train", 64, seed=3)
    for copying in (0, 1000):
        base, processor = load_embedded()
        said = []
        recipe = Recipe(
            text_layer=LAYER, vis_layer=LAYER, mid_dim=96, num_heads=4, copying=copying, steps=25,
            batch_size=8, learning_rate=1e-3, text_locality=0.0, image_locality=0.0, log_every=5,
        )  # fmt: skip
        out = tmp_path / str(copying)
        train(base, processor, samples, [], recipe, out, progress=False, say=said.append)
        assert any("starts by copying" in text for text in said) == bool(copying)
        losses[copying] = read_metrics(out / "metrics.jsonl")[-1]["reliability"]
    assert losses[1000] < 0.8 * losses[0]


class _WithBatchNorm(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4)


def test_bf16_leaves_batch_norm_in_the_dtype_of_its_statistics():
    from dualedit.training.setup import _cast

    module = _WithBatchNorm().eval()
    _cast(module)
    assert module.linear.weight.dtype == torch.bfloat16 and module.norm.weight.dtype == torch.float32
    rows = torch.randn(3, 4, dtype=torch.bfloat16)
    assert module.norm(module.linear(rows)).isfinite().all()
