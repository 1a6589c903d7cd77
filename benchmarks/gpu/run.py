"""Everything that only a GPU can tell, in one command of less than ten minutes.

    python -m benchmarks.gpu [--minutes 9] [--dry-run]

Builds the library with csrc/cuda, checks every implementation on the GPU against float64 at small and at real
sizes, captures every operator in a CUDA graph and replays it with other routes, and runs the benchmarks that
the goals are about, that of a whole model of LLaVA-1.5-7B's shapes (16 GB of memory) among them. Then come
the Triton and CUDA tests on the device, tables of more than 2^31 elements among them (9 GB of memory), some
under compute-sanitizer (where it is installed), and the other benchmarks. At the end stands which goals are
reached, see `benchmarks.gpu.goals`. All of it goes into benchmarks/results/<gpu>.json, in place of what was
there, with the versions it was measured on; the exit status is 0 only if nothing failed. A missed goal is no
failure.

Exit status 2: there is no GPU. With --dry-run none is needed: every step is rehearsed on tiny sizes in
Triton's interpreter or by the reference (`benchmarks.gpu.rehearsal`), tests are collected but not run, no
figure is kept, and the table says "dry run" where a goal found the rows that it is computed from. The exit
status is 0 if all did.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from benchmarks.gpu import checks, goals, rehearsal

ROOT = Path(__file__).parents[2]
TESTS = [
    "tests/kernels/test_nearest_key_triton.py",
    "tests/kernels/test_routed_linear_triton.py",
    "tests/kernels/test_gated_edit_attention_triton.py",
    "tests/kernels/test_gate_triton.py",
    "tests/kernels/test_nearest_key_cuda.py",
    "tests/kernels/test_benchmarks.py",
]
# Of these only what runs on the device: the others of their tests are of the CPU.
SWEEPS = ["tests/kernels/test_random_sweep.py", "tests/kernels/test_large_sizes.py", "-k", "in_triton"]
# The benchmarks that goals are about, the most valuable first: seconds at most, options. A token of the whole
# model takes milliseconds, so there is time for the turns that narrow the interval of its ratio.
GOALS = {
    "bench_gated_edit_attention": (150, ["--quick"]),
    "bench_nearest_key": (100, ["--quick"]),
    "bench_whole_model": (150, ["--quick", "--turns", "20", "--tokens", "200"]),
}
ON_THE_CPU = {"bench_training"}


class Report:
    """The steps that were taken, with their outcome and their seconds; all of them rehearsed if ``dry``."""

    def __init__(self, minutes: float, dry: bool = False):
        self.deadline = time.monotonic() + minutes * 60
        self.dry = dry
        self.steps: list[dict[str, object]] = []

    def step(self, name: str, work: Callable[[], str]) -> None:
        """Do ``work``, which returns what there is to say or raises; later steps run all the same."""
        begin = time.monotonic()
        try:
            if self.left() <= 0:
                raise TimeoutError("no time was left for it")
            outcome, text = "passed", work()
        except Exception as error:
            outcome = "failed"
            text = f"{type(error).__name__}: {error}"
            print(traceback.format_exc(), flush=True)
        seconds = round(time.monotonic() - begin, 1)
        self.steps.append({"step": name, "outcome": outcome, "seconds": seconds, "said": text})
        print(f"[{outcome}] {name} ({seconds} s): {text}", flush=True)

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def passed(self) -> bool:
        """Whether no step has failed."""
        return all(step["outcome"] == "passed" for step in self.steps)


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--minutes", type=float, default=9.0, help="steps that would begin later are not taken"
    )
    parser.add_argument("--part", choices=["check", "capture"], help="only this, in this process")
    parser.add_argument("--dry-run", action="store_true", help="rehearse every step without a GPU")
    options = parser.parse_args()
    if not torch.cuda.is_available() and not options.dry_run:
        print("There is no GPU that torch can see, so there is nothing to check or to measure here.")
        return 2
    if options.part is not None:
        print({"check": checks.check, "capture": checks.capture}[options.part]())
        return 0
    report = Report(max(60.0, options.minutes) if options.dry_run else options.minutes, options.dry_run)
    if options.dry_run:
        with tempfile.TemporaryDirectory() as folder:
            return rehearse(report, Path(folder) / "rows.json")
    name = torch.cuda.get_device_name().lower().replace(" ", "-").removeprefix("nvidia-")
    target = ROOT / "benchmarks/results" / f"{name}.json"
    # An earlier version's rows must not count as this one's, and are kept until this run has its own.
    rows = target.with_suffix(".measuring.json")
    rows.unlink(missing_ok=True)
    take_steps(report, rows)
    content = json.loads(rows.read_text()) if rows.exists() else {}
    found = goals.findings(content)
    content |= {"gpu": versions(), "steps": report.steps, "goals": [asdict(one) for one in found]}
    rows.parent.mkdir(parents=True, exist_ok=True)
    rows.write_text(json.dumps(content, indent=1) + "\n")
    rows.replace(target)
    print(f"{goals.table(found)}\nwrote {target}")
    return 0 if report.passed() else 1


def take_steps(report: Report, rows: Path) -> None:
    """All steps, in the order of their worth; benchmarks write their rows to a file."""
    report.step("build with FORCE_CUDA=1", lambda: build(report))
    # In processes of their own, so that they load the library that was just built.
    report.step("against float64", partial(module, report, "benchmarks.gpu", "--part", "check", limit=90))
    report.step("CUDA graphs", partial(module, report, "benchmarks.gpu", "--part", "capture", limit=60))
    for stem, (limit, extra) in GOALS.items():
        report.step(stem, partial(measure, report, stem, rows, limit, extra))
    report.step("tests on the device", partial(tests, report, *TESTS, limit=200))
    report.step("random and large sizes", partial(tests, report, *SWEEPS, limit=120))
    report.step("compute-sanitizer", partial(sanitize, report))
    for stem in sorted(path.stem for path in (ROOT / "benchmarks").glob("bench_*.py")):
        if stem not in ON_THE_CPU and stem not in GOALS:
            report.step(stem, partial(measure, report, stem, rows, 100, ["--quick"]))


def rehearse(report: Report, rows: Path) -> int:
    """Take all steps without a GPU; the exit status."""
    rehearsal.shrink("benchmarks.gpu.goals")
    take_steps(report, rows)
    content = json.loads(rows.read_text()) if rows.exists() else {}
    found = rehearsal.rehearsed(goals.findings(content))
    refused = [f"{one['impl']} is wrong: {one['reason']}" for one in content.get("refused", [])]
    print("\n".join([goals.table(found), *refused, "a dry run: nothing was measured"]))
    whole = {one.outcome for one in found} == {"dry run"}
    return 0 if report.passed() and whole else 1


def build(report: Report) -> str:
    """Compile the library in place, with csrc/cuda; in a rehearsal only load what there is."""
    said = []
    if not report.dry:
        done = run(report, [sys.executable, "setup.py", "build_ext", "--inplace"], FORCE_CUDA="1")
        lines = (done.stdout + done.stderr).splitlines()
        said = [line for line in lines if line.startswith("dualedit-kernels:")]
    code = "from dualedit_kernels import library; print(library.COMPILED_REASON)"
    loaded = call(report, "-c", code)
    if "loaded" not in loaded and not report.dry:
        raise RuntimeError(f"{loaded}; setup.py said: {' '.join(said)}")
    return loaded


def module(report: Report, name: str, *arguments: str, limit: float) -> str:
    """Run a module; the last line it printed."""
    if not report.dry:
        return call(report, "-m", name, *arguments, limit=limit)
    inside = name.replace("benchmarks.gpu", "benchmarks.gpu.run")
    arguments = (*arguments, "--dry-run") if inside != name else arguments
    # The checks compare every implementation; benchmarks need one that is quick.
    which = {"TRITON_INTERPRET": "1"} if inside != name else {"DUALEDIT_BACKEND": "reference"}
    return call(report, "-m", "benchmarks.gpu.rehearsal", inside, *arguments, limit=math.inf, **which)


def tests(report: Report, *arguments: str, limit: float) -> str:
    """Run tests; in a rehearsal they are only collected."""
    only = ("--collect-only",) if report.dry else ()
    return call(report, "-m", "pytest", "-q", "-x", *only, *arguments, limit=limit)


def measure(report: Report, stem: str, target: Path, limit: float, extra: list[str]) -> str:
    """Run a benchmark on the GPU; what it measured before it ran out of time is kept."""
    arguments = ("--device", "cuda", "--json", str(target), *extra)
    return module(report, f"benchmarks.{stem}", *arguments, limit=limit)


def sanitize(report: Report) -> str:
    """The small checks under memcheck."""
    select = "empty or mixed or overlap or decode or strided or (against_float64 and l2)"
    chosen = (*TESTS[:3], "-k", f"({select}) and bfloat16")
    if report.dry:
        return tests(report, *chosen, limit=150)
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        return "not installed here: left out"
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-m", "pytest"]
    done = run(report, [*command, "-q", "-x", *chosen], limit=150)
    if done.returncode:
        raise RuntimeError(done.stdout[-2000:])
    return done.stdout.strip().splitlines()[-1]


def call(report: Report, *arguments: str, limit: float = 240, **environment: str) -> str:
    """Run Python; the last line it printed, or RuntimeError with the end of its output."""
    done = run(report, [sys.executable, *arguments], limit, **environment)
    if done.returncode:
        raise RuntimeError(f"exit status {done.returncode}:\n{(done.stdout + done.stderr)[-4000:]}")
    return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""


def run(
    report: Report, command: list[str], limit: float = 240, **environment: str
) -> subprocess.CompletedProcess:
    """Run a command from the root of the repository, within the time that is left."""
    return subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=max(1.0, min(limit, report.left())),
    )


def versions() -> dict[str, object]:
    """The GPU and the software that the figures depend on."""
    import triton

    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip().splitlines()
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "driver": driver[0] if driver else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
    }

