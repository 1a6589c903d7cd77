"""What every architecture has to do: be found, edited, hit, left alone, generate, save and load."""

import warnings

import pytest
import torch
import transformers
from dualedit import add_edit, inject_balancedit
from dualedit.editing import lookup
from dualedit.models.architectures import find_decoder_layers, image_token_ids, resolve_layer, resolve_linear
from dualedit.tuners.dualedit import DualEditLayer
from peft import PeftModel
from seeds import VARIABLE, settle

from .builders import LISTED_FOR
from .case import MODES, generated, logits_of
from .parts import batch

# What base models cannot do is listed for one version of transformers; with others it is taken as it comes.
LISTED_HERE = transformers.__version__.startswith(LISTED_FOR)
# Decoders that are given token ids, or whose pictures come in between their layers.
BLIND = ("chameleon", "kosmos-2", "kosmos-2.5", "granite4_vision")


@pytest.fixture(autouse=True)
def print_the_seed(case):
    print(f"seed {case.seed} ({VARIABLE}={settle()})")


def pixel_positions(case):
    """[1, P] bool, measured: where the input of the first decoder layer depends on the picture."""
    _, layers = find_decoder_layers(case.base)
    seen = []
    handle = layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )
    one, other = case.rows[0], case.architecture.row(torch.Generator().manual_seed(case.seed + 1))
    other["input_ids"] = one["input_ids"]
    try:
        for inputs in (one, other):
            logits_of(case.base, inputs)
    finally:
        handle.remove()
    return (seen[0] != seen[1]).any(-1)


def test_layers_are_found_by_every_name(case, support):
    model, path = case.base, case.layers
    assert path in (case.architecture.layers, case.architecture.older)
    wanted = f"{path}.2"
    stack = path.rpartition(".")[2]
    for name in (2, -2, wanted, f"{stack}.2", rf".*\.{stack}\.2", f"base_model.model.{wanted}",
                 f"language_model.model.{stack}.2", f"model.{stack}.2"):  # fmt: skip
        assert resolve_layer(model, name) == wanted, name
    if case.architecture.linear:
        full = resolve_linear(model, case.architecture.linear)
        assert full.startswith(wanted) and full.endswith(case.architecture.linear)
    support("decoder layers", f"`{path}`")


def test_image_ids_cover_the_picture(case, support):
    ids = image_token_ids(case.base)
    assert tuple(ids) == case.architecture.image_ids
    depends = pixel_positions(case)
    support("image positions", case.architecture.stated_by)
    if case.architecture.sees == "text":
        assert not depends.any()
        return
    marked = case.marked()
    assert depends.any() and not (depends & ~marked).any()
    if case.architecture.unused is not None:
        assert int((marked & ~depends).sum()) == case.architecture.unused


def test_an_edit_is_hit_at_its_positions(case, support):
    model, row = case.edited, case.rows[0]
    assert lookup(model, row).fired and not lookup(model, case.rows[1]).fired
    before, after = {}, {}
    handles = []
    layers = [module for module in model.modules() if isinstance(module, DualEditLayer)]
    for layer in layers:
        for module, seen in ((layer.base_layer, before), (layer, after)):
            handles.append(module.register_forward_hook(
                lambda m, a, out, seen=seen, name=layer.layer_name: seen.update(
                    {name: out[0] if isinstance(out, tuple) else out})))  # fmt: skip
    try:
        ours = logits_of(model, row)
    finally:
        for handle in handles:
            handle.remove()
    image = case.marked()
    positions = {f"{case.layers}.1": ~image, f"{case.layers}.2": image}
    for name in before:
        assert torch.equal((before[name] != after[name]).any(-1), positions[name]), name
    assert len(before) == (2 if case.architecture.sees == "both" else 1)
    assert not torch.allclose(ours[0, -1], logits_of(case.base, row)[0, -1], atol=1e-3)
    support("edit text", "yes")
    support("edit image", "yes" if case.architecture.sees == "both" else "no")


