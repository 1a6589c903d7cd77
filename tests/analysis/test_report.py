"""`dualedit report`: figures by hand, what is drawn, what is shown first, and files that are damaged."""

import base64
import io
import json
import math
import random
import re

import PIL.Image
import pytest
from dualedit import EditRequest, EditSample, Probe
from dualedit.analysis import markdown_tables, read_results, settings_of
from dualedit.analysis.drawing import distances_drawing
from dualedit.analysis.gate import cause_of, reach_of, worst_first
from dualedit.analysis.pictures import sources_of
from dualedit.cli import main
from dualedit.cli.report import samples_again
from dualedit.datasets import to_jsonl
from dualedit.evaluation import Journal, Plan, evaluate
from dualedit.toy.samples import edit_sample, edit_samples
from dualedit.toy.world import World
from report_pages import HEAD, NASTY, check_page, gateless, page_of, probe, unit, words_of, written
from scripted_method import chain, chained


@pytest.fixture
def two_facts(tmp_path):
    """Of one fact everything is right; of the other a new picture and a look-alike are wrong."""
    good = [probe(name) for name in ("rel", "t_gen", "v_gen", "hard_image", "t_loc", "m_loc")]
    bad = [
        probe("rel"), probe("t_gen"), probe("v_gen", False, fired=False, distance=1.5),
        probe("hard_image", False, fired=True, distance=0.5), probe("t_loc"), probe("m_loc"),
    ]  # fmt: skip
    return written(tmp_path / "r.jsonl", unit(0, good), unit(1, bad, family="mascot"))


# ---------------------------------------------------------------------- figures


def test_the_table_by_hand(two_facts):
    text = markdown_tables(read_results(two_facts))
    assert text.startswith("**One edit at a time, 2 facts. Free generation, exact match**, % [95% interval]:")
    head, _, row = (line for line in text.splitlines() if line.startswith("|"))
    assert head == "| | Avg | HM | Rel | T-Gen | V-Gen | T-Loc | M-Loc | Hard image |"
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert [cell.split(" [")[0] for cell in cells] == [
        "DualEdit", "90.0", "60.0", "100.0", "100.0", "50.0", "100.0", "100.0", "50.0",
    ]  # fmt: skip
    # Wilson of one of two: 0.5 ± z sqrt(0.125 + z²/16) / (1 + z²/2); of two of two: from 2 / (2 + z²).
    assert cells[5] == "50.0 [9.5, 90.5]" and cells[3] == "100.0 [34.2, 100.0]"
    page = words_of(page_of(two_facts))
    assert "50.0 [9.5, 90.5]" in page and "0.5 s 2 KiB" in page


