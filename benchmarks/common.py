"""What the benchmarks share: the machine, fair timing of rivals side by side, rows and files.

A rival is timed only after its result has been checked in the same run; a wrong one is named and gets no
time. Rivals take turns, so that a neighbour on the machine slows all of them alike. On the CPU with one
thread the clock is the thread's own CPU time, which stands still while a neighbour has the core; otherwise it
is the wall's.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TypeVar

import torch

from dualedit_kernels import library

T = TypeVar("T")
# Bytes: what is larger is read from memory every time. Caches of GPUs hold 40 to 126 MB.
BEYOND_CACHES = 1 << 27


@dataclass
class Row:
    """One measured implementation."""

    op: str
    impl: str
    device: str
    dtype: str
    shape: dict[str, object]
    threads: int
    median_ms: float
    min_ms: float
    max_ms: float
    checked: bool = True


@dataclass
class Paired:
    """How much longer one implementation takes than another, and between what this may lie."""

    ratio: float
    low: float
    high: float


@dataclass
class Rival:
    """An implementation to time.

    run: the call that is timed. wrong: given the result, says what is wrong with it, or None.
    around: called with True before and False after each turn, for rivals that need a global setting.
    calls: how often ``run`` does the work, e.g. as a graph of that many calls: times are of one.
    """

    impl: str
    dtype: str
    run: Callable[[], object]
    wrong: Callable[[object], str | None]
    around: Callable[[bool], None] = field(default=lambda on: None)
    calls: int = 1


class Benchmark:
    """Collects the rows of one benchmark and prints them as they come."""

    def __init__(self, op: str, options: argparse.Namespace):
        self.op, self.options = op, options
        self.device = options.device
        alone = options.device == "cpu" and options.threads == 1
        self.clock = time.thread_time if alone else time.perf_counter
        self.rows: list[Row] = []
        self.refused: list[dict[str, object]] = []
        self.floors: list[dict[str, object]] = []
        self.ratios: list[dict[str, object]] = []
        self.shapes: list[dict[str, object]] = []
        torch.set_num_threads(options.threads)
        print(json.dumps(machine()))

    def compare(
        self,
        shape: dict[str, object],
        rivals: list[Rival],
        floors: dict[str, float] | None = None,
        turns: int | None = None,
        enough: Callable[[dict[str, list[float]]], bool] = lambda times: False,
    ) -> dict[str, list[float]]:
        """Check every rival, time the right ones in turns, and print their rows.

        floors: milliseconds that no implementation can beat, by what sets them, e.g. reading the keys once.
        turns: how often each is timed, at most; None: 7, or 3 with --quick.
        enough: asked after every second turn, given what is returned: whether to stop.

        Returns the milliseconds of each turn, by implementation: the same turn of two is a pair.
        """
        self.shapes.append(shape)
        checked = {rival.impl: self._check(shape, rival) for rival in rivals}
        right = [rival for rival in rivals if checked[rival.impl] is not None]
        order = list(right)
        # A call of seconds is warm after its check, and fills a turn. On a GPU it has compiled a kernel.
        alone = {rival.impl: self.device == "cpu" and checked[rival.impl] > 1 for rival in right}
        repeats = {rival.impl: 1 if alone[rival.impl] else self._repeats(rival) for rival in right}
        times: dict[str, list[float]] = {rival.impl: [] for rival in right}
        for turn in range(turns or (3 if self.options.quick else 7)):
            if turn and turn % 2 == 0 and enough(times):
                break
            right.reverse()  # nobody is always the one who runs behind a certain other
            for rival in right:
                times[rival.impl].append(self._turn(rival, repeats[rival.impl]))
        title = " ".join(f"{name}={value}" for name, value in shape.items())
        print(f"{self.op}  {title}  ({self.device}, {self.options.threads} threads)")
        first = statistics.median(times[order[0].impl]) if order else 0.0
        for rival in order:
            low, middle, high = (
                min(times[rival.impl]),
                statistics.median(times[rival.impl]),
                max(times[rival.impl]),
            )
            key = (self.op, rival.impl, self.device, rival.dtype, shape, self.options.threads)
            self.rows.append(Row(*key, middle, low, high))
            ratio = f"{middle / first:8.2f} x the first"
            print(f"    {rival.impl:<34} {rival.dtype:<9} {middle:10.3f} ms (min {low:.3f}) {ratio}")
        for name, floor in (floors or {}).items():
            self.floors.append({"op": self.op, "name": name, "shape": shape, "ms": floor})
            print(f"    floor: {name:<37} {floor:10.3f} ms", flush=True)
        self._write()
        return times

    def compare_pairs(
        self, shape: dict[str, object], impl: str, base: str, times: dict[str, list[float]]
    ) -> Paired:
        """Print and keep the ratio of two implementations that `compare` timed."""
        result = paired_ratio(times[impl], times[base])
        self.ratios.append(
            {"op": self.op, "impl": impl, "base": base, "shape": shape, "turns": len(times[impl])}
            | asdict(result)
        )
        print(
            f"    {impl} / {base}, median of paired ratios: {result.ratio:.4f}"
            f" ({result.low:.4f} to {result.high:.4f} in 95 of 100 draws, {len(times[impl])} turns)",
            flush=True,
        )
        self._write()
        return result

    def add(self, row: Row) -> None:
        """Keep a row that a benchmark measured by itself, of a shape that was compared."""
        self.rows.append(row)
        self._write()

    def finish(self) -> None:
        """Draw the rows if --plot was given."""
        if self.options.plot is not None:
            from benchmarks.plots import draw

            draw([asdict(row) for row in self.rows], self.floors, self.options.plot)

    def _write(self) -> None:
        """Write the rows if --json was given, after every shape; other rows in the file stay."""
        if self.options.json is not None:
            content = {
                "machine": machine() | {"clock": self.clock.__name__},
                "rows": [],
                "refused": [],
                "floors": [],
            }
            if self.options.json.exists():
                content |= _others(json.loads(self.options.json.read_text()), self.op, self.shapes)
            content["rows"] += [asdict(row) for row in self.rows]
            content["refused"] += self.refused
            content["floors"] += self.floors
            if self.ratios:
                content["ratios"] = content.get("ratios", []) + self.ratios
            self.options.json.parent.mkdir(parents=True, exist_ok=True)
            # Whole or not at all: a run that is ended for its time leaves what it has measured.
            part = self.options.json.with_suffix(".part")
            part.write_text(json.dumps(content, indent=1) + "\n")
            part.replace(self.options.json)

    def _check(self, shape: dict[str, object], rival: Rival) -> float | None:
        """The seconds a rival's first call took, or None if its result is wrong."""
        rival.around(True)
        begin = self.clock()
        result = rival.run()
        self._synchronize()
        seconds = self.clock() - begin
        reason = rival.wrong(result)
        rival.around(False)
        if reason is not None:
            self.refused.append(
                {"op": self.op, "impl": rival.impl, "dtype": rival.dtype, "shape": shape, "reason": reason}
            )
            print(f"    {rival.impl:<34} {rival.dtype:<9} NOT TIMED, its result is wrong: {reason}")
        return seconds if reason is None else None

    def _repeats(self, rival: Rival) -> int:
        self._turn(rival, 1)  # caches, allocator and page tables are cold once
        once = self._turn(rival, 1) * rival.calls / 1e3
        return max(1, min(1000, int((0.02 if self.options.quick else 0.1) / max(once, 1e-7))))

    def _turn(self, rival: Rival, repeats: int) -> float:
        rival.around(True)
        self._synchronize()
        begin = self.clock()
        for _ in range(repeats):
            rival.run()
        self._synchronize()
        elapsed = self.clock() - begin
        rival.around(False)
        return elapsed / repeats / rival.calls * 1e3

    def _synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def arguments(description: str) -> argparse.ArgumentParser:
    """The options every benchmark has: --quick, --json, --threads, --device, --plot."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="fewer shapes and turns")
    parser.add_argument("--json", type=Path, help="write machine and rows to this file")
    parser.add_argument("--plot", type=Path, help="draw the rows into this PNG file")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads for every rival")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    return parser


def place(device: str) -> str:
    """Where the tensors of a benchmark on ``device`` are; elsewhere only in a rehearsal without a GPU."""
    return device


def machine() -> dict[str, object]:
    """What the figures depend on."""
    result: dict[str, object] = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "compiled_library": library.COMPILED_REASON,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    for package in ("triton", "faiss-cpu", "peft"):
        try:
            result[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            result[package] = None
    return result


def paired_ratio(times: list[float], base: list[float]) -> Paired:
    """Median ratio of the same turns of two, and where it lies in 95 of 100 draws from them (bootstrap).

    Two turns in a row have the two in both orders: they make a pair, in which what it costs to run behind the
    other, and a drift of the machine, cancel. A last turn without another is left out.
    """
    turns = len(times) // 2 * 2 or 1
    own, other = (torch.tensor(t[:turns], dtype=torch.float64).view(-1, min(turns, 2)) for t in (times, base))
    ratios = own.sum(1) / other.sum(1)
    draws = torch.randint(len(ratios), (2000, len(ratios)), generator=torch.Generator().manual_seed(0))
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = ratios[draws].quantile(0.5, 1).quantile(ends).tolist()
    return Paired(float(ratios.quantile(0.5)), low, high)


def captured(call: Callable[[], T], calls: int = 1) -> Callable[[], T]:
    """A call whose kernels are captured once, and which replays them: no Python and no launches of each.

    calls: how often the call stands in the graph, one behind the other; for those so short that the launch of
    a graph would take longer. What it returns is the same tensors at every replay, written anew.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        for _ in range(3):  # compiles, and makes what is made on a first call
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        for _ in range(calls):
            result = call()

    def replay() -> T:
        graph.replay()
        return result

    return replay


