"""DualEdit, BalancEdit and LoRA on one model: each on its own, together, saved and loaded, taken off."""

import warnings

import pytest
import torch
from dualedit import (
    BalancEditConfig,
    DualEditConfig,
    add_edit,
    disabled,
    inject_balancedit,
    inject_dualedit,
    lifted,
    list_edits,
    load_edits,
    lookup,
    remove_adapter,
    save_edits,
)
from dualedit.runtime.context import runtime_of
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from tiny_models import LLAVA, QWEN, edit_layers, row_of, store, strengthen

DUAL = dict(text_layer=1, vis_layer=2, mid_dim=16, num_heads=2, threshold=0.999, init_weights=False)
# Inside the decoder layer that DualEdit wraps, so that one wrapper lies in the other.
BALANCE = dict(layer="layers.2.mlp.up_proj", alpha=0.9, max_steps=3, learning_rate=0.3, rank=4)


def lora_config():
    return LoraConfig(r=2, target_modules=r".*language_model.*\.q_proj", init_lora_weights=False)


def logits_of(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def store_in(model, off, inputs, generator):
    """Store an edit in the edit adapter that is left when `off` are switched off."""
    with disabled(model, *off):
        target = torch.randint(3, 100, (3,), generator=generator)
        noise = torch.randn(inputs["pixel_values"].shape, generator=generator)
        near, far = ({**inputs, "pixel_values": inputs["pixel_values"] + s * noise} for s in (0.01, 3.0))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The edit did not take")
            return add_edit(model, inputs, target, positives=[near], negatives=[far])


@pytest.fixture(params=[LLAVA, QWEN], ids=lambda family: family.name)
def family(request):
    return request.param


@pytest.fixture
def three(family, generator, seed):
    """LoRA, then DualEdit and BalancEdit beside it, an edit of one question in each; and what they answer."""
    torch.manual_seed(seed)
    model = get_peft_model(family.build(), lora_config(), adapter_name="style").eval()
    inject_dualedit(model, adapter_name="facts", **DUAL)
    strengthen(model)
    inject_balancedit(model, adapter_name="more", **BALANCE)
    inputs = family.questions(3, generator)
    store_in(model, ["more"], row_of(inputs, 0), generator)
    store_in(model, ["facts"], row_of(inputs, 1), generator)
    return model, inputs


NAMES = ("style", "facts", "more")


def answers(model, inputs):
    """Logits with every combination of the three adapters switched off."""
    found = {}
    for number in range(8):
        off = tuple(name for place, name in enumerate(NAMES) if number >> place & 1)
        with disabled(model, *off):
            found[off] = logits_of(model, inputs)
    return found


def test_each_is_switched_off_on_its_own(three, family):
    model, inputs = three
    base = logits_of(family.build(), inputs)
    by = answers(model, inputs)
    assert torch.equal(by[NAMES], base)
    assert torch.equal(by[()], logits_of(model, inputs))
    lora = by["facts", "more"]
    assert not torch.equal(lora, base)
    # The third question is edited nowhere: LoRA's answer bit for bit, whatever is on.
    for off, logits in by.items():
        assert torch.equal(logits[2], (base if "style" in off else lora)[2])
    with_facts, with_more = by["more",], by["facts",]
    assert torch.equal(with_facts[1:], lora[1:]) and not torch.equal(with_facts[0], lora[0])
    assert torch.equal(with_more[[0, 2]], lora[[0, 2]]) and not torch.equal(with_more[1], lora[1])
    assert torch.equal(by[()][0], with_facts[0]) and torch.equal(by[()][1], with_more[1])


def test_switching_off_nests_and_leaves_no_trace(three):
    model, inputs = three
    before = logits_of(model, inputs)
    flags = [p.requires_grad for p in model.parameters()]
    active = [m.active_adapters for m in model.modules() if isinstance(m, LoraLayer)]
    by = answers(model, inputs)
    with disabled(model, "facts"):
        with disabled(model, "more", "style"):
            assert torch.equal(logits_of(model, inputs), by[NAMES])
        assert torch.equal(logits_of(model, inputs), by["facts",])
    with pytest.raises(KeyError), disabled(model, *NAMES):
        raise KeyError("from inside")
    assert torch.equal(logits_of(model, inputs), before)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [m.active_adapters for m in model.modules() if isinstance(m, LoraLayer)] == active


def test_an_unknown_name_is_refused(three):
    model, _ = three
    with pytest.raises(ValueError, match="'other': no such adapter .* 'style', 'facts', 'more'"):
        with disabled(model, "other"):
            raise AssertionError("the block ran")
    with pytest.raises(ValueError, match="'style': no such edit adapter .* 'facts', 'more'"):
        remove_adapter(model, "style")


def test_disable_adapter_is_the_base_model(three, family):
    model, inputs = three
    before = logits_of(model, inputs)
    with model.disable_adapter():
        assert torch.equal(logits_of(model, inputs), logits_of(family.build(), inputs))
    assert torch.equal(logits_of(model, inputs), before)


def test_generation_with_one_switched_off(three, family):
    model, inputs = three
    question = row_of(inputs, 0)
    with disabled(model, "facts"):
        without = model.generate(**question, max_new_tokens=6, do_sample=False)
    with_facts = model.generate(**question, max_new_tokens=6, do_sample=False, output_logits=True,
                                return_dict_in_generate=True)  # fmt: skip
    with lifted(model):
        assert torch.equal(without, model.generate(**question, max_new_tokens=6, do_sample=False))
        assert not torch.equal(with_facts.logits[0], logits_of(model, question)[:, -1])


def test_editing_asks_which_adapter(three, generator):
    model, inputs = three
    with pytest.raises(ValueError, match=r"Several edit adapters .*facts, more.*dualedit.disabled"):
        lookup(model, inputs)
    with disabled(model, "facts"):
        assert [edit.id for edit in list_edits(model)] == [1]
        assert lookup(model, row_of(inputs, 1)).fired and not lookup(model, row_of(inputs, 0)).fired
    with disabled(model, "more"):
        assert lookup(model, row_of(inputs, 0)).fired and not lookup(model, row_of(inputs, 1)).fired


def test_a_name_that_is_taken(three):
    model, inputs = three
    before, parts = logits_of(model, inputs), [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match="with an adapter 'more' already"):
        inject_balancedit(model, adapter_name="more", **BALANCE)
    with pytest.raises(ValueError, match="no such module"):
        inject_balancedit(model, layer="layers.9.mlp.up_proj", adapter_name="fourth")
    with pytest.raises(ValueError, match="has 4 layers"):
        inject_dualedit(model, text_layer=9, vis_layer=1, mid_dim=16, num_heads=2, adapter_name="fourth")
    assert list(model.peft_config) == list(NAMES)
    assert [type(m) for m in model.modules()] == parts
    assert torch.equal(logits_of(model, inputs), before)


def test_saving_and_loading_side_by_side(three, family, tmp_path):
    model, inputs = three
    expected = answers(model, inputs)
    with lifted(model):
        model.save_pretrained(tmp_path / "lora")
        assert torch.equal(logits_of(model, inputs), expected["facts", "more"])
    save_edits(model, tmp_path / "edits")
    assert torch.equal(logits_of(model, inputs), expected[()])
    for order in (("facts", "more"), ("more", "facts")):
        loaded = PeftModel.from_pretrained(family.build(), tmp_path / "lora" / "style", adapter_name="style")
        for name in order:
            assert load_edits(loaded, tmp_path / "edits" / name, adapter_name=name) is loaded
        found = answers(loaded, inputs)
        for off, logits in expected.items():
            assert torch.equal(found[off], logits), (order, off)


def test_a_lora_that_comes_last(family, generator, seed):
    """Added with the edits lifted, it reaches the wrapped layers, too, and answers as one that came first."""
    torch.manual_seed(seed)
    base = family.build()
    inject_adapter_in_model(DualEditConfig(**DUAL), base, "facts")
    inject_adapter_in_model(BalancEditConfig(**BALANCE), base, "more")
    config = LoraConfig(r=2, target_modules=r".*language_model.*\.(q|up)_proj", init_lora_weights=False)
    with lifted(base):
        inject_adapter_in_model(config, base, "style")
    linears = [n for n, m in base.named_modules() if isinstance(m, LoraLayer)]
    assert len(linears) == 8
    assert sorted(base.peft_config) == ["facts", "more", "style"]
    first = get_peft_model(family.build(), config, adapter_name="style").eval()
    lora = [m for m in first.modules() if isinstance(m, LoraLayer)]
    with torch.no_grad():
        for ours, theirs in zip((base.get_submodule(n) for n in linears), lora, strict=True):
            for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
                b.copy_(a)
    inputs = family.questions(2, generator)
    assert torch.equal(logits_of(base, inputs), logits_of(first, inputs))
    strengthen(base)
    store_in(base, ["facts"], row_of(inputs, 0), generator)
    changed = logits_of(base, inputs)
    assert torch.equal(changed[1], logits_of(first, inputs)[1])
    assert not torch.equal(changed[0], logits_of(first, inputs)[0])


def test_lifting_the_edits_of_their_own_model_is_refused(family):
    model = inject_dualedit(family.build(), **DUAL)
    with pytest.raises(ValueError, match="PeftModel of DUALEDIT edits: pass its base model"):
        with lifted(model):
            raise AssertionError("the block ran")


def test_edits_are_saved_without_the_lora(three, family, tmp_path):
    """And go on a model that has it already, or on one that has not."""
    model, inputs = three
    expected = answers(model, inputs)
    save_edits(model, tmp_path / "edits")
    assert sorted(p.parent.name for p in tmp_path.rglob("adapter_config.json")) == ["facts", "more"]
    alone = load_edits(family.build(), tmp_path / "edits" / "facts")
    assert torch.equal(logits_of(alone, inputs), expected["style", "more"])
    load_edits(alone, tmp_path / "edits" / "more", adapter_name="more")
    assert torch.equal(logits_of(alone, inputs), expected["style",])
    with pytest.raises(ValueError, match="already: pass the base model"):
        load_edits(alone, tmp_path / "edits" / "more", adapter_name="more")
    with pytest.raises(ValueError, match="no edit adapter"):
        save_edits(get_peft_model(family.build(), lora_config()), tmp_path / "none")


def test_a_failed_load_beside_others_leaves_them(three, tmp_path, family):
    model, inputs = three
    save_edits(model, tmp_path)
    for name in ("facts", "more"):
        remove_adapter(model, name)
    before, parts = logits_of(model, inputs), [type(m) for m in model.modules()]
    file = tmp_path / "facts" / "adapter_model.safetensors"
    (tmp_path / "manifest.json").unlink()  # as PEFT alone saves, without digests
    (tmp_path / "facts" / "adapter_config.json").write_text(
        (tmp_path / "facts" / "adapter_config.json").read_text().replace('"mid_dim": 16', '"mid_dim": 8')
    )
    with pytest.raises(ValueError, match="do not fit"):
        load_edits(model, file.parent, adapter_name="facts")
    assert list(model.peft_config) == ["style"]
    assert [type(m) for m in model.modules()] == parts and runtime_of(model.get_base_model()) is None
    assert torch.equal(logits_of(model, inputs), before)


def test_taking_off_one_by_one(three, family):
    model, inputs = three
    by = answers(model, inputs)
    remove_adapter(model, "facts")
    assert torch.equal(logits_of(model, inputs), by["facts",])
    assert [layer.layer_name.rpartition(".")[2] for layer in edit_layers(model)] == ["up_proj"]
    assert list(runtime_of(model.get_base_model()).groups) == [("balancedit_", "more")]
    remove_adapter(model, "more")
    assert torch.equal(logits_of(model, inputs), by["facts", "more"])
    assert not edit_layers(model) and runtime_of(model.get_base_model()) is None
    merged = model.merge_and_unload()
    assert torch.allclose(logits_of(merged, inputs), by["facts", "more"], rtol=1e-4, atol=1e-4)


def test_taking_off_the_one_that_the_model_was_made_with(family, generator, seed):
    torch.manual_seed(seed)
    model = inject_dualedit(family.build(), **DUAL)
    strengthen(model)
    inject_balancedit(model, adapter_name="more", **BALANCE)
    inputs = family.questions(3, generator)
    base = logits_of(family.build(), inputs)
    store_in(model, ["more"], row_of(inputs, 0), generator)
    store_in(model, ["default"], row_of(inputs, 1), generator)
    before = logits_of(model, inputs)
    remove_adapter(model, "default")
    after = logits_of(model, inputs)
    assert torch.equal(after[[0, 2]], base[[0, 2]]) and torch.equal(after[1], before[1])
    assert [edit.id for edit in list_edits(model)] == [1]
    assert model.active_peft_config.layer == BALANCE["layer"]
    with model.disable_adapter():
        assert torch.equal(logits_of(model, inputs), base)
    assert torch.equal(logits_of(model, inputs), after)
    back = model.unload()
    assert torch.equal(logits_of(back, inputs), base) and not edit_layers(back)


def test_the_only_adapter_is_unloaded_instead(family):
    model = inject_dualedit(family.build(), **DUAL)
    with pytest.raises(ValueError, match=r"model.unload\(\) takes it off"):
        remove_adapter(model, "default")


def test_unload_takes_everything_off(family, generator, seed):
    """The edit layers' own unload: LoRA and another editor inside a wrapped layer go, too."""
    torch.manual_seed(seed)
    base = family.build()
    names, inputs = [type(m) for m in base.modules()], family.questions(2, generator)
    expected = logits_of(base, inputs)
    model = inject_dualedit(base, **DUAL)
    inject_balancedit(model, adapter_name="more", **BALANCE)
    inject_adapter_in_model(lora_config(), base, "style")
    assert not torch.equal(logits_of(model, inputs), expected)
    back = model.unload()
    assert back is base and [type(m) for m in base.modules()] == names
    assert torch.equal(logits_of(base, inputs), expected)
    assert not hasattr(base, "peft_config") and runtime_of(base) is None
    assert "generate" not in vars(base)


def test_two_of_one_method_and_one_of_another(generator, seed):
    """set_adapter chooses among the adapters of the PeftModel's own method; the other stays on."""
    torch.manual_seed(seed)
    model = inject_dualedit(LLAVA.build(), **DUAL)
    inject_dualedit(model, adapter_name="cars", **(DUAL | dict(text_layer=0)))
    inject_balancedit(model, adapter_name="more", **BALANCE)
    strengthen(model)
    inputs = LLAVA.questions(3, generator)
    base = logits_of(LLAVA.build(), inputs)
    store_in(model, ["more"], row_of(inputs, 0), generator)
    store_in(model, ["default"], row_of(inputs, 1), generator)
    model.set_adapter("cars")
    store_in(model, ["more"], row_of(inputs, 2), generator)
    changed = [not torch.equal(row, old) for row, old in zip(logits_of(model, inputs), base, strict=True)]
    assert changed == [False, True, True]
    model.set_adapter("default")
    changed = [not torch.equal(row, old) for row, old in zip(logits_of(model, inputs), base, strict=True)]
    assert changed == [True, True, False]
    model.delete_adapter("cars")
    groups = runtime_of(model.get_base_model()).groups
    assert set(groups) == {("dualedit_", "default"), ("balancedit_", "more")}


def test_one_layer_under_two_editors_trains_alone(seed):
    """Injecting beside an adapter neither freezes nor thaws it."""
    model = inject_dualedit(LLAVA.build(), **DUAL)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable
    inject_balancedit(model, adapter_name="more", **BALANCE)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trainable


@pytest.mark.parametrize("config", [DualEditConfig(**DUAL), BalancEditConfig(**BALANCE)])
def test_inject_adapter_in_model(config, generator, seed):
    torch.manual_seed(seed)
    base, plain = LLAVA.build(), LLAVA.build()
    assert inject_adapter_in_model(config, base) is base and not isinstance(base, PeftModel)
    strengthen(base)
    inputs = LLAVA.questions(3, generator)
    assert torch.equal(logits_of(base, inputs), logits_of(plain, inputs))
    store(base, row_of(inputs, 1), generator)
    ours, theirs = logits_of(base, inputs), logits_of(plain, inputs)
    assert torch.equal(ours[[0, 2]], theirs[[0, 2]]) and not torch.equal(ours[1], theirs[1])
    assert torch.equal(
        base.generate(**row_of(inputs, 0), max_new_tokens=4, do_sample=False),
        plain.generate(**row_of(inputs, 0), max_new_tokens=4, do_sample=False),
    )
    remove_adapter(base, "default")
    assert torch.equal(logits_of(base, inputs), theirs) and not edit_layers(base)
    assert not {"peft_config", "_dualedit_runtime", "generate"} & set(vars(base))
