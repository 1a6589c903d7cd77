"""The table of goals, computed from results that are made up, and the run on a GPU that ends in it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
goals = pytest.importorskip(
    "benchmarks.gpu.goals", reason="the benchmarks are not part of an installed package"
)
gpu = pytest.importorskip("benchmarks.gpu.run")
rehearsal = pytest.importorskip("benchmarks.gpu.rehearsal")

OURS = "gated_edit_attention (triton)"
PEER = "cached K/V compiled, CUDA graph"


def row(op, impl, shape, ms, dtype="bfloat16", device="cuda"):
    return {"op": op, "impl": impl, "dtype": dtype, "device": device, "shape": shape, "median_ms": ms}


def attention(batch, open_rows, times, products=1.0, moved=0.5):
    shape = {"batch": batch, "open": open_rows, "tokens": 576, "edit": 620, "hidden": 4096}
    op = "gated_edit_attention"
    floors = {"bfloat16 products at full rate": products, "bfloat16 bytes at full bandwidth": moved}
    return {
        "rows": [row(op, impl, shape, ms) for impl, ms in times.items()],
        "floors": [{"op": op, "name": name, "shape": shape, "ms": ms} for name, ms in floors.items()],
    }


def lookup(batch, keys, graph, floor=None, bf16=None, near=False):
    """fp32 and bf16 keys; ``graph`` and ``bf16``: milliseconds of a lookup."""
    shape = {"batch": batch, "keys": keys, "dim": 4096, "near": near, "massive": False}
    bf16 = graph / 2 if bf16 is None else bf16
    floors = {} if floor is None else {"read fp32 keys once": floor, "read bf16 keys once": floor / 2}
    times = {"nearest_key (cuda), CUDA graph": graph, "nearest_key (cuda) bf16 keys, CUDA graph": bf16}
    # Without a graph it takes longer: these rows answer for no goal.
    times |= {"nearest_key (cuda)": 1e3, "nearest_key (cuda) bf16 keys": 1e3}
    return {
        "rows": [row("nearest_key", impl, shape, ms, "float32") for impl, ms in times.items()],
        "floors": [{"op": "nearest_key", "name": n, "shape": shape, "ms": ms} for n, ms in floors.items()],
    }


def model(method, part, ratio, low, high):
    shape = {"method": method, "part": part, "layers": 32}
    entry = {"op": "whole_model", "base": "base", "shape": shape, "turns": 20}
    ratios = [
        entry | {"impl": method, "ratio": ratio, "low": low, "high": high},
        entry | {"impl": "base again", "ratio": 2.0, "low": 2.0, "high": 2.0},
    ]
    return {"rows": [row("whole_model", method, shape, 10.0)], "ratios": ratios}


def together(*parts):
    return {
        name: [entry for part in parts for entry in part.get(name, [])]
        for name in ("rows", "floors", "ratios")
    }


def outcomes(*parts):
    found = goals.findings(together(*parts))
    return {one.goal: (one.measured, one.outcome) for one in found if one.outcome != "not measured"}


def test_all_goals_are_there_and_nothing_measured_is_said_so():
    found = goals.findings({})
    assert {one.outcome for one in found} == {"not measured"} and {one.measured for one in found} == {None}
    limits = [(one.limit, one.at_least, one.unit) for one in found]
    assert limits == [
        *[(share, True, "%") for share in (0.30, 0.55, 0.65)],  # of the roofline
        *[(1.1, True, "x")] * 3,
        *[(2.7, True, "x")] * 3,
        (3.0, True, "x"),  # a quarter open
        *[(8.0, False, "us")] * 3,  # closed
        *[(share, True, "%") for share in (0.85, 0.85, 0.85, 0.80, 0.80)] * 2,  # of the bandwidth
        *[(6.0, False, "us")] * 2,
        *[(1.01, False, "x")] * 4,
    ]
    assert len({one.goal for one in found}) == len(found)
    lines = goals.table(found).splitlines()
    assert len(lines) == len(found) + 1 and lines[-1] == f"{len(found)} not measured"
    assert " ".join(lines[0].split()) == (
        "attention, B=1, all open: share of the roofline >= 30.0% - not measured"
    )


def test_attention_reaches_and_misses():
    times = {f"{OURS}, CUDA graph": 2.0, OURS: 2.5, PEER: 2.2, "published": 7.0, "cached K/V compiled": 9.0}
    # The roofline is the slower of the two: 1 ms of products at B=1, 1.2 ms of bytes at B=32.
    found = outcomes(
        attention(1, 1, times),
        attention(8, 8, times | {PEER: 2.1, "published": 6.5}),
        attention(32, 32, times, moved=1.2),
    )
    name = "attention, B={}, all open: {}".format
    share = "share of the roofline"
    peer, published = (f"speed, {what} = 1" for what in ("compiled SDPA in a graph", "published algorithm"))
    assert found == {
        name(1, share): (0.5, "reached"),
        name(8, share): (0.5, "missed"),
        name(32, share): (pytest.approx(0.6), "missed"),
        name(1, peer): (pytest.approx(1.1), "reached"),
        name(8, peer): (pytest.approx(1.05), "missed"),
        name(32, peer): (pytest.approx(1.1), "reached"),
        name(1, published): (pytest.approx(2.8), "reached"),
        name(8, published): (pytest.approx(2.6), "missed"),
        name(32, published): (pytest.approx(2.8), "reached"),
    }


def test_a_quarter_open_and_closed():
    graph = f"{OURS}, CUDA graph"
    inplace = f"{OURS}, in place, CUDA graph"
    found = outcomes(
        attention(32, 8, {graph: 1.0, PEER: 2.9}),
        attention(1, 0, {inplace: 0.008, graph: 0.5}),
        attention(8, 0, {inplace: 0.0081, graph: 0.5}),
        attention(32, 0, {graph: 0.001}),  # not in place: not what the goal is about
        attention(8, 2, {graph: 1.0, PEER: 9.0}),
    )
    assert found == {
        "attention, B=32, 8 open: speed, compiled SDPA in a graph = 1": (pytest.approx(2.9), "missed"),
        "attention, B=1, closed, in place, in a graph": (pytest.approx(8.0), "reached"),
        "attention, B=8, closed, in place, in a graph": (pytest.approx(8.1), "missed"),
    }


@pytest.mark.parametrize("missing", ["peer", "floor", "device", "dtype"])
def test_a_missing_part_is_not_a_goal_reached(missing):
    graph = f"{OURS}, CUDA graph"
    content = attention(1, 1, {graph: 1.0, PEER: 5.0})
    peer, share = (
        f"attention, B=1, all open: {what}"
        for what in ("speed, compiled SDPA in a graph = 1", "share of the roofline")
    )
    assert set(outcomes(content)) == {peer, share}
    if missing == "peer":
        content["rows"].pop()
        assert set(outcomes(content)) == {share}
    elif missing == "floor":
        content["floors"].pop()
        assert set(outcomes(content)) == {peer}
    else:
        for entry in content["rows"]:
            entry[missing] = {"device": "cpu", "dtype": "float32"}[missing]
        assert outcomes(content) == {}


def test_lookups_are_judged_by_their_worst_shape():
    found = outcomes(
        lookup(1, 100_000, 1.0, floor=0.9, bf16=0.6),  # 90 % and 75 %
        lookup(1, 100_000, 1.0, floor=0.86, near=True),  # 86 %
        lookup(1, 1000, 0.005, bf16=0.006),
        lookup(1, 1000, 0.0055, bf16=0.0061, near=True),
        lookup(32, 100_000, 1.0, floor=0.8),
        lookup(128, 100_000, 1.0, floor=0.79),
        lookup(8, 1000, 0.001),  # caches hold these keys: no floor, no goal
    )
    name = "lookup, B={}, large table, {} keys: share of copy bandwidth".format
    small = "lookup, B=1, 1,000 {} keys, in a graph".format
    assert found == {
        name(1, "fp32"): (pytest.approx(0.86), "reached"),
        name(32, "fp32"): (pytest.approx(0.8), "reached"),
        name(128, "fp32"): (pytest.approx(0.79), "missed"),
        name(1, "bf16"): (pytest.approx(0.75), "missed"),
        name(32, "bf16"): (pytest.approx(0.8), "reached"),
        name(128, "bf16"): (pytest.approx(0.79), "missed"),
        small("fp32"): (pytest.approx(5.5), "reached"),
        small("bf16"): (pytest.approx(6.1), "missed"),
    }
    half = lookup(1, 100_000, 1.0, floor=0.9)
    half["rows"] = [r for r in half["rows"] if "CUDA graph" not in r["impl"]]
    both = outcomes(lookup(1, 100_000, 1.0, floor=0.9, near=True), half)
    assert both == {}  # one of the two shapes has no time: it cannot be called reached


def test_the_whole_model_is_judged_by_its_interval():
    found = outcomes(
        model("dualedit", "prefill", 1.004, 0.999, 1.009),
        model("dualedit", "decode", 1.004, 0.99, 1.02),
        model("balancedit", "prefill", 1.03, 1.02, 1.04),
    )
    name = "whole model, {}, {}: time, plain model = 1".format
    assert found == {
        name("dualedit", "prefill"): (1.004, "reached"),
        name("dualedit", "decode"): (1.004, "not resolved"),
        name("balancedit", "prefill"): (1.03, "missed"),
    }


def test_command_line(tmp_path, capsys):
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps(attention(32, 8, {f"{OURS}, CUDA graph": 1.0, PEER: 3.5})))
    goals.main([str(path)])
    line = next(line for line in capsys.readouterr().out.splitlines() if "8 open" in line)
    assert line.split()[-5:] == ["3.000", "x", "3.500", "x", "reached"]


@pytest.mark.parametrize("broken", [None, "benchmarks.bench_nearest_key"])
def test_a_run_on_a_gpu(tmp_path, monkeypatch, capsys, broken):
    """Every step but the commands themselves: order, limits, what is written, and the status."""
    commands = []

    def run(report, command, limit=240, **environment):
        commands.append((command[1:], limit))
        text, status = "something", 0
        if command[1] == "-c":
            text = "loaded it"
        elif command[2] == broken:
            status = 1
        elif command[2] == "benchmarks.bench_gated_edit_attention":
            target = Path(command[command.index("--json") + 1])
            assert not target.exists()  # rows of a run that did not end are gone
            assert before.read_text() == "{}"  # those of one that did are kept until these are all there
            target.write_text(json.dumps(attention(32, 8, {f"{OURS}, CUDA graph": 1.0, PEER: 2.5})))
        return subprocess.CompletedProcess(command, status, text, "")

    (tmp_path / "benchmarks/results").mkdir(parents=True)
    for stem in ("nearest_key", "gated_edit_attention", "whole_model", "routed_linear", "training"):
        (tmp_path / f"benchmarks/bench_{stem}.py").touch()
    before = tmp_path / "benchmarks/results/h200.json"
    before.write_text("{}")
    before.with_name("h200.measuring.json").write_text('{"rows": [1]}')
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "run", run)
    monkeypatch.setattr(gpu, "versions", lambda: {"name": "NVIDIA H200"})
    monkeypatch.setattr(gpu, "sanitize", lambda report: "left out")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(sys, "argv", ["gpu"])
    assert gpu.main() == (0 if broken is None else 1)  # a missed goal fails nothing

    modules = [command[1] for command, _ in commands if command[0] == "-m"]
    assert modules == [
        "benchmarks.gpu", "benchmarks.gpu", "benchmarks.bench_gated_edit_attention",
        "benchmarks.bench_nearest_key", "benchmarks.bench_whole_model", "pytest", "pytest",
        "benchmarks.bench_routed_linear",
    ]  # fmt: skip
    for command, limit in commands:
        assert limit <= 240
        if command[1].startswith("benchmarks.bench_"):
            assert command[2:4] == ["--device", "cuda"] and "--quick" in command
    sweeps = next(command for command, _ in commands if "tests/kernels/test_large_sizes.py" in command)
    assert "tests/kernels/test_random_sweep.py" in sweeps and sweeps[-2:] == ["-k", "in_triton"]

    assert list(before.parent.iterdir()) == [before]
    content = json.loads(before.read_text())
    missed = [one for one in content["goals"] if one["outcome"] == "missed"]
    assert [(one["measured"], one["limit"]) for one in missed] == [(2.5, 3.0)]
    assert len(content["goals"]) == len(goals.findings({})) and content["gpu"] == {"name": "NVIDIA H200"}
    failed = [step["step"] for step in content["steps"] if step["outcome"] == "failed"]
    assert failed == ([] if broken is None else ["bench_nearest_key"])
    assert "1 missed" in capsys.readouterr().out


def test_what_the_run_names_is_there():
    root = gpu.ROOT
    for stem in [*gpu.GOALS, *gpu.ON_THE_CPU]:
        assert (root / f"benchmarks/{stem}.py").exists(), stem
    for path in [*gpu.TESTS, *gpu.SWEEPS[:2]]:
        assert (root / path).exists(), path
    for path in gpu.SWEEPS[:2]:
        assert "_in_triton(" in (root / path).read_text()


@pytest.mark.parametrize("missing", [None, "benchmarks.bench_nearest_key"])
def test_a_dry_run(tmp_path, monkeypatch, capsys, missing):
    """Every step is a rehearsal, nothing is kept, and a goal without its rows is a failure."""
    commands = []

    def run(report, command, limit=240, **environment):
        commands.append((command[1:], environment))
        if command[2] == "benchmarks.gpu.rehearsal" and "--json" in command and command[3] != missing:
            target = Path(command[command.index("--json") + 1])
            before = json.loads(target.read_text()) if target.exists() else together()
            target.write_text(json.dumps(together(before, everything(command[3]))))
        return subprocess.CompletedProcess(command, 0, "something", "")

    for name, value in rehearsal.SIZES["benchmarks.gpu.goals"].items():
        monkeypatch.setattr(goals, name, value)  # put back afterwards
    results = sorted((gpu.ROOT / "benchmarks/results").iterdir())
    monkeypatch.setattr(gpu, "run", run)
    monkeypatch.setattr(sys, "argv", ["gpu", "--dry-run"])
    assert gpu.main() == (0 if missing is None else 1)
    assert sorted((gpu.ROOT / "benchmarks/results").iterdir()) == results
    assert [command for command, _ in commands if command[0] == "setup.py"] == []
    rehearsed = [command[2] for command, _ in commands if command[1] == "benchmarks.gpu.rehearsal"]
    others = ["routed_linear", "overhead"]
    assert set(rehearsed) == {"benchmarks.gpu.run", *(f"benchmarks.{s}" for s in gpu.GOALS),
                              *(f"benchmarks.bench_{s}" for s in others)}  # fmt: skip
    for command, _ in commands:
        if command[1] == "pytest":
            assert "--collect-only" in command
    said = capsys.readouterr().out
    count = len(goals.findings({}))
    lookups = 2 * len(goals.BANDWIDTH) + 2
    assert (f"{count} dry run" if missing is None else f"{lookups} not measured") in said
    assert "reached" not in said and "missed" not in said and "nothing was measured" in said


def everything(module):
    """Made-up rows that answer for every goal of a benchmark."""
    if module.endswith("gated_edit_attention"):
        graph = f"{OURS}, CUDA graph"
        times = {graph: 1.0, OURS: 1.0, PEER: 1.0, "published": 1.0, f"{OURS}, in place, CUDA graph": 1.0}
        rows = ((1, 1), (8, 8), (32, 32), (32, 8), (1, 0), (8, 0), (32, 0))
        cases = [attention(batch, some, times) for batch, some in rows]
        for part in cases:
            for entry in (*part["rows"], *part["floors"]):
                entry["shape"]["tokens"] = goals.TOKENS
        return together(*cases)
    if module.endswith("nearest_key"):
        large = [lookup(batch, 100_000, 1.0, floor=0.5) for batch in goals.BANDWIDTH]
        return together(*large, lookup(1, goals.FEW_KEYS, 1.0))
    if module.endswith("whole_model"):
        return together(*(model(m, part, 1.0, 1.0, 1.0) for m in goals.METHODS for part in goals.PARTS))
    return together()


@pytest.mark.parametrize("name", sorted(rehearsal.SIZES))
def test_what_a_rehearsal_shrinks_is_there(name):
    module = pytest.importorskip(name)
    assert [constant for constant in rehearsal.SIZES[name] if not hasattr(module, constant)] == []


@pytest.mark.slow
def test_a_benchmark_is_rehearsed(tmp_path, monkeypatch):
    """The lookups through their whole benchmark: all of its goals find their rows, and no result is wrong."""
    rows = tmp_path / "rows.json"
    command = [sys.executable, "-m", "benchmarks.gpu.rehearsal", "benchmarks.bench_nearest_key"]
    command += ["--device", "cuda", "--quick", "--json", str(rows)]
    environment = gpu.os.environ | {"DUALEDIT_BACKEND": "reference"}
    done = subprocess.run(command, cwd=gpu.ROOT, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    monkeypatch.setattr(goals, "FEW_KEYS", rehearsal.SIZES["benchmarks.gpu.goals"]["FEW_KEYS"])
    content = json.loads(rows.read_text())
    found = rehearsal.rehearsed(list(goals.lookup(goals.Results(content))))
    assert {one.outcome for one in found} == {"dry run"} and len(found) == 12
    assert [one for one in content["refused"] if one["impl"].startswith("nearest_key")] == []


def test_a_size_that_is_gone_is_named(monkeypatch):
    monkeypatch.setitem(rehearsal.SIZES, "benchmarks.gpu.tritons", {"SIZE": 1})
    with pytest.raises(AttributeError, match="benchmarks.gpu.tritons has no SIZE any more"):
        rehearsal.shrink("benchmarks.gpu.tritons")