def test_no_gate_no_change(case):
    model, others = case.edited, batch(case.rows[1:])
    assert torch.equal(logits_of(model, others), logits_of(case.base, others))
    mixed = batch(case.rows)
    ours, theirs = logits_of(model, mixed), logits_of(case.base, mixed)
    assert torch.equal(ours[1:], theirs[1:])
    assert not torch.allclose(ours[0, -1], theirs[0, -1], atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(logits_of(model, mixed), theirs)


@pytest.mark.parametrize("mode", MODES)
def test_generation(case, mode, support):
    base, greedy = case.base_generates(mode), case.base_generates("greedy")
    listed = case.architecture.base_fails.get(mode)
    if isinstance(base, str):
        support(mode, f"base fails: {base}")
        if LISTED_HERE:
            assert listed is not None and listed in base, f"not listed as the base model's failure: {base}"
        pytest.skip(f"the base model fails by itself: {base}")
    assert listed is None or not LISTED_HERE, "the list says that the base model cannot do this, and it does"
    hit, others = case.inputs(mode)
    ours = generated(case.edited, others, mode)
    assert torch.equal(ours[0], base[1][0]) and torch.equal(ours[1], base[1][1])
    tokens, first = generated(case.edited, hit, mode)
    assert torch.equal(tokens[1:], base[0][0][1:])
    own = not torch.allclose(base[0][1][0], greedy[0][1][0], atol=1e-4, rtol=1e-4)
    support(mode, "own" if own else "yes")
    if own:  # the base model reads the prompt otherwise in this mode, and so may the gate
        assert mode != "greedy"
        return
    # A mode that gives the base model's greedy answer gives the edited model's.
    edited, edited_first = generated(case.edited, case.inputs("greedy")[0], "greedy")
    assert not torch.allclose(first[0], base[0][1][0], atol=1e-3)
    assert torch.allclose(first[0], edited_first[0], atol=1e-3, rtol=1e-3)
    if mode != "beams" and torch.equal(base[0][0][0], greedy[0][0][0]):
        assert torch.equal(tokens[0], edited[0])


def test_a_pooled_key_sees_the_picture(case):
    """Where pictures stand in the sequence; the same question about another picture has another key."""
    model = case.inject(case.architecture.build(case.seed), key="pooled", key_dim=8)
    router = next(m for m in model.modules() if isinstance(m, DualEditLayer)).dualedit_router["default"]
    seen = []
    handle = router.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    other = case.architecture.row(torch.Generator().manual_seed(case.seed + 1))
    other["input_ids"] = case.rows[0]["input_ids"]
    if case.name in BLIND:
        with pytest.raises(ValueError, match="key='last'"):
            add_edit(model, case.rows[0], case.target)
        return
    add_edit(model, case.rows[0], case.target)
    assert lookup(model, case.rows[0]).fired
    lookup(model, other)
    handle.remove()
    stored, own, different = seen
    if case.architecture.sees == "text":
        assert own is None or not own.any()
        return
    assert torch.equal(stored, own) and own.any()
    assert not torch.allclose(own, different, rtol=1e-3, atol=0)


def test_save_load_and_unload(case, support, tmp_path):
    model, mixed = case.edited, batch(case.rows)
    model.save_pretrained(tmp_path)
    fresh = case.architecture.build(case.seed)
    loaded = PeftModel.from_pretrained(fresh, tmp_path)
    assert torch.equal(logits_of(loaded, mixed), logits_of(model, mixed))
    unloaded = loaded.unload()
    assert unloaded is fresh
    assert torch.equal(logits_of(unloaded, mixed), logits_of(case.base, mixed))
    support("save and load", "yes")


def test_balancedit(case, support):
    """A codebook at a linear layer: the edited row is hit, the others stay bit for bit."""
    if case.architecture.linear is None:
        support("BalancEdit", "no")
        pytest.skip("no linear layer sees every token")
    model = inject_balancedit(
        case.architecture.build(case.seed), layer=case.architecture.linear, alpha=0.9, max_steps=2, rank=2,
        learning_rate=0.3,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The edit did not take")  # it need not in two steps
        add_edit(model, case.rows[0], case.target, positives=[case.rows[0]], negatives=[case.rows[1]])
    mixed = batch(case.rows)
    ours, theirs = logits_of(model, mixed), logits_of(case.base, mixed)
    assert not torch.allclose(ours[0, -1], theirs[0, -1], atol=1e-3)
    assert torch.equal(ours[1], theirs[1])
    support("BalancEdit", "yes")
