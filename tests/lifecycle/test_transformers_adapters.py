"""transformers' own add_adapter, load_adapter, set_adapter, delete_adapter: no PeftModel anywhere."""

import json

import pytest
import torch
from dualedit import BalancEditConfig, DualEditConfig, load_edits, lookup, remove_edit, save_edits
from dualedit.runtime.context import runtime_of
from peft import LoraConfig, PeftModel
from tiny_models import LLAVA, METHODS, QWEN, edit_layers, editor_of, row_of, store, strengthen
from transformers import AutoModelForImageTextToText

DUAL = dict(text_layer=1, vis_layer=2, mid_dim=16, num_heads=2, threshold=0.999, init_weights=False)
BALANCE = dict(layer="layers.2.mlp.up_proj", alpha=0.9, max_steps=3, learning_rate=0.3, rank=4)


def config_of(method):
    return DualEditConfig(**DUAL) if method == "dualedit" else BalancEditConfig(**BALANCE)


def logits_of(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def groups_of(model):
    return runtime_of(getattr(model, "get_base_model", lambda: model)()).groups


@pytest.fixture(params=METHODS)
def method(request):
    return request.param


@pytest.fixture(params=[LLAVA, QWEN], ids=lambda family: family.name)
def family(request):
    return request.param


@pytest.fixture
def added(method, family, generator, seed):
    """A transformers model with an editor by add_adapter, three edits stored, one of them removed."""
    torch.manual_seed(seed)
    model = family.build()
    model.add_adapter(config_of(method), "facts")
    strengthen(model)
    inputs = family.questions(4, generator)
    for row in (0, 2, 3):
        store(model, row_of(inputs, row), generator)
    remove_edit(model, 2)
    return model, inputs


def test_add_adapter(added, family):
    model, inputs = added
    ours, base = logits_of(model, inputs), logits_of(family.build(), inputs)
    assert torch.equal(ours[[1, 2]], base[[1, 2]])
    assert not torch.equal(ours[0], base[0]) and not torch.equal(ours[3], base[3])
    assert [lookup(model, row_of(inputs, row)).fired for row in range(4)] == [True, False, False, True]
    model.disable_adapters()
    assert torch.equal(logits_of(model, inputs), base)
    model.enable_adapters()
    assert torch.equal(logits_of(model, inputs), ours)


def test_load_adapter_is_refused_and_loses_nothing(added, family, tmp_path):
    """It compares shapes with those of a memory that is still empty; nothing answers without the edits."""
    model, inputs = added
    expected = logits_of(model, inputs)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    other = family.build()
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        other.load_adapter(tmp_path, adapter_name="again")
    with pytest.raises(ValueError, match="holds 2 edits, and none of them was loaded.*dualedit.load_edits"):
        logits_of(other, inputs)
    other.delete_adapter("again")
    assert torch.equal(logits_of(load_edits(other, tmp_path), inputs), expected)


def test_files_of_both_libraries_are_the_same(added, family, tmp_path):
    model, inputs = added
    expected = logits_of(model, inputs)
    model.save_pretrained(tmp_path / "transformers")
    loaded = load_edits(family.build(), tmp_path / "transformers")
    assert torch.equal(logits_of(loaded, inputs), expected)
    save_edits(loaded, tmp_path / "ours")
    other = load_edits(family.build(), tmp_path / "ours")
    assert torch.equal(logits_of(other, inputs), expected)
    loaded.save_pretrained(tmp_path / "peft")
    last = PeftModel.from_pretrained(family.build(), tmp_path / "peft")
    assert torch.equal(logits_of(last, inputs), expected)


def test_a_base_folder_with_an_adapter_in_it(method, generator, tmp_path, seed):
    """from_pretrained of transformers loads an adapter beside the model: not without its edits."""
    torch.manual_seed(seed)
    LLAVA.build().save_pretrained(tmp_path)
    base = AutoModelForImageTextToText.from_pretrained(tmp_path).requires_grad_(False)
    model = editor_of(LLAVA, method, base)
    store(model, LLAVA.question(generator), generator)
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForImageTextToText.from_pretrained(tmp_path)


def test_an_adapter_without_edits(method, family, tmp_path, generator):
    model = family.build()
    model.add_adapter(config_of(method))
    model.save_pretrained(tmp_path)
    other = family.build()
    other.load_adapter(tmp_path)
    inputs = family.questions(2, generator)
    assert torch.equal(logits_of(other, inputs), logits_of(family.build(), inputs))
    assert not lookup(other, row_of(inputs, 0)).fired
    store(other, row_of(inputs, 0), generator)
    assert lookup(other, row_of(inputs, 0)).fired


def test_a_config_of_a_saved_folder_alone(method, family, tmp_path, generator, added):
    """Without its tensors nothing answers: the edits would be lost without a word."""
    model, inputs = added
    model.save_pretrained(tmp_path)
    sizes = json.loads((tmp_path / "adapter_config.json").read_text())["memory_sizes"]
    assert {size["edits"] for size in sizes.values()} == {2}
    other = family.build()
    other.add_adapter(type(config_of(method)).from_pretrained(tmp_path), "fresh")
    with pytest.raises(ValueError, match="holds 2 edits, and none of them was loaded.*load_edits"):
        logits_of(other, inputs)
    with pytest.raises(ValueError, match="holds 2 edits, and none of them was loaded.*load_edits"):
        store(other, row_of(inputs, 2), generator)


def test_half_precision(method, generator, tmp_path):
    model = LLAVA.build(dtype=torch.bfloat16)
    model.add_adapter(config_of(method))
    strengthen(model)
    for layer in edit_layers(model):
        if method == "dualedit":
            layer.configs["default"].threshold = 0.99
    inputs = LLAVA.questions(3, generator)
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    store(model, row_of(inputs, 1), generator)
    expected = logits_of(model, inputs)
    model.save_pretrained(tmp_path)
    other = load_edits(LLAVA.build(dtype=torch.bfloat16), tmp_path)
    assert torch.equal(logits_of(other, inputs), expected)


def test_set_and_delete_adapter(added, method, family, generator, seed):
    """Two of one method and a LoRA, chosen by transformers' set_adapter, which takes lists."""
    torch.manual_seed(seed)
    model, inputs = added
    base = logits_of(family.build(), inputs)
    facts = logits_of(model, inputs)
    model.add_adapter(config_of(method), "second")
    assert torch.equal(logits_of(model, inputs), base)  # the newcomer is the only active one, as with LoRA
    strengthen(model) if method == "dualedit" else None
    store(model, row_of(inputs, 1), generator)
    second = logits_of(model, inputs)
    assert torch.equal(second[[0, 2, 3]], base[[0, 2, 3]]) and not torch.equal(second[1], base[1])
    if method == "balancedit":
        model.set_adapter("facts")
        assert torch.equal(logits_of(model, inputs), facts)
        model.set_adapter(["facts", "second"])
        both = logits_of(model, inputs)
        assert torch.equal(both[1], second[1]) and torch.equal(both[[0, 2, 3]], facts[[0, 2, 3]])
    model.set_adapter("facts")
    model.delete_adapter("second")
    assert [name for _, name in groups_of(model)] == ["facts"] and list(model.peft_config) == ["facts"]
    assert not any("second" in name for name in model.state_dict())
    model.delete_adapter("facts")
    assert not groups_of(model) and not getattr(model, "peft_config", None)
    assert torch.equal(logits_of(model, inputs), base)
    model.add_adapter(config_of(method), "facts")
    assert [len(group) for group in groups_of(model).values()] == [0]
    store(model, row_of(inputs, 1), generator)
    assert lookup(model, row_of(inputs, 1)).edit_id == 1


def test_beside_a_lora(family, generator, seed):
    torch.manual_seed(seed)
    model, plain = family.build(), family.build()
    config = LoraConfig(r=2, target_modules=r".*language_model.*\.q_proj", init_lora_weights=False)
    model.add_adapter(config, "style")
    inputs = family.questions(3, generator)
    lora = logits_of(model, inputs)
    model.add_adapter(DualEditConfig(**DUAL), "facts")
    model.set_adapter(["style", "facts"])
    strengthen(model)
    store(model, row_of(inputs, 1), generator)
    both = logits_of(model, inputs)
    assert torch.equal(both[[0, 2]], lora[[0, 2]]) and not torch.equal(both[1], lora[1])
    model.set_adapter("style")
    assert torch.equal(logits_of(model, inputs), lora)
    model.set_adapter("facts")
    base = logits_of(plain, inputs)
    assert torch.equal(logits_of(model, inputs)[[0, 2]], base[[0, 2]])
    model.delete_adapter("facts")
    model.set_adapter("style")
    assert torch.equal(logits_of(model, inputs), lora)
