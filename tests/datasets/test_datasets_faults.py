"""Faults in data sets: every kind of bad row, file and image is named, or left out and listed."""

from __future__ import annotations

import json

import pytest
from dataset_files import EVQA, FILES, MMKE, OWN, evqa_rows, write, write_lines
from dualedit.datasets import check_images, from_records, load_samples, missing_images, overlap

# ------------------------------------------------------------------ bad rows


def without(key: str):
    return lambda row: row.pop(key)


def with_value(key: str, value):
    return lambda row: row.update({key: value})


EASYEDIT_FAULTS = [
    (without("alt"), "alt", "missing"),
    (without("m_loc_q"), "m_loc_q", "missing"),
    (with_value("alt", ""), "alt", "empty"),
    (with_value("alt", "  "), "alt", "empty"),
    (with_value("alt", 3), "alt", "int"),
    (with_value("alt", ["yes"]), "alt", "list"),
    (with_value("src", None), "src", "null"),
    (with_value("rephrase", {"a": 1}), "rephrase", "dict"),
    (with_value("image", None), "image", "null"),
    (with_value("image", ""), "image", "empty"),
    (with_value("image", 12), "image", "int"),
    (with_value("image", "http://host/a.png"), "image", "download"),
    (with_value("pred", 7), "pred", "int"),
]


@pytest.mark.parametrize(("spoil", "field", "reason"), EASYEDIT_FAULTS)
def test_a_bad_row_is_named_or_left_out_and_listed(tmp_path, spoil, field, reason):
    rows = evqa_rows()
    spoil(rows[1])
    path = write(tmp_path / "vqa.json", rows)
    with pytest.raises(ValueError, match=f"vqa.json, row 1, field '{field}' .*{reason}.*skip_bad"):
        load_samples(path, image_root=EVQA)
    samples = load_samples(path, image_root=EVQA, skip_bad=True)
    assert [s.id for s in samples] == ["0", "2"] and samples.rows == (0, 2)
    (problem,) = samples.skipped
    assert problem[:3] == (str(path), 1, field) and reason in problem.reason
    assert "1 rows left out" in repr(samples)


OWN_FAULTS = [
    ({"prompt": "What brand?"}, "target", "missing"),
    ({**OWN, "target": 2}, "target", "write a text"),
    ({**OWN, "rephrases": "Who made it?"}, "rephrases", "write a list"),
    ({**OWN, "rephrases": ["fine", 3]}, r"rephrases\[1\]", "write an object"),
    ({**OWN, "rephrases": [" "]}, r"rephrases\[0\].prompt", "empty"),
    ({**OWN, "other_images": [None]}, r"other_images\[0\]", "null"),
    ({**OWN, "keep": [{"answer": "x"}]}, r"keep\[0\].prompt", "missing"),
    ({**OWN, "keep": [{"prompt": "a?", "kind": "near"}]}, r"keep\[0\].kind", "hard_image"),
    ({**OWN, "keep": [{"prompt": "a?", "anwser": "b"}]}, r"keep\[0\].anwser", "did you mean 'answer'"),
    ({**OWN, "keep": ["a?"]}, r"keep\[0\]", "write an object"),
    ({**OWN, "portability": [{"prompt": "a?"}]}, r"portability\[0\].answer", "missing"),
    ({**OWN, "companions": [{"prompt": "a?"}]}, r"companions\[0\].target", "missing"),
    ({**OWN, "edit_rephrases": [1]}, r"edit_rephrases\[0\]", "write a text"),
    ({**OWN, "rephrase": ["Who?"]}, "rephrase", "did you mean 'rephrases'"),
    ({**OWN, "entity": "seven"}, "entity", "whole number"),
    ({**OWN, "id": ""}, "id", "leave it out"),
    ({**OWN, "id": "first"}, "id", "line 1"),
]


@pytest.mark.parametrize(("row", "field", "reason"), OWN_FAULTS)
def test_a_bad_row_of_a_users_file_is_named_by_line(tmp_path, row, field, reason):
    path = write_lines(tmp_path / "facts.jsonl", [{**OWN, "id": "first"}, row])
    with pytest.raises(ValueError, match=f"facts.jsonl, line 2, field '{field}' .*{reason}"):
        load_samples(path)
    samples = load_samples(path, skip_bad=True)
    assert [s.id for s in samples] == ["first"] and [p.index for p in samples.skipped] == [1]


@pytest.mark.parametrize(
    ("spoil", "field"),
    [
        (without("rel_ans_1"), "rel_ans_1"),
        (with_value("port_new", [{"port_type": "1-hop"}]), r"port_new\[0\].Q&A"),
        (with_value("port_new", [{"Q&A": {"Question": "a?"}}]), r"port_new\[0\].Q&A.Answer"),
        (with_value("knowledge_type", ""), "knowledge_type"),
    ],
)
def test_a_bad_row_of_mmke_is_named(spoil, field):
    rows = json.loads((FILES / "mmke/data_json/entity/eval.json").read_text())
    spoil(rows[0])
    with pytest.raises(ValueError, match=f"records, row 0, field '{field}'"):
        from_records(rows, image_root=MMKE)


@pytest.mark.parametrize("field", ["rephrased_images", "rephrased_questions", "locality_answer"])
def test_a_bad_row_of_okedit_is_named(field):
    rows = json.loads((FILES / "okedit/okedit.json").read_text())
    rows[0].pop(field)
    with pytest.raises(ValueError, match=f"field '{field}' is missing"):
        from_records(rows, image_root=FILES / "okedit")