def test_many_methods_come_few_to_a_table_on_a_phone(two_facts, tmp_path):
    """Methods are columns, and metrics lines, so that no table is cut; what sums up goes first."""
    content = [json.loads(line) for line in two_facts.read_text().splitlines()]
    names = ["dualedit", "balancedit", "ft-l", "lora"]
    lines = [content[0]] + [row | {"method": name} for name in names for row in content[1:]]
    (tmp_path / "many.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = page_of(tmp_path / "many.jsonl")
    wide, narrow = page.split("<div class=on-wide>")[1].split("<div class=on-narrow>")
    assert wide.count("<table>") == 1 and wide.count("<th scope=col>") == 4
    narrow = narrow.split("<h3")[0]
    assert [table.count("<th scope=col>") for table in narrow.split("<table>")[1:]] == [2, 2]
    for table in (*narrow.split("<table>")[1:], wide):
        rows = [row.split("<small>")[0] for row in table.split("<th scope=row>")[1:]]
        assert rows == ["Avg", "HM", "Rel", "T-Gen", "V-Gen", "T-Loc", "M-Loc", "Hard image"]
    assert "on-narrow" not in page_of(two_facts).split("</style>")[1]


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    folder = tmp_path_factory.mktemp("real")
    files = ["--records", str(folder / "r.jsonl"), "--json", str(folder / "rows.json")]
    assert main(["eval", "--methods", "dualedit", "--edits", "2", "--scoring", "all", *files]) == 0
    return folder


def test_records_give_the_rows_of_their_run(real):
    rows = json.loads((real / "rows.json").read_text())["rows"]
    (setting,) = settings_of(read_results(real))  # rows that say the same are not shown twice
    found = [row.to_dict() for own in setting.rows.values() for row in own]
    assert json.loads(json.dumps(found)) == rows
    (alone,) = settings_of(read_results(real / "rows.json"))
    assert alone.units == {} and list(alone.rows) == ["free", "teacher_forced", "published"]
    assert "Only rows of figures were given" in page_of(real / "rows.json")


def test_a_page_of_a_real_run_shows_the_pictures_that_were_asked_about(real, tmp_path, capsys):
    out = tmp_path / "new" / "page.html"
    assert main(["report", str(real), "--out", str(out), "--examples", "1"]) == 0
    assert "| DualEdit | " in (told := capsys.readouterr().out) and f"page: {out}" in told
    page = out.read_text()
    check_page(page)
    assert "sees the answer" in page and "picture not at hand" not in page
    shown = {base64.b64decode(data) for data in re.findall(r"png;base64,([\w+/=]+)", page)}
    pictures = {PIL.Image.open(io.BytesIO(data)).tobytes() for data in shown}
    first, second = edit_samples(World(0), "test", 2, 0)
    assert first.request.image.tobytes() in pictures and second.request.image.tobytes() not in pictures
    assert len(pictures) == 1 + 3 + 2 + 2 + 2  # the edit's, new ones, others, look-alikes, other questions'


def test_a_sample_can_be_drawn_without_the_others(seed):
    place = random.Random(seed).randrange(5)
    assert repr(edit_sample(World(1), "test", place, seed)) == repr(
        edit_samples(World(1), "test", 5, seed)[place]
    )
    one, other = edit_sample(World(1), "test", place, seed), edit_samples(World(1), "test", 5, seed)[place]
    assert one.request.image.tobytes() == other.request.image.tobytes()
    probes = [sample.locality["m_loc"][0].image.tobytes() for sample in (one, other)]
    assert probes[0] == probes[1]


def test_settings_are_compared_only_where_the_questions_are_the_same(tmp_path):
    world = {"--benchmark": "embedded", "--data": None, "--world-seed": 0, "--seed": 0, "--asked": 100}
    runs = (("a", "dualedit", 0), ("b", "lora", 0), ("c", "dualedit", 1), ("d", "lora", 0))
    for name, method, seed in runs:
        head = {"dualedit_eval": 1, "arguments": world | {"--seed": seed, "--methods": [method]}}
        written(tmp_path / f"{name}.jsonl", unit(0, [probe("rel")], method), head=head)
    first, second = settings_of(read_results(tmp_path))
    assert list(first.units) == ["dualedit", "lora", "lora (d)"]
    assert first.source == ["a.jsonl", "b.jsonl", "d.jsonl"] and list(second.units) == ["dualedit"]


def test_a_sequence_is_shown_as_it_is_at_its_end(tmp_path):
    file = tmp_path / "r.jsonl"
    journal = Journal(file, {"--seed": 0, "--asked": None})
    plan = Plan("sequential", costs=False)
    (result,) = evaluate(chained(4, 2), chain(4), plan, journal=journal, progress=False)
    journal.close()
    (setting,) = settings_of(read_results(file))
    ((row,),) = setting.rows.values()
    assert row.to_dict() == result.row.to_dict() | {"costs": row.costs}
    assert setting.late and {one["phase"] for one in setting.units["scripted"]} == {"end"}
    assert "Asked again after the last edit" in page_of(file)
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:-1]))  # stopped before the last question was asked again
    (setting,) = settings_of(read_results(file))
    assert not setting.late and setting.rows["free"][0].end is None
    assert "not everything has been asked again" in page_of(file)


# ---------------------------------------------------------------------- the gate


def test_distances_are_drawn_on_their_side_of_the_radius():
    edge = [probe("v_gen", distance=2.0, radius=2.0), probe("t_gen", distance=0.0, radius=2.0)]
    out = [probe("hard_image", distance=math.nextafter(2.0, 3) + 1e-6, radius=2.0)]
    far = [probe("t_loc", distance=math.inf, radius=2.0), probe("m_loc", distance=None, radius=None)]
    reach = reach_of([unit(0, [probe("rel", distance=5.0, radius=2.0), *edge, *out, *far])])
    assert reach.threshold == 2.0
    assert reach.ratios["related"] == [1.0, 0.0] and reach.ratios["unrelated"] == [math.inf]
    text = distances_drawing(reach, "M")
    line = float(re.search(r"class=radius x1=\"([\d.]+)\"", text)[1])
    bars = re.findall(r'class=(\w+) x="([\d.]+)" y="[\d.]+" width="([\d.]+)"', text)
    spans = {kind: [] for kind, _, _ in bars}
    for kind, x, width in bars:
        spans[kind].append((float(x), float(x) + float(width)))
    assert len(spans["related"]) == 2 and all(end <= line for _, end in spans["related"])
    assert all(start >= line for start, _ in spans["hard"])
    assert spans["unrelated"][0][0] > spans["hard"][0][1] and "farther" in text
    assert "radius 2" in text and "100% of 2 fire" in text and "0% of 1 fire" in text


