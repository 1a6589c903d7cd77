"""GPU kernels compiled without a GPU: no spills, within the shared memory of the chip, on tensor cores."""

import shutil

import pytest

from benchmarks import compile_report

pytest.importorskip("triton", reason="Triton is not installed here")

# One scene for each operator, at the sizes of LLaVA-1.5-7B; `make compile-report` compiles all of them.
SCENES = {
    "nearest_key bf16 B=8 l2",
    "low_rank bf16 L=1 R=8",
    "full bf16 L=640",
    "attention bf16 B=8 L=640 head=128",
}
KERNELS = {
    "scan_kernel",
    "finish_kernel",
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
    found = compile_report.launches(90, wanted=SCENES.__contains__)
    assert {launch.name for launch in found} == KERNELS
    everything = compile_report.launches(80)
    assert {launch.name for launch in everything} == KERNELS and len(everything) > 3 * len(KERNELS)


@pytest.mark.parametrize("kernel", sorted(KERNELS))
def test_fit_to_ship_on_hopper(kernel):
    found = compile_report.launches(90, kernel, SCENES.__contains__)
    assert found
    for launch in found[:1]:
        result = compile_report.compile_launch(launch, 90)
        assert not result.faults, result
        assert 0 < result.registers <= 255
        dots = kernel not in ("scan_kernel", "finish_kernel", "statistics_kernel")
        assert (result.tensor_cores != "-") == dots


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
def test_cuda_sources_compile(arch):
    results = compile_report.compile_cuda(arch)
    if shutil.which("nvcc") is None:
        assert results == []
        pytest.skip("nvcc is not installed: csrc/cuda is not compiled here")
    assert len(results) > 30 and not [result for result in results if result.faults]


def test_a_spill_is_a_fault(monkeypatch):
    """The report itself can fail."""
    launch = compile_report.launches(90, "finish_kernel", SCENES.__contains__)[0]
    monkeypatch.setattr(compile_report, "resources", lambda cubin: (255, 8))
    monkeypatch.setitem(compile_report.SHARED_LIMIT, 90, -1)
    faults = compile_report.compile_launch(launch, 90).faults
    assert faults[0] == "spills 8 bytes" and "the chip has -1" in faults[1]
