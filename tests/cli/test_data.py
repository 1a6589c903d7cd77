"""`dualedit data`: a build with its page and decisions, what a check finds, and the schema of the files."""

import json
import re

import pytest
from dualedit.cli import main
from dualedit.data import EditRequest, EditSample, Probe
from dualedit.datasets import load_samples, to_jsonl
from dualedit.datasets.build import check_facts, facts_schema, read_decisions, stats_of
from dualedit.toy.samples import edit_samples
from dualedit.toy.world import World
from jsonschema import Draft202012Validator
from stub_endpoint import serving


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Two facts of the embedded world, the page, and what was printed."""
    folder = tmp_path_factory.mktemp("built")
    out, page = folder / "facts.jsonl", folder / "review.html"
    assert main(["data", "build", "toy", "--limit", "2", "--out", str(out), "--review", str(page)]) == 0
    return folder, load_samples(out), page.read_text()


def names(page):
    return re.findall(r'<input type=checkbox checked name="([^"]+)"', page)


def test_decisions_are_read_back(built, capsys):
    folder, samples, page = built
    ticks = names(page)
    assert {"0", "1"} <= set(ticks) and len(ticks) == 2 + sum(
        len(probes) for s in samples for part in (s.generality, s.locality) for probes in part.values()
    )
    rejected = ["1", next(name for name in ticks if name.startswith("0/hard_image/"))]
    decisions = folder / "decisions.json"
    decisions.write_text(json.dumps({"dualedit_decisions": 1, "build": "x", "rejected": rejected}))
    out = folder / "facts.jsonl"
    assert (
        main(["data", "build", "toy", "--limit", "2", "--out", str(out), "--decisions", str(decisions)]) == 0
    )
    assert "1 of 2 facts are accepted" in capsys.readouterr().out
    (kept,) = load_samples(out)
    assert len(kept.locality["hard_image"]) == len(samples[0].locality["hard_image"]) - 1
    assert kept.generality == samples[0].generality
    decisions.write_text(json.dumps({"dualedit_decisions": 1, "rejected": ["0/hard_image/another"]}))
    with pytest.raises(ValueError, match="decides about '0/hard_image/another'"):
        read_decisions(decisions, samples)
    decisions.write_text("[]")
    with pytest.raises(ValueError, match="no file of decisions"):
        read_decisions(decisions, samples)


def test_what_it_would_cost(tmp_path, capsys):
    picture = edit_samples(World(0), "train", 1)[0].request.image
    picture.save(tmp_path / "a.png")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"image": "a.png", "question": "What is it?", "new_answer": "x"}) + "\n")
    with serving() as server:
        arguments = ["data", "build", str(rows), "--out", str(tmp_path / "f.jsonl"), "--model", "none"]
        arguments += ["--endpoint", server.url, "--price", "1000000,0", "--other-images", "0"]
        arguments += ["--look-alikes", "0", "--unrelated-images", "0"]
        assert main([*arguments, "--dry-run"]) == 0
        out = capsys.readouterr().out
        tokens = int(re.search(r"1 rows; endpoint default: 3 requests, about (\d+) tokens in", out)[1])
        assert f"about {tokens}.00 to pay" in out and server.requests == []
        assert main(arguments) == 0
        assert len(server.requests) == 3
        assert main([*arguments, "--dry-run"]) == 0
        assert "3 results are cached" in capsys.readouterr().out
    (sample,) = load_samples(tmp_path / "f.jsonl")
    assert len(sample.generality["t_gen"]) == 4 and len(sample.rephrases) == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["build", "gone.jsonl"], "gone.jsonl: pass --model MODEL"),
        (["build", "gone.jsonl", "--model", "none"], "gone.jsonl"),
        (["build", "toy", "--limit", "0"], "--limit 0"),
        (["build", "toy", "--price", "much"], "--price much"),
        (["build", "toy", "--rephrases", "-1"], "rephrases=-1"),
        (["build", "toy", "--limit", "1", "--unlabelled", ".", "--model", "none"], "pass --model"),
        (["check", "gone.jsonl"], "gone.jsonl"),
    ],
)
def test_what_is_refused(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["data", *arguments]) == 2
    assert said in capsys.readouterr().err


# ---------------------------------------------------------------------- check and stats


def sample(**more):
    fact = {"id": "a", "base_answer": "acer", "rephrases": ["Who made it?"]} | more
    image = fact.pop("image", None)
    request = EditRequest(image, fact.pop("prompt", "What brand is it?"), fact.pop("target", "lenovo"))
    generality, locality = fact.pop("generality", {}), fact.pop("locality", {})
    return EditSample(request, generality, locality, fact.pop("edit", fact.pop("rephrases")), **fact)


def found(*samples, test=None):
    return [str(one) for one in check_facts(samples, test)]


def test_a_built_file_has_nothing_wrong(built):
    findings = check_facts(built[1])
    assert not [one for one in findings if one.wrong]


@pytest.mark.parametrize(
    ("samples", "said"),
    [
        ([sample(target="Acer.")], "the target 'Acer.' is what the model answers before"),
        (
            [sample(generality={"t_gen": [Probe(None, "what brand is it")]})],
            "a rephrase is the question itself",
        ),
        ([sample(generality={"t_gen": [Probe(None, "Whose?")] * 2})], "the rephrase 'whose' comes twice"),
        ([sample(generality={"t_gen": [Probe(None, "who made it")]})], "the test would be known"),
        ([sample(locality={"hard_question": [Probe(None, "What brand is it?")]})], "it must not stay"),
        ([sample(), sample(id="b", target="dell")], "asks what row 0 asks, with another target"),
        ([sample(), sample(id="b")], "asks what row 0 asks, again"),
        ([sample(image="gone.png")], "image 'gone.png' is not there"),
    ],
)
def test_what_is_wrong(samples, said):
    told = found(*samples)
    assert told[0].startswith("WRONG") and any(said in line and line.startswith("WRONG") for line in told)


def test_what_is_missing():
    told = found(sample(rephrases=[], locality={"t_loc": [Probe(None, "Who?")]}))
    assert all(line.startswith("missing  the row") for line in told)
    assert any("rephrases: nothing tests" in line for line in told)
    assert any("answer of questions in keep" in line for line in told)
    assert any("edit_rephrases" in line for line in told)


def test_training_and_test_overlap(tmp_path, capsys):
    samples = edit_samples(World(0), "train", 4)
    first = to_jsonl(samples[:3], tmp_path / "a.jsonl")
    second = to_jsonl(samples[2:], tmp_path / "b.jsonl")
    assert main(["data", "check", str(first)]) == 0
    assert main(["data", "check", str(first), "--test", str(second)]) == 1
    assert "WRONG  training and test: 1 of 2 facts of the test are in both" in capsys.readouterr().out


def test_counts(built, capsys):
    folder, samples, _ = built
    told = stats_of(samples)
    assert told["facts"] == len(samples) and told["probes"]["t_gen"]["all"] == sum(
        len(s.generality["t_gen"]) for s in samples
    )
    assert main(["data", "stats", str(folder / "facts.jsonl"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["with a picture"] >= 1


# ---------------------------------------------------------------------- the schema

VALID = Draft202012Validator(facts_schema())


def test_the_schema_is_one_and_takes_what_is_written(built, tmp_path, capsys):
    Draft202012Validator.check_schema(facts_schema())
    more = to_jsonl(edit_samples(World(0), "train", 2), tmp_path / "more.jsonl")
    for file in (built[0] / "facts.jsonl", more):
        for line in file.read_text().splitlines():
            VALID.validate(json.loads(line))
    assert main(["data", "schema"]) == 0
    assert json.loads(capsys.readouterr().out) == facts_schema()


@pytest.mark.parametrize(
    "wrong",
    [
        {"prompt": " "}, {"target": None}, {"keep": [{"answer": "x"}]},
        {"keep": [{"prompt": "x", "kind": "other"}]}, {"rephrases": "who?"}, {"rephrases": [""]},
        {"other_images": [None]}, {"portability": [{"prompt": "x"}]}, {"entity": "seven"}, {"id": True},
    ],
)  # fmt: skip
def test_the_schema_and_the_loader_refuse_the_same(wrong, tmp_path):
    row = {"prompt": "Who?", "target": "me"}
    VALID.validate(row)
    file = tmp_path / "facts.jsonl"
    file.write_text(json.dumps(row | wrong) + "\n")
    assert not VALID.is_valid(row | wrong)
    with pytest.raises(ValueError):
        load_samples(file, "jsonl")


def test_the_schema_knows_every_field():
    from dualedit.datasets.own import KEYS, KINDS

    schema = facts_schema()
    assert set(schema["properties"]) == set(KEYS)
    assert set(schema["$defs"]["kept"]["properties"]["kind"]["enum"]) == {*KINDS, None}
