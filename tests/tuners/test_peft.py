"""The editors as PEFT methods: injection, naming of layers, saving and loading, several adapters."""

import inspect

import pytest
import torch
from dualedit import BalancEditConfig, DualEditConfig, inject_balancedit, inject_dualedit, lookup, remove_edit
from dualedit.models.architectures import resolve_layer, resolve_linear
from dualedit.runtime.context import runtime_of
from dualedit.tuners.dualedit.modules import EditCrossAttention
from peft import PeftModel, get_peft_model
from tiny_models import (
    FAMILIES,
    LLAVA,
    METHODS,
    QWEN,
    edit_layers,
    editor_of,
    row_of,
    store,
    strengthen,
    tiny_llama,
)
from torch import nn

SIZES = dict(mid_dim=16, num_heads=2, threshold=0.999)


@pytest.fixture(params=METHODS)
def method(request):
    return request.param


def logits_of(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


# ---------------------------------------------------------------------- injection


def test_get_peft_model_is_inject_dualedit(generator, seed):
    inputs = LLAVA.questions(2, generator)
    torch.manual_seed(seed)
    ours = inject_dualedit(LLAVA.build(), text_layer=1, vis_layer=2, init_weights=False, **SIZES)
    config = DualEditConfig(text_layer=1, vis_layer=2, init_weights=False, **SIZES)
    peft = get_peft_model(LLAVA.build(), config)
    assert list(ours.state_dict()) == list(peft.state_dict())
    peft.load_state_dict(ours.state_dict())
    for model in (ours, peft):
        store(strengthen_alike(model), row_of(inputs, 0), torch.Generator().manual_seed(1))
    assert torch.equal(logits_of(ours, inputs), logits_of(peft, inputs))
    mine, theirs = (dict(vars(model.peft_config["default"])) for model in (ours, peft))
    assert mine == theirs


def test_get_peft_model_is_inject_balancedit():
    ours = inject_balancedit(LLAVA.build(), layer=LLAVA.linear, alpha=0.3, rank=2)
    peft = get_peft_model(LLAVA.build(), BalancEditConfig(layer=LLAVA.linear, alpha=0.3, rank=2))
    assert list(ours.state_dict()) == list(peft.state_dict())
    assert vars(ours.peft_config["default"]) == vars(peft.peft_config["default"])


def strengthen_alike(model):
    torch.manual_seed(5)
    return strengthen(model)


@pytest.mark.parametrize(
    "layers",
    [
        (1, 2),
        (-3, -2),
        ("model.language_model.layers.1", "model.language_model.layers.2"),
        ("layers.1", "language_model.layers.2"),
        ("language_model.model.layers.1", "language_model.model.layers.2"),
        (r".*\.1", r".*layers\.2"),
    ],
    ids=["number", "negative", "full", "suffix", "v4", "regex"],
)
def test_ways_to_name_a_layer(layers):
    model = inject_dualedit(LLAVA.build(), text_layer=layers[0], vis_layer=layers[1], **SIZES)
    names = [layer.layer_name for layer in edit_layers(model)]
    assert names == ["model.language_model.layers.1", "model.language_model.layers.2"]
    assert [type(model.get_base_model().get_submodule(n)).__name__ for n in names] == ["DualEditLayer"] * 2


def test_a_name_stays_the_same_once_wrapped():
    model = inject_dualedit(LLAVA.build(), text_layer=1, vis_layer=2, **SIZES).get_base_model()
    for value in (1, -3, "layers.1", "model.language_model.layers.1"):
        assert resolve_layer(model, value) == "model.language_model.layers.1"
    model = inject_balancedit(LLAVA.build(), layer=LLAVA.linear).get_base_model()
    assert resolve_linear(model, "layers.2.mlp.up_proj") == "model.language_model.layers.2.mlp.up_proj"


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@pytest.mark.parametrize(
    ("layers", "roles"),
    [
        (dict(text_layer=1, vis_layer=None), {1: ("text", "gate")}),
        (dict(text_layer=None, vis_layer=2), {2: ("vision", "gate")}),
        (dict(text_layer=1, vis_layer=1), {1: ("text", "vision", "gate")}),
        (dict(text_layer=1, vis_layer=3), {1: ("text", "gate"), 3: ("vision",)}),
        (dict(text_layer=3, vis_layer=0), {0: ("vision", "gate"), 3: ("text",)}),
    ],
    ids=["text", "vision", "both on one", "text first", "vision first"],
)
def test_placement(family, layers, roles, generator):
    base, model = family.build(), editor_of(family, "dualedit", **layers)
    wrapped = {int(layer.layer_name.rpartition(".")[2]): layer for layer in edit_layers(model)}
    assert set(wrapped) == set(roles)
    for number, parts in roles.items():
        role = wrapped[number].roles["default"]
        assert {part for part in ("text", "vision", "gate") if getattr(role, part)} == set(parts)
        adapters = wrapped[number].dualedit_adapter["default"]
        assert set(adapters) == set(parts) - {"gate"}
        assert all(isinstance(adapter, EditCrossAttention) for adapter in adapters.values())
    inputs = family.questions(3, generator)
    store(model, row_of(inputs, 1), generator)
    ours, theirs = logits_of(model, inputs), logits_of(base, inputs)
    assert torch.equal(ours[[0, 2]], theirs[[0, 2]])
    assert not torch.allclose(ours[1, -1], theirs[1, -1], atol=1e-2)
    assert len({tuple(layer.dualedit_memory["default"].ids) for layer in wrapped.values()}) == 1


def test_an_identity_adapter_changes_nothing(generator):
    """init_weights=True: an untrained adapter with edits stored is still the base model."""
    base = LLAVA.build()
    model = inject_dualedit(LLAVA.build(), text_layer=1, vis_layer=2, **SIZES)
    inputs = LLAVA.question(generator)
    store(model, inputs, generator)
    assert lookup(model, inputs).fired
    assert torch.equal(logits_of(model, inputs), logits_of(base, inputs))


def test_mode_follows_the_base():
    for train in (True, False):
        model = inject_dualedit(LLAVA.build().train(train), text_layer=1, vis_layer=2, **SIZES)
        assert all(module.training == train for layer in edit_layers(model) for module in layer.modules())
    model.train()
    assert all(layer.training and layer.base_layer.training for layer in edit_layers(model))
    model.eval()
    assert not any(layer.training or layer.base_layer.training for layer in edit_layers(model))


def test_editing_leaves_modes_and_gradients_alone(method, generator):
    model = editor_of(LLAVA, method)
    model.train()
    model.get_base_model().model.vision_tower.eval()
    modes = [module.training for module in model.modules()]
    trainable = [p.requires_grad for p in model.parameters()]
    store(model, LLAVA.question(generator), generator)
    assert [module.training for module in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == trainable
    assert all(p.grad is None for p in model.parameters())


def test_only_adapters_are_trainable():
    model = inject_dualedit(LLAVA.build().requires_grad_(True), text_layer=1, vis_layer=2, **SIZES)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable and all(".dualedit_adapter.default." in name for name in trainable)
    assert len(trainable) == sum(
        len(list(layer.dualedit_adapter.parameters())) for layer in edit_layers(model)
    )


def test_merging_is_refused(method):
    model = editor_of(LLAVA, method)
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ValueError, match="cannot be merged"):
            merge()
    assert edit_layers(model)


def test_it_is_refused_on_a_peft_model():
    model = inject_dualedit(LLAVA.build(), text_layer=1, vis_layer=2, **SIZES)
    with pytest.raises(ValueError, match="pass the base model, or another adapter_name"):
        inject_dualedit(model, text_layer=1, vis_layer=2, **SIZES)


def test_a_config_or_its_fields():
    """Both give the same adapter; both at once, a name with a typo and a layer by place are refused."""
    config = DualEditConfig(text_layer=1, vis_layer=2, **SIZES)
    model = inject_dualedit(LLAVA.build(), config)
    assert model.peft_config["default"] is config
    assert "text_layer" in inspect.signature(inject_dualedit).parameters
    with pytest.raises(ValueError, match="config and .'text_layer'. are both given"):
        inject_dualedit(LLAVA.build(), config, text_layer=1)
    with pytest.raises(TypeError, match="no setting 'text_layr'.*text_layer"):
        inject_dualedit(LLAVA.build(), text_layr=1)
    with pytest.raises(TypeError, match=r"inject_dualedit\(model, text_layer=...\)"):
        inject_dualedit(LLAVA.build(), 1, vis_layer=2)
    with pytest.raises(TypeError, match=r"inject_balancedit\(model, layer=...\)"):
        inject_balancedit(LLAVA.build(), LLAVA.linear)


# ---------------------------------------------------------------------- saving and loading


@pytest.fixture
def saved(method, generator, tmp_path):
    """An edited model, its questions, their logits, and the folder it was saved to."""
    model = editor_of(LLAVA, method)
    inputs = LLAVA.questions(4, generator)
    for row in (0, 2, 3):
        store(model, row_of(inputs, row), generator)
    remove_edit(model, 2)
    model.save_pretrained(tmp_path)
    return model, inputs, logits_of(model, inputs), tmp_path


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"low_cpu_mem_usage": True},
        {"adapter_name": "other.name".replace(".", "_")},
        {"is_trainable": True},
    ],
)
def test_loading_gives_the_same_logits(how, saved):
    model, inputs, expected, folder = saved
    loaded = PeftModel.from_pretrained(LLAVA.build(), folder, **how)
    loaded.eval()
    assert torch.equal(logits_of(loaded, inputs), expected)
    assert [layer.runtime.groups.keys() for layer in edit_layers(loaded)][0] == {
        (loaded.base_model.prefix, how.get("adapter_name", "default"))
    }
    groups = [next(iter(runtime_of(each.get_base_model()).groups.values())) for each in (model, loaded)]
    assert groups[0].records() == groups[1].records()
    assert groups[0].ids() == groups[1].ids() == [1, 3]


