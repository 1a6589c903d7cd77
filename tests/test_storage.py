"""Saving and loading edits: whole or not at all, on both sides."""

import json
import os
import shutil

import pytest
import torch
from dualedit import inject_dualedit, load_edits, save_edits
from dualedit.models.architectures import fingerprint
from dualedit.runtime.context import runtime_of
from safetensors.torch import load_file, save_file
from tiny_models import LLAVA, METHODS, QWEN, editor_of, row_of, store, tiny_llama

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(params=METHODS)
def method(request):
    return request.param


def logits_of(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def state_of(model):
    """Everything of a model that a failed load must leave alone."""
    attributes = {name: set(vars(module)) - {"_dualedit_runtime"} for name, module in model.named_modules()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    hooks = {name: len(m._forward_pre_hooks) + len(m._forward_hooks) for name, m in model.named_modules()}
    kinds = {name: type(module) for name, module in model.named_modules()}
    return attributes, flags, hooks, kinds, runtime_of(model)


@pytest.fixture
def saved(method, generator, tmp_path):
    model = editor_of(LLAVA, method)
    inputs = LLAVA.questions(3, generator)
    store(model, row_of(inputs, 1), generator)
    folder = tmp_path / "edits"
    save_edits(model, folder)
    return model, inputs, folder


def test_round_trip(saved):
    model, inputs, folder = saved
    loaded = load_edits(LLAVA.build(), folder)
    assert torch.equal(logits_of(loaded, inputs), logits_of(model, inputs))
    assert not any(p.requires_grad for p in loaded.parameters())
    assert not [p for p in folder.parent.iterdir() if p != folder]  # no leavings
    assert os.stat(folder).st_mode & 0o777 == os.stat(_plain_folder(folder.parent)).st_mode & 0o777


def _plain_folder(parent):
    (parent / "plain").mkdir()
    return parent / "plain"


def test_saving_again_keeps_other_files(saved, generator):
    model, inputs, folder = saved
    (folder / "notes.txt").write_text("mine")
    store(model, row_of(inputs, 2), generator)
    save_edits(model, folder)
    assert (folder / "notes.txt").read_text() == "mine"
    assert torch.equal(logits_of(load_edits(LLAVA.build(), folder), inputs), logits_of(model, inputs))


@pytest.mark.parametrize("moves", [0, 1, 2])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failed_save_leaves_the_old_edits_or_the_new_ones(moves, error, saved, generator, monkeypatch):
    """The first move is that of the manifest: before it the folder is as it was, behind it all is saved."""
    model, inputs, folder = saved
    before, expected = contents(folder), logits_of(model, inputs)
    store(model, row_of(inputs, 2), generator)
    model.peft_config["default"].image_token_ids.append(111)  # so that the config changes too
    new = logits_of(model, inputs)
    done, replace = [], os.replace

    def fail(source, target):
        if len(done) == moves:
            raise error("no space left on device")
        done.append(target)
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", fail)
        if moves and error is OSError:  # it is saved; what is left undone, the next writer does
            save_edits(model, folder)
        else:
            with pytest.raises(error):
                save_edits(model, folder)
    assert len(done) == moves
    assert not [p for p in folder.parent.iterdir() if p != folder]
    if moves == 0:
        assert contents(folder) == before
        assert torch.equal(logits_of(load_edits(LLAVA.build(), folder), inputs), expected)
    else:
        with pytest.warns(UserWarning, match="is repaired: the files of the last save were not all in their"):
            loaded = load_edits(LLAVA.build(), folder)
        assert torch.equal(logits_of(loaded, inputs), new)
    save_edits(model, folder)
    assert torch.equal(logits_of(load_edits(LLAVA.build(), folder), inputs), new)
    assert sorted(f.name for f in folder.iterdir() if not f.name.startswith(".")) == [
        "README.md", CONFIG, WEIGHTS, f"journal-00000{3 if moves and error is not OSError else 2}.jsonl",
        "manifest.json",
    ]  # fmt: skip


def test_a_failed_write_leaves_the_old_folder(saved, monkeypatch):
    model, inputs, folder = saved
    before = contents(folder)
    model.peft_config["default"].image_token_ids.append(111)

    def fail(path, *args, **kwargs):
        (path / WEIGHTS).write_bytes(b"half a file")
        raise OSError("no space left on device")

    monkeypatch.setattr(model, "save_pretrained", fail)
    with pytest.raises(OSError, match="no space"):
        save_edits(model, folder)
    assert contents(folder) == before and list(folder.parent.iterdir()) == [folder]


def test_a_failed_first_save_leaves_no_folder(method, tmp_path, monkeypatch):
    model = editor_of(LLAVA, method)
    monkeypatch.setattr(os, "replace", lambda *args: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        save_edits(model, tmp_path / "edits")
    assert not list(tmp_path.iterdir())


def test_saving_something_else(tmp_path):
    with pytest.raises(ValueError, match="pass the PeftModel that inject_dualedit returned"):
        save_edits(LLAVA.build(), tmp_path / "edits")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="is a file: pass a folder"):
        save_edits(inject_dualedit(tiny_llama(), text_layer=1, vis_layer=None, mid_dim=16), tmp_path / "file")
    assert contents(tmp_path) == {"file": b"mine"}


def _cut(folder):
    file = folder / WEIGHTS
    file.write_bytes(file.read_bytes()[:-100])


def _plain(folder):
    """The folder as version 0.1 left it: without a manifest, nothing is known of its files' digests."""
    (folder / "manifest.json").unlink()


def _tensors(folder, change):
    _plain(folder)
    tensors = load_file(folder / WEIGHTS)
    save_file({name: value for name, value in change(tensors).items()}, folder / WEIGHTS)


def _config(folder, **changes):
    _plain(folder)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))


