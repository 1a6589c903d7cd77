"""Editors in several threads, where something fails, copied, compiled and beside other adapters."""

import copy
import io
import threading

import pytest
import torch
from dualedit import add_edit, remove_edit
from dualedit.runtime.context import runtime_of
from dualedit.runtime.frames import FRAMES
from generating import NEW, generate
from peft import LoraConfig, inject_adapter_in_model
from tiny_models import (
    BLIP2,
    LLAVA,
    QWEN,
    WORDS,
    editor_of,
    row_of,
    store,
    tiny_llama,
)  # fmt: skip


@pytest.fixture(autouse=True)
def no_frames_left():
    yield
    assert FRAMES.get() == ()


# ---------------------------------------------------------------------- threads, errors, copies


def test_threads_on_two_models(method, generator):
    models = [editor_of(LLAVA, method), editor_of(QWEN, method)]
    inputs = [LLAVA.questions(3, generator), QWEN.questions(3, generator)]
    for model, given in zip(models, inputs, strict=True):
        store(model, row_of(given, 1), generator)
    _in_threads([(model, given) for model, given in zip(models, inputs, strict=True)] * 2)


def test_threads_on_one_model(method, generator):
    model = editor_of(LLAVA, method)
    batches = [LLAVA.questions(rows, generator) for rows in (1, 2, 3, 4)]
    for batch in batches:
        store(model, row_of(batch, 0), generator)
    _in_threads([(model, batch) for batch in batches])


def _in_threads(work):
    expected = [generate(model, inputs) for model, inputs in work]
    found = [[] for _ in work]
    barrier = threading.Barrier(len(work))

    def run(place, model, inputs):
        torch.set_num_threads(1)
        barrier.wait()
        for _ in range(3):
            found[place].append(generate(model, inputs))
        found[place].append(FRAMES.get())

    threads = [threading.Thread(target=run, args=(i, *job)) for i, job in enumerate(work)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for tokens, wanted in zip(found, expected, strict=True):
        assert len(tokens) == 4 and tokens.pop() == ()
        assert all(torch.equal(each, wanted) for each in tokens)


@pytest.mark.parametrize("where", ["decoder", "before the decoder", "own pre-hook"])
@pytest.mark.parametrize("call", ["forward", "generate"])
@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_errors_leave_nothing_behind(where, call, kind, generator):
    model = editor_of(LLAVA, "dualedit")
    inputs = LLAVA.question(generator)
    store(model, inputs, generator)
    expected = generate(model, inputs)
    base = model.get_base_model()
    place = {
        "decoder": base.get_submodule(LLAVA.layers)[3],
        "before the decoder": base.model.vision_tower,
        "own pre-hook": base.model.language_model,
    }[where]

    def fail(*args):
        raise kind("stop")

    handle = place.register_forward_pre_hook(fail)
    with pytest.raises(kind, match="stop"), torch.no_grad():
        model(**inputs) if call == "forward" else generate(model, inputs)
    handle.remove()
    if kind is RuntimeError or call == "generate":
        assert FRAMES.get() == ()
    assert torch.equal(generate(model, inputs), expected)
    with torch.no_grad():
        model(**inputs)
    assert FRAMES.get() == ()  # what an interrupted call left is gone with the next one


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_are_independent(family, method, way, generator):
    if way == "pickle" and family is LLAVA:
        pytest.skip("transformers' own hooks on CLIP cannot be pickled")
    model = editor_of(family, method)
    inputs = family.questions(3, generator)
    edit = store(model, row_of(inputs, 0), generator)
    expected = generate(model, inputs)
    if way == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    assert torch.equal(generate(twin, inputs), expected)
    assert runtime_of(twin.get_base_model()) is not runtime_of(model.get_base_model())

    other = store(twin, row_of(inputs, 1), generator)
    assert torch.equal(generate(model, inputs), expected)
    assert not torch.equal(generate(twin, inputs)[1], expected[1])
    remove_edit(model, edit.id)
    assert torch.equal(generate(twin, inputs)[0], expected[0])
    remove_edit(twin, other.id)
    assert torch.equal(generate(twin, inputs), expected)
    base = twin.unload()
    with torch.no_grad():
        assert torch.equal(base(**inputs).logits, family.build()(**inputs).logits)
        model.unload()
        assert not any(module._forward_pre_hooks for module in model.get_base_model().modules())


def test_text_only_model(generator):
    base, model = tiny_llama().requires_grad_(False), tiny_llama()
    model = editor_of(LLAVA, "dualedit", model, vis_layer=None)
    words = torch.randint(3, WORDS, (2, 7), generator=generator)
    words[1, -1] = (words[0, -1] + 1 - 3) % (WORDS - 3) + 3
    inputs = {"input_ids": words, "attention_mask": torch.ones_like(words)}
    add_edit(model, {name: value[:1] for name, value in inputs.items()}, torch.tensor([5]))
    with torch.no_grad():
        ours, theirs = model(**inputs).logits, base(**inputs).logits
        assert torch.equal(ours[1], theirs[1]) and not torch.equal(ours[0], theirs[0])
        embedded = model(
            inputs_embeds=base.get_input_embeddings()(words)
        ).logits  # no image: positions are known
    assert torch.equal(embedded, ours)


def test_blip2_generates_with_positional_pixels(generator):
    """BLIP-2's generate takes pixel_values first and never calls the model's forward."""
    model = editor_of(BLIP2, "dualedit")
    inputs = BLIP2.question(generator)
    store(model, inputs, generator)
    base = model.get_base_model()
    by_position = base.generate(
        inputs["pixel_values"], inputs["input_ids"], max_new_tokens=NEW, do_sample=False
    )
    by_name = base.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(by_position, by_name)
    with model.disable_adapter():
        assert not torch.equal(base.generate(**inputs, max_new_tokens=NEW, do_sample=False), by_name)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_torch_compile(method, generator):
    """A compiled model routes and edits as the model itself does, and leaves nothing behind."""
    model = editor_of(LLAVA, method)
    inputs = LLAVA.questions(3, generator)
    store(model, row_of(inputs, 1), generator)
    base = model.get_base_model()
    try:
        with torch.no_grad():
            assert torch.equal(torch.compile(base, backend="eager")(**inputs).logits, base(**inputs).logits)
    finally:
        torch.compiler.reset()


def test_lora_beside_an_editor(generator):
    """LoRA injected into the same model: the promise of the editor holds on top of it."""
    model = editor_of(LLAVA, "balancedit")
    inputs = LLAVA.questions(3, generator)
    inject_adapter_in_model(
        LoraConfig(target_modules=["q_proj"], init_lora_weights=False), model.get_base_model(), "lora"
    )
    with torch.no_grad():
        before = model(**inputs).logits
        store(model, row_of(inputs, 2), generator)
        after = model(**inputs).logits
    assert torch.equal(after[:2], before[:2]) and not torch.equal(after[2], before[2])
