"""Where and in what precision a model runs: half precision, quantised or offloaded weights, checkpointing."""

import importlib.util

import pytest
import torch
from dualedit import add_edit, inject_balancedit, inject_dualedit, list_edits
from generation_answers import first_logits, generate
from tiny_models import (
    IMAGE,
    LLAVA,
    WORDS,
    _spread,
    edit_layers,
    editor_of,
    row_of,
    store,
    strengthen,
)
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, LlavaForConditionalGeneration

SIZES = dict(text_layer=1, vis_layer=2, mid_dim=16, num_heads=2, threshold=0.999, init_weights=False)


def editor_on(model, method, **more):
    """An editor on any model of LLAVA's shape, loud enough to be seen."""
    if method == "dualedit":
        return strengthen(inject_dualedit(model, **SIZES | more))
    settings = dict(layer=LLAVA.linear, alpha=0.9, max_steps=3, learning_rate=0.3)
    return inject_balancedit(model, **settings | more)


def question_in(dtype, generator, rows=3):
    inputs = LLAVA.questions(rows, generator)
    return {**inputs, "pixel_values": inputs["pixel_values"].to(dtype)}


def assert_edited_row(model, base, inputs, generator, hit=1):
    """One stored edit: its row changes clearly, the others not in a bit, all ways to read it agree."""
    with torch.no_grad():
        before = base(**inputs).logits
        assert torch.equal(model(**inputs).logits, before)
        store(model, row_of(inputs, hit), generator)
        after = model(**inputs).logits
    others = [row for row in range(len(before)) if row != hit]
    assert torch.equal(after[others], before[others])
    assert not torch.isclose(after[hit, -1], before[hit, -1], atol=1e-2).all()
    ours, theirs = first_logits(model, inputs), first_logits(base, inputs)
    assert torch.equal(ours[others], theirs[others])
    moved = (after[hit, -1] - before[hit, -1]).abs().max()
    assert (ours[hit] - after[hit, -1]).abs().max() < 0.5 * moved  # half precision rounds them differently
    assert torch.equal(generate(model, inputs)[others], generate(base, inputs)[others])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_precision(method, dtype, generator):
    base, model = LLAVA.build(dtype=dtype), editor_of(LLAVA, method, LLAVA.build(dtype=dtype))
    assert_edited_row(model, base, question_in(dtype, generator), generator)
    for memory in edit_layers(model)[0].groups["default"].memories.values():
        keys = [table for name, table in memory.snapshot().tables.items() if name[:2] in ("k_", "v_")]
        assert all(table.dtype == dtype for table in keys)


# ---------------------------------------------------------------------- offloaded


def offloaded(folder, places):
    accelerate = pytest.importorskip("accelerate")
    model = LLAVA.build()
    device_map = {"model.vision_tower": "cpu", "model.multi_modal_projector": "cpu", "lm_head": "cpu"}
    device_map |= {"model.language_model.embed_tokens": places[0], "model.language_model.norm": "cpu"}
    device_map |= {"model.language_model.rotary_emb": "cpu"}
    device_map |= {f"model.language_model.layers.{i}": places[1 + i % 2] for i in range(4)}
    return accelerate.dispatch_model(model, device_map, offload_dir=str(folder))


@pytest.mark.parametrize(
    "places", [("cpu", "disk", "cpu"), ("disk", "disk", "disk")], ids=["some layers", "embeddings too"]
)
def test_offloaded_to_disk(method, places, tmp_path, generator):
    """Weights that lie on the disk between their uses: the edit's own tensors stay in memory."""
    model = editor_on(offloaded(tmp_path / "weights", places), method)
    for layer in edit_layers(model):
        own = [*layer.named_parameters(), *layer.named_buffers()]
        assert all(t.device.type == "cpu" for name, t in own if not name.startswith("base_layer"))
    inputs = LLAVA.questions(3, generator)
    assert_edited_row(model, LLAVA.build(), inputs, generator)
    whole = editor_on(LLAVA.build(), method)
    present = {name: value for name, value in model.state_dict().items() if value.device.type != "meta"}
    whole.load_state_dict(present, strict=False)
    assert torch.equal(first_logits(model, inputs), first_logits(whole, inputs))


def test_a_full_value_of_an_offloaded_layer(tmp_path, generator):
    model = editor_on(offloaded(tmp_path, ("cpu", "disk", "disk")), "balancedit", value="full")
    inputs = LLAVA.question(generator)
    with pytest.raises(ValueError, match="offloaded"):
        store(model, inputs, generator)


# ---------------------------------------------------------------------- quantised

# With a threshold for outliers, LLM.int8 looks for them over the whole batch: the unedited model itself then
# answers a row otherwise beside other rows, so only whole batches without a hit could be compared.
KINDS = {
    "4bit": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "8bit": dict(load_in_8bit=True, llm_int8_threshold=0.0),
}


