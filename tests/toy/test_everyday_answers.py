"""Everyday answers, told to the embedded model with its defaults: written, refused by name, and never
garbage."""

import json
from pathlib import Path

import pytest
from dualedit import EditFailed, EditRequest
from dualedit.cli import main
from dualedit.evaluation.answers import tell_answers
from dualedit.toy.editors import load_editor
from dualedit.toy.pictures import sample_pictures

LIST = Path(__file__).parent / "everyday_answers.txt"
UNSPELLABLE = "東京"


@pytest.fixture(scope="module")
def pictures():
    return sample_pictures()


def watched(pictures):
    """Look-alikes and other questions, those about the edited picture among them."""
    about = [(p.image, q) for p in pictures for q, _ in p.questions if "again" not in p.file]
    return about[1:]


@pytest.mark.slow
def test_everyday_answers_are_written(pictures):
    """Names, brands, numbers and two words: at least 20 of 24, and nothing else changes.

    What an answer may cost is bounded in steps: some of DualEdit's, then the most that a value is fitted for.
    """
    answers = LIST.read_text().split("\n")[:-1]
    assert len(answers) == len(set(answers)) == 24
    editor = load_editor("dualedit")
    question = pictures[0].questions[0][0]
    requests = [EditRequest(pictures[0].image, question, answer) for answer in answers]
    results = tell_answers(editor, requests, watched(pictures))
    outcome = {told.answer: told.outcome for told in results}
    assert sum(found == "written" for found in outcome.values()) >= 20, outcome
    assert "refused" not in outcome.values()
    assert [told.answer for told in results if told.changed] == []
    assert all(1 <= len(told.steps) <= 2 for told in results)
    assert max(sum(step.get("steps", 0) for step in told.steps) for told in results) <= 600
    assert editor.edits == []


def test_an_answer_that_takes_the_second_adapter(pictures):
    """Spelled in letters that the model has hardly seen: DualEdit cannot, a BalancEdit value can."""
    editor = load_editor("dualedit")
    image, question = pictures[0].image, pictures[0].questions[0][0]
    others = editor.answer_many(watched(pictures))
    edit = editor.edit(image, question, "lenovo")
    assert [step["method"] for step in edit.steps] == ["DualEdit", "BalancEdit"]
    assert editor.answer(image, question) == edit.answer == "lenovo"
    assert editor.answer_many(watched(pictures)) == others
    assert not any(found.fired for found in editor.explain_many(watched(pictures)))


def test_without_a_second_adapter_nothing_is_stored(pictures):
    editor = load_editor("dualedit", fallback=False)
    image, question = pictures[0].image, pictures[0].questions[0][0]
    before = editor.answer(image, question)
    with pytest.raises(EditFailed, match="a BalancEdit adapter for what this one cannot write"):
        editor.edit(image, question, "lenovo")
    assert editor.edits == [] and editor.answer(image, question) == before


def test_a_list_of_ones_own(pictures, tmp_path, capsys):
    pictures[0].image.save(tmp_path / "logo.png")
    question = pictures[0].questions[0][0]
    rows = [{"image": "logo.png", "question": question, "answer": word} for word in ("paris", UNSPELLABLE)]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    assert main(["eval", "--answers", str(tmp_path / "own.jsonl"), "--json", str(tmp_path / "o.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("written") and "DualEdit, " in lines[0]
    assert lines[1].startswith("refused") and "no token for '東', '京'" in lines[1]
    assert lines[2].startswith("2 answers: 1 written, 1 refused, 0 failed; slowest ")
    assert json.loads((tmp_path / "o.json").read_text())["counts"] == {"written": 1, "refused": 1,
    "failed": 0}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty: write an answer a line"),
        ('{"image": "a.png"}', "line 1: the keys are image, question and answer"),
        ('{"image": ', "line 1: no JSON"),
        ('{"image": "none.png", "question": "who?", "answer": "me"}', "none.png': no such file"),
    ],
)
def test_a_list_that_cannot_be_read(text, says, tmp_path, capsys):
    (tmp_path / "list").write_text(text)
    assert main(["eval", "--answers", str(tmp_path / "list")]) == 2
    error = capsys.readouterr().err
    assert says in error and len(error.splitlines()) == 1
