"""Wrong input: an error that names argument, value and remedy, and a model that is as it was."""

import pytest
import torch
from dualedit import (
    BalancEditConfig,
    DualEditConfig,
    Editor,
    add_edit,
    inject_balancedit,
    inject_dualedit,
    list_edits,
    remove_edit,
)  # fmt: skip
from dualedit.models.architectures import find_decoder_layers, image_token_ids
from dualedit.models.targets import append_target
from dualedit.runtime.context import runtime_of
from tiny_models import (
    BLIP2,
    FAMILIES,
    IMAGE,
    LLAVA,
    METHODS,
    QWEN,
    edit_layers,
    editor_of,
    random_image,
    store,
    tiny_llama,
    tiny_mllama,
    tiny_processor,
    tiny_t5,
)  # fmt: skip


@pytest.fixture(params=METHODS)
def method(request):
    return request.param


def state_of(model):
    """Everything that a refused call must leave alone."""
    modules = {name: (type(m), set(vars(m)), m.training) for name, m in model.named_modules()}
    hooks = {name: len(m._forward_pre_hooks) + len(m._forward_hooks) for name, m in model.named_modules()}
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    return modules, hooks, flags, tensors


def assert_same(one, other):
    assert one[:3] == other[:3]
    assert set(one[3]) == set(other[3])
    for name, value in one[3].items():  # a NaN radius is the threshold's, and equal to itself here
        assert torch.allclose(value, other[3][name], rtol=0, atol=0, equal_nan=True), name


def refused(model, call, *words, kind=ValueError):
    """Assert that a call fails with all these words in its message, and changes nothing."""
    before = state_of(model)
    with pytest.raises(kind) as caught:
        call()
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"
    assert_same(state_of(model), before)


# ---------------------------------------------------------------------- injection


@pytest.mark.parametrize("argument", ["text_layer", "vis_layer"])
@pytest.mark.parametrize("layer", [4, -5, 99])
def test_a_layer_number_that_does_not_exist(argument, layer):
    model = LLAVA.build().requires_grad_(True)
    layers = {"text_layer": 1, "vis_layer": 2} | {argument: layer}
    refused(model, lambda: inject_dualedit(model, **layers), f"{argument}={layer}", "4 layers", "from 0 to 3")


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_layer_name_that_does_not_exist(family):
    model = family.build()
    name = f"{family.layers}.7".replace("layers", "layer")
    refused(
        model, lambda: inject_dualedit(model, text_layer=name, vis_layer=2),
        f"text_layer={name!r}", "no such module", f"{family.layers}.0 to {family.layers}.3",
    )  # fmt: skip
    vision = next(
        n for n, _ in model.named_modules() if "vision" in n and n.endswith("layers.0") or "blocks.0" in n
    )
    refused(
        model,
        lambda: inject_dualedit(model, text_layer=vision, vis_layer=2),
        "no such module",
        "Valid layers",
    )


@pytest.mark.parametrize(
    "layer", ["layers.2.mlp.up_project", "layers.9.mlp.up_proj", "up_proj", "mlp", "vision_tower"]
)
def test_a_linear_layer_that_does_not_exist(layer):
    model = LLAVA.build()
    words = (
        ["is ambiguous", "Pass one full name"] if layer == "up_proj" else ["no such module", "up_proj"][:1]
    )
    refused(model, lambda: inject_balancedit(model, layer=layer), f"layer={layer!r}", *words)
    if layer == "layers.2.mlp.up_project":
        refused(
            model,
            lambda: inject_balancedit(model, layer=layer),
            "Nearest: model.language_model.layers.2.mlp.up_proj",
        )


def test_models_without_image_positions():
    llama, mllama = tiny_llama(), tiny_mllama()
    refused(
        llama,
        lambda: inject_dualedit(llama, text_layer=1, vis_layer=2),
        "vis_layer=2",
        "text-only model",
        "vis_layer=None",
    )
    refused(
        mllama,
        lambda: inject_dualedit(mllama, text_layer=2, vis_layer=2),
        "vis_layer=2",
        "cross-attention",
        "vis_layer=None",
    )
    assert inject_dualedit(llama, text_layer=1, vis_layer=None, mid_dim=16) and inject_dualedit(
        mllama, text_layer=2, vis_layer=None, mid_dim=16
    )


