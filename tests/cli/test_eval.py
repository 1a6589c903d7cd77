"""`dualedit eval`: what a user types, the rows and records that come back, and a run that was stopped."""

import json
import os
import socket
import subprocess
import sys

import pytest
from dualedit.cli import main, methods
from dualedit.cli.methods import Source, choose_methods, known_methods, open_methods
from dualedit.datasets import to_jsonl
from dualedit.evaluation import METRICS, MORE_PROBED, Method
from dualedit.toy.editors import EDITORS, VLM
from dualedit.toy.samples import edit_samples
from dualedit.toy.world import World

ALL = ["--scoring", "all", "--published-threshold", "0.9"]  # not fitted anew in every test


def rows_of(file):
    """Rows without what differs from run to run."""
    rows = json.loads(file.read_text())["rows"]
    return [{name: value for name, value in row.items() if name != "costs"} for row in rows]


def evaluate(tmp_path, name, *options):
    file = tmp_path / f"{name}.json"
    assert main(["eval", "--json", str(file), *options]) == 0
    return rows_of(file)


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """Two single edits of DualEdit in all scorings, with records."""
    folder = tmp_path_factory.mktemp("single")
    options = ["--methods", "dualedit", "--edits", "2", *ALL, "--records", str(folder / "r.jsonl")]
    return evaluate(folder, "rows", *options), folder, options


def test_three_scorings_side_by_side(single):
    rows, folder, _ = single
    assert [row["scoring"] for row in rows] == ["free", "teacher_forced", "published"]
    assert [row.get("sees_answer", False) for row in rows] == [False, False, True]
    for row in rows:
        assert (row["method"], row["protocol"], row["edits"], row["n"]) == ("dualedit", "single", 1, 2)
        assert set(row["metrics"]) == {*METRICS, *MORE_PROBED}
        measured = {name: value for name, value in row["metrics"].items() if name != "portability"}
        assert all(0 <= value <= 100 for value in measured.values())
        assert row["metrics"]["portability"] is None  # no such questions in the drawn world
    costs = json.loads((folder / "rows.json").read_text())["rows"][0]["costs"]
    assert all(costs[name] > 0 for name in ("edit_seconds", "edit_bytes", "answer_seconds"))


def test_records_say_what_was_asked_answered_and_routed(single):
    _, folder, _ = single
    lines = [json.loads(line) for line in (folder / "r.jsonl").read_text().splitlines()]
    assert len(lines) == 3 and lines[0]["arguments"]["--edits"] == [2]
    rel = lines[1]["probes"][0]
    assert rel["metric"] == "rel" and rel["fired"] is True and rel["distance"] <= rel["radius"]
    assert rel["edit"] == rel["expected"] == lines[1]["target"] and rel["edit_prompt"] == rel["prompt"]
    assert {"no_image", "same_image"} < {probe["metric"] for probe in lines[2]["probes"]}


def test_a_stopped_run_gives_the_same_table(single, tmp_path, capsys):
    rows, folder, options = single
    lines = (folder / "r.jsonl").read_text().splitlines(keepends=True)
    records = tmp_path / "r.jsonl"
    records.write_text("".join(lines[:2]) + lines[2][:100])  # killed within the second fact
    assert evaluate(tmp_path, "again", *options[:-1], str(records)) == rows
    again = [json.loads(line) for line in records.read_text().splitlines()]
    whole = [json.loads(line) for line in lines]
    assert [line.get("probes") for line in again] == [line.get("probes") for line in whole]
    assert main(["eval", *options[:-1], str(records), "--seed", "1"]) == 2
    assert "r.jsonl was begun by a run with other arguments (--seed 0, now 1)" in capsys.readouterr().err


def test_facts_of_ones_own_on_a_model_of_ones_own(single, tmp_path, capsys):
    """The benchmark's facts, written to a file, and its model as any other folder: the same figures."""
    rows, _, _ = single
    file = to_jsonl(edit_samples(World(0), "test", 2, 0), tmp_path / "facts.jsonl")
    own = ["--data", str(file), "--model", str(VLM), "--adapter", str(EDITORS / "dualedit")]
    own += ["--records", str(tmp_path / "asked.jsonl")]  # and no --methods, as in the README
    found = evaluate(tmp_path, "own", "--scoring", "free,teacher_forced", *own)
    assert found == rows[:2]
    assert main(["eval", *own[:-2], "--edits", "3"]) == 2
    assert "--edits 3: " in (error := capsys.readouterr().err) and "has 2 facts" in error


