"""Compiles every GPU kernel without a GPU; fails if one spills, is too large or misses the tensor cores.

    python -m benchmarks.gpu.compile_report [--triton oldest installed] [--arch 80 90 100] [--only attend]
                                        [--scenes bf16] [--json report.json]

It is done for the oldest Triton that is supported and for the installed one, which in a fresh install is the
newest. Another version than the installed one is fetched once (200 MB) and kept: `benchmarks.gpu.tritons`.

Every launch that `benchmarks.gpu.scenes` records is compiled for each architecture, and its registers and
spilled bytes are read from the machine code. The CUDA sources are compiled with nvcc where it is installed.

The exit status is 0 only if no kernel spills, all fit the shared memory of the chip, and every product of
16-bit operands runs on tensor cores. Products in fp32 are exact on purpose (no tf32) and use ordinary
multiply-adds.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.gpu import tritons
from benchmarks.gpu.scenes import Launch, launches

HEADER = "{:<7} {:<22} {:<6} {:>4} {:>5} {:>7} {:<6} tiles | first used by".format(
    "triton", "kernel", "arch", "regs", "spill", "shared", "units"
)
# Bytes that a block may use, CUDA programming guide.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# What products on tensor cores are called in PTX: of Blackwell, of Hopper, of all.
TENSOR_CORES = {"tcgen05": "tcgen05.mma", "wgmma": "wgmma.mma_async", "mma": "mma.sync"}
@dataclass(frozen=True)
class Result:
    """What one kernel became on one architecture; ``faults`` is empty if it is fit to ship.

    triton: the version that compiled it; None where nvcc did.
    """

    triton: str | None
    kernel: str
    arch: str
    tiles: str
    scene: str
    registers: int
    spilled: int
    shared: int
    tensor_cores: str
    faults: list[str]


def compiled(launch: Launch, arch: int) -> object:
    """What Triton makes of one launch for one architecture."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(
        launch.kernel,
        dict(launch.signature),
        dict(launch.constexprs),
        {(i,): [["tt.divisibility", 16]] for i in launch.divisible},
    )
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(launch.options))


def compile_launch(launch: Launch, arch: int) -> Result:
    """Compile one launch for one architecture and judge it."""
    import triton

    kernel = compiled(launch, arch)
    registers, spilled = resources(kernel.asm["cubin"])
    shared = kernel.metadata.shared
    narrow_dots = re.findall(r"tt\.dot .*: tensor<\d+x\d+x(?:bf16|f16)", kernel.asm["ttir"])
    units = next((name for name, text in TENSOR_CORES.items() if text in kernel.asm["ptx"]), "-")
    faults = []
    if spilled:
        faults.append(f"spills {spilled} bytes")
    if shared > SHARED_LIMIT[arch]:
        faults.append(f"needs {shared} bytes of shared memory, the chip has {SHARED_LIMIT[arch]}")
    if narrow_dots and units == "-":
        faults.append("a product of 16-bit operands does not use the tensor cores")
    tiles = {n: v for n, v in launch.constexprs if n.startswith("B") and n != "BACKWARD"} | dict(
        launch.options
    )
    text = " ".join(f"{name.removeprefix('num_')}={value}" for name, value in tiles.items())
    return Result(
        triton.__version__, launch.name, f"sm_{arch}", text, launch.scene, registers, spilled, shared, units,
        faults,
    )  # fmt: skip


