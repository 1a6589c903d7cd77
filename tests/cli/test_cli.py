"""The command line: what a user types, what comes back, and what happens to the saved files."""

import json
import os
import re
import threading
import time
from pathlib import Path

import pytest
from dualedit.cli import book, main
from dualedit.cli.demo_story import TITLES
from dualedit.cli.errors import with_options
from dualedit.cli.saved_folder import read_saved, writing
from dualedit.toy import model as vlm
from PIL import Image

QUESTION = "who founded this brand?"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """The sample pictures, as `dualedit sample` writes them."""
    folder = tmp_path_factory.mktemp("pictures")
    assert main(["sample", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def saved_once(tmp_path_factory, pictures):
    """A folder with one BalancEdit edit of the embedded model; copy it before changing it."""
    folder = tmp_path_factory.mktemp("saved") / "edits"
    assert edit(pictures / "logo.png", "maria", folder, "--method", "balancedit") == 0
    return folder


@pytest.fixture
def saved(saved_once, tmp_path):
    """An own copy of a folder with one edit."""
    folder = tmp_path / "edits"
    folder.mkdir()
    for file in saved_once.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture(scope="module")
def other_model(tmp_path_factory):
    """A local Hugging Face folder with another model of the same shape, untrained."""
    folder = tmp_path_factory.mktemp("model")
    processor = vlm.build_processor()
    vlm.save_embedded(vlm.build_model(processor.tokenizer, seed=1), processor, folder)
    return folder


def edit(image, answer, folder, *options):
    return main(["edit", str(image), QUESTION, answer, "--edits", str(folder), *options])


def bytes_of(folder):
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def complaint(capsys):
    """The one line on stderr."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("dualedit: ")
    return lines[0]


# ---------------------------------------------------------------------- the round trip


@pytest.mark.parametrize("method", ["dualedit", "balancedit"])
def test_edit_list_ask_remove(method, pictures, tmp_path, capsys):
    folder, logo = tmp_path / "edits", str(pictures / "logo.png")
    assert main(["ask", logo, QUESTION, "-e", str(folder)]) == 0
    before, note = capsys.readouterr().out.splitlines()
    assert "unedited" in note and not folder.exists()
    target = "maria" if before != "maria" else "leon"

    assert edit(logo, target, folder, "--method", method) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0] == f"before: {before}"
    assert main(["list", "-e", str(folder)]) == 0
    listed = capsys.readouterr().out
    assert "1 " in listed and QUESTION in listed and target in listed

    assert main(["ask", logo, QUESTION, "-e", str(folder)]) == 0
    answer, note = capsys.readouterr().out.splitlines()
    assert told[1] == f"after:  {answer}"
    # Up to rounding: a batch of one row and the prompt of an edit are summed in another order.
    assert note.startswith(("(edit 1 answers (distance 0,", "(edit 1 answers (distance <0.001,"))
    if method == "balancedit":  # it is fitted until it answers; DualEdit's adapters may be wrong about a fact
        assert answer == target

    assert main(["remove", "1", "-e", str(folder)]) == 0
    capsys.readouterr()
    assert main(["ask", logo, QUESTION, "-e", str(folder)]) == 0
    assert capsys.readouterr().out.splitlines() == [before, "(no edit is stored)"]


@pytest.mark.parametrize("method", ["dualedit", "balancedit"])
@pytest.mark.parametrize("gone", [1, 2, 3])
def test_removing_from_the_files_is_removing_with_the_model(method, gone, tmp_path, capsys):
    """Of edits of different lengths, the same tensors, sizes and card either way."""
    from dualedit import save_edits
    from dualedit.cli.saved_folder import remove_saved
    from safetensors.torch import load_file

    editor = three_edits(method)
    folders = [tmp_path / name for name in ("files", "model")]
    save_edits(editor.model, folders[0])
    editor.remove(gone)
    save_edits(editor.model, folders[1])

    assert remove_saved(folders[0], gone) == 2
    assert main(["compact", str(folders[0])]) == 0
    left = [(edit.id, edit.target) for edit in editor.edits]
    assert [(edit.id, edit.target) for edit in read_saved(folders[0]).edits] == left
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    assert set(one) == set(other)
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and tensor.shape == other[name].shape, name
        assert tensor.numpy(force=True).tobytes() == other[name].numpy(force=True).tobytes(), name
    for file in ("adapter_config.json", "README.md"):
        assert (folders[0] / file).read_text() == (folders[1] / file).read_text()


def three_edits(method):
    """An editor of the embedded model with three edits, the second of a longer question."""
    from dualedit.toy.editors import load_editor
    from dualedit.toy.pictures import sample_pictures

    editor = load_editor(method)
    logos = [picture.image for picture in sample_pictures()[:4]]
    questions = [QUESTION, "tell me, " + QUESTION, QUESTION]
    for logo, question, target in zip(logos, questions, ("maria", "leon", "anna"), strict=False):
        editor.edit(logo, question, target)
    return editor


def test_a_second_edit_of_the_same_question_replaces_the_first(saved, pictures, capsys):
    assert edit(pictures / "logo.png", "leon", saved) == 0
    out = capsys.readouterr().out
    assert "before: maria" in out and "after:  leon" in out and "replaces edit 1, 'maria'" in out
    assert [(e.id, e.target) for e in read_saved(saved).edits] == [(2, "leon")]


def test_a_question_without_a_picture_is_left_alone(saved, capsys):
    assert main(["ask", "-", "what is the capital of peru?", "-e", str(saved)]) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("(no edit answers; edit 1 is nearest")


def test_saved_edits_are_read_without_the_model_as_with_it(saved):
    from dualedit.cli.loading import open_editor

    read = [(e.id, e.prompt, e.target, e.radius, e.created) for e in read_saved(saved).edits]
    loaded = open_editor(saved, None).edits
    assert read == [(e.id, e.prompt, e.target, pytest.approx(e.radius), e.created) for e in loaded]


def test_a_model_of_ones_own_with_balancedit(other_model, pictures, tmp_path, capsys):
    folder, options = tmp_path / "edits", ("--model", str(other_model))
    assert edit(pictures / "logo.png", "maria", folder, *options, "--layer", "layers.5.mlp.up_proj") == 0
    assert "after:  maria" in capsys.readouterr().out
    assert main(["ask", str(pictures / "logo.png"), QUESTION, "-e", str(folder), *options]) == 0
    assert capsys.readouterr().out.startswith("maria\n(edit 1 answers")


# ---------------------------------------------------------------------- errors: one line, exit code 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["asq"], "No such command 'asq'"),
        (["ask"], "Missing argument 'IMAGE'"),
        (["list", "--edit", "x"], "No such option"),
        (["remove", "one"], "Invalid value for 'ID'"),
        (["list", "-e", "{tmp}/none"], "no edits are saved in {tmp}/none"),
        (["remove", "1", "-e", "{tmp}/none"], "no edits are saved in {tmp}/none"),
        (["ask", "{tmp}/none.png", "who?"], "'{tmp}/none.png': no such file"),
        (["ask", "{tmp}/text.png", "who?"], "'{tmp}/text.png' cannot be read as an image"),
        (["ask", "-", "who?", "-e", "{tmp}/text.png"], "--edits {tmp}/text.png is a file"),
        (["ask", "-", "who?", "-m", "{tmp}"], "--model {tmp} holds no config.json"),
        (["ask", "-", " "], "QUESTION ' ': pass a question"),
        (["ask", "", "who?"], "IMAGE '' is empty"),
        (["ask", "http://127.0.0.1:9/c.png", "who?"], "url='http://127.0.0.1:9/c.png' cannot be downloaded"),
        (["edit", "-", "who?", "me", "-e", "{tmp}/none"], "IMAGE -: the edit's image is missing"),
        (["edit", "-", "who?", "me", "-e", ""], "Invalid value for '--edits' / '-e': it is empty"),
        (["ask", "-", "who?", "--model", ""], "Invalid value for '--model' / '-m': it is empty"),
        (["train", "--model", "x", "--out", ""], "Invalid value for '--out' / '-o': it is empty"),
        (["train", "--model", "x", "--batch-size", "0"], "--batch-size 0: pass a whole number"),
        (["train", "--stops", "1"], "No such option: --stops"),
        (["edit", "-", "who?", "me", "--method", "dual"], "--method dual: choose one of dualedit, "),
        (["edit", "-", "who?", "me", "--layer", "x", "-e", "{tmp}/none"], "--adapter and --layer are"),
        (["edit", "-", "who?", "me", "-m", "{tmp}", "-e", "{tmp}/none"], "balancedit --layer NAME"),
        (["sample", "{tmp}/text.png"], "{tmp}/text.png is a file"),
        (["demo", "--edits", "0"], "--edits 0: pass at least 1"),
        (["eval", "--protocol", "batc"], "--protocol batc: choose one of single, batch"),
        (["eval", "--methods", "dualedit,magic"], "choose from dualedit, balancedit"),
        (["eval", "--edits", "1,x"], "--edits 1,x: pass whole numbers"),
        (["demo", "--json", "{tmp}"], "--json {tmp} is a folder"),
    ],
)
def test_errors_fit_on_a_line(arguments, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.png").write_text("not a picture")
    assert main([argument.format(tmp=tmp_path) for argument in arguments]) == 2
    assert says.format(tmp=tmp_path) in complaint(capsys)
    assert [file.name for file in tmp_path.iterdir()] == ["text.png"]


def test_an_error_that_begins_with_an_empty_line(saved, pictures, monkeypatch, capsys):
    from dualedit import storage

    def refuse(*_, **__):
        raise RuntimeError("\n\n  size mismatch for key\nand more")

    monkeypatch.setattr(storage, "load_edits", refuse)
    assert main(["ask", str(pictures / "logo.png"), QUESTION, "-e", str(saved)]) == 2
    assert complaint(capsys).endswith("(RuntimeError: size mismatch for key).")


def test_an_error_without_words(monkeypatch, capsys):
    def refuse(*_):
        raise ValueError

    monkeypatch.setattr(book, "show_list", refuse)
    assert main(["list"]) == 2
    assert "ValueError" in complaint(capsys)


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("image=None: the image is missing.", "IMAGE -: the image is missing."),
        ("image='a.png': no such file.", "IMAGE 'a.png': no such file."),
        ("Pass image_root=, a folder; skip_bad=True skips.", "Pass --images, a folder; --skip-bad skips."),
        ("layer=None: name it", "--layer (not given): name it"),
        ("f(image=3), an.image=4 and my_image=5 stay", "f(image=3), an.image=4 and my_image=5 stay"),
    ],
)
def test_arguments_are_told_as_options(message, told):
    names = {"image": "IMAGE", "image_root": "--images", "skip_bad": "--skip-bad", "layer": "--layer"}
    assert with_options(message, names) == told


def test_unknown_id_names_the_stored_ones(saved, capsys):
    before = bytes_of(saved)
    assert main(["remove", "7", "-e", str(saved)]) == 2
    assert "no edit 7" in complaint(capsys)
    assert bytes_of(saved) == before


def test_the_other_method_is_refused_for_a_folder(saved, pictures, capsys):
    before = bytes_of(saved)
    assert edit(pictures / "logo.png", "leon", saved, "--method", "dualedit") == 2
    assert "holds BalancEdit edits" in complaint(capsys)
    assert bytes_of(saved) == before


def test_edits_of_another_base_model_are_refused(saved, other_model, capsys):
    before = bytes_of(saved)
    assert main(["ask", "-", "who?", "-e", str(saved), "-m", str(other_model)]) == 2
    assert "another base model" in complaint(capsys)
    assert bytes_of(saved) == before


def cut(file):
    file.write_bytes(file.read_bytes()[:-40])


DAMAGES = {
    "weights cut short": lambda folder: cut(folder / "adapter_model.safetensors"),
    "weights missing": lambda folder: (folder / "adapter_model.safetensors").unlink(),
    "config cut short": lambda folder: cut(folder / "adapter_config.json"),
    "config missing": lambda folder: (folder / "adapter_config.json").unlink(),
    "config of something else": lambda folder: (folder / "adapter_config.json").write_text("[]"),
    "another adapter": lambda folder: (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}'),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("command", ["list", "ask", "remove", "edit"])
def test_a_damaged_folder_is_refused_and_left_as_it_is(damage, command, saved, pictures, capsys):
    DAMAGES[damage](saved)
    before = bytes_of(saved)
    arguments = {
        "list": ["list"],
        "ask": ["ask", "-", "who?"],
        "remove": ["remove", "1"],
        "edit": ["edit", str(pictures / "logo.png"), QUESTION, "leon"],
    }[command]
    assert main([*arguments, "-e", str(saved)]) == 2
    assert str(saved) in complaint(capsys)
    assert bytes_of(saved) == before


def test_a_bug_keeps_its_traceback(monkeypatch, tmp_path):
    def broken(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(book, "show_list", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["list"])


# ---------------------------------------------------------------------- stopping, and two at once


def test_ctrl_c_leaves_the_folder_as_it_was(saved, pictures, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)  # while saving: a file is written, and no line of it
    before = bytes_of(saved)
    assert edit(pictures / "logo.png", "leon", saved) == 130
    assert "stopped" in complaint(capsys)
    assert bytes_of(saved) == before
    assert [file.name for file in saved.parent.iterdir()] == ["edits"]


def test_one_writer_at_a_time(tmp_path):
    pytest.importorskip("fcntl")
    order = []

    def second():
        with writing(tmp_path / "edits"):
            order.append("second")

    with writing(tmp_path / "edits"):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.2)
        order.append("first")
    thread.join(timeout=10)
    assert order == ["first", "second"]


# ---------------------------------------------------------------------- sample and demo


def test_sample_writes_pictures_and_their_questions(pictures):
    listing = json.loads((pictures / "questions.json").read_text())
    assert {entry["file"] for entry in listing} | {"questions.json"} == {f.name for f in pictures.iterdir()}
    for entry in listing:
        assert Image.open(pictures / entry["file"]).size == (48, 48)
        assert entry["questions"] and all(q["ask"] and q["answer"] for q in entry["questions"])
    logo, again, alike = ({q["ask"]: q["answer"] for q in entry["questions"]} for entry in listing[:3])
    assert logo == again
    assert all(logo[question] != alike[question] for question in logo)


@pytest.fixture(scope="module")
def demo_files(tmp_path_factory):
    """The JSON, page and README of a small demo."""
    folder = tmp_path_factory.mktemp("demo")
    readme = folder / "README.md"
    readme.write_text(README)
    files = {"json": folder / "out" / "demo.json", "page": folder / "out" / "demo.html", "readme": readme}
    options = [word for name, file in files.items() for word in (f"--{name}", str(file))]
    assert main(["demo", "--model", "embedded", "--edits", "3", *options]) == 0
    return files


README = (
    "# Top\n<!-- generated: story -->\noutdated\n<!-- end -->\nbetween\n"
    "<!-- generated: figures -->\n<!-- end -->\nbottom\n"
)


def test_demo_json(demo_files):
    rows = json.loads(demo_files["json"].read_text())
    assert list(rows) == ["rows"]
    assert [row["method"] for row in rows["rows"]] == ["dualedit", "balancedit"]
    for row in rows["rows"]:
        assert list(row) == ["method", "scoring", "protocol", "edits", "n", "metrics", "stderr", "interval"]
        assert (row["scoring"], row["protocol"], row["edits"], row["n"]) == ("free", "single", 1, 3)
        assert set(row["metrics"]) == set(row["stderr"]) == set(TITLES)
        assert all(0 <= value <= 100 for value in row["metrics"].values())


@pytest.mark.parametrize("protocol", ["single", "batch"])
def test_eval_json(protocol, tmp_path, capsys):
    file = tmp_path / "figures.json"
    options = ["--protocol", protocol, "--edits", "2,3", "--asked", "3", "--json", str(file)]
    assert main(["eval", "--methods", "balancedit", *options]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [row["protocol"] for row in rows] == [protocol] * 2
    assert [row["edits"] for row in rows] == ([1, 1] if protocol == "single" else [2, 3])
    assert [row["n"] for row in rows] == ([2, 3] if protocol == "single" else [3, 3])
    assert all(row["metrics"]["rel"] == 100 for row in rows)


def test_the_demo_tells_an_edit_of_ones_own(pictures, tmp_path, capsys):
    page = tmp_path / "own.html"
    own = ["--picture", str(pictures / "logo.png"), "--question", "what brand is this logo?"]
    own += ["--answer", "kiblo"]
    assert main(["demo", "--model", "embedded", "--edits", "1", *own, "--page", str(page)]) == 0
    told = capsys.readouterr().out
    assert "(about a picture: your own)" in told and "to answer kiblo" in told
    assert "what brand is this logo?" in page.read_text() and "kiblo" in page.read_text()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--picture", "PICTURE"], "--question and --answer: your own edit takes all of"),
        (["--question", "what?", "--answer", "x"], "--picture: your own edit takes all of"),
        (["--model", "gpt"], "the demo is about smol or toy"),
        (["--picture", "nowhere.png", "--question", "what?", "--answer", "x"], "nowhere.png"),
        (["--edits", "0"], "--edits 0: pass at least 1"),
    ],
)
def test_the_demo_refuses_before_it_works(options, words, pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = [str(pictures / "logo.png") if word == "PICTURE" else word for word in options]
    assert main(["demo", *given]) == 2
    assert words in complaint(capsys)


def test_demo_page_is_one_file(demo_files):
    text = demo_files["page"].read_text()
    assert text.count("<html") == text.count("</html>") == 1
    assert "data:image/png;base64," in text
    for outside in ("http://", "https://", "<script", "<link", "src=\"/", "url("):
        assert outside not in text


def test_demo_fills_the_readme(demo_files):
    text = demo_files["readme"].read_text()
    assert text.startswith("# Top\n<!-- generated: story -->\n```text\nQuestion: ")
    assert "outdated" not in text and "\nbetween\n" in text and text.endswith("bottom\n")
    row = json.loads(demo_files["json"].read_text())["rows"][1]
    assert f"| BalancEdit | {row['metrics']['rel']:.1f} [" in text


def test_a_readme_without_blocks_is_refused_before_the_work(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    readme = tmp_path / "README.md"
    readme.write_text("nothing to fill")
    assert main(["demo", "--readme", str(readme)]) == 2
    assert "needs '<!-- generated: NAME -->' blocks" in complaint(capsys)
    assert readme.read_text() == "nothing to fill"


# ---------------------------------------------------------------------- the quickstart


def quickstart_blocks():
    text = (Path(__file__).parents[2] / "docs" / "quickstart.md").read_text()
    return re.findall(r"<!-- runs -->\n```python\n(.*?)```", text, re.DOTALL)


@pytest.mark.parametrize("number", range(2))
def test_the_quickstarts_run(number, tmp_path, monkeypatch, capsys):
    blocks = quickstart_blocks()
    assert len(blocks) == 2
    monkeypatch.chdir(tmp_path)
    exec(compile(blocks[number], "quickstart.md", "exec"), {"__name__": "quickstart"})
    assert "maria" in capsys.readouterr().out
