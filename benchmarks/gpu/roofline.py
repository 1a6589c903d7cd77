"""What each GPU kernel could reach on an H200, on paper: bytes, products, instructions of its machine code.

    python -m benchmarks.gpu.roofline [--write]

Nothing here runs on a GPU. Every kernel is compiled for sm_90 and its machine code read: the innermost loop
that holds most of its arithmetic, where it spends its time, is counted by kind of instruction. A
multiprocessor issues four instructions of a warp in a clock and does as many in fp32, so whatever stands
beside the arithmetic takes its time from it. Three bounds follow for the shapes of LLaVA-1.5-7B: bytes that
must move at the bandwidth of a copy, products at the rate of the tensor cores, instructions at the rate of
issue. The largest is the fastest that this machine code can be; latencies, waves that do not fill the GPU
and launches come on top.

--write puts the tables into benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu.compile_report import compiled
from benchmarks.gpu.scenes import Launch, launches
from benchmarks.gpu.tritons import ROOT

ARCH, WARP = 90, 32
# H200: a copy and a large bf16 product as measured on one; processors and clock as NVIDIA states them.
COPY, PRODUCTS, PROCESSORS, CLOCK = 4.3e12, 788e12, 132, 1.98e9
ISSUE = PROCESSORS * 4 * CLOCK  # instructions of warps a second
FP32 = ("FFMA", "FADD", "FMUL")
HEAD = "| loop | fp32 | memory | tensor FLOP | bytes, us | tensor, us | issue, us | bound by"
README, BEGIN, END = ROOT / "benchmarks/README.md", "<!-- roofline -->", "<!-- /roofline -->"
# LLaVA-1.5-7B: width, width of the edit attention, image tokens, tokens of a row, tokens of an edit.
D, M, IMAGE, L, EDIT = 4096, 1024, 576, 640, 620


@dataclass
class Loop:
    """The loop that holds most of a kernel's arithmetic: instructions of one thread in one turn of it."""

    kinds: Counter
    flops: int  # of tensor cores in one turn, by one warp

    @property
    def issued(self) -> int:
        """All of them."""
        return sum(self.kinds.values())

    @property
    def fp32(self) -> int:
        """Those in fp32."""
        return sum(self.kinds[kind] for kind in FP32)