def test_layers_that_questions_without_a_picture_skip():
    model = tiny_mllama()
    refused(
        model,
        lambda: inject_dualedit(model, text_layer=1, vis_layer=None),
        "text_layer=1",
        "cross-attention layer",
        "[1]",
    )
    linear = "layers.1.mlp.up_proj"
    refused(
        model, lambda: inject_balancedit(model, layer=linear), f"layer={linear!r}", "cross-attention layer"
    )


def test_models_that_an_editor_cannot_serve():
    for kind, words in (("blip", "cross-attention"), ("git", "no id marks them"), ("pi0", "actions")):
        model = tiny_llama()
        model.config.model_type = kind
        refused(
            model,
            lambda model=model: inject_dualedit(model, text_layer=1, vis_layer=None),
            "cannot be edited",
            words,
        )
        refused(model, lambda model=model: inject_balancedit(model, layer="layers.1.mlp.up_proj"), words)


def test_several_states_for_every_token():
    model = tiny_llama()
    model.config.hc_mult = 4
    refused(
        model,
        lambda: inject_dualedit(model, text_layer=1, vis_layer=None),
        "carries 4 states",
        "inject_balancedit",
    )


def test_a_model_without_an_image_token():
    model = BLIP2.build()
    model.config.image_token_index = None
    refused(
        model,
        lambda: inject_dualedit(model, text_layer=1, vis_layer=2),
        "vis_layer=2",
        "image_token_ids=[...]",
        "vis_layer=None",
    )
    assert inject_dualedit(model, text_layer=1, vis_layer=2, mid_dim=16, image_token_ids=[IMAGE])


def test_an_encoder_decoder():
    model = tiny_t5()
    refused(
        model, lambda: inject_dualedit(model, text_layer=0, vis_layer=None), "encoder-decoder", "decoder-only"
    )
    refused(model, lambda: inject_balancedit(model, layer="wo"), "encoder-decoder", "decoder-only")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        (dict(num_heads=3), ["num_heads=3", "divisor of mid_dim=1024"]),
        (dict(num_heads=0), ["num_heads=0"]),
        (dict(mid_dim=0), ["mid_dim=0", "positive"]),
        (dict(threshold=1.5), ["threshold=1.5", "[-1, 1]"]),
        (dict(threshold=float("nan")), ["threshold=nan"]),
        (dict(gate="open"), ["gate='open'", "'prompt', 'published'"]),
        (dict(text_layer=None, vis_layer=None), ["text_layer, vis_layer", "at least one layer"]),
        (dict(text_layer=True), ["text_layer=True", "layer number"]),
        (dict(vis_layer=1.5), ["vis_layer=1.5", "layer number"]),
    ],
)
def test_bad_dualedit_settings(setting, words):
    model = LLAVA.build()
    refused(model, lambda: inject_dualedit(model, **({"text_layer": 1, "vis_layer": 2} | setting)), *words)
    with pytest.raises(ValueError):
        DualEditConfig(**setting)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        (dict(layer=None), ["layer=None", "name the linear layer"]),
        (dict(layer=""), ["layer=''"]),
        (dict(alpha=1.2), ["alpha=1.2", "[0, 1]"]),
        (dict(metric="dot"), ["metric='dot'", "'l2', 'cosine'"]),
        (dict(key="first"), ["key='first'", "'mean', 'last'"]),
        (dict(value="sparse"), ["value='sparse'", "'low_rank', 'full'"]),
        (dict(rank=0), ["rank=0"]),
        (dict(max_steps=0), ["max_steps=0"]),
        (dict(stop_probability=1.0), ["stop_probability=1.0", "(0, 1)"]),
        (dict(learning_rate=0.0), ["learning_rate=0.0", "positive"]),
    ],
)
def test_bad_balancedit_settings(setting, words):
    model = LLAVA.build()
    refused(model, lambda: inject_balancedit(model, **({"layer": LLAVA.linear} | setting)), *words)
    with pytest.raises(ValueError):
        BalancEditConfig(**({"layer": LLAVA.linear} | setting))


