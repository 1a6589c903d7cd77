"""Fitting the pooled routing key: what it moves, what it whitens, what it is worth, what it refuses."""

import pytest
import torch
from dualedit.data import Probe
from dualedit.models.prompting import Prompter
from dualedit.toy.model import load_embedded
from dualedit.toy.samples import edit_samples
from dualedit.toy.world import World
from dualedit.training import fit_pooled_key
from dualedit.training.pooled_key import questions_about, read_questions
from dualedit.tuners import inject_balancedit, inject_dualedit
from tiny_models import LLAVA, edit_layers, editor_of, store


@pytest.mark.parametrize("method", ["dualedit", "balancedit"])
def test_fitting_whitens_what_varies_within_a_fact_and_moves_the_head_alone(method, seed):
    base, processor = load_embedded()
    if method == "dualedit":
        model = inject_dualedit(
            base, text_layer=1, vis_layer=1, mid_dim=32, num_heads=4, key="pooled", key_dim=256
        )
    else:
        model = inject_balancedit(base, layer="layers.2.mlp.up_proj", key="pooled", key_dim=256)
    samples = edit_samples(World(0), "train", 60, seed=seed % 1000)
    prompter = Prompter(processor)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    fitted_on = fit_pooled_key(model, prompter, samples, shrinkage=1e-3, progress=False)
    assert fitted_on == {"facts": 60, "pairs": 60 * 8}  # five rephrases and three other images each
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert {name.rpartition(".")[2] for name in moved} == {"map", "centre", "image_weight"}
    router = edit_layers(model)[0].router("default")
    assert float(router.image_weight.detach()) == 3.0
    apart, edits = [], []
    for sample in samples:
        read = read_questions(model, prompter, questions_about(sample))
        parts = torch.nn.functional.normalize(torch.stack([read.last, read.pictured], 1), dim=-1)
        apart.append((parts[1:] - parts[:1]) / 2**0.5)
        edits.append(parts[:1])
    apart, edits = torch.cat(apart).double(), torch.cat(edits)
    for half, fitted in enumerate((router.question, router.picture)):
        differ = apart[:, half][(apart[:, half] != 0).any(1)]
        maps, within = fitted.map.double(), differ.T @ differ / len(differ)
        shrunk = within + 1e-3 * within.trace() / len(within) * torch.eye(len(within))
        torch.testing.assert_close(maps @ shrunk @ maps.T, torch.eye(len(maps)).double(), atol=1e-4, rtol=0)
        # Best first: the edits differ more along the first directions.
        spread = ((edits[:, half] - edits[:, half].mean(0)).double() @ maps.T).square().mean(0)
        assert spread[:50].min() > spread[50:].max()
        torch.testing.assert_close(fitted.centre, edits[:, half].mean(0))


def test_a_pooled_key_tells_look_alikes_better_apart(seed):
    """Of a world that the model has never seen; fitted on another such world."""
    base, processor = load_embedded()
    model = inject_dualedit(
        base, text_layer=1, vis_layer=1, mid_dim=32, num_heads=4, key="pooled", key_dim=128
    )
    prompter = Prompter(processor)
    fit_pooled_key(model, prompter, edit_samples(World(100), "train", 150, seed=3), progress=False)
    router = edit_layers(model)[0].router("default")
    found = {"plain": ([], []), "pooled": ([], [])}
    samples = edit_samples(World(101), "train", 80, seed=seed % 97)
    for sample in samples:
        same, alike = questions_about(sample), sample.locality["hard_image"]
        read = read_questions(model, prompter, [*same, *alike])
        plain = torch.nn.functional.normalize(read.last, dim=1)
        keys = {"plain": plain, "pooled": router(read.last, read.pictured)}
        for name, key in keys.items():
            cosine = (key @ key[0]).tolist()
            found[name][0].extend(cosine[len(same) - 3 : len(same)])  # other images
            found[name][1].extend(cosine[len(same) :])

    def confused(near, far):
        near, far = torch.tensor(near), torch.tensor(far)
        return (near[:, None] < far[None]).float().mean()

    assert confused(*found["pooled"]) < confused(*found["plain"])


def test_wordings_of_the_test_are_not_fitted_to():
    for sample in edit_samples(World(0), "train", 3, seed=4):
        same = questions_about(sample)
        assert same[0] == Probe(sample.request.image_source, sample.request.prompt)
        assert len(same) == 1 + len(sample.rephrases) + len(sample.generality["v_gen"])
        assert not {probe.prompt for probe in same} & {probe.prompt for probe in sample.generality["t_gen"]}


def test_layers_above_the_gate_do_not_run():
    base, processor = load_embedded()
    model = inject_dualedit(
        base, text_layer=1, vis_layer=2, mid_dim=16, num_heads=2, key="pooled", key_dim=16
    )
    ran = []
    for number, layer in enumerate(base.model.language_model.layers):
        layer.register_forward_hook(lambda *_, number=number: ran.append(number))
    sample = edit_samples(World(0), "train", 1, seed=4)[0]
    read = read_questions(model, Prompter(processor), questions_about(sample))
    assert ran == [0, 1] and len(read.last) == len(read.pictured)


def test_refusals():
    with pytest.raises(ValueError, match="no pooled routing key.*key='pooled'"):
        fit_pooled_key(editor_of(LLAVA, "dualedit"), None, [])
    with pytest.raises(ValueError, match="BalancEditConfig.*no pooled routing key"):
        fit_pooled_key(editor_of(LLAVA, "balancedit"), None, [])
    pooled = editor_of(LLAVA, "dualedit", key="pooled", key_dim=16)
    with pytest.raises(ValueError, match="shrinkage=0.*above 0"):
        fit_pooled_key(pooled, None, [], shrinkage=0)
    with pytest.raises(ValueError, match="image_weight=-1.*from 0 on"):
        fit_pooled_key(pooled, None, [], image_weight=-1)
    with pytest.raises(ValueError, match="none of 0 has a rephrase"):
        fit_pooled_key(pooled, None, [], progress=False)
    store(pooled, LLAVA.question(torch.Generator()), torch.Generator())
    with pytest.raises(ValueError, match="holds 1 edits"):
        fit_pooled_key(pooled, None, [])