def test_radii_of_their_own_are_drawn_as_shares():
    probes = [probe("v_gen", distance=1.0, radius=4.0), probe("t_gen", distance=3.0, radius=2.0)]
    reach = reach_of([unit(0, probes)])
    assert reach.threshold is None and reach.ratios["related"] == [0.25, 1.5]
    assert "its edit's radius" in distances_drawing(reach, "M")


def test_a_look_alike_that_was_edited_too_is_related():
    edited = probe("hard_image", expected="its own", distance=0.5)
    assert reach_of([unit(0, [edited])]).ratios["related"] == [0.5]


def test_no_gate_no_distances(tmp_path):
    units = [unit(i, gateless(probe("rel"), probe("t_loc", False)), "lora") for i in (0, 1)]
    assert reach_of(units) is None
    page = words_of(page_of(written(tmp_path / "r.jsonl", *units)))
    assert "How near questions lie" not in page and "It has no gate" in page
    assert "2 an answer changed that should not have" in page and "nearest edit:" not in page


@pytest.mark.parametrize(
    ("found", "cause"),
    [
        (probe("v_gen", False, fired=False), "missed"),
        (probe("v_gen", False), "answer"),
        (probe("v_gen", False, edit="else"), "other"),
        (probe("v_gen", False, edit_prompt="who ?"), "other"),
        (probe("portability", False, expected="follows"), "answer"),
        (probe("hard_image", False, fired=True), "caught"),
        (probe("hard_image", False), "changed"),
        (probe("hard_image", False, expected="its own"), "missed"),
        (probe("hard_image", False, expected="its own", fired=True), "other"),
        (probe("hard_image", False, expected="its own", fired=True, edit="its own"), "answer"),
        (gateless(probe("rel", False))[0], "not learned"),
        (gateless(probe("m_loc", False))[0], "spilled"),
    ],
)
def test_why_an_answer_is_wrong(found, cause):
    assert cause_of(found, unit(0, [found]), "rel ?") == cause


# ---------------------------------------------------------------------- examples


def test_worst_failures_first(two_facts, tmp_path):
    page = words_of(page_of(two_facts, examples=2))
    assert "2 of 12 answers are wrong" in page
    assert "1 no edit fired, and one should have 1 an edit fired that should not have" in page
    assert page.index("edit fact 1: mascot, 2 of 6 wrong") < page.index("edit fact 0: brand, 0 of 6 wrong")
    assert page.index("mascot 1 fact") < page.index("brand 1 fact")
    worst = page[page.index("edit fact 1") :]
    assert worst.index("new picture: new answer wrong") < worst.index("look-alike: as before wrong")
    assert worst.index("look-alike: as before wrong") < worst.index("same input: new answer as wanted")
    said = "wanted new, answers odd, before old No edit fired, and one should have."
    why = "nearest edit: rel ? new does not fire: distance 1.5 > radius 1"
    assert f"{said} {why}" in re.sub(r" ([,.])", r"\1", worst)
    assert "edit fact 0:" not in words_of(page_of(two_facts, examples=1))
    assert "What went wrong" not in words_of(page_of(two_facts, examples=0))


def test_partly_right_is_partly_wrong():
    """Token by token only: by how much is wrong, not by how many questions."""
    half, none = (
        [probe("rel", answer=None, correct=None, contains=None, teacher_forced=score)] for score in (0.5, 0.0)
    )
    assert [one["sample"] for one in worst_first([unit(0, half), unit(1, none)])] == [1, 0]


def test_token_accuracies_alone_make_a_page(tmp_path):
    unasked = {"answer": None, "correct": None, "contains": None}
    probes = [probe(name, **unasked, teacher_forced=0.5) for name in ("rel", "t_loc")]
    page = words_of(page_of(written(tmp_path / "r.jsonl", unit(0, probes))))
    assert "Teacher-forced token accuracy" in page and "Free generation" not in page
    assert "50% of its tokens right" in page


def test_nothing_wrong(tmp_path):
    page = words_of(page_of(written(tmp_path / "r.jsonl", unit(0, [probe("rel")]))))
    assert "Nothing wrong in these 1 questions." in page and "Show 1 fact" in page
    assert "By family" not in page  # there is one