def test_several_possible_stacks_are_listed():
    model = tiny_llama()
    model.model.other = torch.nn.ModuleList([torch.nn.Sequential(torch.nn.Linear(2, 2)) for _ in range(4)])
    with pytest.raises(ValueError, match=r"model.layers \(4 layers\), model.other \(4 layers\)"):
        find_decoder_layers(model)


# ---------------------------------------------------------------------- editing


def test_an_edit_without_its_image(method, generator):
    model = editor_of(LLAVA, method)
    editor = Editor(model, tiny_processor())
    refused(model, lambda: editor.edit(None, "what is this ?", "cat"), "image=None", "Pass the image")
    if method == "dualedit":
        words = torch.tensor([[1, 5, 6]])
        refused(model, lambda: add_edit(model, {"input_ids": words}, torch.tensor([5])), "image is missing")
    assert list_edits(model) == []


@pytest.mark.parametrize(
    ("prompt", "target", "words"),
    [
        ("", "cat", ["prompt=''", "pass a question"]),
        ("  ", "cat", ["prompt='  '"]),
        (None, "cat", ["prompt=None"]),
        ("what is this ?", "", ["target=''", "Pass the new answer"]),
        ("what is this ?", " \n", [r"target=' \n'"]),
        ("what is this ?", None, ["target=None"]),
    ],
)
def test_empty_text(method, prompt, target, words, generator):
    model = editor_of(LLAVA, method)
    editor = Editor(model, tiny_processor())
    refused(model, lambda: editor.edit(random_image(generator), prompt, target), *words)


@pytest.mark.parametrize("call", ["edit", "edit_many", "answer", "explain"])
def test_an_image_that_is_an_address(method, call, generator):
    model = editor_of(LLAVA, method)
    editor = Editor(model, tiny_processor())
    address = "http://127.0.0.1:9/computer.jpg"  # nobody listens there
    calls = {
        "edit": lambda: editor.edit(address, "what is this ?", "cat"),
        "edit_many": lambda: editor.edit_many([(address, "what is this ?", "cat")], progress=False),
        "answer": lambda: editor.answer(address, "what is this ?"),
        "explain": lambda: editor.explain(address, "what is this ?"),
    }
    refused(model, calls[call], repr(address), "cannot be downloaded", "Connection refused")


def test_an_image_that_no_file_system_takes_for_a_name(method):
    model = editor_of(LLAVA, method)
    editor = Editor(model, tiny_processor())
    coded = "iVBORw0KGgo" * 2000
    refused(model, lambda: editor.edit(coded, "what is this ?", "cat"), "image='iVBORw0KGgo", "no such file")


def test_image_and_question_that_have_changed_places(method, generator, tmp_path):
    model = editor_of(LLAVA, method)
    editor = Editor(model, tiny_processor())
    image, file = random_image(generator), tmp_path / "photo.png"
    image.save(file)
    words = ["is a picture, where the question belongs", "pass the image first, then the prompt"]
    for picture in (image, file, str(file)):
        refused(model, lambda p=picture: editor.edit("what is this ?", p, "cat"), "prompt=", *words)
        refused(model, lambda p=picture: editor.answer("what is this ?", p), "prompt=", *words)
    refused(model, lambda: editor.answer_many(["what is this ?"]), "questions[0] is a str", "pairs")


def test_an_editor_with_a_tokenizer_in_place_of_the_processor(method, generator):
    model = editor_of(LLAVA, method)
    editor = Editor(model, tiny_processor().tokenizer)
    image = random_image(generator)
    words = ["a tokenizer, which drops pictures", "pass the model's processor"]
    refused(model, lambda: editor.edit(image, "what is this ?", "cat"), *words)
    refused(model, lambda: editor.answer(image, "what is this ?"), *words)
    assert isinstance(editor.answer(None, "what is this ?", 2), str)