def _wider(tensors):
    key = next(name for name in tensors if name.endswith(".key"))
    return tensors | {key: torch.zeros(tensors[key].shape[0], tensors[key].shape[1] + 1)}


def _other_ids(tensors):
    key = [name for name in tensors if name.endswith(".edit_ids")][-1]
    return tensors | {key: tensors[key] + 1}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_cut, "is cut short or damaged"),
        (lambda f: (f / WEIGHTS).write_bytes(b""), "is cut short or damaged"),
        (lambda f: (f / WEIGHTS).unlink(), "adapter_model.safetensors is missing"),
        (lambda f: (f / CONFIG).unlink(), "adapter_config.json is missing"),
        (lambda f: (_plain(f), (f / WEIGHTS).unlink()), "holds no adapter_model.safetensors"),
        (lambda f: (_plain(f), (f / CONFIG).unlink()), "holds no adapter_config.json"),
        (shutil.rmtree, "does not exist"),
        (lambda f: _tensors(f, lambda t: dict(list(t.items())[1:])), "lacks 1 tensors"),
        (lambda f: _tensors(f, _wider), "has shape .* in the file, this model needs"),
        (
            lambda f: _config(f, base_fingerprint={"hidden_size": 4096}),
            "another base model: hidden_size is 32 here",
        ),
    ],
    ids=["cut", "empty", "no weights", "no config", "no weights, plain", "no config, plain", "no folder",
         "a tensor less", "other size", "other base"],
)
def test_a_folder_that_cannot_be_loaded(damage, message, saved):
    _, inputs, folder = saved
    damage(folder)
    before = contents(folder) if folder.exists() else None
    base = LLAVA.build().requires_grad_(True)
    expected = logits_of(base, inputs)
    state = state_of(base)
    with pytest.raises(ValueError, match=message):
        load_edits(base, folder)
    assert state_of(base) == state
    assert torch.equal(logits_of(base, inputs), expected)
    assert (contents(folder) if folder.exists() else None) == before


