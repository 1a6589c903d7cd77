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
    assert bench.floors(small, speed) == {}
    assert bench.floors(shape, speed)["read bf16 keys once"] == pytest.approx(819.2e6 / 30e9 * 1e3)
    graphs = {"nearest_key (triton) bf16 keys, CUDA graph": [0.2]}  # 819 MB in 0.2 ms
    assert bench.read_rates(shape, 5e12, graphs) == [
        "nearest_key (triton) bf16 keys, CUDA graph reads 4096.0 GB/s, 82% of memory's 5000.0"
    ]
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
    monkeypatch.setattr(bench, "captured", lambda call, calls=1: graphs.append((call, calls)) or call)
    monkeypatch.setattr(torch, "compile", lambda call: call)
    names = [rival.impl for rival in bench.rivals(problem, quick=False)]
    assert not graphs and names[1:] == [
        "published", "published, fused attention", "cached K/V", "cached K/V compiled"
    ]  # fmt: skip
    assert [rival.impl for rival in bench.rivals(problem, quick=True)] == names[:4]
    ours, peer = f"{names[0]}, CUDA graph", "cached K/V compiled, CUDA graph"
    with torch.no_grad():
        for quick in (True, False):
            rivals = {rival.impl: rival for rival in bench.rivals(problem, quick, cuda=True)}
            assert list(rivals) == [*names[:4], ours, names[4], peer]
            assert graphs[-2:] == [(rivals[names[0]].run, 1), (rivals[names[4]].run, 1)]
            assert [rivals[impl].run for impl in (ours, peer)] == [call for call, _ in graphs[-2:]]
            assert [rival.wrong(rival.run()) for rival in rivals.values()] == [None] * 7
            assert {rival.calls for rival in rivals.values()} == {1}

        problem = bench.Problem.sample([False, False], torch.float32, "cpu")
        inplace = f"{names[0]}, in place, CUDA graph"
        rivals = {rival.impl: rival for rival in bench.rivals(problem, quick=True, cuda=True)}
        assert list(rivals) == [*names[:4], ours, inplace]
        assert rivals[inplace].calls == graphs[-1][1] == bench.CALLS > 1
        asked, operator = [], bench.gated_edit_attention

        def spy(*args, **named):
            asked.append(named["inplace"])
            return operator(*args, **named)

        monkeypatch.setattr(bench, "gated_edit_attention", spy)
        for impl in (inplace, ours, names[0]):
            assert rivals[impl].wrong(rivals[impl].run()) is None
        assert asked == [True, False, False]
        assert list(bench.rivals(problem, quick=False, cuda=True))[-1].impl == peer


@pytest.mark.parametrize("quick", [True, False])
def test_attention_on_a_gpu(monkeypatch, quick):
    """The batches, dtypes and floors of a run on a GPU, with everything on the CPU and small."""
    from benchmarks import bench_gated_edit_attention as bench

    for name, size in (("HIDDEN", 16), ("MID", 8), ("HEADS", 2), ("IMAGE", 5), ("TEXT", 9), ("EDIT", 3)):
        monkeypatch.setattr(bench, name, size)
    seen = []

    class Stand:
        def __init__(self, op, options):
            assert options.device == "cuda"

        def compare(self, shape, rivals, floors):
            dtypes = {rival.dtype for rival in rivals}
            seen.append((shape["batch"], shape["open"], *dtypes, list(floors)))

        def finish(self):
            pass

    def on_cuda(result):
        def call(*args):
            assert args[-1] == "cuda"
            return result(*args[:-1])

        return call

    sample = bench.Problem.sample
    monkeypatch.setattr(bench, "Benchmark", Stand)
    monkeypatch.setattr(bench.Problem, "sample", on_cuda(lambda rows, dtype: sample(rows, dtype, "cpu")))
    monkeypatch.setattr(bench, "bandwidth", on_cuda(lambda: 4e12))
    monkeypatch.setattr(bench, "product_rate", on_cuda(lambda dtype: 7e14))
    monkeypatch.setattr(bench, "captured", lambda call, calls=1: call)
    monkeypatch.setattr(torch, "compile", lambda call: call)
    monkeypatch.setattr(sys, "argv", ["bench", "--device", "cuda", *(["--quick"] if quick else [])])
    bench.main()
    rows = [(1, 1), (1, 0), (8, 8), (8, 2), (8, 0), (32, 32), (32, 8), (32, 0)]
    dtypes = ["bfloat16"] if quick else ["float32", "bfloat16"]
    floors = "{} products at full rate", "{} bytes at full bandwidth"
    assert seen == [
        (batch, some, dtype, [floor.format(dtype) for floor in floors] if some else [])
        for dtype in dtypes
        for batch, some in rows
    ]


