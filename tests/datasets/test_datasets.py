"""Loading facts: each data set's real layout, prompt templates, lazy images, and the way back to a file."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import PIL.Image
import pytest
from dataset_files import (
    EVQA,
    FILES,
    LAYOUTS,
    MMKE,
    OWN,
    VLKEB,
    asked,
    evqa_rows,
    picture,
    png_bytes,
    write,
    write_lines,
)
from dualedit.data import EditRequest, EditSample, Probe
from dualedit.datasets import FORMATS, TEMPLATES, check_images, from_records, load_samples, overlap, to_jsonl
from dualedit.evaluation.single import probes_of
from dualedit.models.prompting import Prompter

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


# ------------------------------------------------------------------ images


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
         "keep": {"prompt": ["What colour?", "Why?"], "image": [png_bytes(image), None],
                  "answer": ["red", None]},
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
    from dualedit.toy.model import build_processor

    prompter = Prompter(build_processor())
    laptop, chess = load_samples(FILES / "own/facts.jsonl")
    questions = [(p.image, p.prompt) for _, p in (*probes_of(laptop), *probes_of(chess))]
    inputs = prompter.inputs(questions)
    assert inputs["input_ids"].shape[0] == len(questions) == 11
    assert inputs["pixel_values"].shape[0] == sum(image is not None for image, _ in questions) == 9
    assert inputs["pixel_values"].std() > 0


def test_formats_are_the_documented_ones():
    assert FORMATS == ("evqa", "eic", "vlkeb", "mmke", "okedit", "jsonl")


def test_documented_example_loads():
    import dualedit.datasets

    text = dualedit.datasets.__doc__
    row = json.loads(text[text.index("{") : text.index("]}") + 2])
    (sample,) = from_records([row], verify_images=False)
    assert sample.request.target == "lenovo" and len(sample.generality) == 2
    assert [p.answer for p in sample.locality["hard_image"]] == ["acer"]
    assert [p.answer for p in sample.locality["t_loc"]] == ["shakespeare"]
