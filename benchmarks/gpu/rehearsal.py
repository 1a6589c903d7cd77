"""A part of the GPU run on a machine without a GPU: the same code, tiny sizes.

    DUALEDIT_BACKEND=reference python -m benchmarks.gpu.rehearsal benchmarks.bench_nearest_key --device cuda

For ``python -m benchmarks.gpu --dry-run``, which so finds a misspelt name or an argument too few before a GPU
waits for it. Tensors stay on the CPU, graphs are calls, compiled rivals are not compiled, bandwidth and rate
are made up: no figure means anything, and none is kept.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable

import torch

from benchmarks import common
from benchmarks.gpu import goals

MADE_UP = 1e12  # bytes or operations a second
# What modules of the run call their sizes, and tiny ones.
SIZES: dict[str, dict[str, object]] = {
    "benchmarks.bench_gated_edit_attention": {
        "HIDDEN": 48, "MID": 32, "HEADS": 2, "IMAGE": 5, "TEXT": 9, "EDIT": 6, "CALLS": 2,
    },
    "benchmarks.bench_nearest_key": {
        "SHAPES": [(20, 8), (24, 8), (22, 16)], "BEYOND_CACHES": 22 * 16 * 2, "CALLS": 2,
    },
    "benchmarks.bench_routed_linear": {"IN": 48, "OUT": 40},
    "benchmarks.bench_overhead": {"EDITS": 10, "TOKENS": 2},
    "benchmarks.bench_whole_model": {"EDITS": 10, "QUESTION": 4},
    "benchmarks.gpu.goals": {"TOKENS": 5, "FEW_KEYS": 20},
    "benchmarks.gpu.checks": {
        "LOOKUPS": ((1, 1, 1), (3, 7, 33), (9, 31, 40)),
        "LINEARS": ((1, 40, 24, 8), (7, 33, 65, 3)),
        "ATTENTIONS": (
            dict(rows=5, tokens=19, dim=24, mid=32, num_heads=2, lengths=[7, 1, 40], route=[2, -1, 0, 1, 2]),
        ),
        "GRAPH": dict(
            rows=4, tokens=9, dim=32, mid=32, num_heads=2, lengths=[7, 3], route=[0, -1, 1, -1]
        ),
    },
}  # fmt: skip
TINY_MODEL = dict(
    hidden=64, feed_forward=96, heads=4, layers=4, words=200, vision_hidden=32, vision_layers=2,
    vision_heads=2, side=28, patch=14, mid=32,
)  # fmt: skip


def stand_in() -> None:
    """Put what needs a GPU aside; before a module of the run is imported."""
    from dualedit_kernels import testing, triton_support

    if triton_support.interpreting():
        testing.mend_interpreter()
    common.place = lambda device: "cpu"
    common.captured = _repeated
    common.bandwidth = lambda device="cpu": MADE_UP
    common.product_rate = lambda dtype, device="cpu": MADE_UP
    common.Benchmark._synchronize = lambda self: None
    common.Benchmark._repeats = lambda self, rival: 1
    compare = common.Benchmark.compare
    common.Benchmark.compare = lambda *args, **options: compare(*args, **options | {"turns": 2})
    torch.compile = lambda function: function
    torch.cuda.mem_get_info = lambda: (1 << 40, 1 << 40)


def _repeated(call: Callable[[], object], calls: int = 1) -> Callable[[], object]:
    return lambda: [call() for _ in range(calls)][-1]


def shrink(name: str) -> object:
    """The module with tiny sizes."""
    module = importlib.import_module(name)
    for constant, value in SIZES.get(name, {}).items():
        if not hasattr(module, constant):
            raise AttributeError(f"{name} has no {constant} any more: correct SIZES in {__name__}.")
        setattr(module, constant, value)
    if name == "benchmarks.bench_whole_model":
        module.SIZES = module.Sizes(**TINY_MODEL)
    return module


def rehearsed(found: list[goals.Finding]) -> list[goals.Finding]:
    """Findings without figures: "dry run" where a goal found all its rows, else still "not measured"."""
    for one in found:
        if one.measured is not None:
            one.measured, one.outcome = None, "dry run"
    return found


def main() -> int:
    """Run a module of the GPU run by its name, with its own arguments."""
    name, arguments = sys.argv[1], sys.argv[2:]
    stand_in()
    shrink("benchmarks.gpu.checks")
    module = shrink(name)
    sys.argv = [name, *arguments]
    return module.main() or 0


if __name__ == "__main__":
    sys.exit(main())
