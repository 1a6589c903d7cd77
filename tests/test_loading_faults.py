"""Saved folders that hold what no edit has, or no edits: one error that says so, the model as it was."""

import json
import os
import warnings

import pytest
import torch
from dualedit import DualEditConfig, add_edit, inject_balancedit, inject_dualedit, load_edits, save_edits
from dualedit.files import write_whole
from dualedit.memory import EditMemory
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import LLAVA, METHODS, editor_of, store


@pytest.fixture(params=METHODS)
def method(request):
    return request.param


def saved(method, folder, generator):
    model = editor_of(LLAVA, method)
    store(model, LLAVA.question(generator), generator)
    save_edits(model, folder)
    (folder / "manifest.json").unlink()  # as version 0.1 left it: nothing is known of the files' digests
    return folder / "adapter_model.safetensors"


def untouched(base, names):
    return [name for name, _ in base.named_modules()] == names and not hasattr(base, "peft_config")


def refused(folder, says):
    base = LLAVA.build()
    names = [name for name, _ in base.named_modules()]
    with pytest.raises(ValueError, match=says):
        load_edits(base, folder)
    assert untouched(base, names)


CHANGES = {
    "an infinite radius": ("radius", lambda t: torch.full_like(t, float("inf")), "not finite"),
    "a key of NaN": ("key", lambda t: torch.full_like(t, float("nan")), "not finite"),
    "the last number there is": ("edit_ids", lambda t: torch.full_like(t, 2**63 - 1), "edits count from 1"),
    "number zero": ("edit_ids", torch.zeros_like, "edits count from 1"),
    "numbers with a fraction": ("edit_ids", lambda t: t.float(), "edit_ids is torch.float32"),
    "lengths in a table": ("edit_lengths", lambda t: t[None], "edit_lengths is torch.int64 of shape"),
    "a key of whole numbers": ("key", lambda t: t.to(torch.int64), "key is torch.int64"),
    "records that are no text": ("record_bytes", lambda t: t.to(torch.int64), "record_bytes is torch.int64"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_add_refuses_is_not_loaded(change, method, generator, tmp_path):
    file = saved(method, tmp_path, generator)
    name, spoil, says = CHANGES[change]
    tensors = load_file(file)
    for key in [key for key in tensors if key.endswith("." + name)]:
        tensors[key] = spoil(tensors[key]).contiguous()
    save_file(tensors, file)
    refused(tmp_path, says)


def test_add_refuses_them_too():
    memory = EditMemory({"key": (2,), "radius": ()}, {})
    with pytest.raises(ValueError, match="radius"):
        memory.check({"key": torch.ones(2), "radius": torch.tensor(float("inf"))})
    memory.check({"key": torch.ones(2), "radius": torch.tensor(-1.0)})


def test_a_folder_of_a_lora_is_refused_before_the_model_is_touched(tmp_path):
    base = LLAVA.build()
    get_peft_model(LLAVA.build(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    names = [name for name, _ in base.named_modules()]
    with pytest.raises(ValueError, match="holds a .*LORA adapter, not edits"):
        load_edits(base, tmp_path)
    assert untouched(base, names)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ("[]", "adapter_config.json is damaged"),
        ("{", "adapter_config.json is damaged"),
        ('{"peft_type": "NONE"}', "adapter_config.json is damaged"),
        ("{}", "holds a None adapter, not edits"),
        ({"memory_sizes": [1]}, "memory_sizes=.1.: it is set by saving"),
        ({"memory_sizes": {"a": 1}}, "memory_sizes="),
        ({"mid_dim": "16"}, "mid_dim='16': pass a number"),
        ({"image_token_ids": "3"}, "image_token_ids='3'"),
        ({"fallback": 3}, "fallback=3"),
        ({"fallback": "more"}, "does not exist"),
    ],
)
def test_settings_that_cannot_be(changed, says, generator, tmp_path):
    saved("dualedit", tmp_path, generator)
    file = tmp_path / "adapter_config.json"
    if isinstance(changed, dict):
        changed = json.dumps(json.loads(file.read_text()) | changed)
    file.write_text(changed)
    refused(tmp_path, says)


# ---------------------------------------------------------------------- arguments


@pytest.mark.parametrize("setting", ["mid_dim", "alpha", "refine_rate", "refine_steps", "num_heads"])
def test_a_number_given_as_text(setting):
    with pytest.raises(ValueError, match=f"{setting}='1': pass a number"):
        DualEditConfig(**{setting: "1"})
    with pytest.raises(ValueError, match="rank='8': pass a number"):
        inject_balancedit(LLAVA.build(), layer=LLAVA.linear, rank="8")


def test_image_tokens_without_pixels(method, generator):
    model = editor_of(LLAVA, method)
    inputs = LLAVA.question(generator)
    inputs.pop("pixel_values")
    with pytest.raises(ValueError, match="input_ids hold image tokens, and there are no pixels"):
        add_edit(model, inputs, torch.tensor([5]))


@pytest.mark.parametrize("target", [torch.tensor([5.0]), torch.tensor([True]), [5]])
def test_a_target_that_is_no_token_ids(target, method, generator):
    with pytest.raises(ValueError, match="target_ids is .*: pass the answer's token ids"):
        add_edit(editor_of(LLAVA, method), LLAVA.question(generator), target)


def test_untrained_adapters_with_refining_are_stored_with_the_reason(generator):
    model = inject_dualedit(LLAVA.build(), text_layer=1, vis_layer=2, mid_dim=16, num_heads=2, refine_steps=3)
    with pytest.warns(UserWarning, match="are not trained"):
        add_edit(model, LLAVA.question(generator), torch.tensor([5]))


# ---------------------------------------------------------------------- files


def test_the_process_s_file_mask_is_left_alone(tmp_path, monkeypatch):
    """Setting it, even for a moment, would show in every thread."""

    def refuse(mask):
        raise AssertionError("the mask was set")

    before = os.umask(0o027)
    try:
        with monkeypatch.context() as patched:
            patched.setattr(os, "umask", refuse)
            write_whole(tmp_path / "a.txt", "text")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                save_edits(editor_of(LLAVA, "balancedit"), tmp_path / "edits")
    finally:
        os.umask(before)
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "edits" / "adapter_model.safetensors").stat().st_mode & 0o777 == 0o640
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.txt", "edits"]