def test_what_people_write_is_shown_as_they_wrote_it(tmp_path):
    told = probe("rel", False, prompt=NASTY, expected=NASTY, before=NASTY, answer=NASTY, edit=NASTY)
    bad = unit(0, [told, probe("t_loc", False, answer="")], NASTY, id=NASTY, family=NASTY, target=NASTY)
    other = unit(1, [probe("rel")], NASTY, family="another")
    head = {"dualedit_eval": 1, "arguments": {"--data": NASTY, "--seed": 0, "--model": NASTY}}
    file = written(tmp_path / "r.jsonl", bad, other, head=head)
    page = page_of(file, samples=lambda arguments: NASTY)
    assert NASTY not in page and page.count("<script") == 0
    words = words_of(page)
    assert words.count(NASTY) >= 10 and "(nothing)" in words
    (row,) = (line for line in markdown_tables(read_results(file)).splitlines() if "&lt;script" in line)
    assert len(re.findall(r"(?<!\\)\|", row)) == 4  # the name, Rel and T-Loc: three cells


# ---------------------------------------------------------------------- pictures


def test_pictures_by_their_paths_small_and_once(tmp_path):
    photo, logo = tmp_path / "it's a photo.jpg", tmp_path / "logo.png"
    PIL.Image.effect_noise((900, 600), 80).convert("RGB").save(photo)
    PIL.Image.new("RGB", (20, 10), (1, 2, 3)).save(logo)
    probes = [probe("rel", image=repr(str(photo))), probe("t_gen", image=repr(str(photo))),
              probe("m_loc", image=repr(str(logo))), probe("t_loc"),
              probe("hard_image", image=repr(str(tmp_path / "no.png"))),
              probe("v_gen", image="<RGB 48x48>")]  # fmt: skip
    page = page_of(written(tmp_path / "r.jsonl", unit(0, probes)))
    kinds = re.findall(r"data:image/(\w+);base64,([\w+/=]+)", page)
    assert sorted(kind for kind, _ in kinds) == ["png", "webp"]
    sizes = {PIL.Image.open(io.BytesIO(base64.b64decode(data))).size for _, data in kinds}
    assert sizes == {(224, 149), (20, 10)}
    assert page.count(">picture not at hand<") == 2 and page.count(">no picture<") == 1
    assert page.count('aria-label="the picture asked about"') == 4  # the fact itself, and three questions


def test_facts_of_ones_own_are_loaded_again(tmp_path):
    samples = edit_samples(World(0), "test", 2, 0)
    data = to_jsonl(samples, tmp_path / "facts.jsonl")
    arguments = {"--data": str(data), "--format": "auto", "--images": None, "--skip-bad": False, "--seed": 0,
                 "--edits": [2]}  # fmt: skip
    found = samples_again(arguments)
    assert isinstance(found, str) and "has changed since" in found  # no fingerprint
    from dualedit.cli.evaluate import CONTENTS, fingerprint

    found = samples_again(arguments | {CONTENTS: fingerprint(data)})
    assert [sample.request.target for sample in found] == [sample.request.target for sample in samples]
    data.write_text(data.read_text() + "\n")
    assert "has changed since" in samples_again(arguments | {CONTENTS: "0" * 16})
    data.unlink()
    assert "not there any more" in samples_again(arguments)
    assert "do not say which facts" in samples_again({})
    assert "benchmark that is not known" in samples_again({"--data": None, "--seed": 0, "--benchmark": "b"})


def test_a_sample_that_is_another_one_lends_no_pictures(real, tmp_path):
    lines = (real / "r.jsonl").read_text().splitlines()
    units = [json.loads(line) for line in lines[1:]]
    for found in units:
        found["sample"] = 1 - found["sample"]
    file = written(tmp_path / "r.jsonl", *units, head=json.loads(lines[0]))
    page = page_of(file, samples=samples_again)
    assert "base64" not in page and "picture not at hand" in page


@pytest.mark.parametrize(
    ("place", "change"),
    [(None, {"target": "else"}), (1, {"prompt": "whose ?"}), (1, {"metric": "v_gen"}), (1, {"image": None})],
)
def test_pictures_are_those_of_the_same_questions(place, change):
    edited, again, other = (PIL.Image.new("RGB", (4, 4), (n, 0, 0)) for n in (1, 2, 3))
    sample = EditSample(
        EditRequest(edited, "rel ?", "new"),
        {"t_gen": [Probe(again, "t_gen ?")]},
        {"hard_question": [Probe(other, "hard_question ?")]},
    )
    kinds = ("rel", "t_gen", "hard_question", "no_image", "same_image")
    probes = [probe(kind, image="<RGB 4x4>") for kind in kinds]
    probes[3] |= {"prompt": "rel ?", "image": None}
    probes[4] |= {"prompt": "hard_question ?"}
    asked = unit(0, probes)
    assert sources_of(asked, sample) == [edited, again, other, None, edited]
    (asked if place is None else probes[place]).update(change)
    assert sources_of(asked, sample) == [None] * 5


