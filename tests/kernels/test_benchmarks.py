"""The benchmarks' own promises: a wrong rival gets no time, and files keep what other runs wrote."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

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


def lookups(*shapes):
    names = ("batch", "keys", "near")
    return [
        {
            "op": "nearest_key",
            "impl": impl,
            "device": "cpu",
            "dtype": "float32",
            "shape": dict(zip(names, shape, strict=True)) | {"dim": 4096},
            "threads": 1,
            "median_ms": factor * shape[1],
            "min_ms": factor * shape[1],
            "max_ms": factor * shape[1],
        }
        for shape in shapes
        for impl, factor in (("nearest_key (cpp)", 1e-3), ("faiss", 2e-3))
    ]


def test_plots_are_of_time_against_each_size():
    pytest.importorskip("matplotlib")
    from benchmarks import plots

    rows = lookups(*((batch, keys, False) for batch in (1, 8) for keys in (1000, 100_000)), (1, 1000, True))
    found = {(p.axis, p.setting): p.rows for p in plots.panels(rows)}
    sizes = {key: sorted({row["shape"][key[0]] for row in part}) for key, part in found.items()}
    assert sizes == {
        ("keys", "B 1, far from all keys, cpu, 1 threads"): [1000, 100_000],
        ("keys", "B 8, far from all keys, cpu, 1 threads"): [1000, 100_000],
        ("batch", "N 1000, far from all keys, cpu, 1 threads"): [1, 8],
        ("batch", "N 100000, far from all keys, cpu, 1 threads"): [1, 8],
        ("batch", "cpu, 1 threads"): [1],  # the row that differs from all others in no size
    }
    assert all(row in sum(found.values(), []) for row in rows)

    floors = [
        {"op": "nearest_key", "name": "read fp32 keys once", "shape": rows[2]["shape"], "ms": 50.0},
        {"op": "nearest_key", "name": "at full rate", "shape": rows[2]["shape"], "ms": 9.0},
    ]
    first = next(plots.panels(rows))
    assert plots.roofline(first, floors) == {
        "read fp32 keys once": [(1000, 0.5, False), (100_000, 50.0, True)],
        "at full rate": [(100_000, 9.0, True)],
    }
    place = plots.figure(rows, floors).axes[0]
    assert place.get_xscale() == place.get_yscale() == "log"
    drawn = [tuple(zip(*line.get_data(), strict=True)) for line in place.get_lines()]
    assert ((1000, 1.0), (100_000, 100.0)) in drawn and ((1000, 2.0), (100_000, 200.0)) in drawn
    assert ((1000, 0.5), (100_000, 50.0)) in drawn


def test_plots_tell_shares_of_open_rows_apart():
    from benchmarks import plots

    def of(*shapes):
        rows = lookups(*((batch, 1000, False) for batch, _ in shapes))[::2]
        for row, (batch, some) in zip(rows, shapes, strict=True):
            row |= {"op": "gated_edit_attention", "shape": {"batch": batch, "open": some}}
        return [(p.setting, [r["shape"]["batch"] for r in p.rows]) for p in plots.panels(rows)]

    one = "cpu, 1 threads"
    assert of((1, 1), (8, 2), (1, 0), (8, 0)) == [
        (f"open some rows, {one}", [1, 8]),
        (f"open none, {one}", [1, 8]),
    ]
    assert of((1, 1), (8, 8), (8, 2), (32, 8)) == [
        (f"open 100% of rows, {one}", [1, 8]),
        (f"open 25% of rows, {one}", [8, 32]),
    ]


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


def modules(monkeypatch, **contents):
    """Modules of these names with these contents; None: it is not installed."""
    for name, content in contents.items():
        module = None
        if content is not None:
            module = ModuleType(name.replace("__", "."))
            vars(module).update(content)
        monkeypatch.setitem(sys.modules, name.replace("__", "."), module)


class GpuIndex:
    """What the benchmark uses of faiss.GpuIndexFlatL2."""

    def __init__(self, resources, dim, config):
        assert config.device == 0 and resources is not None
        self.dim = dim

    def add(self, keys):
        assert keys.shape[1] == self.dim
        self.keys = keys

    def search(self, query, count):
        distance, index = torch.cdist(query, self.keys).square().topk(count, largest=False)
        return distance, index


def test_peers_of_the_lookup_on_a_gpu(monkeypatch, capsys):
    from benchmarks import bench_nearest_key as bench

    query, keys = bench.problem({"batch": 4, "keys": 50, "dim": 30, "near": True, "massive": False}, "cpu")
    want = bench.exact(query, keys)

    def wrong(result):
        return None if torch.equal(result[0], want[0]) else "another key"

    faiss = {
        "StandardGpuResources": object,
        "GpuIndexFlatConfig": SimpleNamespace,
        "GpuIndexFlatL2": GpuIndex,
    }
    modules(monkeypatch, faiss=faiss, faiss__contrib={}, faiss__contrib__torch_utils={})

    def search(flat, query, count, neighbors, distances, resources):
        assert resources.stream == 7
        found = torch.cdist(query, flat).square().topk(count, largest=False)
        distances.copy_(found.values)
        neighbors.copy_(found.indices)

    def build(keys, metric, resources):
        assert metric == "sqeuclidean" and resources.stream == 7
        return keys

    brute = SimpleNamespace(build=build, search=search)
    modules(monkeypatch, cuvs={}, cuvs__common={"Resources": SimpleNamespace})
    modules(monkeypatch, cuvs__neighbors={"brute_force": brute})
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=7))
    for peer, impl in ((bench.faiss_gpu, "faiss GpuIndexFlatL2"), (bench.cuvs, "cuVS brute force")):
        (rival,) = bench._if_it_runs(impl, lambda peer=peer: peer(query, keys, wrong))
        index, distance = rival.run()
        assert rival.impl == impl and rival.wrong((index, distance)) is None
        torch.testing.assert_close(distance, want[1].float(), rtol=1e-3, atol=1e-3)

    modules(monkeypatch, faiss={}, cuvs=None, cuvs__common=None)
    for peer in (bench.faiss_gpu, bench.cuvs):
        assert bench._if_it_runs(peer.__name__, lambda peer=peer: peer(query, keys, wrong)) == []
    said = capsys.readouterr().out
    assert "faiss_gpu is left out: this faiss is built without GPUs" in said
    assert "cuvs is left out: " in said

    def fails():
        raise RuntimeError("no driver")

    assert bench._if_it_runs("cuVS", lambda: [common.Rival("cuVS", "float32", fails, wrong)]) == []
    assert "cuVS is left out, it failed: RuntimeError: no driver" in capsys.readouterr().out


def test_the_rivals_of_attention(monkeypatch):
    """On a GPU those under a CUDA graph come too; each captures what is timed without a graph."""
    from benchmarks import bench_gated_edit_attention as bench

    for name, size in (("HIDDEN", 16), ("MID", 8), ("HEADS", 2), ("IMAGE", 5), ("TEXT", 9), ("EDIT", 3)):
        monkeypatch.setattr(bench, name, size)
    problem = bench.Problem.sample([True, False], torch.float32, "cpu")
    graphs = []
    monkeypatch.setattr(bench, "captured", lambda call: graphs.append(call) or call)
    monkeypatch.setattr(torch, "compile", lambda call: call)
    names = [rival.impl for rival in bench.rivals(problem, quick=False)]
    assert not graphs and names[1:] == [
        "published", "published, fused attention", "cached K/V", "cached K/V compiled"
    ]  # fmt: skip
    assert [rival.impl for rival in bench.rivals(problem, quick=True)] == names[:4]
    with torch.no_grad():
        for quick in (True, False):
            rivals = bench.rivals(problem, quick, cuda=True)
            assert [rival.impl for rival in rivals] == [
                *names, f"{names[0]}, CUDA graph", "cached K/V compiled, CUDA graph"
            ]  # fmt: skip
            assert [rival.run for rival in rivals[-2:]] == graphs[-2:] == [rivals[0].run, rivals[4].run]
            assert [rival.wrong(rival.run()) for rival in rivals] == [None] * 7


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_call_runs_anew_at_every_replay():
    from benchmarks import bench_gated_edit_attention as bench

    x = torch.ones(3, device="cuda")
    replay = bench.captured(lambda: x + 1)
    for value in (5.0, 6.0):
        x.fill_(value)
        assert replay().tolist() == [value + 1] * 3
