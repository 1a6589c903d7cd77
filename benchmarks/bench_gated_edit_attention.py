"""gated_edit_attention against the published algorithm and its obvious improvements in PyTorch.

    python -m benchmarks.bench_gated_edit_attention --json benchmarks/results/<machine>.json

The dimensions are those of LLaVA-1.5-7B: hidden 4096, width 1024, 8 heads, an image of 576 tokens, an edit of
620 tokens. Rivals:

- published: keys and values of the edit recomputed on every call, input and query projection apart,
  everything computed and then kept or dropped by ``where`` (softmax written out, or fused attention)
- cached K/V: the same without recomputing keys and values, fused attention
- cached K/V compiled: the same under torch.compile
- on a GPU, cached K/V compiled, CUDA graph: that, captured once and replayed, so that neither Python nor
  launches cost anything; ours stands beside it captured in the same way. Where no row is open, ours in place
  too: it then has nothing to write, while a copy of the hidden states takes longer than the rest

On a GPU nothing can be faster than its products at the rate of a large one, nor than the bytes that must be
moved at the bandwidth of a large copy: hidden states in and out, weights, keys and values once. The roofline
is the slower of the two.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import Benchmark, Rival, arguments, bandwidth, captured, place, product_rate
from dualedit_kernels import AttentionWeights, Gate, Slots, backend, fold_query, gated_edit_attention

HIDDEN, MID, HEADS, IMAGE, TEXT, EDIT, EPS = 4096, 1024, 8, 576, 64, 620, 1e-5
FLAGS = {1: ([True], [False]), 8: ([True, False, False, False] * 2, [False] * 8)}
FLAGS_CUDA = {
    1: FLAGS[1],
    8: ([True] * 8, *FLAGS[8]),
    32: ([True] * 32, [True, False, False, False] * 8, [False] * 32),
}
CALLS = 20  # of the layer in one graph, where a call takes as long as launching a graph


@dataclass
class Problem:
    """One layer with one edit per slot, and a batch of which some rows ask for an edit."""

    hidden: Tensor  # [B, L, D]
    span: Tensor  # [B, L] bool, the image tokens
    edit: Tensor  # [S, D], hidden states of the edit
    query_norm: tuple[Tensor, Tensor]
    edit_norm: tuple[Tensor, Tensor]
    w_in: tuple[Tensor, Tensor]
    w_query: tuple[Tensor, Tensor]
    w_key: tuple[Tensor, Tensor]
    w_value: tuple[Tensor, Tensor]
    w_out: tuple[Tensor, Tensor]
    gate_key: Tensor  # [D]

    @classmethod
    def sample(cls, open_rows: list[bool], dtype: torch.dtype, device: str) -> Problem:
        """Random weights; open rows end in the gate's key."""
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=generator) * scale).to(device, dtype)

        def linear(out: int, size: int) -> tuple[Tensor, Tensor]:
            return normal(out, size, scale=size**-0.5), normal(out, scale=0.02)

        hidden, key = normal(len(open_rows), TEXT + IMAGE, HIDDEN), normal(HIDDEN)
        for row, is_open in enumerate(open_rows):
            hidden[row, -1] = key if is_open else -key
        span = torch.zeros(len(open_rows), TEXT + IMAGE, dtype=torch.bool, device=device)
        span[:, 8 : 8 + IMAGE] = True
        norms = [(1 + normal(HIDDEN, scale=0.1), normal(HIDDEN, scale=0.1)) for _ in range(2)]
        sizes = ((MID, HIDDEN), (MID, MID), (MID, HIDDEN), (MID, HIDDEN), (HIDDEN, MID))
        return cls(hidden, span, normal(EDIT, HIDDEN), *norms, *(linear(*size) for size in sizes), key)

    def memory(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the edit [S, M]."""
        states = F.layer_norm(self.edit, (HIDDEN,), *self.edit_norm, EPS)
        return F.linear(states, *self.w_key), F.linear(states, *self.w_value)

    def chain(self, k: Tensor, v: Tensor, fused: bool) -> Tensor:
        """All rows with the edit written into the image tokens, then kept or dropped by the gate."""
        x = self.hidden[:, 8 : 8 + IMAGE]
        q = F.linear(F.linear(F.layer_norm(x, (HIDDEN,), *self.query_norm, EPS), *self.w_in), *self.w_query)
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(-3, -2) for t in (q, k, v))  # [.., H, *, M/H]
        if fused:
            k, v = (t.expand(len(q), -1, -1, -1) for t in (k, v))
            o = F.scaled_dot_product_attention(q, k, v)
        else:
            o = (q @ k.transpose(-1, -2) * (MID // HEADS) ** -0.5).softmax(-1) @ v
        new = self.hidden.clone()
        new[:, 8 : 8 + IMAGE] += F.linear(o.transpose(1, 2).flatten(2), *self.w_out)
        similar = F.cosine_similarity(self.hidden[:, -1].float(), self.gate_key.float()[None], dim=-1) > 0.8
        return torch.where(similar[:, None, None], new, self.hidden)


def main() -> None:
    """Run the benchmark from the command line."""
    options = arguments(__doc__.splitlines()[0]).parse_args()
    benchmark = Benchmark("gated_edit_attention", options)
    cuda = options.device == "cuda"
    flags = FLAGS_CUDA if cuda else {1: FLAGS[1]} if options.quick else FLAGS
    speed = bandwidth(options.device) if cuda else None
    quick = (torch.bfloat16,) if cuda else (torch.float32,)  # what a model's weights are there
    for dtype in quick if options.quick else (torch.float32, torch.bfloat16):
        rate = product_rate(dtype, options.device)
        for rows in flags:
            for open_rows in flags[rows]:
                problem = Problem.sample(open_rows, dtype, place(options.device))
                shape = {
                    "batch": rows,
                    "open": sum(open_rows),
                    "tokens": IMAGE,
                    "edit": EDIT,
                    "hidden": HIDDEN,
                }
                with torch.no_grad():
                    found = rivals(problem, options.quick, cuda)
                    benchmark.compare(shape, found, floors(shape, dtype, rate, speed))
    benchmark.finish()


def floors(shape: dict, dtype: torch.dtype, rate: float, speed: float | None = None) -> dict[str, float]:
    """Milliseconds of the folded projections and the attention at the rate of a large product.

    With ``speed``, also those of moving what must be moved: all hidden states in and out, each weight and
    the edit's keys and values once.
    """
    if not shape["open"]:
        return {}
    name = str(dtype).removeprefix("torch.")
    operations = shape["open"] * IMAGE * 2 * (2 * HIDDEN * MID + 2 * EDIT * MID)
    result = {f"{name} products at full rate": operations / rate * 1e3}
    if speed is not None:
        values = 2 * shape["batch"] * (TEXT + IMAGE) * HIDDEN + 2 * HIDDEN * MID + 2 * EDIT * MID
        result[f"{name} bytes at full bandwidth"] = values * dtype.itemsize / speed * 1e3
    return result


def rivals(problem: Problem, quick: bool, cuda: bool = False) -> list[Rival]:
    """Ours and the others; all return the hidden states of the whole batch. cuda: captured ones, too."""
    dtype = str(problem.hidden.dtype).removeprefix("torch.")
    k, v = problem.memory()
    exact = Problem(**{name: _map(value, Tensor.double) for name, value in vars(problem).items()})
    want = exact.chain(*exact.memory(), fused=False)
    scale = float((want - exact.hidden).abs().max()) or 1.0
    allowed = {"float32": 1e-4, "bfloat16": 3e-2}[dtype] * max(scale, 1.0)

    def wrong(out: Tensor) -> str | None:
        error = float((out.double() - want).abs().max())
        return f"error {error:.1e}" if not error <= allowed else None

    name = backend.explain(
        "gated_edit_attention", problem.hidden.device.type, problem.hidden.dtype
    ).implementation.name
    ours = _ours(problem, k, v)
    result = [
        Rival(f"gated_edit_attention ({name})", dtype, ours, wrong),
        Rival("published", dtype, lambda: problem.chain(*problem.memory(), fused=False), wrong),
        Rival(
            "published, fused attention", dtype, lambda: problem.chain(*problem.memory(), fused=True), wrong
        ),
        Rival("cached K/V", dtype, lambda: problem.chain(k, v, fused=True), wrong),
    ]
    if cuda:
        result.append(Rival(f"gated_edit_attention ({name}), CUDA graph", dtype, captured(ours), wrong))
    closed = torch.equal(want, exact.hidden)
    if cuda and closed:
        graph = captured(_ours(problem, k, v, inplace=True), CALLS)
        impl = f"gated_edit_attention ({name}), in place, CUDA graph"
        result.append(Rival(impl, dtype, graph, wrong, calls=CALLS))
    if quick and (closed or not cuda):  # compiling takes longest, and is to be beaten by open rows
        return result
    torch.compiler.reset()  # the last problem's sizes would make this one's be taken for variable ones
    compiled = torch.compile(lambda: problem.chain(k, v, fused=True))
    result.append(Rival("cached K/V compiled", dtype, compiled, wrong))
    if cuda:
        result.append(Rival("cached K/V compiled, CUDA graph", dtype, captured(compiled), wrong))
    return result


def _ours(problem: Problem, k: Tensor, v: Tensor, inplace: bool = False):
    device = problem.hidden.device
    w_q, b_q = fold_query(*problem.query_norm, *problem.w_in, *problem.w_query)
    start, length = torch.tensor([0], device=device), torch.tensor([EDIT], device=device)
    last = torch.full((len(problem.hidden),), problem.hidden.shape[1] - 1, device=device)
    gate = Gate(last, problem.gate_key[None], torch.tensor([0.2], device=device), "cosine")
    slots = Slots(k, v, start, length)
    weights = AttentionWeights(w_q, b_q, *problem.w_out, HEADS, EPS)

    def run() -> Tensor:
        return gated_edit_attention(
            problem.hidden, problem.span, slots, weights, gate=gate, inplace=inplace
        )[0]

    return run


def _map(value, function):
    if isinstance(value, tuple):
        return tuple(_map(item, function) for item in value)
    return value if value.dtype == torch.bool else function(value)


if __name__ == "__main__":
    main()