# ---------------------------------------------------------------------- files


def test_a_file_that_was_cut_is_read_up_to_there(two_facts, capsys, tmp_path):
    two_facts.write_bytes(two_facts.read_bytes() + '{"method": "dualedit", "id": "é'.encode()[:-1])
    out, table = tmp_path / "p.html", tmp_path / "t.md"
    assert main(["report", str(two_facts), "--out", str(out), "--markdown", str(table)]) == 0
    said = "r.jsonl ends within a line: its whole lines are used."
    assert said in words_of(out.read_text()) and said in table.read_text()
    assert "2 facts" in table.read_text()
    told = capsys.readouterr().out
    assert f"table: {table}" in told and "| Rel |" not in told


def test_a_run_that_has_not_ended_says_how_far_it_is(tmp_path):
    file = written(tmp_path / "r.jsonl", unit(0, [probe("rel")], edits=5))
    written(tmp_path / "r.jsonl.part1", unit(1, [probe("rel")], edits=5))
    page = words_of(page_of(file))
    assert "2 of 5 facts have been asked so far" in page and "the run has not ended" in page


BAD = {
    "missing.jsonl": (None, "missing.jsonl: no such file or folder"),
    "empty.jsonl": ("", "empty.jsonl is empty"),
    "notes.txt": ("milk\n", "notes.txt, line 1 is neither JSON of dualedit eval --json nor"),
    "facts.jsonl": ('{"prompt": "a"}\n{"prompt": "b"}\n', "facts.jsonl, line 2 is neither"),
    "other.json": ('{"machine": 1}', "other.json, line 1: no rows of figures"),
    "row.json": ('{"rows": [{"method": "a", "n": 1}]}', "row.json, row 1: metrics is missing"),
    "figure.json": (
        '{"rows": [{"method": "a", "n": 1, "metrics": {"rel": "x"}}]}',
        "figure.json, row 1, metrics: rel is 'x'",
    ),
    "version.jsonl": ('{"dualedit_eval": 9, "arguments": {}}\n', "line 1 was not written by this version"),
    "nothing.jsonl": (json.dumps(HEAD) + "\n", "nothing.jsonl holds no sample"),
    "damaged.jsonl": (json.dumps(HEAD) + '\n{"meth\n{}\n', "damaged.jsonl, line 2 is damaged"),
    "lacks.jsonl": (f"{json.dumps(HEAD)}\n{{}}\n", "lacks.jsonl, line 2: method is missing"),
    "list.jsonl": (f"{json.dumps(HEAD)}\n[]\n", "list.jsonl, line 2: it is no JSON object"),
    "metric.jsonl": (
        f"{json.dumps(HEAD)}\n{json.dumps(unit(0, [probe('rel') | {'metric': 'b'}]))}\n",
        "metric.jsonl, line 2: probes[0].metric is 'b'",
    ),
    "radius.jsonl": (
        f"{json.dumps(HEAD)}\n{json.dumps(unit(0, [probe('rel', radius='far')]))}\n",
        "radius.jsonl, line 2: probes[0].radius is 'far'",
    ),
    "letter.jsonl": (json.dumps(HEAD).encode() + b"\n\xff\n{}\n", "letter.jsonl, line 2 is not text"),
    "folder": ({"facts.jsonl": "{}\n", "own.json": "[]"}, "folder holds no results"),
}


@pytest.mark.parametrize("name", BAD)
def test_errors_fit_on_a_line(name, tmp_path, capsys):
    content, says = BAD[name]
    place = tmp_path / name
    if isinstance(content, dict):
        place.mkdir()
        for file, text in content.items():
            (place / file).write_text(text)
    elif content is not None:
        place.write_bytes(content if isinstance(content, bytes) else content.encode())
    out = tmp_path / "page.html"
    assert main(["report", str(place), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1 and "Traceback" not in error
    assert not out.exists()


def test_results_are_not_written_over(two_facts, tmp_path, capsys):
    before = two_facts.read_bytes()
    for options, says in (
        (["--out", str(two_facts)], "may hold results"),
        (["--markdown", str(tmp_path / "rows.json")], "may hold results"),
        (["--out", str(tmp_path)], "is a folder"),
        (["--out", str(tmp_path / "a"), "--markdown", str(tmp_path / "a")], "are both"),
        (["--examples", "-1"], "--examples -1"),
    ):
        assert main(["report", str(two_facts), *options]) == 2
        assert says in capsys.readouterr().err
    assert two_facts.read_bytes() == before and list(tmp_path.iterdir()) == [two_facts]