def test_loading_many_times_adds_nothing(saved):
    model, inputs, expected, folder = saved
    loaded = PeftModel.from_pretrained(LLAVA.build(), folder)
    for _ in range(2):
        loaded.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(LLAVA.build(), folder)
    assert torch.equal(logits_of(loaded, inputs), expected)


def test_full_state_dict_into_an_empty_memory(method, saved):
    model, inputs, expected, _ = saved
    other = editor_of(LLAVA, method)
    result = other.load_state_dict(model.state_dict())
    assert not result.missing_keys and not result.unexpected_keys
    assert torch.equal(logits_of(other, inputs), expected)


def test_bfloat16_model(method, generator, tmp_path):
    more = dict(threshold=0.99) if method == "dualedit" else {}
    model = editor_of(LLAVA, method, LLAVA.build(dtype=torch.bfloat16), **more)
    inputs = LLAVA.questions(3, generator)
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    base = LLAVA.build(dtype=torch.bfloat16)
    edit = store(model, row_of(inputs, 1), generator)
    expected = logits_of(model, inputs)
    assert expected.dtype == torch.bfloat16
    assert torch.equal(expected[[0, 2]], logits_of(base, inputs)[[0, 2]])
    assert not torch.equal(expected[1], logits_of(base, inputs)[1])
    assert lookup(model, row_of(inputs, 1)).edit_id == edit.id
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(LLAVA.build(dtype=torch.bfloat16), tmp_path)
    assert torch.equal(logits_of(loaded, inputs), expected)