def test_layers_with_different_edits_are_refused(generator, tmp_path):
    model = editor_of(LLAVA, "dualedit")
    store(model, LLAVA.question(generator), generator)
    save_edits(model, tmp_path / "edits")
    _tensors(tmp_path / "edits", _other_ids)
    base = LLAVA.build()
    state = state_of(base)
    with pytest.raises(ValueError, match="its layers hold different edits"):
        load_edits(base, tmp_path / "edits")
    assert state_of(base) == state


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (lambda: LLAVA.build(seed=1), "embedding_signs"),
        (QWEN.build, "model_type is 'qwen2_5_vl' here and was 'llava'"),
        (tiny_llama, "model_type is 'llama' here"),
    ],
    ids=["other weights", "other architecture", "text only"],
)
def test_edits_of_another_base_model(base, message, saved):
    _, _, folder = saved
    model = base()
    logits_of(model, {"input_ids": torch.tensor([[1, 5]])}) if model.config.model_type == "llama" else None
    state, before = state_of(model), contents(folder)
    with pytest.raises(ValueError, match=message):
        load_edits(model, folder)
    assert state_of(model) == state and contents(folder) == before


def test_edits_of_a_model_that_was_trained_further(saved, tmp_path):
    """Its embeddings are the same; a few weights of its layers have other signs. Adapters do not count."""
    from peft import LoraConfig, get_peft_model

    _, inputs, folder = saved
    further = LLAVA.build()
    with torch.no_grad():
        for layer in further.model.language_model.layers:
            weight = layer.self_attn.q_proj.weight
            noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))
            weight += 0.5 * weight.std() * noise
    with pytest.raises(ValueError, match="another base model: weight_signs is '[0-9a-f]{16}' here and was"):
        load_edits(further, folder)
    beside = get_peft_model(LLAVA.build(), LoraConfig(target_modules=["q_proj", "up_proj"]), "style")
    load_edits(beside, folder, adapter_name="facts")
    marks = [fingerprint(base) for base in (LLAVA.build(), beside.get_base_model())]
    assert marks[0] == marks[1] and marks[0]["weight_signs"] is not None
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_fingerprint"] == marks[0]


def test_a_config_of_another_size(generator, tmp_path):
    """New weights beside an old config (a power cut between two moves): refused with both named."""
    model = editor_of(LLAVA, "dualedit")
    store(model, LLAVA.question(generator), generator)
    save_edits(model, tmp_path / "edits")
    _config(tmp_path / "edits", mid_dim=8)
    base = LLAVA.build()
    state = state_of(base)
    with pytest.raises(ValueError, match="do not fit together"):
        load_edits(base, tmp_path / "edits")
    assert state_of(base) == state


def test_loading_on_an_edited_model(saved):
    model, inputs, folder = saved
    expected = logits_of(model, inputs)
    for base in (model, model.get_base_model()):
        with pytest.raises(ValueError, match="with an edit adapter already: pass the base model"):
            load_edits(base, folder)
    assert torch.equal(logits_of(model, inputs), expected)


def test_a_named_adapter_is_found_in_its_folder(method, generator, tmp_path):
    model = editor_of(LLAVA, method, adapter_name="cars")
    inputs = LLAVA.question(generator)
    store(model, inputs, generator)
    save_edits(model, tmp_path / "edits")
    with pytest.raises(ValueError, match=r"pass one of its folders \['cars'\]"):
        load_edits(LLAVA.build(), tmp_path / "edits")
    loaded = load_edits(LLAVA.build(), tmp_path / "edits" / "cars")
    assert torch.equal(logits_of(loaded, inputs), logits_of(model, inputs))


def test_the_same_model_in_another_dtype(saved):
    """A base model loaded in half precision is still the base model of its edits."""
    *_, folder = saved
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert load_edits(LLAVA.build(dtype=dtype), folder)
