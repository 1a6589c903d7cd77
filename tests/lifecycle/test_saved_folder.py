"""What lies in a saved folder, the ways PEFT loads it, and what PEFT offers that edits refuse."""

import re

import pytest
import torch
from dualedit import inject_balancedit, inject_dualedit, list_edits, load_edits, lookup, save_edits
from huggingface_hub import ModelCard
from peft import (
    AutoPeftModel,
    LoraConfig,
    PeftConfig,
    PeftMixedModel,
    PeftModel,
    convert_to_lora,
    get_peft_model,
)
from peft.utils.hotswap import hotswap_adapter
from tiny_models import LLAVA, METHODS, QWEN, edit_layers, editor_of, row_of, store, tiny_llama
from transformers import AutoModelForImageTextToText

pytestmark = pytest.mark.slow  # as a whole: together they take longer than an inner loop may


def logits_of(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


@pytest.fixture(params=METHODS)
def method(request):
    return request.param


@pytest.fixture
def edited(method, generator, seed, tmp_path):
    """A tiny LLaVA from a folder of its own, edited; its questions; the folder of the base."""
    torch.manual_seed(seed)
    folder = tmp_path / "base"
    LLAVA.build().save_pretrained(folder)
    base = AutoModelForImageTextToText.from_pretrained(folder).requires_grad_(False)
    model = editor_of(LLAVA, method, base)
    inputs = LLAVA.questions(3, generator)
    store(model, row_of(inputs, 1), generator)
    return model, inputs, folder


def snippet(folder):
    blocks = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 1
    return blocks[0]


def run_in(folder, code, monkeypatch):
    monkeypatch.chdir(folder)
    names = {}
    exec(compile(code, str(folder / "README.md"), "exec"), names)
    return names["model"]


@pytest.mark.parametrize("saver", ["save_pretrained", "save_edits", "subfolder", "twice", "transformers"])
def test_the_card_loads_the_folder(saver, edited, generator, tmp_path, monkeypatch):
    """The snippet in README.md runs as it stands, in the folder that it lies in."""
    model, inputs, base = edited
    folder = tmp_path / "edits"
    if saver == "subfolder":
        model.add_adapter("cars", type(model.peft_config["default"])(**_settings(model)))
        model.set_adapter("cars")
        store(model, row_of(inputs, 2), generator)
        model.save_pretrained(folder)
        folder = folder / "cars"
    elif saver == "transformers":
        model.get_base_model()._hf_peft_config_loaded = True
        model.get_base_model().save_pretrained(folder)
    else:
        save_edits(model, folder) if saver == "save_edits" else model.save_pretrained(folder)
    if saver == "twice":
        store(model, row_of(inputs, 2), generator)
        model.save_pretrained(folder)
    text = (folder / "README.md").read_text()
    count = 2 if saver == "twice" else 1
    assert f"with {count} stored edit{'s' if count > 1 else ''}\n" in text
    assert text.count("dualedit: begin") == 1 and "[More Information Needed]" not in text
    assert "\npip install .  " in text and "pip install dualedit-kernels" not in text
    assert ModelCard.load(folder / "README.md").data["library_name"] in ("peft", "transformers")
    loaded = run_in(folder, snippet(folder), monkeypatch)
    assert type(loaded.get_base_model()).__name__ == "LlavaForConditionalGeneration"
    assert torch.equal(logits_of(loaded.requires_grad_(False), inputs), logits_of(model, inputs))
    assert len(list_edits(loaded)) == count


def _settings(model):
    config = model.peft_config["default"]
    names = ("text_layer", "vis_layer", "mid_dim", "num_heads", "threshold", "init_weights")
    if not hasattr(config, "text_layer"):
        names = ("layer", "alpha", "max_steps", "learning_rate", "rank")
    return {name: getattr(config, name) for name in names}


def test_the_card_keeps_what_others_wrote(edited, tmp_path):
    model, *_ = edited
    folder = tmp_path / "edits"
    folder.mkdir()
    mine = "---\nlicense: mit\n---\n# Cars of our shop\n\nAsk Maria before changing anything.\n"
    (folder / "README.md").write_text(mine)
    for _ in range(2):
        model.save_pretrained(folder)
    card = ModelCard.load(folder / "README.md")
    assert card.data["license"] == "mit" and card.data["library_name"] == "peft"
    assert card.text.count("Ask Maria") == 1 and card.text.count("dualedit: begin") == 1
    assert "from_pretrained(base" in snippet(folder)


def test_a_base_without_a_name(method, generator, tmp_path):
    """Nothing is made up: the card says what is known of the base model."""
    model = editor_of(LLAVA, method)
    model.save_pretrained(tmp_path)
    code = snippet(tmp_path)
    assert "base = ...  # the LlavaForConditionalGeneration" in code and "hidden_size 32" in code
    compile(code, "README.md", "exec")


def test_a_folder_of_safetensors_only(edited, tmp_path):
    model, inputs, base = edited
    model.save_pretrained(tmp_path / "edits")
    names = {path.name for path in (tmp_path / "edits").iterdir()}
    assert names == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    model.save_pretrained(tmp_path / "pickle", safe_serialization=False)
    with pytest.raises(ValueError, match="holds no adapter_model.safetensors"):
        load_edits(AutoModelForImageTextToText.from_pretrained(base), tmp_path / "pickle")


def test_auto_peft_model(edited, tmp_path):
    """The config names the base model and its class, so PEFT finds both by itself."""
    model, inputs, _ = edited
    model.save_pretrained(tmp_path / "edits")
    loaded = AutoPeftModel.from_pretrained(tmp_path / "edits")
    assert isinstance(loaded, PeftModel)
    assert type(loaded.get_base_model()).__name__ == "LlavaForConditionalGeneration"
    assert not any(p.requires_grad for p in loaded.parameters())
    assert torch.equal(logits_of(loaded, inputs), logits_of(model, inputs))
    half = AutoPeftModel.from_pretrained(tmp_path / "edits", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and list_edits(half)[0].id == 1
    assert isinstance(PeftConfig.from_pretrained(tmp_path / "edits"), type(model.peft_config["default"]))


@pytest.mark.parametrize("family", [LLAVA, QWEN], ids=lambda family: family.name)
@pytest.mark.parametrize("low", [False, True], ids=["", "low_cpu_mem_usage"])
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_every_way_of_from_pretrained(family, low, trainable, dtype, method, generator, tmp_path):
    """Together with each other, under another name, and then saved and loaded again."""
    more = dict(threshold=0.99) if method == "dualedit" else {}
    model = editor_of(family, method, family.build(dtype=dtype), **more)
    inputs = family.questions(3, generator)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    store(model, row_of(inputs, 1), generator)
    expected = logits_of(model, inputs)
    assert not torch.equal(expected[1], logits_of(family.build(dtype=dtype), inputs)[1])
    model.save_pretrained(tmp_path / "first")
    loaded = PeftModel.from_pretrained(
        family.build(dtype=dtype), tmp_path / "first", "cars", is_trainable=trainable, low_cpu_mem_usage=low
    ).eval()
    assert torch.equal(logits_of(loaded, inputs), expected)
    parts = [p for name, p in loaded.named_parameters() if "dualedit_adapter" in name]
    assert {p.requires_grad for p in parts} == ({trainable} if parts else set())
    assert not any(b.is_meta for b in loaded.buffers()) and not any(p.is_meta for p in loaded.parameters())
    loaded.save_pretrained(tmp_path / "second")
    again = PeftModel.from_pretrained(family.build(dtype=dtype), tmp_path / "second" / "cars")
    assert torch.equal(logits_of(again, inputs), expected)
    assert lookup(again, row_of(inputs, 1)).edit_id == 1


# ---------------------------------------------------------------------- refused, with the reason


def test_merging_is_refused_for_both_names(method):
    model = editor_of(LLAVA, method)
    parts = [type(m) for m in model.modules()]
    for merge in (model.merge_and_unload, model.merge_adapter, lambda: edit_layers(model)[0].merge()):
        with pytest.raises(ValueError, match="cannot be merged into the base weights: they apply only to"):
            merge()
    assert [type(m) for m in model.modules()] == parts


def test_mixed_models_are_refused(method, generator):
    """PEFT lists what PeftMixedModel takes; side by side goes without it."""
    config = editor_of(LLAVA, method).peft_config["default"]
    with pytest.raises(ValueError, match=f"'{method.upper()}' is not compatible with the `PeftMixedModel`"):
        get_peft_model(LLAVA.build(), config, mixed=True)
    mixed = get_peft_model(LLAVA.build(), LoraConfig(target_modules=["q_proj"]), mixed=True)
    assert isinstance(mixed, PeftMixedModel)
    with pytest.raises(ValueError, match=f"'{method.upper()}' is not compatible with the `PeftMixedModel`"):
        mixed.add_adapter("facts", config)


def test_injecting_into_a_mixed_model_is_refused():
    mixed = get_peft_model(LLAVA.build(), LoraConfig(target_modules=["q_proj"]), mixed=True)
    with pytest.raises(ValueError, match="PeftMixedModel: edits cannot be mixed into it"):
        inject_dualedit(mixed, text_layer=1, vis_layer=2, mid_dim=16, num_heads=2)
    with pytest.raises(ValueError, match="PeftMixedModel: edits cannot be mixed into it"):
        inject_balancedit(mixed, layer=LLAVA.linear)


def test_hotswap_is_refused(edited, tmp_path):
    model, inputs, _ = edited
    expected = logits_of(model, inputs)
    model.save_pretrained(tmp_path / "edits")
    kind = model.peft_type.value
    with pytest.raises(ValueError, match=f"Hotswapping only supports .*{kind} was passed"):
        hotswap_adapter(model, tmp_path / "edits", "default")
    base = model.get_base_model()
    base._hf_peft_config_loaded = True
    with pytest.raises(ValueError, match="Hotswapping is currently only supported for LoRA"):
        base.load_adapter(tmp_path / "edits", adapter_name="default", hotswap=True)
    assert torch.equal(logits_of(model, inputs), expected)


def test_conversion_to_lora_is_refused(edited):
    model, *_ = edited
    assert not model.supports_lora_conversion()
    with pytest.raises(TypeError, match="do not support LoRA conversion: .*EditLayer"):
        convert_to_lora(model, rank=2)


def test_pefts_own_add_adapter_says_no(method):
    """Another method's adapter goes through inject_... or load_edits, which put it beside."""
    model = editor_of(LLAVA, method)
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        model.add_adapter("style", LoraConfig(target_modules=["q_proj"]))


def test_a_text_only_model(generator, tmp_path, monkeypatch):
    """Its class is an AutoModelForCausalLM's, and the card says so."""
    tiny_llama().save_pretrained(tmp_path / "base")
    base = type(tiny_llama()).from_pretrained(tmp_path / "base")
    inject_dualedit(base, text_layer=1, vis_layer=None, mid_dim=16, num_heads=2).save_pretrained(
        tmp_path / "edits"
    )
    loaded = run_in(tmp_path / "edits", snippet(tmp_path / "edits"), monkeypatch)
    ids = torch.tensor([[1, 5, 6]])
    assert torch.equal(logits_of(loaded, {"input_ids": ids}), logits_of(tiny_llama(), {"input_ids": ids}))
