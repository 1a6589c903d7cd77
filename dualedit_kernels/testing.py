"""What tests and benchmarks share: error-relative comparison, ties, and samplers of shapes and cases.

An implementation is judged against float64, and its error against the error of plain PyTorch in the same
dtype: ``err <= factor * err_pytorch``. A fixed tolerance would be too loose for one shape and too tight for
the next.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .gated_edit_attention.arguments import AttentionWeights, Slots


def assert_as_exact(
    name: str, actual: Tensor, plain: Tensor, exact: Tensor, factor: float = 2.0, floor: float = 0.0
) -> None:
    """Raise AssertionError unless ``actual`` is within ``factor`` times plain PyTorch's error.

    name: what is compared, e.g. "dq"; it opens the message.
    plain: the reference evaluated in the dtype of ``actual``. exact: the same in float64.
    One rounding of the result itself is always allowed. floor: an error that is allowed in any case.
    """
    if actual.shape != exact.shape:
        raise AssertionError(f"{name}: shape {list(actual.shape)}, expected {list(exact.shape)}")
    if not exact.numel():
        return
    error, allowed = max_error(actual, exact), floor + factor * max_error(plain, exact)
    roundings = 1e3 if actual.dtype == torch.float64 else 1.0  # float64 itself is no judge of float64
    allowed += roundings * torch.finfo(actual.dtype).eps * float(exact.abs().max())
    if not error <= allowed:
        raise AssertionError(
            f"{name}: error {error:.3e} against float64, allowed {allowed:.3e} ({factor} x PyTorch's)"
        )


def rounding_of_sums(length: int, dtype: torch.dtype, magnitude: Tensor) -> float:
    """What sums of ``length`` products may be off by, in whatever order they are added: a floor.

    One order may round less than another by luck, and then the error of plain PyTorch says little about the
    next implementation. Errors of independent roundings grow with the root of their
    number: sqrt(length) * u * sum |a_i b_i|, u half of eps (Higham and Mary, SIAM J. Sci. Comput. 41, 2019).

    magnitude: sum |a_i b_i| of each result, in float64: the reference evaluated on absolute values.
    dtype: of the products; 16-bit ones are added up in fp32.
    """
    unit = torch.finfo(torch.promote_types(dtype, torch.float32)).eps / 2
    return length**0.5 * unit * float(magnitude.abs().max()) if magnitude.numel() else 0.0


def max_error(actual: Tensor, exact: Tensor) -> float:
    """Largest absolute difference, inf if ``actual`` holds a NaN."""
    if not exact.numel():
        return 0.0
    difference = (actual.to(torch.float64) - exact.to(torch.float64)).abs()
    return float(torch.nan_to_num(difference, nan=torch.inf).max())


def exact_distances(query: Tensor, keys: Tensor, metric: str) -> Tensor:
    """All distances [B, N] in float64, without any shortcut."""
    query, keys = query.to(torch.float64), keys.to(torch.float64)
    if metric == "cosine":
        query, keys = (t / torch.linalg.vector_norm(t, dim=-1, keepdim=True) for t in (query, keys))
        return (query[:, None] - keys[None]).square().sum(-1) / 2
    return torch.linalg.vector_norm(query[:, None] - keys[None], dim=-1)


def assert_nearest(
    index: Tensor,
    distance: Tensor,
    query: Tensor,
    keys: Tensor,
    radius: Tensor,
    metric: str,
    rtol: float = 1e-5,
) -> None:
    """Raise AssertionError unless (index, distance) is a right answer of `nearest_key`.

    Where float64 itself sees two keys within ``rtol`` either may win, and a distance within ``rtol`` of the
    radius may fall on either side; everything else must agree.
    """
    every = exact_distances(query, keys, metric)
    best, nearest = every.min(1)
    slack = best * rtol + (1e-7 if metric == "cosine" else 0.0)
    wrong = (distance.to(torch.float64) - best).abs() > slack
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise AssertionError(
            f"distance[{row}] is {float(distance[row])!r}, float64 says {float(best[row])!r}"
        )
    for row, (got, want) in enumerate(zip(index.tolist(), nearest.tolist(), strict=True)):
        edge = abs(float(best[row]) - float(radius[want])) <= float(slack[row]) + 1e-6 * float(radius[want])
        if got < 0:
            right = edge or float(best[row]) > float(radius[want])
        else:
            tie = float(every[row, got] - best[row]) <= 2 * float(slack[row])
            right = tie and (edge or got != want or float(best[row]) <= float(radius[want]))
        if not right:
            raise AssertionError(
                f"index[{row}] is {got}, float64 says nearest {want} at {float(best[row])!r},"
                f" radius {float(radius[want])!r}"
            )


@dataclass(frozen=True)
class AttentionCase:
    """Inputs of one gated edit attention."""

    hidden: Tensor
    span: Tensor
    route: Tensor
    k: Tensor
    v: Tensor
    start: Tensor
    length: Tensor
    w_q: Tensor
    b_q: Tensor
    w_o: Tensor
    b_o: Tensor
    num_heads: int
    eps: float = 1e-5

    DIFFERENTIABLE = ("hidden", "k", "v", "w_q", "b_q", "w_o", "b_o")

    def to(self, dtype: torch.dtype) -> AttentionCase:
        """The same case with its floating tensors in ``dtype``, detached."""
        return replace(self, **{name: getattr(self, name).detach().to(dtype) for name in self.DIFFERENTIABLE})

    def require_grad(self) -> AttentionCase:
        """Make every differentiable tensor a leaf that records gradients."""
        for name in self.DIFFERENTIABLE:
            getattr(self, name).requires_grad_(True)
        return self

    def with_tensors(self, *tensors: Tensor) -> AttentionCase:
        """The same case with other differentiable tensors, in the order of `DIFFERENTIABLE`."""
        return replace(self, **dict(zip(self.DIFFERENTIABLE, tensors, strict=True)))

    def args(self) -> tuple:
        """Arguments of the registered operator, in its order (after hidden: span, route, k, ...)."""
        return tuple(getattr(self, name) for name in self.__dataclass_fields__)

    def public(self) -> dict[str, object]:
        """Keyword arguments of the public function and of the reference, routed by ``route``."""
        slots = Slots(self.k, self.v, self.start, self.length)
        weights = AttentionWeights(self.w_q, self.b_q, self.w_o, self.b_o, self.num_heads, self.eps)
        return {
            "hidden": self.hidden,
            "span": self.span,
            "route": self.route,
            "slots": slots,
            "weights": weights,
        }


def attention_case(
    generator: torch.Generator,
    rows: int,
    tokens: int,
    dim: int,
    mid: int,
    num_heads: int,
    lengths: list[int],
    route: list[int],
    span: Tensor | float = 0.6,
) -> AttentionCase:
    """A random case in float64; ``span`` is a mask [rows, tokens] or the share of tokens that are in it."""

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale

    length = torch.tensor(lengths, dtype=torch.int64)
    if not isinstance(span, Tensor):
        span = torch.rand(rows, tokens, generator=generator) < span
    return AttentionCase(
        hidden=normal(rows, tokens, dim) * 2 + 0.5,
        span=span,
        route=torch.tensor(route, dtype=torch.int64),
        k=normal(int(length.sum()), mid),
        v=normal(int(length.sum()), mid),
        start=length.cumsum(0) - length,
        length=length,
        w_q=normal(mid, dim, scale=dim**-0.5),
        b_q=normal(mid, scale=0.1),
        w_o=normal(dim, mid, scale=mid**-0.5),
        b_o=normal(dim, scale=0.1),
        num_heads=num_heads,
    )


def sample_shape(generator: torch.Generator) -> dict[str, int]:
    """A random odd shape for an attention case: rows, tokens, dim, mid, num_heads, slots."""

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    heads = pick(1, 4)
    return {
        "rows": pick(1, 7),
        "tokens": pick(1, 40),
        "dim": pick(1, 70),
        "mid": heads * pick(1, 17),
        "num_heads": heads,
        "slots": pick(1, 5),
    }


def mend_interpreter() -> None:
    """Give Triton's interpreter, in this process, the product and the rounding of bf16 that a GPU has.

    It keeps bf16 as the integers of its bits. Three of its operations are then silently wrong:

    - ``tl.dot`` multiplies the bits as integers: mended, the operands are widened first;
    - a cast of fp32 to bf16 cuts off where the GPU rounds to nearest even: mended;
    - arithmetic on bf16 values works on the bits: not mended, kernels convert with ``.to(tl.float32)`` first.
    """
    from triton import language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def create_dot(self, a, b, *rest):
        a, b = (self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(self, a, b, *rest)

    def cast_impl(self, source, target):
        if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
            rounded = torch.from_numpy(source.data.copy(order="C")).to(torch.bfloat16)
            return TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)
        return cast(self, source, target)

    InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl = create_dot, cast_impl
