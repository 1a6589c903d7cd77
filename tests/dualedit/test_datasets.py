"""Loading facts: each data set's real layout, every kind of bad row, lazy images, and the way back to a file."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path

import PIL.Image
import pytest
from dualedit.data import EditRequest, EditSample, Probe
from dualedit.datasets import (
    FORMATS,
    TEMPLATES,
    check_images,
    from_records,
    load_samples,
    missing_images,
    overlap,
    to_jsonl,
)
from dualedit.evaluation.single import probes_of
from dualedit.prompting import Prompter

FILES = Path(__file__).parent / "data_files"
EVQA = [FILES / "evqa/images", FILES / "evqa/rephrased"]
VLKEB = FILES / "vlkeb/VLKEB_images"
MMKE = FILES / "mmke/data_image"
LAYOUTS = [
    ("evqa/vqa_eval.json", EVQA, "evqa", 3),
    ("evqa/vqa_train.json", EVQA, "evqa", 2),
    ("eic/caption_eval_edit.json", None, "eic", 1),
    ("vlkeb/eval.json", VLKEB, "vlkeb", 2),
    ("vlkeb/eval_multihop.json", VLKEB, "vlkeb", 2),
    ("vlkeb/eval_edit_onehop.json", VLKEB, "vlkeb", 1),
    ("mmke/data_json/entity/eval.json", MMKE, "mmke", 1),
    ("mmke/data_json/visual/eval.json", MMKE, "mmke", 1),
    ("mmke/data_json/user/eval.json", MMKE, "mmke", 1),
    ("okedit/okedit.json", None, "okedit", 1),
    ("own/facts.jsonl", None, "jsonl", 2),
]


def asked(probes) -> list[tuple]:
    """Image file name, prompt and answer of probes."""
    return [(p.image_source and Path(p.image_source).name, p.prompt, p.answer) for p in probes]


def evqa_rows() -> list[dict]:
    return json.loads((FILES / "evqa/vqa_eval.json").read_text())


def picture(colour: int = 40, size: int = 9) -> PIL.Image.Image:
    return PIL.Image.new("RGB", (size, size), (colour, 10, 200))


def png_bytes(image: PIL.Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def write(path: Path, rows: list | str) -> Path:
    path.write_text(rows if isinstance(rows, str) else json.dumps(rows))
    return path


def write_lines(path: Path, rows: list[dict]) -> Path:
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


# ------------------------------------------------------------------ layouts


@pytest.mark.parametrize(("file", "root", "kind", "count"), LAYOUTS)
def test_each_layout_is_told_apart_and_every_image_opens(file, root, kind, count):
    samples = load_samples(FILES / file, image_root=root)
    assert (samples.format, len(samples), samples.template) == (kind, count, "plain")
    assert samples.source == str(FILES / file) and not samples.skipped
    check_images(samples, decode=True)
    for sample in samples:
        for _, probe in probes_of(sample):  # names that the evaluation knows
            assert probe.image is None or probe.image.mode == "RGB"
    same = load_samples(FILES / file, image_root=root, format=kind)
    assert list(same) == list(samples)


def test_evqa():
    sample = load_samples(FILES / "evqa/vqa_eval.json", image_root=EVQA)[1]
    name = "COCO_val2014_000000000002.png"
    assert asked([Probe(sample.request.image_source, sample.request.prompt, sample.request.target)]) == [
        (name, "How many boats are there?", "three")
    ]
    assert asked(sample.generality["t_gen"]) == [(name, "What is the number of boats?", "three")]
    assert asked(sample.generality["v_gen"]) == [(name, "How many boats are there?", "three")]
    assert "rephrased" in sample.generality["v_gen"][0].image_source
    assert asked(sample.locality["t_loc"]) == [(None, "when did the second world war end", "1945")]
    bird = ("COCO_val2014_000000000005.png", "What is the bird sitting on?", "branch")
    assert asked(sample.locality["m_loc"]) == [bird]
    assert (sample.id, sample.base_answer, sample.rephrases, sample.portability) == ("1", "2", [], {})


def test_target_that_the_model_already_gives_is_kept_and_noted():
    samples = load_samples(FILES / "evqa/vqa_eval.json", image_root=EVQA)
    assert [(note.index, note.field) for note in samples.notes] == [(2, "alt")]
    assert "nothing to correct" in samples.notes[0].reason and samples[2].request.target == "Cow"


def test_vlkeb_hops_are_asked_about_the_edited_image():
    plain, hops = load_samples(FILES / "vlkeb/eval_multihop.json", image_root=VLKEB)
    assert plain.portability == {}
    assert asked(hops.portability["1-hop"]) == [
        ("google_15.png", "In which state is the town in the picture?", "Kansas")
    ]
    assert [p.answer for p in hops.portability["2-hop"]] == ["Topeka"]


def test_vlkeb_one_hop_edits_are_companions_of_their_questions():
    (sample,) = load_samples(FILES / "vlkeb/eval_edit_onehop.json", image_root=VLKEB)
    assert sample.companions == [EditRequest(None, "In which state is Lenora?", "Ohio")]
    question = ("google_15.png", "In which state is the town in the picture?", "Ohio")
    assert asked(sample.portability["edit_onehop"]) == [question]


def test_mmke_entity_reads_both_spellings_of_answers():
    (sample,) = load_samples(FILES / "mmke/data_json/entity/eval.json", image_root=MMKE)
    assert sample.family == "entity_level"
    texts = [(None, "What is Ann Poe's profession?", "sculptor"), (None, "Where is Ann Poe from?", "Riga")]
    assert asked(sample.portability["t_rel"]) == texts
    for kind, image in (("m_rel", "Spider+2.png"), ("v_rel", "Spider+11.png")):
        assert asked(sample.portability[kind]) == [
            (image, "What is this person's profession?", "sculptor"),
            (image, "Where is this person from?", "Riga"),
        ]
    assert asked(sample.portability["1-hop"])[0][0] == "Spider+2.png"


def test_mmke_visual_has_an_image_of_its_own_for_hops_and_its_own_question_for_the_rephrased_image():
    (sample,) = load_samples(FILES / "mmke/data_json/visual/eval.json", image_root=MMKE)
    assert sample.base_answer is None  # empty in the file
    assert asked(sample.portability["m_rel"]) == [("thumb_1.png", "What does the person ask for?", "silence")]
    again = ("thumb_2.png", "What does the person ask for here?", "silence")
    assert asked(sample.portability["v_rel"]) == [again]
    hop = ("thumb_hop.png", "What should the others do?", "stop talking")
    assert asked(sample.portability["1-hop"]) == [hop]


def test_okedit():
    (sample,) = load_samples(FILES / "okedit/okedit.json")
    assert (sample.id, sample.base_answer) == ("ok-1", "poodle")
    assert [p.prompt for p in sample.generality["t_gen"]] == [
        "What breed of dog is it?",
        "This dog is of which breed?",
    ]
    assert [Path(p.image_source).name for p in sample.generality["v_gen"]] == ["1.png", "2.png", "3.png"]
    assert asked(sample.locality["hard_image"]) == [("4.png", "Which breed is this dog?", "basset")]


def test_own_file():
    laptop, chess = load_samples(FILES / "own/facts.jsonl")
    assert (laptop.id, laptop.base_answer, laptop.family, laptop.entity) == ("laptop", "dell", "brand", 7)
    assert laptop.rephrases == ["Name the brand of this computer."]
    assert asked(laptop.generality["t_gen"]) == [
        ("7.png", "Who made this computer?", "lenovo"),
        ("8.png", "Which brand built it?", "lenovo"),
    ]
    assert asked(laptop.generality["v_gen"]) == [
        ("8.png", "What brand is this computer?", "lenovo"),
        ("8.png", "Who is the maker?", "lenovo"),
    ]
    assert asked(laptop.locality["t_loc"]) == [(None, "Who wrote Hamlet?", "shakespeare")]
    assert asked(laptop.locality["hard_question"]) == [("7.png", "What colour is it?", None)]
    assert asked(laptop.locality["m_loc"]) == [("10.png", "What is this?", "a cup")]
    assert asked(laptop.locality["hard_image"]) == [
        ("9.png", "What brand is this computer?", "acer"),
        ("10.png", "What brand is this cup?", None),
    ]
    assert asked(laptop.portability["1-hop"]) == [("7.png", "In which country is the maker?", "china")]
    assert chess == EditSample(
        EditRequest(None, "Who chairs the chess club?", "Zoë Ångström"), {}, {}, id="1"
    )


def test_json_list_and_json_lines_hold_the_same_rows(tmp_path):
    rows = [json.loads(line) for line in (FILES / "own/facts.jsonl").read_text().splitlines()]
    listed = load_samples(write(tmp_path / "facts.json", rows), image_root=FILES / "own")
    assert list(listed) == list(load_samples(FILES / "own/facts.jsonl"))
    lines = write_lines(tmp_path / "vqa.jsonl", evqa_rows())
    assert list(load_samples(lines, image_root=EVQA)) == list(
        load_samples(FILES / "evqa/vqa_eval.json", image_root=EVQA)
    )


def test_byte_order_mark_windows_lines_and_blank_lines_are_no_fault(tmp_path):
    path = tmp_path / "facts.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"prompt": "a?", "target": "b"}\r\n\r\n{"prompt": "c?", "target": "d"}\r\n'
    )
    assert [s.request.target for s in load_samples(path)] == ["b", "d"]


# ------------------------------------------------------------------ templates


def prompts(file: str, template: str | None, root=EVQA) -> tuple[str, ...]:
    sample = load_samples(FILES / file, image_root=root, prompt_template=template)[0]
    probes = [sample.generality["t_gen"], sample.locality["t_loc"], sample.locality["m_loc"]]
    return (sample.request.prompt, *(p[0].prompt for p in probes))


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (None, ("Is the kite red?", "Would you call the kite red?", "who wrote the play hamlet",
                "What does this grow from?")),
        ("raw", ("Is the kite red?", "Would you call the kite red?", "nq question: who wrote the play hamlet",
                 "What does this grow from?")),
        ("dualedit", ("Is the kite red? The answer is:", "Would you call the kite red? The answer is:",
                      "nq question: who wrote the play hamlet?", "What does this grow from? The answer is:")),
        ("easyedit", ("Question: Is the kite red? Short answer: ",
                      "Question: Would you call the kite red? Short answer: ",
                      "nq question: who wrote the play hamlet",
                      "Question: What does this grow from? Short answer: ")),
        ("Q: {prompt}", ("Q: Is the kite red?", "Q: Would you call the kite red?",
                         "Q: who wrote the play hamlet", "Q: What does this grow from?")),
    ],
)  # fmt: skip
def test_wordings_of_the_papers(template, expected):
    assert prompts("evqa/vqa_eval.json", template) == expected


def test_captions_are_never_asked():
    for template in ("dualedit", "easyedit"):
        edit, rephrased, _, unrelated = prompts("eic/caption_eval_edit.json", template, root=None)
        assert (edit, rephrased) == ("a photo of", "a picture of")
        assert unrelated == TEMPLATES[template].image.replace(
            "{prompt}", "What sport can you play with this?"
        )


def test_braces_in_a_question_are_no_fault():
    rows = [{"prompt": "What is {x} in f{0}?", "target": "a {b}"}]
    assert from_records(rows, prompt_template="{prompt} A:")[0].request.prompt == "What is {x} in f{0}? A:"


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


OWN = {"prompt": "What brand?", "target": "lenovo"}
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
    (note,) = from_records([{**OWN, "annotator": "kim", "license": None}]).notes
    assert note[:3] == ("records", 0, "annotator")


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
        ('[1, "a"]', "no row is a JSON object"),
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
    assert "not JSON at column" in samples.skipped[1].reason


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


def test_no_image_is_opened_until_it_is_asked_for_and_none_is_kept(monkeypatch):
    opened = []
    real = PIL.Image.open

    def watched(file, *rest, **named):
        opened.append(file)
        return real(file, *rest, **named)

    monkeypatch.setattr(PIL.Image, "open", watched)
    loaded = [load_samples(FILES / file, image_root=root) for file, root, _, _ in LAYOUTS]
    check_images(loaded[0])
    assert overlap(loaded[1], loaded[0]).counts["m_loc"] == (3, 3)
    assert "COCO_val2014_000000000001.png" in repr(loaded[0][0])
    again = pickle.loads(pickle.dumps(loaded[0].samples))
    assert again == loaded[0].samples and again[0] != again[1]
    assert opened == []
    request = loaded[0][0].request
    first, second = request.image, request.image
    assert first.size == (12, 12) and first is not second and len(opened) == 2
    assert request.image_source == opened[0] and first not in vars(request).values()


def test_given_pictures_stay_as_they_are():
    image = picture()
    probe = Probe(image, "a?", "b")
    assert probe.image is image and probe.image_source is image
    assert probe == Probe(picture(), "a?", "b") and probe != Probe(picture(41), "a?", "b")
    assert Probe(None, "a?").image is None and hash(Probe("a.png", "a?")) == hash(Probe("a.png", "a?"))
    assert "9x9" in repr(probe) and "'a.png'" in repr(EditRequest(Path("a.png"), "a?", "b"))
    with pytest.raises(AttributeError):
        probe.image = None
    with pytest.raises(ValueError, match="image is a int"):
        Probe(3, "a?")


def test_paths_stay_valid_when_the_current_folder_changes(tmp_path, monkeypatch):
    monkeypatch.chdir(FILES / "own")
    samples = load_samples("facts.jsonl")
    monkeypatch.chdir(tmp_path)
    assert samples[0].request.image.size == (12, 12)


# ------------------------------------------------------------------ records


def test_records_of_tables_with_pictures_and_bytes():
    image, other = picture(1), picture(2)
    rows = [
        {**OWN, "image": {"bytes": png_bytes(image), "path": "a.png"}, "other_images": [other],
         "keep": {"prompt": ["What colour?", "Why?"], "image": [png_bytes(image), None], "answer": ["red", None]},
         "rephrases": None},
        {**OWN, "image": {"bytes": None, "path": str(FILES / "own/photos/7.png")}, "id": 8},
    ]  # fmt: skip
    first, second = from_records(iter(rows), source="hub/facts")
    assert first.request.image.tobytes() == image.tobytes()
    assert first.generality == {"v_gen": [Probe(other, OWN["prompt"], OWN["target"])]}
    assert asked(first.locality["t_loc"]) == [(None, "Why?", None)]
    assert [p.prompt for p in first.locality["hard_question"]] == ["What colour?"]
    assert second.id == "8" and second.request.image.size == (12, 12)
    with pytest.raises(ValueError, match="hub/facts, row 0, field 'image' .*neither bytes nor a path"):
        from_records([{**OWN, "image": {"bytes": None, "path": None}}], source="hub/facts")
    with pytest.raises(ValueError, match="records, row 1 is a list"):
        from_records([OWN, [1]])


def test_limit_counts_samples_not_rows():
    rows = [{**OWN, "target": ""}, OWN, OWN, {"prompt": 3}]
    samples = from_records(rows, skip_bad=True, limit=2)
    assert (len(samples), samples.rows, len(samples.skipped)) == (2, (1, 2), 1)
    part = samples[1:]
    assert (len(part), part.rows, part.format) == (1, (2,), "jsonl")


# ------------------------------------------------------------------ the way back


@pytest.mark.parametrize(("file", "root", "kind", "count"), LAYOUTS)
def test_what_is_written_reads_back_equal(tmp_path, file, root, kind, count):
    samples = load_samples(FILES / file, image_root=root, prompt_template="raw")
    again = load_samples(to_jsonl(samples, tmp_path / "all" / "facts.jsonl"))
    assert again.format == "jsonl" and list(again) == list(samples)
    assert [f.name for f in (tmp_path / "all").iterdir()] == ["facts.jsonl"]  # paths, not copies


def test_pictures_are_written_once_beside_the_file(tmp_path):
    image, other = picture(1), picture(2, 5)
    sample = EditSample(
        EditRequest(image, "What?", "b"),
        {"t_gen": [Probe(image, "Which?", "b")], "v_gen": [Probe(png_bytes(other), "What?", "b")]},
        {"hard_question": [Probe(picture(1), "Why?", "c")], "t_loc": [Probe(None, "When?")]},
        ["Name it."], "kind", 4, id="x", base_answer="a",
    )  # fmt: skip
    path = to_jsonl([sample, sample], tmp_path / "facts.jsonl")
    assert len(list((tmp_path / "facts_images").iterdir())) == 2
    assert all("facts_images/" in line for line in path.read_text().splitlines())
    with pytest.raises(ValueError, match="line 2, field 'id'"):
        load_samples(path)
    again = load_samples(path, limit=1)[0]
    assert again.request.image.tobytes() == image.tobytes()
    assert again.generality["v_gen"][0].image.tobytes() == other.tobytes()
    assert (again.rephrases, again.family, again.entity, again.id) == (["Name it."], "kind", 4, "x")
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    assert load_samples(moved / "facts.jsonl", limit=1)[0].request.image.size == (9, 9)


def test_what_cannot_be_written_is_refused_and_leaves_no_file(tmp_path):
    request = EditRequest(picture(), "What?", "b")
    for generality, message in (
        ({"near": [Probe(None, "a?")]}, r"samples\[0\] has probes named \['near'\]"),
        ({"t_gen": [Probe(None, "a?")]}, r"samples\[0\] asks 'a\?' without an image"),
    ):
        with pytest.raises(ValueError, match=message):
            to_jsonl([EditSample(request, generality, {})], tmp_path / "facts.jsonl")
    assert not (tmp_path / "facts.jsonl").exists()


# ------------------------------------------------------------------ overlap


def test_overlap_of_splits():
    train, test = (
        load_samples(FILES / f"evqa/vqa_{split}.json", image_root=EVQA) for split in ("train", "eval")
    )
    found = overlap(train, test)
    assert found.counts == {
        "facts": (1, 3), "questions": (1, 3), "images": (2, 3), "images_anywhere": (2, 3), "m_loc": (3, 3),
        "m_loc_images": (3, 3), "t_loc": (1, 3),
    }  # fmt: skip
    assert found.to_dict()["m_loc"] == {"shared": 3, "of": 3} and "m_loc 3/3" in str(found)
    assert overlap([], test).counts["m_loc"] == (0, 3)


def test_overlap_by_content_sees_through_copies(tmp_path):
    picture(5).save(tmp_path / "a.png")
    picture(5).save(tmp_path / "b.png", compress_level=0)
    train, test = (
        [EditSample(EditRequest(tmp_path / name, "a?", "b"), {}, {})] for name in ("a.png", "b.png")
    )
    assert overlap(train, test).counts["images"] == (0, 1)
    assert overlap(train, test, by="content").counts["images"] == (1, 1)


# ------------------------------------------------------------------ on to the model


def test_loaded_probes_are_model_inputs():
    from dualedit.demo.vlm import build_processor

    prompter = Prompter(build_processor())
    laptop, chess = load_samples(FILES / "own/facts.jsonl")
    questions = [(p.image, p.prompt) for _, p in (*probes_of(laptop), *probes_of(chess))]
    inputs = prompter.inputs(questions)
    assert inputs["input_ids"].shape[0] == len(questions) == 11
    assert inputs["pixel_values"].shape[0] == sum(image is not None for image, _ in questions) == 9
    assert inputs["pixel_values"].std() > 0


def test_formats_are_the_documented_ones():
    assert FORMATS == ("evqa", "eic", "vlkeb", "mmke", "okedit", "jsonl")