def test_floors_of_attention():
    from benchmarks import bench_gated_edit_attention as bench

    shape = {"batch": 32, "open": 8}
    flops = 8 * 576 * 2 * (2 * 4096 * 1024 + 2 * 620 * 1024)
    moved = 2 * (2 * 32 * 640 * 4096 + 2 * 4096 * 1024 + 2 * 620 * 1024)
    floors = bench.floors(shape, torch.bfloat16, rate=7e14, speed=4e12)
    assert floors == {
        "bfloat16 products at full rate": pytest.approx(flops / 7e14 * 1e3),
        "bfloat16 bytes at full bandwidth": pytest.approx(moved / 4e12 * 1e3),
    }
    assert list(bench.floors(shape, torch.float32, rate=1e12)) == ["float32 products at full rate"]
    assert bench.floors(shape | {"open": 0}, torch.bfloat16, rate=7e14, speed=4e12) == {}


def ticking(monkeypatch, run):
    """A clock for a benchmark, and rivals that move it by 1/1024 s each, ``first``: at first by so many."""
    now, done = [0.0], []
    monkeypatch.setattr(run, "clock", lambda: now[0])

    def rival(impl, calls=1, first=None):
        def work():
            now[0] += (calls if first is None or impl in done else first) / 1024
            done.append(impl)

        return common.Rival(impl, "float32", work, lambda y: None, calls=calls)

    return rival, done


def test_a_graph_of_many_calls_is_timed_as_one_of_them(tmp_path, monkeypatch):
    run = benchmark(tmp_path)
    rival, done = ticking(monkeypatch, run)
    times = run.compare({"size": 3}, [rival("one"), rival("graph", calls=10)])
    assert times["one"] == times["graph"] == pytest.approx([1000 / 1024] * 3)
    # The check and two turns of one, then three turns of 20 ms.
    assert done.count("one") == 3 + 3 * 20 and done.count("graph") == 3 + 3 * 2


@pytest.mark.parametrize("device, repeats", [("cpu", 1), ("cuda", 20)])
def test_a_first_call_of_seconds_is_a_turn_unless_it_compiles(tmp_path, monkeypatch, device, repeats):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    run = benchmark(tmp_path, "example", "--device", device)
    rival, done = ticking(monkeypatch, run)
    run.compare({"size": 3}, [rival("slow at first", first=5000)])
    assert len(done) == (1 if device == "cpu" else 3) + 3 * repeats


class Event:
    """What the benchmarks use of torch.cuda.Event; a call takes 2 ms."""

    calls = 0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = Event.calls

    def elapsed_time(self, end):
        return 2.0 * (end.at - self.at)


def test_rates_of_a_gpu(monkeypatch):
    """On the meta device, where tensors have sizes but no data."""

    def counting(function):
        def call(*args):
            Event.calls += 1
            return function(*args)

        return call

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.Tensor, "copy_", counting(torch.Tensor.copy_))
    monkeypatch.setattr(torch.nn.functional, "linear", counting(torch.nn.functional.linear))
    assert common.bandwidth("meta") == pytest.approx(2 * 2**30 / 2e-3)  # read and written
    assert common.product_rate(torch.bfloat16, "meta") == pytest.approx(2 * 8192**3 / 2e-3)


