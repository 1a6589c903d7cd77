"""GPU kernels compiled without a GPU: no spills, within the shared memory of the chip, on tensor cores."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.gpu import compile_report, scenes, tritons

pytest.importorskip("triton", reason="Triton is not installed here")

# One scene for each operator, at the sizes of LLaVA-1.5-7B; `make compile-report` compiles all of them.
SCENES = {
    "nearest_key bf16 B=8 l2",
    "low_rank bf16 L=1 R=8",
    "full bf16 L=640",
    "attention bf16 B=8 L=640 head=128",
    "gate bf16 N=8 cosine",
}
KERNELS = {
    "scan_kernel",
    "shrink_kernel",
    "expand_kernel",
    "outer_kernel",
    "statistics_kernel",
    "project_kernel",
    "attend_kernel",
    "output_kernel",
    "query_kernel",
    "memory_kernel",
}


def test_scenes_cover_every_kernel():
    found = scenes.launches(90, wanted=SCENES.__contains__)
    assert {launch.name for launch in found} == KERNELS
    everything = scenes.launches(80)
    assert {launch.name for launch in everything} == KERNELS and len(everything) > 3 * len(KERNELS)


@pytest.mark.parametrize(("arch", "units"), [(90, "wgmma"), (100, "tcgen05")])
@pytest.mark.parametrize("kernel", sorted(KERNELS))
def test_fit_to_ship_on_hopper_and_blackwell(kernel, arch, units):
    found = scenes.launches(arch, kernel, SCENES.__contains__)
    assert found
    for launch in found[:1] + ([found[-1]] if kernel == "statistics_kernel" else []):
        result = compile_report.compile_launch(launch, arch)
        assert not result.faults, result
        assert 0 < result.registers <= 255
        if kernel in ("scan_kernel", "statistics_kernel"):
            assert result.tensor_cores == "-"
        else:
            assert result.tensor_cores in ("mma", units)
        if kernel == "project_kernel":
            assert result.tensor_cores == units


def reductions(scene, kernel, arch):
    """Each sum and minimum of numbers in a kernel: its axis, its shape and how threads hold its values."""
    launch = scenes.launches(arch, kernel, lambda name: name == scene)[0]
    text = compile_report.compiled(launch, arch).asm["ttgir"]
    layouts = dict(re.findall(r"^(#\w+) = (.*)$", text, re.MULTILINE))
    found = re.findall(
        r'"tt.reduce"\(.*?\) <\{axis = (\d) : i32(?:.*\n)*?\s*\}\) : \(tensor<([\dx]+f32), (#\w+)>', text
    )
    return [(int(axis), shape, layouts[layout]) for axis, shape, layout in found]


@pytest.mark.parametrize("count", [1, 8])
def test_the_gate_adds_up_as_the_lookup_does(count):
    """Bits depend on the order of a sum, and that on which thread holds what: the same in both kernels."""
    lookup = reductions(f"nearest_key bf16 N={count}", "scan_kernel", 90)
    gate = reductions(f"gate bf16 N={count} cosine", "statistics_kernel", 90)
    assert [(axis, shape) for axis, shape, _ in lookup] == [
        (1, "1x256xf32"),  # length of the query
        (1, f"{count}x256xf32"),  # of the keys
        (2, f"1x{count}x256xf32"),
        (1, f"1x{count}xf32"),
    ]
    assert gate[:4] == lookup and len(gate) == 6  # then mean and variance


@pytest.fixture
def oldest_triton():
    """The oldest supported version, where it is kept already or can be fetched."""
    version = tritons.oldest()
    if version == tritons.installed():
        pytest.skip(f"the installed Triton is the oldest, {version}: the other tests compile with it")
    try:
        tritons.fetch(version, limit=180)
    except tritons.NotAvailable as error:
        pytest.skip(str(error))
    return version


@pytest.mark.slow
def test_fit_to_ship_by_the_oldest_triton(oldest_triton, tmp_path):
    """Every kernel in bf16 for all generations; `make compile-report` compiles every configuration."""
    command = [sys.executable, "-m", "benchmarks.gpu.compile_report", "--triton", "oldest", "--no-cuda"]
    command += ["--scenes", *sorted(SCENES), "--json", str(tmp_path / "rows.json")]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert {row["triton"] for row in rows} == {oldest_triton}
    assert {(row["kernel"], row["arch"]) for row in rows} == {
        (kernel, arch) for kernel in KERNELS for arch in ("sm_80", "sm_90", "sm_100")
    }
    assert not [row for row in rows if row["faults"]]


def test_a_triton_is_fetched_once_and_whole(monkeypatch, tmp_path):
    calls = []

    def pip(command, **options):
        calls.append(command[-1])
        target = Path(command[command.index("--target") + 1])
        target.mkdir()
        if len(calls) > 1:  # the first fetch is cut short
            (target / "triton").mkdir()
        failed = len(calls) == 1
        return SimpleNamespace(returncode=int(failed), stderr="trying\nno network\n" if failed else "")

    monkeypatch.setattr(tritons.subprocess, "run", pip)
    with pytest.raises(tritons.NotAvailable, match="triton 9.9.9 cannot be fetched: no network"):
        tritons.fetch("9.9.9", tmp_path)
    assert list(tmp_path.iterdir()) == []
    folder = tritons.fetch("9.9.9", tmp_path)
    assert tritons.fetch("9.9.9", tmp_path) == folder
    assert list(tmp_path.iterdir()) == [folder] and (folder / "triton").is_dir()
    assert calls == ["triton==9.9.9"] * 2
    assert tritons.environment(folder)["PYTHONPATH"].startswith(str(folder))


def test_another_triton_than_the_asked_one_is_refused(monkeypatch, tmp_path):
    """A cached folder that is not the version of its name."""
    folder = tmp_path / f"triton-9.9.9-{sys.implementation.cache_tag}"
    (folder / "triton").mkdir(parents=True)
    row = compile_report.Result("3.0.0", "kernel", "sm_90", "", "", 1, 0, 0, "-", [])

    def child(command, **options):
        Path(command[command.index("--json") + 1]).write_text(json.dumps([vars(row)]))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(compile_report.subprocess, "run", child)
    options = compile_report.arguments().parse_args(["--cache", str(tmp_path)])
    with pytest.raises(RuntimeError, match=r"compiled by triton \{'3.0.0'\} in place of 9.9.9"):
        compile_report.under_another_triton("9.9.9", options)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_cuda_sources_compile(arch):
    results = compile_report.compile_cuda(arch)
    if shutil.which("nvcc") is None:
        assert results == []
        pytest.skip("nvcc is not installed: csrc/cuda is not compiled here")
    assert len(results) > 30 and not [result for result in results if result.faults]


def test_a_spill_is_a_fault(monkeypatch):
    """The report itself can fail."""
    launch = scenes.launches(90, "scan_kernel", SCENES.__contains__)[0]
    monkeypatch.setattr(compile_report, "resources", lambda cubin: (255, 8))
    monkeypatch.setitem(compile_report.SHARED_LIMIT, 90, -1)
    faults = compile_report.compile_launch(launch, 90).faults
    assert faults[0] == "spills 8 bytes" and "the chip has -1" in faults[1]