def bandwidth(device: str = "cpu") -> float:
    """Bytes per second of memory, at best: read by a CPU on torch's threads; read and written by a GPU."""
    if device == "cpu":
        data = torch.ones(1 << 26)  # 256 MB
        data.sum()
        return data.numel() * 4 / min(_timed(data.sum) for _ in range(7))
    source = torch.ones(1 << 28, device=device)  # 1 GiB
    target = torch.empty_like(source)
    return 2 * source.nbytes / _timed_on_gpu(lambda: target.copy_(source), 10)


def product_rate(dtype: torch.dtype, device: str = "cpu") -> float:
    """Floating-point operations per second of a large matrix product, at best."""
    if device == "cpu":
        size = 1536
        x, weight = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
        product = partial(torch.nn.functional.linear, x, weight)
        product()
        return 2 * size**3 / min(_timed(product) for _ in range(7))
    size = 8192
    # Random: of ones a GPU computes faster, because they take less power.
    x, weight = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    return 2 * size**3 / _timed_on_gpu(lambda: torch.nn.functional.linear(x, weight), 4)


def _timed_on_gpu(call: Callable[[], object], repeats: int) -> float:
    """Seconds of one call on the GPU's own clock, the best of seven turns of ``repeats`` calls."""
    call()
    milliseconds = []
    for _ in range(7):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(repeats):
            call()
        end.record()
        torch.cuda.synchronize()
        milliseconds.append(begin.elapsed_time(end))
    return min(milliseconds) / repeats / 1e3


def _timed(call: Callable[[], object]) -> float:
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    begin = clock()
    call()
    return clock() - begin


def _others(content: dict[str, list], op: str, shapes: list[dict]) -> dict[str, list]:
    names = [n for n in ("rows", "refused", "floors", "ratios") if n in content]
    return {n: [row for row in content[n] if row["op"] != op or row["shape"] not in shapes] for n in names}


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