def wide_llava():
    """LLaVA's language model at the least width that bitsandbytes takes on a CPU."""
    torch.manual_seed(0)
    config = LLAVA.build().config
    for name, value in {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}.items():
        setattr(config.text_config, name, value)
    model = LlavaForConditionalGeneration(config).eval()
    _spread(model)
    return model


def quantised(folder, kind):
    """The model as from_pretrained quantises it, but for the parts around its language model."""
    if not (folder / "config.json").is_file():
        wide_llava().save_pretrained(folder)
    keep = ["lm_head", "model.vision_tower", "model.multi_modal_projector"]
    config = BitsAndBytesConfig(**KINDS[kind], llm_int8_skip_modules=keep)
    return AutoModelForImageTextToText.from_pretrained(
        folder, quantization_config=config, device_map="cpu", dtype=torch.float32
    ).eval()


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("kind", KINDS)
def test_quantised_base(method, kind, tmp_path, generator):
    base = quantised(tmp_path, kind).requires_grad_(False)
    model = editor_on(quantised(tmp_path, kind), method)
    linear = base.get_submodule(LLAVA.layers)[1].mlp.up_proj
    assert type(linear).__module__.startswith("bitsandbytes")
    inputs = LLAVA.questions(3, generator)
    with torch.no_grad():
        base(**inputs)  # its first call packs 4-bit weights for a CPU
    if method == "balancedit" and not passes_gradients(linear):  # 4 bits on a CPU
        with pytest.raises(ValueError, match="No gradient comes back to .*layers.2.mlp.up_proj"):
            store(model, row_of(inputs, 0), generator)
        return
    assert_edited_row(model, base, inputs, generator)
    if method == "balancedit":
        with pytest.raises(ValueError, match="quantised"):
            full = editor_on(quantised(tmp_path, kind), method, value="full")
            store(full, LLAVA.question(generator), generator)


def passes_gradients(linear):
    x = torch.ones(1, 1, linear.in_features, requires_grad=True)
    with torch.enable_grad():
        linear(x).sum().backward()
    return x.grad is not None and bool(x.grad.any())


class Packed(torch.nn.Linear):
    """A stand-in for a quantised layer: integers for weights, and a scale; of use without bitsandbytes."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.scale = linear.weight.abs().amax().item() / 127
        packed = (linear.weight.detach() / self.scale).round().to(torch.int8).flatten()[:, None]
        self.weight = torch.nn.Parameter(packed, requires_grad=False)

    def forward(self, x):
        weight = self.weight.view(self.out_features, self.in_features).to(x.dtype) * self.scale
        return torch.nn.functional.linear(x, weight)


def pack(model):
    for layer in model.get_submodule(LLAVA.layers):
        layer.mlp.up_proj = Packed(layer.mlp.up_proj)
    return model


def test_a_base_without_floating_weights_at_the_edited_layer(method, generator):
    """What quantisation does to a layer, whoever does it: weights that are integers of another shape."""
    assert_edited_row(
        editor_on(pack(LLAVA.build()), method), pack(LLAVA.build()), LLAVA.questions(3, generator), generator
    )
    full = editor_on(pack(LLAVA.build()), "balancedit", value="full")
    with pytest.raises(ValueError, match="quantised.*low_rank"):
        store(full, LLAVA.question(generator), generator)


class Deaf(Packed):
    """A quantised layer that is made for answering only."""

    def forward(self, x):
        return super().forward(x.detach())


def test_a_value_that_cannot_be_fitted(generator):
    """Above the edited layer nothing passes a gradient: said, and nothing is stored."""
    model = LLAVA.build()
    mlp = model.get_submodule(LLAVA.layers)[2].mlp
    mlp.down_proj = Deaf(mlp.down_proj)
    edited = editor_on(model, "balancedit")
    with pytest.raises(ValueError, match="No gradient comes back"):
        store(edited, LLAVA.question(generator), generator)
    assert list_edits(edited) == []


# ---------------------------------------------------------------------- checkpointing


@pytest.mark.parametrize("reentrant", [False, True])
def test_generating_with_checkpointing_left_on(method, reentrant, generator):
    """A model left in training mode with checkpointing on answers with its edits all the same."""
    model = editor_of(LLAVA, method)
    inputs = LLAVA.question(generator)
    words = torch.randint(3, WORDS, (1, 2), generator=generator)
    store(model, inputs, generator, words[0])
    expected = generate(model, inputs)
    base = model.get_base_model()
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert torch.equal(generate(model, inputs), expected)
    base.train()
    uncached = {"use_cache": False, "suppress_tokens": [IMAGE, IMAGE + 1]}
    assert torch.equal(generate(model, inputs, **uncached), expected)
    if method == "dualedit":  # storing runs the frozen model, whatever mode it was left in
        add_edit(model, LLAVA.question(generator), words[0])
        assert base.training
    assert torch.equal(generate(model, inputs, **uncached), expected)