def disassembled(cubin: bytes) -> list[str]:
    """Lines of machine code, labels among them."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout
    return text.splitlines()


def hot_loop(lines: list[str]) -> Loop:
    """The innermost loop with the most products on tensor cores, or else with the most in fp32."""
    labels: dict[str, int] = {}
    code: list[tuple[str, str]] = []
    bounds: list[tuple[int, int]] = []
    for line in lines:
        if label := re.match(r"\s*(\.L\w+):", line):
            labels[label[1]] = len(code)
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);", line):
            code.append((found[1], found[2]))
            target = re.search(r"\((\.L\w+)\)", found[2])
            if found[1].startswith("BRA") and target and target[1] in labels:
                bounds.append((labels[target[1]], len(code)))
    inner = [b for b in bounds if not any(b != c and b[0] <= c[0] and c[1] <= b[1] for c in bounds)]
    loops = [_counted(code[begin:end]) for begin, end in inner]
    if not loops:
        raise ValueError("the machine code has no loop: it was unrolled, or its text is of another kind.")
    return max(loops, key=lambda loop: (loop.flops, loop.fp32))


def _counted(code: list[tuple[str, str]]) -> Loop:
    kinds = Counter(name.split(".")[0] for name, _ in code)
    flops = 0
    for name, _ in code:
        if found := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", name):  # one of these by four warps together
            rows, columns, depth = map(int, found.groups())
            flops += 2 * rows * columns * depth // 4
        elif name.startswith("HMMA.16816"):
            flops += 2 * 16 * 8 * 16
    return Loop(kinds, flops)


def loop_of(scene: str, kernel: str, **constants: object) -> tuple[Launch, Loop]:
    """A kernel of a scene, chosen by its compile-time constants where it is launched in several ways."""
    for launch in launches(ARCH, kernel, lambda name: name == scene):
        if constants.items() <= dict(launch.constexprs).items():
            return launch, hot_loop(disassembled(compiled(launch, ARCH).asm["cubin"]))
    raise ValueError(f"{scene} launches no {kernel} with {constants}.")


def microseconds(loop: Loop, work: float, moved: float, tensor: bool) -> dict[str, float]:
    """The three bounds. work: operations on tensor cores, or fused multiply-adds of single values."""
    if tensor:
        issued = work / loop.flops * loop.issued
        return {"bytes": moved / COPY, "tensor": work / PRODUCTS, "issue": issued / ISSUE}
    issued = work / WARP * loop.issued / loop.kinds["FFMA"]
    return {"bytes": moved / COPY, "tensor": 0.0, "issue": issued / ISSUE}


def kernels(rows: int) -> Iterator[tuple[str, Loop, dict[str, float]]]:
    """(kernel, its loop, its bounds) of one call of the attention, bf16, all rows open."""
    scene = "attention bf16 B=8 L=640 head=128"
    states, weights = 2.0 * rows * IMAGE * D, 2.0 * M * D
    _, loop = loop_of("gate bf16 N=1 cosine", "statistics_kernel", GATE=True)
    # Two passes; the second finds the states in a cache. A sum and a sum of squares of differences.
    yield "statistics", loop, microseconds(loop, rows * IMAGE * D, states, False)
    _, loop = loop_of(scene, "project_kernel")
    moved = states + weights + 2 * rows * IMAGE * M
    yield "project", loop, microseconds(loop, 2.0 * rows * IMAGE * D * M, moved, True)
    _, loop = loop_of(scene, "attend_kernel", BACKWARD=False)
    moved = 2.0 * (2 * rows * IMAGE * M + 2 * EDIT * M)
    yield "attend", loop, microseconds(loop, 4.0 * rows * IMAGE * EDIT * M, moved, True)
    _, loop = loop_of(scene, "output_kernel", INPLACE=False)
    moved = 2.0 * (2 * rows * L * D + D * M + rows * IMAGE * M)
    yield "output", loop, microseconds(loop, 2.0 * rows * IMAGE * D * M, moved, True)


def lookups() -> Iterator[tuple[str, int, Loop, dict[str, float]]]:
    """(dtype of the keys, queries, loop, bounds) of lookups among 100,000 keys."""
    for dtype, size in (("fp32", 4), ("bf16", 2)):
        for batch in (1, 8, 16, 32, 128):
            launch, loop = loop_of(f"nearest_key {dtype} B={min(batch, 8)} l2", "scan_kernel")
            queries = -(-batch // dict(launch.constexprs)["BB"]) * dict(launch.constexprs)["BB"]
            yield dtype, batch, loop, microseconds(loop, queries * 1e5 * D, 1e5 * D * size, False)


def tables() -> str:
    """Both, in Markdown."""
    lines = [f"| kernel, B {HEAD} |", "|---" * 9 + "|"]
    sums: dict[int, float] = {}
    for rows in (1, 8, 32):
        for name, loop, bounds in kernels(rows):
            lines.append(f"| {name}, {rows} | {_loop(loop)} | {_bounds(bounds)} |")
            sums[rows] = sums.get(rows, 0.0) + max(bounds.values())
    lines += ["", "All four, microseconds: " + ", ".join(f"B={b}: {s * 1e6:.0f}" for b, s in sums.items())]
    lines += ["", f"| keys, B {HEAD} | of a copy's bandwidth, at most |", "|---" * 10 + "|"]
    for dtype, batch, loop, bounds in lookups():
        share = bounds["bytes"] / max(bounds.values())
        lines.append(f"| {dtype}, {batch} | {_loop(loop)} | {_bounds(bounds)} | {share:.0%} |")
    return "\n".join(lines)


def _loop(loop: Loop) -> str:
    memory = sum(n for kind, n in loop.kinds.items() if re.match(r"LD|ST|UTMA", kind))
    return f"{loop.issued} | {loop.fp32} | {memory} | {loop.flops or '-'}"


def _bounds(bounds: dict[str, float]) -> str:
    return " | ".join(f"{value * 1e6:.0f}" for value in bounds.values()) + f" | {max(bounds, key=bounds.get)}"


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"into {README.relative_to(ROOT)}")
    text = tables()
    print(text)
    if parser.parse_args().write:
        page = README.read_text()
        before, after = page.split(BEGIN)[0], page.split(END)[1]
        README.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


if __name__ == "__main__":
    main()