@pytest.mark.parametrize("quick", [True, False])
def test_lookups_on_a_gpu(monkeypatch, quick):
    """The shapes and floors of a run on a GPU, with everything on the CPU and small."""
    from benchmarks import bench_nearest_key as bench

    seen, devices = [], []

    class Stand:
        def __init__(self, op, options):
            assert op == "nearest_key" and options.device == "cuda"

        def compare(self, shape, rivals, floors):
            seen.append((shape["keys"], shape["dim"], shape["batch"], shape["near"], list(floors)))
            return {}

        def finish(self):
            pass

    monkeypatch.setattr(bench, "Benchmark", Stand)
    monkeypatch.setattr(bench, "bandwidth", lambda device: devices.append(device) or 4e12)
    monkeypatch.setattr(bench, "problem", lambda shape, device: devices.append(device) or (None, None))
    monkeypatch.setattr(bench, "rivals", lambda *args: [])
    arguments = ["bench", "--device", "cuda", *(["--quick"] if quick else [])]
    monkeypatch.setattr(sys, "argv", arguments)
    bench.main()
    assert set(devices) == {"cuda"}
    large = ["read fp32 keys once", "read bf16 keys once"]
    sizes = {(1000, 4096): [], (100_000, 4096): large} | ({} if quick else {(100_000, 1024): large})
    want = [
        (*size, batch, near, floors)
        for size, floors in sizes.items()
        for batch in (1, 8, 16, 32, 128)
        for near in (False, True)
    ]
    assert sorted(seen) == sorted(want)


def test_the_captured_lookup(monkeypatch):
    """A GPU's rivals, with tensors of the CPU that say they are of a GPU."""
    from benchmarks import bench_nearest_key as bench

    query, keys = bench.problem({"batch": 4, "keys": 50, "dim": 30, "near": True, "massive": False}, "cpu")
    graphs = []
    monkeypatch.setattr(bench, "captured", lambda call, calls: graphs.append(calls) or call)

    class There(torch.Tensor):
        device = SimpleNamespace(type="cuda", index=0)

    monkeypatch.setattr(bench, "_if_it_runs", lambda name, make: [])
    monkeypatch.setattr(bench.backend, "explain", lambda *args: SimpleNamespace(
        implementation=SimpleNamespace(name="triton", functions={})
    ))  # fmt: skip
    monkeypatch.setattr(torch, "full", lambda *args, device, full=torch.full: full(*args))
    monkeypatch.setattr(bench, "nearest_key", lambda query, keys, *rest: bench._smallest(
        torch.cdist(query.double(), torch.Tensor(keys).double())
    ))  # fmt: skip
    options = SimpleNamespace(device="cuda")
    rivals = {rival.impl: rival for rival in bench.rivals(query, keys.as_subclass(There), options, {})}
    assert list(rivals) == [
        "nearest_key (triton)", "nearest_key (triton), CUDA graph",
        "nearest_key (triton) bf16 keys", "nearest_key (triton) bf16 keys, CUDA graph",
        "torch matmul trick", "torch.cdist",
    ]  # fmt: skip
    assert graphs == [bench.CALLS] * 2
    assert [r.calls for r in rivals.values()] == [1, bench.CALLS, 1, bench.CALLS, 1, 1]
    assert [r.dtype for r in rivals.values()] == ["float32"] * 2 + ["bfloat16"] * 2 + ["float32"] * 2
    assert [rivals[impl].wrong(rivals[impl].run()) for impl in list(rivals)[:4]] == [None] * 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("calls", [1, 3])
def test_a_captured_call_runs_anew_at_every_replay(calls):
    x, total = torch.ones(3, device="cuda"), torch.zeros(3, device="cuda")
    replay = common.captured(lambda: (x + 1, total.add_(1)), calls)
    total.zero_()
    for value in (5.0, 6.0):
        x.fill_(value)
        assert replay()[0].tolist() == [value + 1] * 3
    assert total.tolist() == [2 * calls] * 3