def test_sequential_rows_say_what_is_left_at_the_end(tmp_path):
    options = ["--methods", "balancedit", "--protocol", "sequential", "--edits", "3", "--asked", "2"]
    (row,) = evaluate(tmp_path, "rows", *options)
    assert (row["protocol"], row["edits"], row["n"]) == ("sequential", 3, 2)
    assert 0 <= row["metrics"]["retention"] <= 100
    assert set(row["end"]["metrics"]) == {*METRICS, *MORE_PROBED}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--scoring", "best"], "--scoring best: choose from free, teacher_forced, published, or all"),
        (["--scoring", ""], "--scoring : choose from"),
        (["--protocol", "batched"], "choose one of single, batch, sequential"),
        (["--benchmark", "evqa"], "--benchmark evqa: choose one of embedded"),
        (["--methods", "serac2"], "--methods serac2: choose from dualedit, balancedit"),
        (["--methods", ""], "--methods : choose from"),
        (["--methods", "dualedit,dualedit"], "name each method once"),
        (["--model", "m"], "--model: the embedded benchmark is about the embedded model; pass --data too"),
        (["--model", "m", "--data", "d"], "--model: pass --adapter DIR for DualEdit, --layer NAME for Bal"),
        (["--model", "m", "--data", "d", "--methods", "dualedit"], "pass them with --adapter DIR"),
        (["--model", "m", "--data", "d", "--methods", "balancedit"], "--layer NAME"),
        (["--layer", "up_proj"], "--adapter and --layer are for a model of your own"),
        (["--data", "{tmp}/none.jsonl"], "--data '{tmp}/none.jsonl': no such file"),
        (["--data", "{tmp}/notes.txt"], "--data '{tmp}/notes.txt' begins with 'milk, bread"),
        (["--data", "{tmp}/cut.jsonl"], "{tmp}/cut.jsonl, line 1 is not JSON at column 30"),
        (["--data", "{tmp}/bad.jsonl"], "field 'target' is missing"),
        (["--data", "{tmp}/bad.jsonl"], "--skip-bad leaves bad rows out"),
        (["--data", "{tmp}/bad.jsonl", "--images", "{tmp}/no"], "--images '{tmp}/no' is no folder"),
        (["--data", "{tmp}/bad.jsonl", "--format", "vqa"], "--format 'vqa' is unknown"),
        (["--records", "{tmp}"], "--records {tmp} is a folder"),
        (["--records", "{tmp}/notes.txt", "--edits", "1"], "holds something else"),
        (["--published-threshold", "3"], "a cosine lies in [-1, 1]"),
        (["--edits", "0"], "--edits and --asked: pass numbers of at least 1"),
        (["--edits", "99999"], "--edits 99999: this world has"),
    ],
)
def test_errors_fit_on_a_line(options, says, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("milk, bread\n")
    (tmp_path / "cut.jsonl").write_text('{"prompt": "who?", "target": "ma')
    (tmp_path / "bad.jsonl").write_text('{"prompt": "who?", "target": "maria"}\n{"prompt": "who?"}\n')
    assert main(["eval", *(option.replace("{tmp}", str(tmp_path)) for option in options)]) == 2
    error = capsys.readouterr().err
    assert says.replace("{tmp}", str(tmp_path)) in error
    assert error.count("\n") == 1 and "Traceback" not in error
    assert (tmp_path / "notes.txt").read_text() == "milk, bread\n"


def test_all_is_every_method_that_the_options_suffice_for():
    own = Source(model=VLM)
    every = choose_methods("all", Source())
    assert set(every) <= set(known_methods()) and {"dualedit", "balancedit", "grace", "visedit"} <= set(every)
    assert {"dualedit", "balancedit"} <= set(known_methods())
    assert not {"dualedit", "balancedit"} & set(
        choose_methods("all", own) if len(known_methods()) > 2 else ()
    )
    layered = Source(model=VLM, layer="layers.1.mlp.up_proj")
    assert "balancedit" in choose_methods("all", layered)
    (method,) = open_methods(["balancedit"], layered)
    assert isinstance(method, Method) and method.name == "balancedit" and method.memory_bytes() == 0


def test_the_published_threshold_is_fitted_where_it_is_needed(monkeypatch):
    monkeypatch.setattr(methods, "_TRAINING_FACTS", 2)
    thresholds = [
        next(iter(open_methods(["dualedit"], source)))._published.threshold
        for source in (Source(), Source(published=True), Source(published=True, published_threshold=0.3))
    ]
    assert thresholds[0] == 0.8 and thresholds[2] == 0.3
    assert thresholds[1] not in (0.8, 0.3) and -1 < thresholds[1] < 1


@pytest.mark.slow
def test_two_processes_give_the_table_of_one(tmp_path):
    pytest.importorskip("accelerate")
    options = ["--methods", "dualedit", "--protocol", "sequential", "--edits", "2", "--records"]
    alone = evaluate(tmp_path, "alone", *options, str(tmp_path / "alone.jsonl"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    group |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "dualedit.cli", "eval", "--json", str(tmp_path / "two.json")]
    paths = os.pathsep.join(path for path in sys.path if path)
    processes = [
        subprocess.Popen(
            [*command, *options, str(tmp_path / "two.jsonl")],
            env={**os.environ, **group, "RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": paths},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        told = [process.communicate(timeout=900) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], told
    assert "dualedit, free generation" in told[0][0] and told[1][0] == ""  # one of them speaks
    assert rows_of(tmp_path / "two.json") == alone
    shared, whole = (
        sorted(
            (line["phase"], line["sample"], json.dumps(line["probes"]))
            for line in map(json.loads, (tmp_path / name).read_text().splitlines()[1:])
        )
        for name in ("two.jsonl", "alone.jsonl")
    )
    assert shared == whole
    assert sorted(file.name for file in tmp_path.glob("two*")) == ["two.json", "two.jsonl"]
