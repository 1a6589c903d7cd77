"""`dualedit layers`: what a config says about where edits can go."""

import json

import pytest
import torch
from dualedit import inject_balancedit, inject_dualedit
from dualedit.cli import main
from dualedit.cli.layers import _ranges, describe
from tiny_models import BLIP2, LLAVA, QWEN, tiny_llama, tiny_mllama, tiny_t5


@pytest.fixture
def folder(tmp_path):
    """A folder that holds a model's config and nothing else."""

    def write(model):
        model.config.save_pretrained(tmp_path / "model")
        assert [file.name for file in (tmp_path / "model").iterdir()] == ["config.json"]
        return str(tmp_path / "model")

    return write


def printed(capsys, *arguments):
    assert main(["layers", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    return {line[:17].strip(): line[17:] for line in lines}


def complaint(capsys, *arguments):
    assert main(["layers", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1
    return err


@pytest.mark.parametrize("arguments", [(), ("embedded",), ("dualedit-embedded",)])
def test_the_embedded_model(arguments, capsys):
    from dualedit.toy.model import load_embedded

    base, _ = load_embedded()
    found = printed(capsys, *arguments)
    number = base.config.text_config.num_hidden_layers
    assert found["model"] == "LlavaForConditionalGeneration (llava)"
    assert found["decoder layers"].endswith(f".{number - 1}")
    assert found["hidden size"] == str(base.config.text_config.hidden_size)
    assert found["image token ids"] == str(base.config.image_token_index)
    assert found["text_layer"] == found["vis_layer"] == f"0-{number - 1}"
    assert "mlp.up_proj" in found[f"0-{number - 1}"]


@pytest.mark.parametrize("family", [LLAVA, QWEN, BLIP2], ids=lambda family: family.name)
def test_what_is_printed_can_be_injected(family, folder, capsys):
    model = family.build()
    found = printed(capsys, folder(model))
    assert found["decoder layers"] == f"{family.layers}.0 to {family.layers}.3"
    assert found["hidden size"] == "32"
    linear = found["0-3"].split(", ")
    assert inject_dualedit(model, text_layer=0, vis_layer=3, mid_dim=16).unload() is model
    for name in linear:
        assert inject_balancedit(model, layer=f"layers.3.{name}").unload() is model


def test_a_text_only_model(folder, capsys):
    found = printed(capsys, folder(tiny_llama()))
    assert found["text_layer"] == "0-3"
    assert found["image token ids"] == "none: a text-only model"
    assert found["vis_layer"].startswith("none: LlamaForCausalLM is a text-only model")


def test_cross_attention(folder, capsys):
    """Layer 1 is a cross-attention layer; pictures are not in the sequence."""
    found = printed(capsys, folder(tiny_mllama()))
    assert found["text_layer"] == "0, 2-3" and "mlp.up_proj" in found["0, 2-3"]
    assert "cross-attention" in found["vis_layer"] and "cross-attention" in found["image token ids"]


def test_a_config_without_an_image_id():
    model = BLIP2.build()
    model.config.image_token_index = None
    found = dict(describe(model))
    assert "image_token_ids=[...]" in found["image token ids"]
    assert "names no image token" in found["vis_layer"]


def test_no_weights_are_made(folder, capsys, monkeypatch):
    """A config of a model far larger than this machine's memory."""
    model = tiny_llama()
    model.config.hidden_size, model.config.intermediate_size = 65536, 262144
    path = folder(model)
    monkeypatch.setattr(torch.nn.Module, "to", None)
    assert printed(capsys, path)["hidden size"] == "65536"


def test_wrong_folders(folder, tmp_path, capsys):
    assert "is no folder: pass a local folder" in complaint(capsys, str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    assert "holds no config.json" in complaint(capsys, str(tmp_path / "empty"))
    file = tmp_path / "config.json"
    for text in ("{", "[]", "{}", json.dumps({"model_type": "nonsuch"}), json.dumps({"model_type": "clip"})):
        file.write_text(text)
        assert "does not describe a model that transformers" in complaint(capsys, str(tmp_path)), text
    assert "encoder-decoder" in complaint(capsys, folder(tiny_t5()))


def test_ranges():
    assert _ranges([0]) == "0" and _ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
