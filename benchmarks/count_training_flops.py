"""FLOPs of a training step of DualEdit's adapters at LLaVA-1.5-7B's shapes, against the published procedure.

    python -m benchmarks.count_training_flops --json benchmarks/results/training-flops.json

Counted by `torch.utils.flop_counter`, forward and backward, for one edit with its five questions (the
paper's losses), images of 576 tokens, adapters of the paper's size at layers 16 and 19 of 32. Products are
counted and not computed, so the real model's shapes need neither its weights nor its memory. That both ways
give the same losses and gradients is what `benchmarks.bench_training` checks. Rows:

- published: the published procedure written plainly, see `benchmarks.bench_training`
- published, from stored states: the same, with the layers up to the first edited one taken from the disk, as
  the released code does
- dualedit: a step as `dualedit train` takes it; each question's frozen part runs once
- dualedit, kept: a step on questions that came before, with `keep_gib`
- dualedit, the whole run: the mean over the paper's 50,000 steps of 4 edits on E-VQA's 6,346, each of which
  is new once, with all of them kept
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from dualedit.runtime.partial import leaving
from dualedit.toy.model import IMAGE, build_tokenizer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.bench_training import LOSSES, PATCH, Problem, Size, build
from benchmarks.common import machine

LLAVA_7B = Size(4096, 32, 32, 11_008, 32_064, 1024, 24, 16, 16, 19)
# The paper's run, and the training edits of E-VQA.
STEPS, EDITS_A_STEP, EDITS = 50_000, 4, 6_346
_PRODUCTS = {
    torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default,
    torch.ops.aten.baddbmm.default, torch.ops.aten.convolution.default,
}  # fmt: skip
# Elements of a tensor from which on its values are not kept for the backward pass.
_LARGE = 1 << 16


class WithoutProducts(TorchDispatchMode):
    """Inside it matrix products and convolutions give zeros of the right shape."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if func not in _PRODUCTS:
            return func(*args, **(kwargs or {}))
        on_meta = [each.to("meta") if isinstance(each, Tensor) else each for each in args]
        shape = func(*on_meta, **(kwargs or {})).shape
        return next(each for each in args if isinstance(each, Tensor)).new_zeros(shape)


def _gate_flops(span: Tensor, route: Tensor, k: Tensor, length: Tensor, w_q: Tensor) -> tuple[int, int]:
    """Of `gated_edit_attention`: one projection of all written tokens, and one product with all keys."""
    size, dim = w_q.shape
    project = attend = 0
    for row, edit in zip(span, route.tolist(), strict=True):
        if edit >= 0:
            tokens = int(row.sum())
            project += 2 * tokens * dim * size
            attend += 2 * tokens * int(length[edit]) * size
    return project, attend


def _forward_flops(hidden, span, route, k, v, start, length, w_q, *rest, out_val=None, **_) -> int:
    project, attend = _gate_flops(span, route, k, length, w_q)
    return 2 * project + 2 * attend  # in and out; scores and values


def _backward_flops(grad, hidden, span, route, k, v, start, length, w_q, *rest, out_val=None, **_) -> int:
    project, attend = _gate_flops(span, route, k, length, w_q)
    return 4 * project + 4 * attend + project + 2 * attend  # what the forward has not kept is made again


def _formulas() -> dict[Any, Callable[..., int]]:
    operators = torch.ops.dualedit_kernels
    found = {
        operators.gated_edit_attention: _forward_flops,
        operators.gated_edit_attention_backward: _backward_flops,
    }
    for formula in found.values():
        formula._get_raw = True  # tensors, not their shapes
    return found


@contextmanager
def counting() -> Iterator[FlopCounterMode]:
    """Inside the block, FLOPs are counted; next to nothing is computed and next to nothing is kept."""

    def keep(tensor: Tensor) -> Any:
        large = tensor.is_floating_point() and tensor.numel() > _LARGE
        return (tensor.dtype, tensor.shape) if large else tensor

    def give_back(kept: Any) -> Tensor:
        return kept if isinstance(kept, Tensor) else torch.zeros((), dtype=kept[0]).expand(kept[1])

    counter = FlopCounterMode(display=False, custom_mapping=_formulas())
    with torch.autograd.graph.saved_tensors_hooks(keep, give_back), WithoutProducts(), counter:
        yield counter


def without_weights(size: Size, side: int) -> nn.Module:
    """A model whose weights take no memory: each is one number, seen in the right shape."""
    with init_empty_weights(include_buffers=False):
        model = build(size, side, build_tokenizer().convert_tokens_to_ids(IMAGE))
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                value = torch.full((), 0.01).expand(parameter.shape)
                module._parameters[name] = nn.Parameter(value, requires_grad=False)
    return model


def flops(size: Size, side: int) -> tuple[dict[str, float], int]:
    """FLOPs of one edit's step, by who takes it; and bytes that keeping its frozen part takes, in fp32."""
    problem = Problem(size, (without_weights(size, side), without_weights(size, side)), side, 1)
    problem.fused(False)  # its products are counted where they are written out
    found: dict[str, float] = {}
    with counting() as counter, torch.no_grad():
        problem.published.read_edits()
    total = counter.get_total_flops()
    for term in LOSSES:
        with counting() as counter:
            problem.published.loss(term).backward()
        total += counter.get_total_flops()
    found["published"] = total
    found["published, from stored states"] = total - lower_flops(problem, size)
    for name, batch in (("dualedit", "packed"), ("first", "kept"), ("dualedit, kept", "kept")):
        with counting() as counter:
            problem.ours(problem.batches[batch])[:5].sum().backward()
        found[name] = counter.get_total_flops()
    new = EDITS / (STEPS * EDITS_A_STEP)
    found["dualedit, the whole run"] = new * found.pop("first") + (1 - new) * found["dualedit, kept"]
    return found, problem.ours.frozen.kept_bytes


def lower_flops(problem: Problem, size: Size) -> int:
    """Of the published step: tower and layers up to the first edited one, in all of its forwards."""
    published, total = problem.published, 0
    layers = published.base.model.language_model.layers
    for term, inputs in published.terms.items():
        runs = {"reliability": 2, "text_locality": 2, "image_locality": 2}.get(term, 1)
        call = {name: value for name, value in inputs.items() if name != "labels"}
        with counting() as counter, torch.no_grad(), leaving(layers[size.text_layer]):
            published.base(**call, use_cache=False)
        total += runs * counter.get_total_flops()
    return total


def table(found: dict[str, float]) -> str:
    """A Markdown table."""
    lines = ["| a step for one edit | TFLOPs | published / this |", "|---|---:|---:|"]
    for name, value in found.items():
        lines.append(f"| {name} | {value / 1e12:.1f} | {found['published'] / value:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Count, print a table, write it to a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--side", type=int, default=336, help="of an image, in pixels")
    options = parser.parse_args()
    found, kept = flops(LLAVA_7B, options.side)
    kept_gib = kept / 2 * EDITS / 2**30  # in bf16
    print(table(found))
    print(f"keeping what the frozen layers make of {EDITS} edits, in bf16: {kept_gib:.0f} GiB")
    if options.json is not None:
        shape = {**vars(LLAVA_7B), "image_tokens": (options.side // PATCH) ** 2, "edits": 1}
        versions = {name: value for name, value in machine().items() if name in ("torch", "python")}
        content = {"machine": versions, "shape": shape, "flops": found, "kept_gib": kept_gib}
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