@pytest.mark.parametrize(
    ("samples", "words"),
    [
        (dict(rephrases="founder ?"), ["rephrases='founder ?' is one sample", "rephrases=[...]"]),
        (dict(negatives="cat.png"), ["negatives='cat.png' is one sample", "negatives=[...]"]),
        (dict(rephrases=[3]), ["rephrases[0]=3", "a text or an (image, question) pair"]),
        (dict(negatives=["a.png", ("b.png", "what ?", "c")]), ["negatives[1]=", "(image, question) pair"]),
    ],
)
def test_one_sample_where_a_list_belongs(samples, words, method, generator):
    model = editor_of(LLAVA, method)
    editor = Editor(model, tiny_processor())
    refused(model, lambda: editor.edit(random_image(generator), "what is this ?", "cat", **samples), *words)


@pytest.mark.parametrize(
    ("requests", "words"),
    [
        ({"image": None, "prompt": "what ?", "target": "cat"}, ["requests is one dict", "a list"]),
        ("what ?", ["requests is one str"]),
        (["what ?"], ["requests[0]: the request is a str", "(image, prompt, target)"]),
        ([("what ?", "cat")], ["requests[0]: the request is a tuple"]),
        ([{"image": None, "prompt": "what ?"}], ["requests[0]", "target is missing"]),
        ([{"image": None, "prompt": "?", "target": "cat", "answer": "x"}], ["answer is not known"]),
    ],
)
def test_requests_of_another_shape(requests, words, method):
    model = editor_of(LLAVA, method)
    editor = Editor(model, tiny_processor())
    refused(model, lambda: editor.edit_many(requests, progress=False), *words)


@pytest.mark.parametrize("bad", ["rows", "no ids", "target"])
def test_bad_tensors(method, bad, generator):
    model = editor_of(LLAVA, method)
    inputs, target = LLAVA.questions(2 if bad == "rows" else 1, generator), torch.tensor([5])
    if bad == "no ids":
        inputs.pop("input_ids")
    if bad == "target":
        target = torch.tensor([], dtype=torch.int64)
    with pytest.raises(ValueError, match="target_ids is empty" if bad == "target" else "pass one prompt"):
        append_target(inputs, target)
    samples = (
        {}
        if method == "dualedit"
        else {"positives": [LLAVA.question(generator)], "negatives": [LLAVA.question(generator)]}
    )
    refused(model, lambda: add_edit(model, inputs, target, **samples))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_an_edit_that_overflows(family, method, generator):
    """NaN anywhere in what would be stored: nothing is stored in any layer, and the model still answers."""
    model = editor_of(family, method)
    kept = store(model, family.question(generator), generator)
    bad = family.question(generator)
    samples = (
        {}
        if method == "dualedit"
        else {"positives": [family.question(generator)], "negatives": [family.question(generator)]}
    )
    layer = model.get_base_model().get_submodule(family.layers)[0]
    handle = layer.register_forward_hook(lambda m, a, out: out * float("nan"))
    refused(model, lambda: add_edit(model, bad, torch.tensor([5]), **samples), "finite")
    handle.remove()
    assert [edit.id for edit in list_edits(model)] == [kept.id]
    memories = [m for layer in edit_layers(model) for m in runtime_of(model.get_base_model()).groups.values()]
    assert all(len(memory) == 1 for group in memories for memory in group.memories.values())


def test_overflow_in_the_later_layer_only(generator):
    """The text layer's rows are fine, the vision layer's are not: neither is stored."""
    model = editor_of(LLAVA, "dualedit")
    layer = edit_layers(model)[1].base_layer
    handle = layer.register_forward_hook(lambda m, a, out: out * float("inf"))
    inputs = LLAVA.question(generator)
    refused(model, lambda: add_edit(model, inputs, torch.tensor([5])), "NaN or infinite", "bfloat16")
    handle.remove()
    assert [len(layer.dualedit_memory["default"]) for layer in edit_layers(model)] == [0, 0]


