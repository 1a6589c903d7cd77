"""routed_linear against a Python loop over the rows and PEFT's batch of mixed LoRA adapters.

    python -m benchmarks.bench_routed_linear --json benchmarks/results/<machine>.json

The layer is the MLP's up-projection of LLaVA-1.5-7B (4096 to 11008), with 16 edits. Rows "delta" are given
the layer's own output and time what an edit adds to it; rows "layer" compute the layer too, as PEFT does.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import Benchmark, Rival, arguments, place
from dualedit_kernels import Full, LowRank, backend, routed_linear

IN, OUT, RANK, EDITS = 4096, 11008, 8, 16


def main() -> None:
    """Run the benchmark from the command line."""
    options = arguments(__doc__.splitlines()[0]).parse_args()
    benchmark = Benchmark("routed_linear", options)
    for dtype in (torch.float32,) if options.quick else (torch.float32, torch.bfloat16):
        for kind, rows, tokens, index in cases(options.quick):
            generator = torch.Generator().manual_seed(0)
            x, weight, values = problem(generator, kind, rows, tokens, dtype, place(options.device))
            routes = torch.tensor(index, device=place(options.device))
            base = F.linear(x, weight)
            for part in ("delta", "layer"):
                shape = {"kind": kind, "part": part, "batch": rows, "tokens": tokens, "in": IN, "out": OUT}
                shape |= {"routed": int((routes >= 0).sum()), "edits": EDITS if kind == "low_rank" else 2}
                with torch.no_grad():
                    given = base if part == "delta" else None
                    benchmark.compare(shape, rivals(x, weight, values, routes, given))
    benchmark.finish()


def cases(quick: bool) -> list[tuple[str, int, int, list[int]]]:
    """(kind, rows, tokens, route of each row)"""
    mixed = [3, -1, 7, -1, -1, 3, -1, 0]
    result = [("low_rank", 8, 16, mixed), ("low_rank", 8, 1, mixed)]
    return (
        result
        if quick
        else [*result, ("low_rank", 8, 16, [-1] * 8), ("full", 8, 16, [1, -1, 0, 1, -1, 1, 0, 1])]
    )


def problem(
    generator: torch.Generator, kind: str, rows: int, tokens: int, dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor, LowRank | Full]:
    """x [B, L, I], weight [O, I] and the values of the edits."""

    def normal(*shape: int, scale: float) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(device, dtype)

    x, weight = normal(rows, tokens, IN, scale=1.0), normal(OUT, IN, scale=IN**-0.5)
    if kind == "full":
        return x, weight, Full(normal(2, OUT, IN, scale=IN**-0.5))
    return x, weight, LowRank(normal(EDITS, RANK, IN, scale=IN**-0.5), normal(EDITS, OUT, RANK, scale=0.3))


def rivals(
    x: Tensor, weight: Tensor, values: LowRank | Full, index: Tensor, base: Tensor | None
) -> list[Rival]:
    """Ours, the loop, and PEFT where it does the same."""
    dtype = str(x.dtype).removeprefix("torch.")
    want = loop(x, weight, values, index, None)  # rows with -1 must agree bit for bit
    allowed = {"float32": 1e-4, "bfloat16": 5e-2}[dtype]

    def wrong(y: Tensor) -> str | None:
        error = float((y.float() - want.float()).abs().max())
        if not torch.equal(y[index < 0], want[index < 0]):
            return "a row without an edit changed"
        return f"error {error:.1e}" if not error <= allowed else None

    name = backend.explain("routed_linear", x.device.type, x.dtype).implementation.name
    result = [
        Rival(
            f"routed_linear ({name})",
            dtype,
            lambda: routed_linear(x, weight, None, values, index, base),
            wrong,
        ),
        Rival("Python loop over rows", dtype, lambda: loop(x, weight, values, index, base), wrong),
    ]
    if base is None and isinstance(values, LowRank):
        result += _peft(x, weight, values, index, wrong)
    return result


def loop(x: Tensor, weight: Tensor, values: LowRank | Full, index: Tensor, base: Tensor | None) -> Tensor:
    """What one writes first."""
    y = F.linear(x, weight) if base is None else base.clone()
    for row, slot in enumerate(index.tolist()):
        if slot >= 0 and isinstance(values, LowRank):
            y[row] += x[row] @ values.down[slot].t() @ values.up[slot].t()
        elif slot >= 0:
            y[row] = x[row] @ values.weight[slot].t()
    return y


class Layer(nn.Module):
    """A model of one linear layer, for PEFT."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.up_proj = nn.Linear(IN, OUT, bias=False, device="meta")
        self.up_proj.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, L, I] to [B, L, O]."""
        return self.up_proj(x)


def _peft(x: Tensor, weight: Tensor, values: LowRank, index: Tensor, wrong) -> list[Rival]:
    try:
        import peft
    except ImportError:
        print("    peft is not installed: left out")
        return []
    config = peft.LoraConfig(target_modules=["up_proj"], r=RANK, lora_alpha=RANK)
    model = peft.get_peft_model(
        Layer(weight), config, adapter_name="edit0", autocast_adapter_dtype=False
    ).eval()
    for slot in range(1, EDITS):
        model.add_adapter(f"edit{slot}", config)
    layer = model.base_model.model.up_proj
    for slot in range(EDITS):
        layer.lora_A[f"edit{slot}"].weight.data = values.down[slot]
        layer.lora_B[f"edit{slot}"].weight.data = values.up[slot]
    names = ["__base__" if slot < 0 else f"edit{slot}" for slot in index.tolist()]
    dtype = str(x.dtype).removeprefix("torch.")
    return [Rival("PEFT LoRA, adapter_names", dtype, lambda: model(x, adapter_names=names), wrong)]


if __name__ == "__main__":
    main()