def resources(cubin: bytes) -> tuple[int, int]:
    """(registers, spilled bytes) of a cubin's one kernel; Triton uses the stack for spills alone."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    figures = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    return int(figures[1]), int(figures[2]) + int(figures[3])


def compile_cuda(arch: int) -> list[Result]:
    """Compile csrc/cuda/*.cu with nvcc; an empty list if there is no nvcc."""
    nvcc = shutil.which("nvcc")
    results = []
    folder = Path(__file__).parents[2] / "csrc"
    for source in sorted(folder.glob("cuda/*.cu")) if nvcc else []:
        command = [
            nvcc,
            "-cubin",
            "-O3",
            "-std=c++17",
            f"-arch=sm_{arch}",
            "-Xptxas",
            "-v",
            "-I",
            str(folder),
        ]
        done = subprocess.run(
            [*command, str(source), "-o", "/dev/null"], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"nvcc failed for {source.name}:\n{done.stderr}")
        names = {name for name, *_ in _ptxas_figures(done.stderr)}
        readable = _demangle(sorted(names))
        for name, registers, spilled, shared in _ptxas_figures(done.stderr):
            faults = [f"spills {spilled} bytes"] if spilled else []
            figures = (registers, spilled, shared, "-", faults)
            results.append(Result(None, readable[name], f"sm_{arch}", "", source.name, *figures))
    return results


def main() -> int:
    """Run from the command line; the exit status says whether all kernels are fit to ship."""
    options = arguments().parse_args()
    named = {"oldest": tritons.oldest(), "installed": tritons.installed()}
    results: list[Result] = []
    for version in dict.fromkeys(named.get(name, name) for name in options.triton):
        if version == tritons.installed():
            results += compile_triton(options)
        else:
            results += under_another_triton(version, options)
    everything = not (options.only or options.scenes or options.no_cuda)
    for arch in options.arch if everything else ():
        cuda = compile_cuda(arch)
        if not cuda:
            print(f"csrc/cuda is not compiled for sm_{arch}: there is no nvcc on the PATH")
        for result in cuda:
            show(result)
        results += cuda
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")
    bad = [result for result in results if result.faults]
    print(f"{len(results)} kernels compiled, {len(bad)} not fit to ship")
    return 1 if bad or not results else 0


def arguments() -> argparse.ArgumentParser:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--triton",
        nargs="+",
        default=["oldest", "installed"],
        metavar="VERSION",
        help="versions, e.g. 3.6.0, or oldest (of the supported) and installed, which is the default",
    )
    parser.add_argument("--cache", type=Path, help="where fetched versions of Triton are kept")
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100], choices=sorted(SHARED_LIMIT))
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument("--scenes", nargs="+", default=[], help="scenes whose name contains one of these")
    parser.add_argument("--no-cuda", action="store_true", help="leave csrc/cuda out")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    return parser


def compile_triton(options: argparse.Namespace) -> list[Result]:
    """Compile the launches that the options name with this process's Triton, and show each."""
    results = []
    print(HEADER, flush=True)
    for arch in options.arch:
        for launch in launches(arch, options.only, lambda scene: _chosen(scene, options.scenes)):
            results.append(compile_launch(launch, arch))
            show(results[-1])
    return results


def under_another_triton(version: str, options: argparse.Namespace) -> list[Result]:
    """The same in a process that imports another Triton."""
    folder = tritons.fetch(version, options.cache)
    with tempfile.TemporaryDirectory() as place:
        rows = Path(place) / "rows.json"
        command = [sys.executable, "-m", "benchmarks.gpu.compile_report", "--triton", "installed"]
        command += ["--no-cuda", "--json", str(rows), "--only", options.only]
        command += ["--arch", *map(str, options.arch)]
        if options.scenes:
            command += ["--scenes", *options.scenes]
        done = subprocess.run(command, env=tritons.environment(folder), cwd=tritons.ROOT, check=False)
        if not rows.exists():
            raise RuntimeError(f"the report under triton {version} ended with status {done.returncode}")
        results = [Result(**row) for row in json.loads(rows.read_text())]
    others = {result.triton for result in results} - {version}
    if others:
        raise RuntimeError(f"compiled by triton {others} in place of {version}")
    return results


def show(result: Result) -> None:
    """Print one row of the table."""
    print(
        f"{result.triton or '-':<7} {result.kernel:<22} {result.arch:<6} {result.registers:>4} "
        f"{result.spilled:>5} {result.shared:>7} {result.tensor_cores:<6} {result.tiles} | {result.scene}"
        + "".join(f"  FAULT: {fault}" for fault in result.faults),
        flush=True,
    )


def _chosen(scene: str, parts: list[str]) -> bool:
    return not parts or any(part in scene for part in parts)


def _ptxas_figures(log: str) -> list[tuple[str, int, int, int]]:
    """(mangled name, registers, spilled bytes, static shared bytes) of every kernel in a log of ptxas -v."""
    figures = []
    for part in re.split(r"Compiling entry function '", log)[1:]:
        spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", part))
        shared = re.search(r"(\d+) bytes smem", part)
        registers = int(re.search(r"Used (\d+) registers", part).group(1))
        figures.append((part.split("'")[0], registers, spills, int(shared.group(1)) if shared else 0))
    return figures


def _demangle(names: list[str]) -> dict[str, str]:
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None or not names:
        return {name: name for name in names}
    text = subprocess.run([tool, *names], capture_output=True, text=True, check=True).stdout.splitlines()
    short = [
        re.sub(r"\(.*", "", re.sub(r"^void |dualedit::|\(anonymous namespace\)::", "", line)) for line in text
    ]
    return dict(zip(names, short, strict=True))


if __name__ == "__main__":
    sys.exit(main())