def test_edits_move_between_dtypes(saved):
    """Edits made on a float32 model are found again by the same model in half precision."""
    model, inputs, _, folder = saved
    for dtype in (torch.bfloat16, torch.float16):
        loaded = PeftModel.from_pretrained(LLAVA.build(dtype=dtype), folder)
        half = {
            name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()
        }
        assert logits_of(loaded, half).dtype == dtype
        if isinstance(loaded.peft_config["default"], BalancEditConfig):
            continue  # its radius here is far below bfloat16's resolution
        for layer in edit_layers(loaded):
            layer.configs["default"].threshold = 0.99
        assert [lookup(loaded, row_of(half, row)).fired for row in range(4)] == [True, False, False, True]


def test_casting_an_edited_model(generator):
    """Weights folded for float32 are not used after the model has been cast."""
    model = editor_of(LLAVA, "dualedit")
    inputs = LLAVA.question(generator)
    store(model, inputs, generator)
    before = logits_of(model, inputs)
    model.double()
    doubled = logits_of(model, inputs | {"pixel_values": inputs["pixel_values"].double()})
    assert doubled.dtype == torch.float64
    assert torch.allclose(doubled.float(), before, rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        for layer in edit_layers(model):
            for name, parameter in layer.dualedit_adapter.named_parameters():
                if "q_proj.weight" in name or "in_proj.weight" in name:
                    parameter.data.mul_(3.0)
    model.eval()
    scaled = logits_of(model, inputs | {"pixel_values": inputs["pixel_values"].double()})
    assert not torch.allclose(scaled, doubled, rtol=1e-4, atol=1e-4)


def test_unmatched_fingerprint_is_refused(saved):
    *_, folder = saved
    with pytest.raises(ValueError, match="another base model: embedding_signs"):
        PeftModel.from_pretrained(LLAVA.build(seed=1), folder)


# ---------------------------------------------------------------------- several adapters


def test_two_adapters(generator):
    base, model = LLAVA.build(), editor_of(LLAVA, "dualedit")
    inputs = LLAVA.questions(3, generator)
    expected = logits_of(base, inputs)
    store(model, row_of(inputs, 0), generator)
    first = logits_of(model, inputs)
    model.add_adapter("second", DualEditConfig(text_layer=1, vis_layer=3, init_weights=False, **SIZES))
    assert torch.equal(logits_of(model, inputs), first)
    model.set_adapter("second")
    strengthen(model)
    assert torch.equal(logits_of(model, inputs), expected)
    store(model, row_of(inputs, 1), generator)
    second = logits_of(model, inputs)
    assert torch.equal(second[[0, 2]], expected[[0, 2]]) and not torch.equal(second[1], expected[1])
    model.set_adapter("default")
    strengthened = logits_of(model, inputs)
    assert torch.equal(strengthened[1:], expected[1:]) and not torch.equal(strengthened[0], expected[0])
    assert [len(group) for group in runtime_of(model.get_base_model()).groups.values()] == [1, 1]
    model.delete_adapter("second")
    assert torch.equal(logits_of(model, inputs), strengthened)
    assert list(runtime_of(model.get_base_model()).groups) == [("dualedit_", "default")]
    assert not any("second" in name for name in model.state_dict())


def test_two_adapters_are_saved_apart(generator, tmp_path):
    model = editor_of(QWEN, "balancedit")
    inputs = QWEN.questions(2, generator)
    store(model, row_of(inputs, 0), generator)
    model.add_adapter(
        "b", BalancEditConfig(layer=QWEN.linear, alpha=0.9, max_steps=2, learning_rate=0.3, rank=2)
    )
    model.set_adapter("b")
    store(model, row_of(inputs, 1), generator)
    expected = logits_of(model, inputs)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(QWEN.build(), tmp_path)
    loaded.load_adapter(tmp_path / "b", adapter_name="b")
    loaded.set_adapter("b")
    assert torch.equal(logits_of(loaded, inputs), expected)
    loaded.set_adapter("default")
    model.set_adapter("default")
    assert torch.equal(logits_of(loaded, inputs), logits_of(model, inputs))


def test_attributes_of_the_base_layer_show_through():
    model = tiny_llama()
    model.model.layers[1].attention_type = "full_attention"
    layer = edit_layers(inject_dualedit(model, text_layer=1, vis_layer=None, **SIZES))[0]
    assert layer.attention_type == "full_attention"
    assert isinstance(layer.self_attn, nn.Module)
    with pytest.raises(AttributeError, match="no_such_attribute"):
        _ = layer.no_such_attribute
    linear = edit_layers(inject_balancedit(tiny_llama(), layer="layers.1.mlp.up_proj"))[0]
    assert (linear.in_features, linear.out_features) == (32, 48)
