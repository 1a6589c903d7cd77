"""The benchmarks' own promises: a wrong rival gets no time, and files keep what other runs wrote."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
common = pytest.importorskip(
    "benchmarks.common", reason="the benchmarks are not part of an installed package"
)


def benchmark(tmp_path, op="example", *extra):
    options = common.arguments("test").parse_args(["--quick", "--json", str(tmp_path / "rows.json"), *extra])
    return common.Benchmark(op, options)


def rivals():
    right = common.Rival("right", "float32", lambda: torch.ones(3), lambda y: None)
    wrong = common.Rival("wrong", "float32", lambda: torch.zeros(3), lambda y: "all of it")
    return [right, wrong]


def test_a_wrong_result_is_not_timed(tmp_path, capsys):
    run = benchmark(tmp_path)
    run.compare({"size": 3}, rivals(), {"nothing": 0.0})
    run.finish()
    content = json.loads((tmp_path / "rows.json").read_text())
    assert [row["impl"] for row in content["rows"]] == ["right"]
    assert content["refused"] == [
        {"op": "example", "impl": "wrong", "dtype": "float32", "shape": {"size": 3}, "reason": "all of it"}
    ]
    assert "NOT TIMED, its result is wrong: all of it" in capsys.readouterr().out
    row = content["rows"][0]
    assert set(row) == {
        "op", "impl", "device", "dtype", "shape", "threads", "median_ms", "min_ms", "max_ms", "checked"
    }  # fmt: skip
    assert row["checked"] is True and 0 <= row["min_ms"] <= row["median_ms"] <= row["max_ms"]
    assert content["machine"]["torch"] == torch.__version__ and content["machine"]["clock"] == "thread_time"


def test_rows_of_other_runs_stay(tmp_path):
    for op, size in (("first", 3), ("second", 3), ("first", 4), ("first", 3)):
        benchmark(tmp_path, op).compare({"size": size}, rivals()[:1])
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert sorted((row["op"], row["shape"]["size"]) for row in rows) == [
        ("first", 3),
        ("first", 4),
        ("second", 3),
    ]


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    run = benchmark(tmp_path, "example", "--plot", str(tmp_path / "plot.png"))
    run.compare({"size": 3, "near": True}, rivals(), {"floor": 1e-3})
    run.finish()
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_reference_of_the_lookup_is_exact_on_massive_activations():
    from benchmarks.bench_nearest_key import exact, problem
    from dualedit_kernels.testing import exact_distances

    query, keys = problem({"batch": 4, "keys": 50, "dim": 600, "near": False, "massive": True}, "cpu")
    index, distance = exact(query, keys)
    want = exact_distances(query, keys, "l2").min(1)
    assert torch.equal(index, want.indices)
    torch.testing.assert_close(distance, want.values, rtol=1e-7, atol=0)


def test_one_query_is_held_against_memory():
    bench = pytest.importorskip("benchmarks.bench_nearest_key")
    shape, speed = {"keys": 100_000, "dim": 4096}, 30e9
    times = {
        "nearest_key (cpp)": [60.0, 54.0, 61.0],
        "nearest_key (cpp) bf16 keys": [30.0],
        "nearest_key (cpp, coded)": [10.0],
        "faiss": [50.0],
    }
    fp32, bf16 = bench.read_rates(shape, speed, times)
    assert fp32 == "nearest_key (cpp) reads 27.3 GB/s, 91% of memory's 30.0"
    assert bf16 == "nearest_key (cpp) bf16 keys reads 27.3 GB/s, 91% of memory's 30.0"
    assert list(bench.floors(shape, speed)) == ["read fp32 keys once", "read bf16 keys once"]
    small = {"keys": 1000, "dim": 4096}
    assert bench.floors(small, speed) == {} and bench.floors(shape, None) == {}
    assert bench.read_rates(small, speed, {"nearest_key (cpp)": [0.4]})[0].endswith("caches hold these keys")
