"""Which implementation runs: the choice, its reasons, the report, and life without the compiled library."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dualedit_kernels
from dualedit_kernels import backend, library
from dualedit_kernels.__main__ import report

PACKAGE = Path(dualedit_kernels.__file__).parent


def python(*arguments, cwd=PACKAGE.parent, **environment):
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("DUALEDIT_")}
    variables = inherited | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(cwd)} | environment
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=variables, capture_output=True, text=True, timeout=120
    )


def entry(name, refusal=None):
    return backend.Implementation(name, {}, lambda device, dtype: refusal, f"{name} is good")


@pytest.fixture
def family(monkeypatch):
    monkeypatch.setattr(backend, "_families", dict(backend._families))
    backend.register("example", entry("fast", "it needs a wing"), entry("slow"), entry("last"))
    yield "example"
    backend._cache.clear()


def test_first_that_can_run_is_chosen_and_says_why(family):
    choice = backend.explain(family, "cpu", torch.float32)
    assert choice.implementation.name == "slow"
    assert choice.reason == "slow is good; not fast: it needs a wing"


def test_forcing(family, monkeypatch):
    with backend.use_backend(example="last"):
        assert backend.explain(family, "cpu", torch.float32).reason == "forced by use_backend"
        with backend.use_backend(example="slow"):
            assert backend.explain(family, "cpu", torch.float32).implementation.name == "slow"
        assert backend.explain(family, "cpu", torch.float32).implementation.name == "last"
    assert backend.explain(family, "cpu", torch.float32).implementation.name == "slow"
    backend._cache.clear()
    monkeypatch.setenv(backend.ENVIRONMENT, "nearest_key=reference,example=last")
    choice = backend.explain(family, "cpu", torch.float32)
    assert choice.implementation.name == "last" and "DUALEDIT_BACKEND" in choice.reason


def test_a_forced_implementation_never_falls_back(family):
    with (
        backend.use_backend(example="fast"),
        pytest.raises(RuntimeError, match="cannot run: it needs a wing"),
    ):
        backend.explain(family, "cpu", torch.float32)
    with (
        backend.use_backend(example="nothing"),
        pytest.raises(RuntimeError, match="use one of fast, slow, last"),
    ):
        backend.explain(family, "cpu", torch.float32)
    with (
        pytest.raises(ValueError, match="'other' is not an operator family"),
        backend.use_backend(other="fast"),
    ):
        pass


def test_nothing_can_run(monkeypatch):
    monkeypatch.setattr(backend, "_families", dict(backend._families))
    backend.register("example", entry("a", "it is raining"), entry("b", "it is raining"))
    with pytest.raises(RuntimeError, match="not a, b: it is raining"):
        backend.explain("example", "cpu", torch.float32)


def test_every_operator_runs_everywhere():
    """Plain PyTorch is behind every family, for any device and dtype."""
    for family in backend.families():
        for device in ("cpu", "cuda", "xpu"):
            for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
                assert backend.explain(family, device, dtype).reason


def test_report_names_everything():
    text = report()
    for word in ("torch", "triton", "C++ compiler", "compiled library", *backend.families()):
        assert word in text
    assert library.COMPILED_REASON in text
    printed = python("-m", "dualedit_kernels")
    assert printed.returncode == 0, printed.stderr
    assert "nearest_key" in printed.stdout


def test_environment_forces_in_a_new_process():
    result = python("-m", "dualedit_kernels", DUALEDIT_BACKEND="reference")
    assert result.stdout.count("forced by DUALEDIT_BACKEND=reference") == len(backend.families())


LOOKUP = (
    "import torch, dualedit_kernels as d; from dualedit_kernels import backend, library;"
    "print(library.COMPILED_REASON); print(backend.explain('nearest_key', 'cpu', torch.float32).reason);"
    "print(d.nearest_key(torch.ones(1, 4), torch.eye(4), torch.full((4,), 9.0))[0].tolist())"
)


def test_without_the_compiled_library(tmp_path):
    """Everything imports and works when the library was never built, is switched off, or is broken."""
    shutil.copytree(PACKAGE, tmp_path / PACKAGE.name, ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    never = python("-c", LOOKUP, cwd=tmp_path)
    assert never.returncode == 0, never.stderr
    assert "not built: install again with a C++ compiler" in never.stdout and "[0]" in never.stdout
    assert "not cpp-avx512, cpp-avx2, cpp-portable: the compiled library is not built" in never.stdout
    forced = python("-c", LOOKUP, cwd=tmp_path, DUALEDIT_BACKEND="nearest_key=cpp-avx2")
    assert "is forced by DUALEDIT_BACKEND" in forced.stderr and forced.returncode

    off = python("-c", LOOKUP, DUALEDIT_NO_COMPILED="1")
    assert "not loaded because DUALEDIT_NO_COMPILED is set" in off.stdout and "[0]" in off.stdout

    (tmp_path / PACKAGE.name / "_C.abi3.so").write_bytes(b"not a library")
    broken = python("-c", LOOKUP, cwd=tmp_path)
    assert broken.returncode == 0, broken.stderr
    assert "_C.abi3.so could not be loaded" in broken.stdout and "[0]" in broken.stdout


def test_imports_torch_and_triton_only():
    """The operators know tensors, not models."""
    code = (
        "import sys, dualedit_kernels;"
        "bad = [m for m in ('transformers', 'peft', 'dualedit', 'faiss', 'matplotlib') if m in sys.modules];"
        "sys.exit(f'imported {bad}' if bad else 0)"
    )
    result = python("-c", code)
    assert result.returncode == 0, result.stderr


def test_setup_without_build(tmp_path):
    """DUALEDIT_NO_BUILD=1 leaves the library out, says so, and the build succeeds."""
    root = PACKAGE.parent
    if not (root / "setup.py").exists():
        pytest.skip("the package is installed without its source tree")
    result = python("setup.py", "build", "--build-base", str(tmp_path), cwd=root, DUALEDIT_NO_BUILD="1")
    assert result.returncode == 0, result.stderr
    assert "the C++ library is NOT built: DUALEDIT_NO_BUILD is set" in result.stderr
    assert not list(tmp_path.rglob("_C*")) and list(tmp_path.rglob("nearest_key/op.py"))
