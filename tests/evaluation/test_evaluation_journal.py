"""Records of an evaluation: what is in them, and going on after a stop."""

import json

import pytest
from dualedit.evaluation import Journal, Plan, evaluate
from scripted_method import chain, chained

ARGUMENTS = {"--seed": 0, "--edits": (4,), "--scoring": ["free"]}
PLAN = Plan("sequential", asked=3, costs=False)


class Stop(BaseException):
    """As Ctrl-C: nobody catches it."""


def _rows(method, file, arguments=ARGUMENTS, plan=PLAN):
    journal = Journal(file, arguments)
    results = evaluate(method, chain(4), plan, journal=journal, progress=False)
    journal.close()
    return [result.row.to_dict() for result in results]


def _stopped(file, after, plan=PLAN):
    """A run that is stopped while it asks for the time after the given number of samples."""
    journal = Journal(file, ARGUMENTS)
    write, written = journal.write, []

    def counted(key, unit):
        if len(written) == after:
            raise Stop
        written.append(unit)
        write(key, unit)

    journal.write = counted
    with pytest.raises(Stop):
        evaluate(chained(4, 2), chain(4), plan, journal=journal, progress=False)
    journal._out.close()


def test_a_line_a_sample_with_everything_that_was_asked(tmp_path):
    file = tmp_path / "records.jsonl"
    _rows(chained(4), file)
    head, *lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert head == {"dualedit_eval": 1, "arguments": {**ARGUMENTS, "--edits": [4]}}
    assert [(line["phase"], line["sample"]) for line in lines] == [
        (phase, place) for phase in ("after", "end") for place in (0, 2, 3)
    ]
    assert {(line["method"], line["protocol"], line["edits"]) for line in lines} == {
        ("scripted", "sequential", 4)
    }
    probe = lines[0]["probes"][2]
    assert probe["metric"] == "hard_image" and probe["prompt"] == "who ?" and probe["image"] == "<RGB 2x2>"
    assert (probe["expected"], probe["before"], probe["answer"], probe["correct"]) == (*("old 1",) * 3, True)
    assert (lines[0]["target"], lines[0]["family"]) == ("new 0", "who")


@pytest.mark.parametrize("protocol", ["single", "batch", "sequential"])
@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_stopped_run_goes_on_where_it_was(protocol, after, tmp_path):
    plan = Plan(protocol, asked=3, costs=False)
    whole = _rows(chained(4, 2), tmp_path / "whole.jsonl", plan=plan)
    _stopped(tmp_path / "part.jsonl", after, plan)
    method = chained(4, 2)
    assert _rows(method, tmp_path / "part.jsonl", plan=plan) == whole
    assert (tmp_path / "part.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()
    batches = sum(entry[0] == "answers" for entry in method.log)  # two a sample, before and after
    left = {"single": 4 - after, "batch": 3 - after}
    # A sequence asks its samples again at the end, so it needs all of their earlier answers.
    assert batches == (4 * left[protocol] if protocol in left else 2 * 3 + 2 * (6 - after))


def test_a_finished_run_is_read_and_nothing_is_asked(tmp_path):
    first = _rows(chained(4), tmp_path / "r.jsonl")
    method = chained(4)
    assert _rows(method, tmp_path / "r.jsonl") == first
    assert method.log == []


def test_a_line_cut_short_is_asked_again(tmp_path):
    file = tmp_path / "r.jsonl"
    first = _rows(chained(4), file)
    text = file.read_text()
    file.write_text(text[:-40])
    assert _rows(chained(4), file) == first
    assert file.read_text() == text
    file.write_text(text[:20])  # not even the first line
    assert _rows(chained(4), file) == first
    assert file.read_text() == text


def test_other_arguments_are_refused_and_named(tmp_path):
    file = tmp_path / "r.jsonl"
    _rows(chained(4), file)
    before = file.read_text()
    with pytest.raises(ValueError, match=r"r.jsonl was begun .*--seed 0, now 7\).* or another file"):
        Journal(file, {**ARGUMENTS, "--seed": 7})
    with pytest.raises(ValueError, match=r"--model None, now 'x'"):
        Journal(file, {**ARGUMENTS, "--model": "x"})
    assert file.read_text() == before


@pytest.mark.parametrize("text", ["a table\n1 2\n", '{"rows": []}\n', "[1]\n", '{"dualedit_eval": 9}\n'])
def test_another_file_is_left_alone(text, tmp_path):
    file = tmp_path / "r.jsonl"
    file.write_text(text)
    with pytest.raises(ValueError, match="holds something else"):
        Journal(file, ARGUMENTS)
    assert file.read_text() == text


def test_a_damaged_line_is_named(tmp_path):
    file = tmp_path / "r.jsonl"
    _rows(chained(4), file)
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join([*lines[:2], "{oops\n", *lines[3:]]))
    with pytest.raises(ValueError, match="line 3 is damaged"):
        Journal(file, ARGUMENTS)


class Process:
    """One of two processes, run one after the other: what the other has is handed over by the test."""

    count = 2

    def __init__(self, index):
        self.index = index

    def gather(self, items):
        return items

    def wait(self):
        pass


def test_processes_share_the_samples_and_the_file(tmp_path):
    """Each writes a part; the first one puts them together, whoever was stopped goes on with both."""
    whole = _rows(chained(4), tmp_path / "alone.jsonl")
    file = tmp_path / "r.jsonl"
    journals = [Journal(file, ARGUMENTS, Process(index)) for index in (0, 1)]
    units = []
    for index, journal in enumerate(journals):
        (found,) = evaluate(
            chained(4), chain(4), PLAN, journal=journal, processes=Process(index), progress=False
        )
        units.append({record["sample"] for record in found.records})
    assert units == [{0, 3}, {2}]  # in turn, of those that are asked about: 0, 2, 3
    for journal in reversed(journals):
        journal.close()
    assert [f.name for f in tmp_path.iterdir() if f.name.startswith(("r.", ".r"))] == ["r.jsonl"]
    assert sorted(file.read_text().splitlines()) == sorted(
        (tmp_path / "alone.jsonl").read_text().splitlines()
    )
    method = chained(4)
    assert _rows(method, file) == whole and method.log == []


def test_parts_of_a_stopped_run_of_many_are_found_by_one(tmp_path):
    whole = _rows(chained(4), tmp_path / "alone.jsonl")
    file = tmp_path / "r.jsonl"
    journal = Journal(file, ARGUMENTS, Process(1))  # the first process never came to write anything
    evaluate(chained(4), chain(4), PLAN, journal=journal, processes=Process(1), progress=False)
    journal._out.close()
    assert (tmp_path / "r.jsonl.part1").is_file()
    assert _rows(chained(4), file) == whole
    assert [f.name for f in tmp_path.iterdir() if f.name.startswith("r.")] == ["r.jsonl"]
