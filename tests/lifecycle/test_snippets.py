"""Snippets of README and docs, word for word, with tiny models of the same make."""

import re
from functools import partialmethod
from pathlib import Path

import pytest
import torch
from dualedit import Editor, inject_dualedit, load_edits, save_edits
from dualedit.editor import generate_answers
from dualedit.models.prompting import Prompter
from tiny_hub_models import LAYERS, make_llava, make_qwen
from tiny_models import edit_layers, random_image, strengthen
from transformers import AutoModelForImageTextToText, AutoProcessor

ROOT = Path(__file__).resolve().parents[2]
README, GUIDE = ROOT / "README.md", ROOT / "docs" / "models.md"
LLAVA, QWEN = "llava-hf/llava-1.5-7b-hf", "Qwen/Qwen2.5-VL-7B-Instruct"
MARK = "<!-- runs with a tiny model -->"


def snippets(page):
    """Model id to the snippet of a page that names it."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(re.escape(MARK) + r"\n```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == text.count(MARK)
    return {re.search(r'^name = "(.*)"$', block, re.MULTILINE).group(1): block for block in blocks}


def run(model_id, folder, monkeypatch, where, page=GUIDE):
    """Run the snippet in `where`, with the model's name replaced and nothing else."""
    code = snippets(page)[model_id]
    # A tiny model with random weights learns no answer to the letter; a real one does, and is asked.
    defaults = Editor.__init__.__defaults__
    assert defaults[:3] == (None, None, False)  # keep_failed is the third
    monkeypatch.setattr(Editor.__init__, "__defaults__", (None, None, True, *defaults[3:]))
    assert code.count(model_id) == 1
    monkeypatch.chdir(where)
    names = {}
    exec(compile(code.replace(model_id, str(folder)), str(page), "exec"), names)
    return names


@pytest.fixture
def where(tmp_path, generator):
    """A working directory with the picture that the snippets ask about."""
    folder = tmp_path / "work"
    folder.mkdir()
    random_image(generator).resize((64, 64)).save(folder / "computer.jpg")
    return folder


def unedited_answer(folder, where, question):
    base = AutoModelForImageTextToText.from_pretrained(folder, dtype="bfloat16")
    prompter = Prompter(AutoProcessor.from_pretrained(folder))
    return generate_answers(base, prompter, [(str(where / "computer.jpg"), question)])[0]


def check_run(names, capsys, folder, where):
    """Both ways of asking answer alike, by the edit, before and after the round trip through the folder."""
    printed = capsys.readouterr().out
    editor = Editor(names["model"], names["processor"])
    answer = editor.answer("computer.jpg", names["question"])
    by_hand = names["processor"].decode(
        names["tokens"][0, names["inputs"]["input_ids"].shape[1] :], skip_special_tokens=True
    )
    assert by_hand.strip() == answer and printed.count(answer) >= 2
    assert [(edit.prompt, edit.target) for edit in editor.edits] == [(names["question"], "lenovo")]
    explanation = editor.explain("computer.jpg", names["question"])
    assert explanation.fired and explanation.edit.target == "lenovo"
    assert answer != unedited_answer(folder, where, names["question"])
    return printed


def test_all_snippets_are_there():
    assert set(snippets(README)) == {LLAVA} and set(snippets(GUIDE)) == {LLAVA, QWEN}


@pytest.mark.filterwarnings("ignore:The edit did not take", "ignore:The positive sample")
def test_llava(tmp_path, where, seed, monkeypatch, capsys):
    folder = make_llava(tmp_path / "model", seed)
    written = {path.name for path in folder.iterdir()}
    assert written >= {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja",
                       "processor_config.json", "tokenizer_config.json"}  # fmt: skip
    names = run(LLAVA, folder, monkeypatch, where)
    printed = check_run(names, capsys, folder, where)
    assert "Edit(id=1" in printed and "target='lenovo'" in printed
    [layer] = edit_layers(names["model"])
    assert layer.layer_name == "model.language_model.layers.20.mlp.up_proj"
    assert (where / "llava-edits" / "README.md").is_file()


@pytest.mark.filterwarnings("ignore:The edit did not take", "ignore:The positive sample")
def test_readme(tmp_path, where, seed, monkeypatch, capsys):
    folder = make_llava(tmp_path / "model", seed)
    names = run(LLAVA, folder, monkeypatch, where, README)
    printed = capsys.readouterr().out
    assert printed.splitlines()[0].endswith(" True") and "target='lenovo'" in printed
    assert names["editor"].answer("computer.jpg", names["question"]) in printed


def prepare_adapters(folder, where, name, seed, trained=True):
    """The folder of trained adapters that the snippet loads, made with the layers that the README names."""
    torch.manual_seed(seed)
    base = AutoModelForImageTextToText.from_pretrained(folder, dtype="bfloat16")
    model = inject_dualedit(base, text_layer=16, vis_layer=19)
    assert [layer.layer_name.rpartition(".")[2] for layer in edit_layers(model)] == ["16", "19"]
    save_edits(strengthen(model) if trained else model, where / name)


def test_qwen(tmp_path, where, seed, monkeypatch, capsys, torchvision):
    folder = make_qwen(tmp_path / "model", seed)
    prepare_adapters(folder, where, "qwen-adapters", seed)
    # Random adapters write something, and not what they are told.
    monkeypatch.setattr(Editor, "edit", partialmethod(Editor.edit, keep_failed=True))
    names = run(QWEN, folder, monkeypatch, where)
    printed = check_run(names, capsys, folder, where)
    assert " True\n" in printed
    assert [layer.layer_name for layer in edit_layers(names["model"])] == [
        f"model.language_model.layers.{number}" for number in (16, 19)
    ]
    assert LAYERS > 20


def test_llava_with_dualedit(tmp_path, where, seed, monkeypatch):
    """The layers of the paper on the other model, and what the README says of untrained adapters."""
    folder = make_llava(tmp_path / "model", seed)
    question = "What brand is this computer?"
    expected = unedited_answer(folder, where, question)
    processor = AutoProcessor.from_pretrained(folder)
    for trained in (False, True):
        prepare_adapters(folder, where, f"adapters-{trained}", seed, trained)
        base = AutoModelForImageTextToText.from_pretrained(folder, dtype="bfloat16")
        editor = Editor(load_edits(base, where / f"adapters-{trained}"), processor, keep_failed=True)
        editor.edit(where / "computer.jpg", question, "lenovo")
        assert editor.explain(where / "computer.jpg", question).fired
        assert (editor.answer(where / "computer.jpg", question) != expected) == trained