def test_an_unknown_edit(method, generator):
    model = editor_of(LLAVA, method)
    refused(model, lambda: remove_edit(model, 3), "edit_id=3", "Stored: none", kind=KeyError)
    ids = [store(model, LLAVA.question(generator), generator).id for _ in range(2)]
    editor = Editor(model, tiny_processor())
    for remove in (lambda i: remove_edit(model, i), editor.remove):
        refused(
            model,
            lambda remove=remove: remove(99),
            "edit_id=99",
            f"Stored: {ids[0]}, {ids[1]}",
            kind=KeyError,
        )


def test_no_adapter_or_several():
    model = LLAVA.build()
    refused(
        model, lambda: add_edit(model, {}, torch.tensor([5])), "no active edit adapter", "inject_dualedit"
    )
    edited = editor_of(LLAVA, "dualedit", model)
    edited.add_adapter("b", DualEditConfig(text_layer=1, vis_layer=2, mid_dim=16, num_heads=2))
    edited.base_model.set_adapter(["default", "b"])
    refused(edited, lambda: list_edits(edited), "b, default", "set_adapter")


def test_full_values_of_a_quantised_layer(generator):
    model = editor_of(LLAVA, "balancedit", value="full")
    layer = edit_layers(model)[0]
    layer.base_layer.weight = torch.nn.Parameter(layer.base_layer.weight.to(torch.int8), requires_grad=False)
    layer.base_layer.forward = lambda x: torch.nn.functional.linear(x, layer.base_layer.weight.to(x.dtype))
    question = LLAVA.question(generator)
    call = lambda: store(model, question, generator)  # noqa: E731
    refused(model, call, "value='full'", "quantised (torch.int8)", "value='low_rank'")


# ---------------------------------------------------------------------- generating


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@pytest.mark.parametrize("where", ["argument", "config", "model"])
def test_chunked_prefill(family, where, generator):
    model = editor_of(family, "dualedit")
    inputs = family.question(generator)
    base = model.get_base_model()
    config = type(base.generation_config).from_dict(
        base.generation_config.to_dict() | {"prefill_chunk_size": 4}
    )
    more = {"argument": {"prefill_chunk_size": 4}, "config": {"generation_config": config}, "model": {}}[
        where
    ]
    before = base.generation_config
    if where == "model":
        base.generation_config = config
    refused(
        model,
        lambda: model.generate(**inputs, **more),
        "prefill_chunk_size=4",
        "Leave prefill_chunk_size out",
    )
    base.generation_config = before
    assert model.generate(**inputs, max_new_tokens=1).shape[0] == 1


def test_packed_sequences(generator):
    model = editor_of(LLAVA, "dualedit")
    inputs = LLAVA.question(generator)
    packed = {"cu_seq_lens_q": torch.tensor([0, 4, 9], dtype=torch.int32)}
    with torch.no_grad():
        model(**inputs, **packed)  # without edits there is nothing to tell apart
    store(model, inputs, generator)
    refused(model, lambda: model(**inputs, **packed), "cu_seq_lens_q", "padded batches")
    ids = inputs["input_ids"]
    again = {**inputs, "position_ids": torch.cat([torch.arange(4), torch.arange(ids.shape[1] - 4)])[None]}
    del again["attention_mask"]
    refused(model, lambda: model(**again), "position_ids", "padded batches")
    model(**again | {"position_ids": torch.arange(3, 3 + ids.shape[1])[None]})  # one sequence, begun later
    refused(model, lambda: model.generate_batch([[1, 5, 6]]), "generate_batch", "padded batches")
    base = model.unload()
    assert "generate_batch" not in vars(base)


def test_no_input_at_all():
    model = editor_of(QWEN, "dualedit").get_base_model()
    with pytest.raises(ValueError, match="input_ids and inputs_embeds"):
        model.model.language_model()


def test_image_ids_come_from_the_config():
    assert [image_token_ids(family.build()) for family in FAMILIES] == [[IMAGE], [IMAGE, IMAGE + 1], [IMAGE]]