def test_unknown_fields_of_a_users_file_are_noted():
    row = {**OWN, "annotator": "kim", "license": None, "keep": [{"prompt": "a?", "by": 1}] * 2}
    notes = from_records([row, row]).notes
    assert [note[:3] for note in notes] == [("records", 0, "annotator"), ("records", 0, "keep[0].by")]


def test_no_good_row_is_an_error_even_when_bad_rows_are_skipped():
    with pytest.raises(ValueError, match="none of 2 rows makes a sample.*'target'"):
        from_records([{**OWN, "target": ""}] * 2, skip_bad=True)


# ------------------------------------------------------------------ bad files


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("[]", "empty list"),
        ('[{"prompt": "a?", "target": "b"}, {"prompt": "c', r"line 1, column 4\d: .*breaks off"),
        ('[{"prompt": "a?", "target": "b"}', "breaks off"),
        ('[{"prompt": "a?"\n "target": "b"}, {}]', "line 2, column 2.*Mend"),
        ('{\n "data": [\n  {"prompt": "a?", "target": "b"}\n ]\n}', r"one object with the keys \['data'\]"),
        ('"facts"', "begins with"),
        ("prompt,target\na?,b\n", "begins with"),
        ('[1, "a"]', "row 0 is a int: each row should be an object"),
        ('{"prompt": "a?", "target": "b', r"line 1 is not JSON at column \d+: .*breaks off"),
        ('\n{"prompt": "a?", "target": b}\n{"prom', r"line 2 is not JSON at column \d+: Expecting value"),
        ('{"text": "a", "label": 1}', r"\['label', 'text'\].*prompt and target"),
    ],
)
def test_a_file_that_holds_no_rows_is_named_with_the_place(tmp_path, content, message):
    path = write(tmp_path / "facts.json", content)
    with pytest.raises(ValueError, match=f"facts.json.*{message}"):
        load_samples(path)


def test_bytes_that_are_no_text_and_a_missing_file(tmp_path):
    (tmp_path / "a.json").write_bytes(b"\xff\xfe\x00[")
    with pytest.raises(ValueError, match="not UTF-8"):
        load_samples(tmp_path / "a.json")
    with pytest.raises(FileNotFoundError, match="b.json.*no such file"):
        load_samples(tmp_path / "b.json")


def test_a_broken_line_is_a_bad_row(tmp_path):
    path = write(tmp_path / "facts.jsonl", f'{json.dumps(OWN)}\n[1]\n\n{{"prompt": "Who')
    with pytest.raises(ValueError, match="facts.jsonl, line 2 is a list"):
        load_samples(path)
    samples = load_samples(path, skip_bad=True)
    assert [(p.index, p.field) for p in samples.skipped] == [(1, ""), (2, "")]
    assert "not JSON at column" in samples.skipped[1].reason and "breaks off" in samples.skipped[1].reason


def test_format_is_told_by_the_first_row_that_can_be_told(tmp_path):
    assert from_records([{"prompt": "no target"}, OWN], skip_bad=True).format == "jsonl"


def test_wrong_arguments_are_named(tmp_path):
    path = FILES / "own/facts.jsonl"
    with pytest.raises(ValueError, match="format='vqa' is unknown.*evqa"):
        load_samples(path, format="vqa")
    with pytest.raises(ValueError, match="field 'src' is missing.*format 'evqa'"):
        load_samples(path, format="evqa")
    with pytest.raises(ValueError, match="prompt_template='paper'.*dualedit"):
        load_samples(path, prompt_template="paper")
    with pytest.raises(ValueError, match="limit=0"):
        load_samples(path, limit=0)
    with pytest.raises(ValueError, match="image_root=.*nowhere"):
        load_samples(path, image_root=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="records is a dict"):
        from_records(OWN)
    with pytest.raises(ValueError, match="by='name'"):
        overlap([], [], by="name")


# ------------------------------------------------------------------ images


def test_missing_images_are_counted_and_named_before_anything_runs(tmp_path):
    path = write(tmp_path / "vqa.json", evqa_rows())
    with pytest.raises(ValueError) as caught:
        load_samples(path)
    text = str(caught.value)
    assert "9 images of 3 rows are not there" in text and "and 4 more" in text and "image_root=" in text
    assert "row 0, field 'image'" in text and "COCO_val2014_000000000001.png" in text
    rows = evqa_rows()
    rows[1]["m_loc"] = "val2014/gone.png"
    samples = load_samples(write(path, rows), image_root=EVQA, skip_bad=True)
    assert [(p.index, p.field) for p in samples.skipped] == [(1, "m_loc")] and len(samples) == 2
    unchecked = load_samples(path, image_root=EVQA, verify_images=False)
    assert len(unchecked) == 3
    assert [p[:3] for p in missing_images(unchecked)] == [(str(path), 1, "locality.m_loc[0].image")]
    with pytest.raises(ValueError, match=r"row 1, field 'locality.m_loc\[0\].image'.*gone.png"):
        check_images(unchecked)


def test_broken_images_load_and_are_found_by_decoding(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    samples = from_records([{**OWN, "image": "a.png"}], image_root=tmp_path)
    check_images(samples)
    with pytest.raises(ValueError, match="a.png.*cannot be read"):
        check_images(samples, decode=True)
    with pytest.raises(ValueError, match="a.png.*cannot be read as an image"):
        _ = samples[0].request.image
